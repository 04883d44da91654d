"""What the live view counts of x86. The shadow MMU alone says what became of a fault it has no event for."""

from __future__ import annotations

from typing import Final

from arch.common import WATCHED as COMMON
from kvmfault.contract.tracepoints import recorded
from kvmfault.contract.watched import Sort, Watched, WatchedEvents

_FRAME: Final = recorded("gfn", 51, 0) << 12

WATCHED: Final[WatchedEvents] = {
    **COMMON,
    "kvm_page_fault": Watched(Sort.FAULT),
    "kvm_mmu_spte_requested": Watched(Sort.HANDLED, "level", _FRAME),
    "fast_page_fault": Watched(Sort.HANDLED, "ret"),  # its address is the guest's own under shadow paging
    "kvm_mmu_set_spte": Watched(Sort.ENTRY, "level", _FRAME),
    "kvm_tdp_mmu_spte_changed": Watched(Sort.ENTRY, "level", _FRAME),
    "kvm_mmu_split_huge_page": Watched(Sort.ENTRY, "level", _FRAME),
    "handle_mmio_page_fault": Watched(Sort.HANDLED, "", _FRAME),
    "kvm_fast_mmio": Watched(Sort.MMIO, "", recorded("gpa") << 0),
    "kvm_exit": Watched(Sort.EXIT, "exit_reason"),
    "kvm_mmu_pagetable_walk": Watched(Sort.WALK),
}
