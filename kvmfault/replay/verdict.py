"""Whether the recording bears out what the model decided for a fault."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EFAULT, errorcode

from kvmfault.contract.format import size_text
from kvmfault.contract.outcome import (
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    MmioAccess,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Resume,
    Retry,
    Spurious,
    UndecodedMmio,
    WriteProtected,
)

__all__ = ["Evidence", "Unexplained", "judge", "outcome_text"]


@dataclass(frozen=True, slots=True)
class Unexplained:
    """The model's outcome contradicts the recording."""

    line: int
    outcome: Outcome
    why: str


@dataclass(slots=True)
class Evidence:
    """What the recording shows between a fault and the vCPU's next entry."""

    device: bool = False
    """A device access to the faulting page."""
    undecoded: bool = False
    """... that the syndrome did not describe."""
    errno: int = 0
    """KVM_RUN returned this error."""
    gave_up: bool = False
    """KVM_RUN returned because the emulator failed."""
    ended: bool = True
    """The next entry or exit of the vCPU was recorded: absence of evidence means something."""


def judge(line: int, outcome: Outcome, seen: Evidence) -> Unexplained | None:
    """Compare one outcome with its evidence; None: they agree, or the recording cannot tell."""
    match outcome:
        case Exit(Reason.MMIO, MmioAccess()) | Resume() | Emulate():
            if not seen.device and not seen.gave_up and seen.ended:
                return Unexplained(line, outcome, "the model has a device access, the recording shows none")
        case Exit(Reason.UNDECODED_MMIO, UndecodedMmio()):
            if not seen.undecoded and seen.ended:
                return Unexplained(line, outcome, "the model has an undecoded access, the recording shows none")
        case Error(errno):
            if seen.errno != errno and not seen.undecoded:
                name = errorcode.get(errno, str(errno))
                return Unexplained(line, outcome, f"the model fails with {name}, the recording does not show it")
        case Fixed() | Spurious() | WriteProtected():
            if seen.device or seen.undecoded:
                return Unexplained(line, outcome, "the model finds memory, the recording shows a device access")
            if seen.errno == EFAULT:
                return Unexplained(line, outcome, "the model finds memory, KVM_RUN failed with EFAULT")
        case Exit(_, _, errno):
            if errno and seen.errno != errno:
                return Unexplained(line, outcome, "the model leaves with an error, the recording does not show it")
        case Retry():
            if seen.device or seen.undecoded:
                return Unexplained(line, outcome, "the model retries, the recording shows a device access")
        case Inject() | NeedsGuestWalk():
            pass  # leave no trace event of their own
    return None


def outcome_text(outcome: Outcome) -> str:
    """An outcome in a few words, for counting."""
    match outcome:
        case Fixed(size, prot):
            return f"fixed {size_text(size)} {prot}"
        case Exit(reason, _, errno):
            return f"exit {reason}" + (f", {errorcode.get(errno, errno)}" if errno else "")
        case Resume(done):
            return f"resume, {done.name.lower()}"
        case Error(errno):
            return f"error {errorcode.get(errno, errno)}"
        case Inject(what):
            return f"inject {what}"
        case WriteProtected():
            return "write-protected"
        case NeedsGuestWalk():
            return "needs guest walk"
        case Spurious() | Retry() | Emulate():
            return type(outcome).__name__.lower()
