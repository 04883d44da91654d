"""A memslot request as user space makes it, and what it can amount to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvmfault.errors import ModelError
from kvmfault.types import Gpa, Hva

__all__ = ["NO_FILE", "Allocation", "ChangeKind", "GuestMemfd", "MemslotRequest", "Via"]

NO_FILE: Final = (1 << 32) - 1
"""File descriptor -1, as the 32-bit field of the ioctl's argument holds it."""


class Via(Enum):
    """How a request arrives."""

    REGION1 = "KVM_SET_USER_MEMORY_REGION"
    REGION2 = "KVM_SET_USER_MEMORY_REGION2"
    KERNEL = "kernel"
    """A slot of KVM itself (x86: TSS, identity map, APIC page), which may use the ids behind the user's."""


class ChangeKind(Enum):
    """What a request amounts to (enum kvm_mr_change). A move may change flags as well."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags-only"


class Allocation(Enum):
    """A memory allocation of a change, to be made to fail."""

    SLOT = "slot"
    INVALID_COPY = "invalid-copy"
    DIRTY_BITMAP = "dirty-bitmap"
    METADATA = "metadata"
    """The architecture's own (x86: rmaps, huge page counts)."""


@dataclass(frozen=True, slots=True)
class GuestMemfd:
    """A guest_memfd file: *size* bytes, created by this VM or by another one."""

    size: int
    own: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MemslotRequest:
    """The argument of the ioctl, as user space fills it: nothing about it is known to be right.

    Raises ModelError for a number that the fields of the argument (32 or 64 bits) cannot hold.
    """

    slot: int
    """Bits 15:0 the id, bits 31:16 the address space."""
    flags: int = 0
    gpa: Gpa
    size: int
    """Bytes; 0 deletes."""
    hva: Hva
    memfd: int = NO_FILE
    """File descriptor of a guest_memfd; looked at only with GUEST_MEMFD."""
    memfd_offset: int = 0
    userfault_bitmap: int = 0
    """Address of the bitmap; looked at only with USERFAULT (proposed)."""
    via: Via = Via.REGION2

    def __post_init__(self) -> None:
        for name, bits in (("slot", 32), ("flags", 32), ("memfd", 32)):
            self._check(name, getattr(self, name), bits)
        for name in ("gpa", "size", "hva", "memfd_offset", "userfault_bitmap"):
            self._check(name, getattr(self, name), 64)

    def _check(self, name: str, value: int, bits: int) -> None:
        if not 0 <= value < 1 << bits:
            raise ModelError(f"{name} is {value:#x}; the ioctl's field is an unsigned number of {bits} bits")

    @property
    def id(self) -> int:
        """The slot's number in its address space."""
        return self.slot & 0xFFFF

    @property
    def as_id(self) -> int:
        """The address space."""
        return self.slot >> 16
