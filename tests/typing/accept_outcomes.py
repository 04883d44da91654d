"""Every outcome handled; a new kind of outcome would be refused here."""

from typing import assert_never

from kvmfault import (
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    NeedsGuestWalk,
    Outcome,
    Resume,
    Retry,
    Spurious,
    WriteProtected,
)


def goes_on(outcome: Outcome) -> bool:
    match outcome:
        case Fixed() | Spurious() | Retry() | Resume() | Inject() | Emulate() | WriteProtected():
            return True
        case Exit(reason=reason, errno=errno):
            return not errno and reason.value < 0
        case Error() | NeedsGuestWalk():
            return False
        case _:
            assert_never(outcome)
