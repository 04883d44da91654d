"""How a fault ends. Each outcome is a value; ``why`` is one sentence for people and takes no part in equality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import TypeAlias

from kvmfault.contract.format import PROTS, Prot
from kvmfault.types import Gpa, Hva

__all__ = [
    "Completion",
    "Done",
    "Emulate",
    "Error",
    "Exit",
    "ExternalAbort",
    "Fixed",
    "Inject",
    "MemoryFault",
    "MmioAccess",
    "NeedsGuestWalk",
    "Outcome",
    "Reason",
    "Resume",
    "Retry",
    "Signal",
    "Spurious",
    "UndecodedMmio",
    "WriteProtected",
    "fixed",
]


@dataclass(frozen=True, slots=True)
class Fixed:
    """An entry was installed or repaired. *size* in bytes."""

    size: int
    prot: Prot
    why: str = field(default="", compare=False)


@cache
def fixed(size: int, prot: int) -> Fixed:
    """The Fixed of a size and R/W/X bits. Few exist, and making one anew takes a tenth of the whole path."""
    return Fixed(size, PROTS[prot])


@dataclass(frozen=True, slots=True)
class Spurious:
    """The entry already allowed the access: another vCPU fixed it, or the TLB was stale."""

    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Retry:
    """Nothing was decided; the guest (or the caller) tries again. *signal*: a SIGBUS was queued for the VMM.
    *waits*: it is no use before user space has supplied the page (userfaultfd)."""

    why: str = field(default="", compare=False)
    signal: Signal | None = None
    waits: bool = False


@dataclass(frozen=True, slots=True)
class WriteProtected:
    """The frame may not be made writable here; the access is emulated or the protection lifted."""

    why: str = field(default="", compare=False)


class Done(Enum):
    """What was done instead of mapping, when the guest simply resumes."""

    CLAIMED = "the abort was claimed by the host's error handling"
    SKIPPED = "the instruction was skipped"
    BUS = "a device inside the kernel took the access"
    SIGNALLED = "the process got a signal"
    EMULATED = "the instruction was emulated"


@dataclass(frozen=True, slots=True)
class Resume:
    """The guest goes on, nothing mapped. Where a bus device took the access, *completion* finishes it with *value*."""

    done: Done
    why: str = field(default="", compare=False)
    signal: Signal | None = None
    completion: Completion | None = field(default=None, compare=False)
    value: int = 0
    """BUS: what the device gave for a load."""


@dataclass(frozen=True, slots=True)
class Signal:
    """SIGBUS with BUS_MCEERR_AR: the address and log2 of the span that is lost."""

    hva: Hva
    lsb: int


@dataclass(frozen=True, slots=True)
class Emulate:
    """The instruction has to be emulated. *private*: the access was to private memory, which cannot be."""

    private: bool = False
    allow_retry: bool = False
    """The emulator may unprotect the page and retry instead (EMULTYPE_ALLOW_RETRY_PF)."""
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class MmioAccess:
    """A decoded device access, as kvm_run.mmio has it. *data*: bytes of a store in the guest's byte order."""

    gpa: Gpa
    size: int
    is_write: bool
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Completion:
    """What finishing an MMIO access needs, taken from the fault: by then the fault registers may hold another one.

    ``finish(bus_value)`` gives the value for the register, or None for a store or the zero register.
    """

    access: MmioAccess
    register: int
    sign_extend: bool
    wide: bool
    convert: Callable[[Completion, int], int] = field(repr=False)
    """How this architecture and kernel turn *size* bytes from the bus into a register value."""
    zero_register: int = 31
    """Number of the register that drops what is written (``Backend.zero_register``)."""

    def finish(self, bus_value: int) -> int | None:
        """Value to write to ``register``; None: nothing is written. *bus_value* as read, little-endian.

        Kernel: kvm_handle_mmio_return.
        """
        if self.access.is_write or self.register == self.zero_register:
            return None
        return self.convert(self, bus_value & ((1 << 8 * self.access.size) - 1))


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """kvm_run.memory_fault."""

    gpa: Gpa
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class UndecodedMmio:
    """An MMIO access that the syndrome does not describe: sanitised syndrome and full address for the VMM."""

    syndrome: int
    gpa: Gpa


@dataclass(frozen=True, slots=True)
class ExternalAbort:
    """An external abort left to the VMM: the syndrome without what only the host may know, the addresses if known."""

    syndrome: int
    gva: int = 0
    gpa: Gpa | None = None


class Reason(Enum):
    """Why KVM_RUN returns; the value is KVM_EXIT_* in the UAPI."""

    MMIO = 6
    INTR = 10
    INTERNAL_ERROR = 17
    UNDECODED_MMIO = 28
    DIRTY_RING_FULL = 31
    MEMORY_FAULT = 39
    EXTERNAL_ABORT = 41
    WIDE_MMIO = 42

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Exit:
    """KVM_RUN returns to the VMM: with 0, or with -errno where *errno* is not 0."""

    reason: Reason
    detail: MmioAccess | MemoryFault | UndecodedMmio | ExternalAbort | None = None
    errno: int = 0
    completion: Completion | None = field(default=None, compare=False)
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Inject:
    """An exception is delivered to the guest. *what* names it; *errno*: KVM_RUN fails as well."""

    what: str
    address: int
    syndrome: int = 0
    errno: int = 0
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Error:
    """KVM_RUN fails with -errno and no exit reason."""

    errno: int
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class NeedsGuestWalk:
    """A shadow fault: the address is virtual and the guest's tables were not given."""

    why: str = field(default="", compare=False)


Outcome: TypeAlias = (
    Fixed | Spurious | Retry | WriteProtected | Resume | Emulate | Exit | Inject | Error | NeedsGuestWalk
)
