"""What a vCPU remembers of its last access to MMIO, so that the next one needs no walk of the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvmfault.types import Gfn

__all__ = ["MmioCache"]

_NOTHING: Final = Gfn(0)
_CHANGING: Final = 1 << 63
"""Bit of a memslot generation while slots change (KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS)."""


@dataclass(frozen=True, slots=True)
class MmioCache:
    """One frame and one virtual page. Immutable: noting gives a new value.

    Zero stands for nothing, so frame 0 and page 0 never hit. Kernel: vcpu->arch.mmio_gva, mmio_gfn, mmio_gen.
    """

    gfn: Gfn = _NOTHING
    page: int = 0
    """Virtual address of the page; 0 where the table translates guest-physical addresses."""
    generation: int = 0
    """Of the memslots of address space 0, whichever the vCPU uses, when it was noted."""

    def noted(self, gfn: Gfn, gva: int | None, generation: int, page_shift: int) -> MmioCache:
        """After an access to *gfn*; *gva*: as for ``Ports.note_mmio``. Nothing is noted while slots change.

        Kernel: vcpu_cache_mmio_info.
        """
        if generation & _CHANGING:
            return self
        return MmioCache(gfn, (gva or 0) & -(1 << page_shift), generation)

    def hits(self, address: int, generation: int, page_shift: int, *, direct: bool, nested: bool) -> bool:
        """Whether *address* is known to be MMIO.

        *direct*: the table translates guest-physical addresses, and *address* is one; else a virtual one. *nested*: one
        of a nested guest whose hypervisor's tables are shadowed; it never hits. Kernel: mmio_info_in_cache.
        """
        if nested or generation != self.generation:
            return False
        if direct:
            return bool(self.gfn) and self.gfn == address >> page_shift
        return bool(self.page) and self.page == address & -(1 << page_shift)
