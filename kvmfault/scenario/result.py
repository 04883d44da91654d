"""What an event did, in words that mean the same on every backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvmfault.contract.outcome import (
    Done,
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    MemoryFault,
    MmioAccess,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Resume,
    Retry,
    Signal,
    Spurious,
    UndecodedMmio,
    WriteProtected,
)
from kvmfault.machine.guest import AccessRun, Ended
from kvmfault.path.lookup import PRIVATE_FLAG, USERFAULT_FLAG
from kvmfault.path.run import Run
from kvmfault.scenario.expectation import Kind

__all__ = ["FaultShown", "Leaf", "Left", "Result", "access_kind", "kind_of", "left", "shown", "signal_of"]

_EXITS: Final = {
    Reason.MMIO: Kind.MMIO,
    Reason.UNDECODED_MMIO: Kind.UNDECODED,
    Reason.MEMORY_FAULT: Kind.MEMORY_FAULT,
    Reason.DIRTY_RING_FULL: Kind.RING_FULL,
    Reason.INTERNAL_ERROR: Kind.INTERNAL_ERROR,
    Reason.INTR: Kind.INTERRUPTED,
    Reason.EXTERNAL_ABORT: Kind.EXTERNAL_ABORT,
    Reason.WIDE_MMIO: Kind.WIDE_MMIO,
}
_RESUMED: Final = {
    Done.CLAIMED: Kind.CLAIMED,
    Done.SKIPPED: Kind.SKIPPED,
    Done.BUS: Kind.BUS,
    Done.SIGNALLED: Kind.SIGBUS,
    Done.EMULATED: Kind.MEMORY,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """One return to the VMM. Members that this kind of exit does not have are None."""

    kind: Kind
    errno: int = 0
    gpa: int | None = None
    size: int | None = None
    write: bool | None = None
    data: str | None = None
    """Bytes in hexadecimal."""
    private: bool | None = None
    userfault: bool | None = None


@dataclass(frozen=True, slots=True)
class FaultShown:
    """One fault of an event: its neutral outcome, the step that decided and why."""

    outcome: Kind
    step: str
    because: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """The entry over an address."""

    size: int
    prot: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One event on one target. The members up to ``violates`` are what guest, VMM and host notice of it."""

    outcome: Kind
    errno: int = 0
    rule: str | None = None
    exits: tuple[Left, ...] = ()
    loaded: int | None = None
    lost: int | None = None
    pages: tuple[tuple[int, int], ...] | None = None
    """Runs of dirty pages, first and last."""
    ring: tuple[tuple[int, int], ...] | None = None
    """Entries of a dirty ring, (slot, page)."""
    count: int | None = None
    young: bool | None = None
    left: int | None = None
    stale: bool = False
    """The access reached a frame that is not the memory's any more."""
    violates: Mapping[str, str] = field(default_factory=dict)
    """Invariants that broke, with what breaks them."""

    frame: str | None = None
    leaf: Leaf | None = None
    """The entry over the event's address afterwards."""
    faults: tuple[FaultShown, ...] = ()
    flushed: bool = False
    counters: Mapping[str, int] = field(default_factory=dict)

    @property
    def visible(self) -> tuple[object, ...]:
        """What has to be equal on every target unless a difference is declared."""
        noticed = (self.loaded, self.lost, self.pages, self.ring, self.count, self.young, self.left, self.stale)
        return self.outcome, self.errno, self.exits, *noticed, tuple(sorted(self.violates))


def left(exit_: Exit) -> Left:
    """A return to the VMM."""
    kind = _EXITS[exit_.reason]
    match exit_.detail:
        case MmioAccess(gpa, size, is_write, data):
            return Left(kind=kind, errno=exit_.errno, gpa=gpa, size=size, write=is_write, data=data.hex(" "))
        case MemoryFault(gpa, size, flags):
            return Left(
                kind=kind,
                errno=exit_.errno,
                gpa=gpa,
                size=size,
                private=bool(flags & PRIVATE_FLAG),
                userfault=bool(flags & USERFAULT_FLAG),
            )
        case UndecodedMmio(_, gpa):
            return Left(kind=kind, errno=exit_.errno, gpa=gpa)
        case _:
            return Left(kind=kind, errno=exit_.errno)


def kind_of(outcome: Outcome) -> tuple[Kind, int]:
    """The neutral word for how one fault ended, and the errno that KVM_RUN returns."""
    match outcome:
        case Fixed():
            return Kind.MAPPED, 0
        case Spurious():
            return Kind.SPURIOUS, 0
        case Retry(signal=Signal()):
            return Kind.SIGBUS, 0
        case Retry():
            return (Kind.WAITS if outcome.waits else Kind.RETRY), 0
        case WriteProtected():
            return Kind.WRITE_PROTECTED, 0
        case Resume(done):
            return _RESUMED[done], 0
        case Emulate():
            return Kind.EMULATE, 0
        case Exit(reason, _, errno):
            return _EXITS[reason], errno
        case Inject(errno=errno):
            return Kind.INJECTED, errno
        case Error(errno):
            return Kind.ERROR, errno
        case NeedsGuestWalk():
            return Kind.UNTRANSLATED, 0


def signal_of(faults: Iterable[Run]) -> Signal | None:
    """The last SIGBUS that faults queued."""
    signals = (getattr(run.outcome, "signal", None) for run in faults)
    return next((s for s in reversed(list(signals)) if isinstance(s, Signal)), None)


def access_kind(run: AccessRun, *, device: bool) -> tuple[Kind, int]:
    """How an access ended, and the errno of KVM_RUN. *device*: one inside the kernel serves the address."""
    last = run.outcome
    match run.ended:
        case Ended.WAITS:
            return Kind.WAITS, 0
        case Ended.STUCK:
            return Kind.STUCK, 0
        case Ended.SIGNALLED:
            return Kind.SIGBUS, 0
        case Ended.DONE if not run.exits and not isinstance(last, Resume):
            return (Kind.BUS if isinstance(last, Emulate) and device else Kind.MEMORY), 0
        case _:
            return kind_of(last) if last is not None else (Kind.MEMORY, 0)


def shown(run: Run) -> FaultShown:
    """A fault of an event, with what decided it."""
    decided = [step for step in run.steps if step.outcome is not None]
    kind, _ = kind_of(run.outcome)
    return FaultShown(kind, decided[0].name if decided else "", "; then ".join(step.because for step in decided))
