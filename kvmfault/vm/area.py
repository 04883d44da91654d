"""An area of the user address space under the guest, and what a pin of one of its pages gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from kvmfault.types import Hva, Pfn

__all__ = ["HUGETLB", "AreaKind", "HvaRange", "Pin", "PinError", "Vma"]


class AreaKind(Enum):
    """What backs an area."""

    ANON = "anon"
    THP = "thp"
    """Anonymous, in transparent huge pages wherever an aligned block fits and was not split."""
    HUGETLB_2M = "hugetlb-2m"
    HUGETLB_1G = "hugetlb-1g"
    PFNMAP = "pfnmap"
    """Frames without struct page behind them, a device's registers for instance (VM_IO | VM_PFNMAP)."""


HUGETLB: Final = {AreaKind.HUGETLB_2M: 1 << 21, AreaKind.HUGETLB_1G: 1 << 30}
"""Areas made of pages of a fixed huge size, which are never split; its bytes."""


class HvaRange(NamedTuple):
    """User addresses ``[start, end)``, bytes: what an MMU notifier would be told to invalidate."""

    start: Hva
    end: Hva


@dataclass(frozen=True, slots=True, kw_only=True)
class Vma:
    """One area of user addresses with the same properties (struct vm_area_struct)."""

    start: Hva
    end: Hva
    kind: AreaKind
    pfn: Pfn
    """Frame of the first page."""
    page_shift: int
    block: int
    """Bytes of the largest leaf that the host's page table may use here: a page, or the area's huge page."""
    readonly: bool = False
    tags: bool = False
    """Memory tags allowed (VM_MTE_ALLOWED)."""
    any_uncached: bool = False
    """May be mapped with a weaker memory type than device memory (VM_ALLOW_ANY_UNCACHED)."""
    device: bool = False
    """The frames are not memory of the host (arm64: kvm_is_device_pfn)."""
    cacheable: bool = False
    """A device's frames are mapped cacheable for user space (arm64: kvm_vma_is_cacheable)."""
    unit: int = field(init=False, repr=False, compare=False)
    """Bytes of the smallest piece that has a fate of its own: a page, but of hugetlb the huge page."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", self.block if self.kind in HUGETLB else 1 << self.page_shift)

    def pfn_at(self, hva: Hva) -> Pfn:
        """Frame that the area itself has for *hva*, which must lie in it."""
        return Pfn(self.pfn + ((hva - self.start) >> self.page_shift))

    def block_at(self, hva: Hva) -> int:
        """Bytes of the block that the area is known to be made of at *hva*. THP does not count: it may be split.

        hugetlb: its page; PFNMAP: its block where that fits; else the host's page. (arm64: get_vma_page_shift)
        """
        if self.kind is AreaKind.PFNMAP and self.fits(hva):
            return self.block
        return self.unit

    def fits(self, hva: Hva) -> bool:
        """Whether the aligned block around *hva* lies inside the area."""
        start = hva & -self.block
        return self.start <= start and start + self.block <= self.end


class PinError(Enum):
    """Why there is no frame (KVM_PFN_ERR_*; NEEDS_IO is the ``async`` flag of hva_to_pfn)."""

    FAULT = "fault"
    HWPOISON = "hwpoison"
    RO_FAULT = "ro-fault"
    SIGPENDING = "sigpending"
    NEEDS_IO = "needs-io"
    WAITS = "waits for user space to supply the page (userfaultfd)"
    """A model of one thread cannot sleep: the caller says so and comes again."""
    NO_SLOT = "no-slot"
    """No memslot, hence no memory (KVM_PFN_NOSLOT). Never from host memory itself."""


class Pin(NamedTuple):
    """What a pin gave: a frame or an error. (A tuple: every fault makes one, a frozen dataclass takes 1 us more.)"""

    pfn: Pfn | None
    error: PinError | None = None
    writable: bool = False
    """The host mapping allows writes, whether or not one was asked for."""
    device: bool = False
    invalidated: HvaRange | None = None
    """The pin itself changed the host's mapping here (a write broke copy-on-write): a notifier call in its middle."""
    max_size: int | None = None
    """Largest block in bytes that the source allows (order of a guest_memfd folio); None: no limit of its own."""
    errno: int = 0
    """guest_memfd: what to report when there is no frame."""
