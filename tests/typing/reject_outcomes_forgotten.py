"""A runner that forgets how a fault can end: the vCPU would go on after an error."""

from typing import assert_never

from kvmfault import Emulate, Error, Exit, Fixed, Inject, Outcome, Resume, Retry, Spurious, WriteProtected


def goes_on(outcome: Outcome) -> bool:
    match outcome:
        case Fixed() | Spurious() | Retry() | Resume() | Inject() | Emulate() | WriteProtected():
            return True
        case Error() | Exit():
            return False
        case _:
            assert_never(outcome)  # error: incompatible type "NeedsGuestWalk"; expected "Never"
