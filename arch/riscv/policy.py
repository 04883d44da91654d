"""Decisions of RISC-V KVM that are data (gstage_page_fault, kvm_riscv_gstage_map and what they call).

Some values are behaviour that one may question:
- huge pages of hugetlb are mapped without a look at the slot's geometry: a misaligned block, which faults for ever
  where gpa and hva differ modulo its size;
- a block size that is no level of the table fails the guest;
- so does a write to a block that was mapped before its slot was logged (gstage_set_pte finds a leaf on its way).
"""

from __future__ import annotations

from typing import Final

from kvmfault.contract.format import Stage2Format
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import PinError
from kvmfault.contract.values import (
    DirtyMark,
    ExecGrant,
    InvalidSlot,
    LoggedSize,
    MemfdSource,
    OnRetry,
    PoisonSpan,
    Prefault,
    PresentLeaf,
    Reaction,
    ReadMaps,
    RetryTest,
    SignExtension,
    SlotFlush,
    SmallerOverBlock,
    Topup,
    Unbacked,
    Unchanged,
    UnknownArea,
    Userfault,
)

_K, _M, _G = 1 << 10, 1 << 20, 1 << 30

_POLICY: Final = Policy(
    unbacked=Unbacked.LEAVE,  # gstage_page_fault
    invalid_slot=InvalidSlot.AS_NONE,  # gfn_to_hva_memslot_prot
    write_tracking=False,
    topup=Topup.ALWAYS,  # head of kvm_riscv_gstage_map
    unexplained_permission=None,
    area_sizes={4 * _K: 4 * _K, 2 * _M: 2 * _M, _G: _G},  # vma_pagesize: 4K, PMD, PUD
    unknown_area=UnknownArea.FAULT,  # "Invalid VMA page size"
    check_geometry=False,  # no look at the slot
    logged_size=LoggedSize.PAGE,  # logging: vma_pagesize = PAGE_SIZE
    readonly_slot_logs=False,  # logging needs a slot that may be written
    precheck=False,  # mmu_invalidate_retry under the lock only
    nowait_first=False,
    interruptible=False,
    # after gfn_to_pfn_prot
    frame_reaction={
        PinError.FAULT: Reaction.FAULT,
        PinError.HWPOISON: Reaction.SIGBUS,
        PinError.RO_FAULT: Reaction.FAULT,
        PinError.SIGPENDING: Reaction.EINTR,
        PinError.NO_SLOT: Reaction.FAULT,
    },
    poison_span=PoisonSpan.AREA,  # vma_pageshift, whatever is mapped
    fetch_from_device=True,  # no test for it
    read_maps_writable=ReadMaps.UNLESS_LOGGED,  # logging and not a write: writable = false
    exec_grant=ExecGrant.ALWAYS,  # gstage_map_page is asked for page_exec always
    retry_test=RetryTest.PLAIN,  # mmu_invalidate_retry
    fit_sizes=(),  # the host table is not looked at
    relax_in_place=False,  # gstage_set_pte writes the entry anew
    dirty_mark=DirtyMark.WITH_ENTRY,  # mark_page_dirty before gstage_map_page
    on_retry=OnRetry.RESUME,  # returns 0, so gstage_page_fault 1
    memfd_source=MemfdSource.NONE,
    unchanged=Unchanged.SPURIOUS,
    smaller_over_block=SmallerOverBlock.REFUSE,  # gstage_set_pte: EEXIST
    present_leaf=PresentLeaf.REPLACE,
    slot_flush=SlotFlush.SLOT,  # kvm_arch_flush_shadow_memslot
    userfault=Userfault.ABSENT,
    prefault=Prefault.ABSENT,
    recovers_blocks=False,
    mmio_sign_extension=SignExtension.KEPT,  # kvm_riscv_vcpu_mmio_return
)


def policy_612(fmt: Stage2Format) -> Policy:
    """Linux 6.12: the same for every format, since pages have 4K."""
    return _POLICY
