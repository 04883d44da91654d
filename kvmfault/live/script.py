"""Operations that a script performs on a KVM, real or modelled, and what a KVM answers.

A script is a sequence of operations with every number given: the same one runs on any ``Kvm``. Host memory is one pool
at a fixed address, so that user addresses are the same too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from errno import errorcode
from typing import Final, Protocol, TypeAlias

from kvmfault.contract.live import GuestAccess
from kvmfault.contract.outcome import Error, Exit, MemoryFault, MmioAccess, UndecodedMmio
from kvmfault.types import Hva
from kvmfault.vm.memslot_request import MemslotRequest

__all__ = [
    "POOL",
    "POOL_SIZE",
    "Access",
    "Answer",
    "ClearDirtyLog",
    "CreateMemfd",
    "DirtyRing",
    "GetDirtyLog",
    "HarvestRing",
    "Host",
    "HostAction",
    "Kvm",
    "ManualProtect",
    "Operation",
    "Prefault",
    "ResetRings",
    "SetAttributes",
    "SetRegion",
    "exit_text",
    "guards",
    "log_bytes",
    "perform",
]

POOL: Final = Hva(1 << 44)
"""Where the pool of host memory begins: far from where Linux puts anything by itself."""
POOL_SIZE: Final = 8 << 20
_BLOCK: Final = 2 << 20


def guards(page: int) -> range:
    """The last page of each block of the pool, which is never mapped.

    Where Linux splits an area that covers a whole huge page, it invalidates all of that, huge or not
    (split_huge_pmd_address); between guards no area does, and a change invalidates its own pages only.
    """
    return range(POOL + _BLOCK - page, POOL + POOL_SIZE, _BLOCK)


class HostAction(Enum):
    """What the VMM's process does with host memory."""

    MAP = "map"
    """New memory, present and writable."""
    UNMAP = "unmap"
    READ_ONLY = "make read-only"
    NO_ACCESS = "make inaccessible"
    WRITABLE = "make writable"
    STORE = "store to"
    """One byte in each page."""
    DISCARD = "discard"
    """The content goes: until the next store, loads find the shared page of zeros, which is no code."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation gave. Unused members keep their defaults, so that answers of one operation compare whole."""

    errno: int = 0
    """0, or a positive errno."""
    pages: tuple[int, ...] = ()
    """GET_DIRTY_LOG: pages of the slot, rising."""
    ring: tuple[tuple[int, int], ...] = ()
    """Entries of the dirty ring as (slot, page of the slot), in order."""
    reset: int = 0
    """Entries that a reset of the rings took."""
    exits: tuple[Exit | Error, ...] = ()
    """What KVM_RUN returned until the access was done or could not be done."""
    rest: tuple[int, int] | None = None
    """PRE_FAULT_MEMORY: (gpa, size) as they are afterwards."""

    def __str__(self) -> str:
        parts = [errorcode.get(self.errno, str(self.errno)) if self.errno else "ok"]
        if self.pages:
            parts.append(f"pages {_ranges(self.pages)}")
        if self.ring:
            parts.append("ring " + " ".join(f"{slot:#x}:{page}" for slot, page in self.ring))
        if self.reset:
            parts.append(f"{self.reset} reset")
        if self.rest is not None:
            parts.append(f"rest gpa {self.rest[0]:#x} size {self.rest[1]:#x}")
        return ", ".join([*parts, *map(exit_text, self.exits)])


class Kvm(Protocol):
    """A VM with one vCPU: each method is an operation. None raises for what KVM refuses: the answer has the errno."""

    def set_region(self, request: MemslotRequest) -> Answer:
        """KVM_SET_USER_MEMORY_REGION or _REGION2."""
        ...

    def get_dirty_log(self, slot: int, *, bad_pointer: bool = False) -> Answer:
        """KVM_GET_DIRTY_LOG; *slot* has the address space in its upper 16 bits."""
        ...

    def clear_dirty_log(self, slot: int, first: int, count: int, bits: int) -> Answer:
        """KVM_CLEAR_DIRTY_LOG of *count* pages from *first*; bit n of *bits* stands for page *first* + n."""
        ...

    def manual_protect(self, flags: int) -> Answer:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""
        ...

    def dirty_ring(self, size: int) -> Answer:
        """KVM_CAP_DIRTY_LOG_RING_ACQ_REL; *size* in bytes. Before the first access: a vCPU is born with its ring."""
        ...

    def harvest_ring(self) -> Answer:
        """Collect what the vCPU's ring holds."""
        ...

    def reset_rings(self) -> Answer:
        """KVM_RESET_DIRTY_RINGS."""
        ...

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int) -> Answer:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        ...

    def create_memfd(self, fd: int, size: int, flags: int) -> Answer:
        """KVM_CREATE_GUEST_MEMFD. *fd* is the name by which requests of the script call the file."""
        ...

    def prefault(self, gpa: int, size: int, flags: int) -> Answer:
        """KVM_PRE_FAULT_MEMORY."""
        ...

    def host(self, action: HostAction, hva: int, size: int) -> Answer:
        """The process changes memory of its own: whole pages of the pool, no guards. What is impossible is not done."""
        ...

    def access(self, access: GuestAccess) -> Answer:
        """The guest performs one access; device loads give zeros. Ends when it is done, or KVM_RUN gives an error."""
        ...


class _Operation:
    # the text of an operation: its words, and what was given that is not the default
    __slots__ = ()

    def __str__(self) -> str:
        words = [re.sub(r"(?<!^)([A-Z])", r" \1", type(self).__name__).lower()]
        return " ".join(words + [f"{name} {_text(value)}" for name, value in _members(self)])


def _members(value: object) -> Iterator[tuple[str, object]]:
    # the fields of a dataclass and of those within it, without those that have their default
    for f in fields(value):  # type: ignore[arg-type]  # every operation is a dataclass
        member = getattr(value, f.name)
        if is_dataclass(member):
            yield from _members(member)
        elif member != f.default:
            yield f.name, member


def _text(value: object) -> str:
    return value.value if isinstance(value, Enum) else hex(value) if isinstance(value, int) else str(value)


@dataclass(frozen=True, slots=True)
class SetRegion(_Operation):
    """See Kvm.set_region."""

    request: MemslotRequest


@dataclass(frozen=True, slots=True)
class GetDirtyLog(_Operation):
    """See Kvm.get_dirty_log."""

    slot: int
    bad_pointer: bool = False


@dataclass(frozen=True, slots=True)
class ClearDirtyLog(_Operation):
    """See Kvm.clear_dirty_log."""

    slot: int
    first: int
    count: int
    bits: int


@dataclass(frozen=True, slots=True)
class ManualProtect(_Operation):
    """See Kvm.manual_protect."""

    flags: int


@dataclass(frozen=True, slots=True)
class DirtyRing(_Operation):
    """See Kvm.dirty_ring."""

    size: int


@dataclass(frozen=True, slots=True)
class HarvestRing(_Operation):
    """See Kvm.harvest_ring."""


@dataclass(frozen=True, slots=True)
class ResetRings(_Operation):
    """See Kvm.reset_rings."""


@dataclass(frozen=True, slots=True)
class SetAttributes(_Operation):
    """See Kvm.set_attributes."""

    gpa: int
    size: int
    attributes: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class CreateMemfd(_Operation):
    """See Kvm.create_memfd."""

    fd: int
    size: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Prefault(_Operation):
    """See Kvm.prefault."""

    gpa: int
    size: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Host(_Operation):
    """See Kvm.host."""

    action: HostAction
    hva: int
    size: int


@dataclass(frozen=True, slots=True)
class Access(_Operation):
    """See Kvm.access."""

    access: GuestAccess


Operation: TypeAlias = (
    SetRegion
    | GetDirtyLog
    | ClearDirtyLog
    | ManualProtect
    | DirtyRing
    | HarvestRing
    | ResetRings
    | SetAttributes
    | CreateMemfd
    | Prefault
    | Host
    | Access
)


def perform(kvm: Kvm, operation: Operation) -> Answer:
    """What *kvm* answers to *operation*."""
    match operation:
        case SetRegion(request):
            return kvm.set_region(request)
        case GetDirtyLog(slot, bad_pointer):
            return kvm.get_dirty_log(slot, bad_pointer=bad_pointer)
        case ClearDirtyLog(slot, first, count, bits):
            return kvm.clear_dirty_log(slot, first, count, bits)
        case ManualProtect(flags):
            return kvm.manual_protect(flags)
        case DirtyRing(size):
            return kvm.dirty_ring(size)
        case HarvestRing():
            return kvm.harvest_ring()
        case ResetRings():
            return kvm.reset_rings()
        case SetAttributes(gpa, size, attributes, flags):
            return kvm.set_attributes(gpa, size, attributes, flags)
        case CreateMemfd(fd, size, flags):
            return kvm.create_memfd(fd, size, flags)
        case Prefault(gpa, size, flags):
            return kvm.prefault(gpa, size, flags)
        case Host(action, hva, size):
            return kvm.host(action, hva, size)
        case Access(access):
            return kvm.access(access)


def exit_text(done: Exit | Error) -> str:
    """One return of KVM_RUN for people."""
    if isinstance(done, Error):
        return f"run {errorcode.get(done.errno, str(done.errno))}"
    errno = f" with {errorcode.get(done.errno, str(done.errno))}" if done.errno else ""
    match done.detail:
        case MmioAccess(gpa, size, is_write, data):
            return f"mmio {'write' if is_write else 'read'} {size} at {gpa:#x}{' of ' + data.hex() if is_write else ''}"
        case MemoryFault(gpa, size, flags):
            return f"memory fault gpa {gpa:#x} size {size:#x} flags {flags:#x}{errno}"
        case UndecodedMmio(syndrome, gpa):
            return f"undecoded mmio at {gpa:#x} syndrome {syndrome:#x}"
        case other:
            return f"{done.reason}{f' {other}' if other else ''}{errno}"


def _ranges(pages: tuple[int, ...]) -> str:
    # rising numbers, with neighbours as one: 1 3-5
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][-1] == page - 1:
            runs[-1][1:] = [page]
        else:
            runs.append([page])
    return " ".join("-".join(map(str, run)) for run in runs)


def log_bytes(pages: int) -> int:
    """Bytes that GET_DIRTY_LOG writes for a slot of *pages*: whole 64-bit words. (kvm_dirty_bitmap_bytes)"""
    return -(-pages // 64) * 8
