"""Decisions of LoongArch KVM that are data (kvm_map_page and what it calls).

Whatever fails becomes a device access in the end (joints.treat_as_mmio): so memory that failed gives no SIGBUS.
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

_M: Final = 1 << 20
_PMD_SIZE: Final = {12: 2 * _M, 14: 32 * _M, 16: 512 * _M}


def policy_612(fmt: Stage2Format) -> Policy:
    """Linux 6.12. Blocks of one size, that of a PMD."""
    return Policy(
        unbacked=Unbacked.LEAVE,  # kvm_map_page: EFAULT
        invalid_slot=InvalidSlot.AS_NONE,  # gfn_to_hva_memslot_prot
        write_tracking=False,
        topup=Topup.ALWAYS,  # kvm_mmu_topup_memory_cache in kvm_map_page
        unexplained_permission=None,
        area_sizes=None,  # no area is looked at
        unknown_area=UnknownArea.USE,
        check_geometry=True,  # fault_supports_huge_mapping
        logged_size=LoggedSize.PAGE_ON_WRITE,  # the same: not for a write
        readonly_slot_logs=True,  # kvm_slot_dirty_track_enabled
        precheck=False,  # mmu_invalidate_retry_gfn under the lock only
        nowait_first=False,
        interruptible=False,
        frame_reaction=dict.fromkeys(PinError, Reaction.FAULT),  # is_error_noslot_pfn: EFAULT
        poison_span=PoisonSpan.PAGE,
        fetch_from_device=True,  # no test for it
        read_maps_writable=ReadMaps.NEVER,  # __WRITEABLE only for a write
        exec_grant=ExecGrant.ALWAYS,  # _PAGE_NO_EXEC is never set
        retry_test=RetryTest.GFN,  # mmu_invalidate_retry_gfn
        fit_sizes=(_PMD_SIZE[fmt.page_shift],),  # host_pfn_mapping_level
        relax_in_place=False,
        dirty_mark=DirtyMark.BLOCK_AFTER_UNLOCK,  # mark_page_dirty_in_slot at the end of kvm_map_page
        on_retry=OnRetry.LOOP,  # "retry:" of kvm_map_page, schedules after 100
        memfd_source=MemfdSource.NONE,
        unchanged=Unchanged.SPURIOUS,
        smaller_over_block=SmallerOverBlock.SPLIT,  # kvm_split_huge
        present_leaf=PresentLeaf.REPLACE,
        slot_flush=SlotFlush.SLOT,  # kvm_arch_flush_shadow_memslot
        userfault=Userfault.ABSENT,
        prefault=Prefault.ABSENT,
        recovers_blocks=False,
        mmio_sign_extension=SignExtension.KEPT,  # kvm_complete_mmio_read
    )
