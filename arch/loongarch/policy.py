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
        unbacked=Unbacked.LEAVE,
        invalid_slot=InvalidSlot.AS_NONE,
        write_tracking=False,
        topup=Topup.ALWAYS,
        unexplained_permission=None,
        area_sizes=None,
        unknown_area=UnknownArea.USE,
        check_geometry=True,
        logged_size=LoggedSize.PAGE_ON_WRITE,
        readonly_slot_logs=True,
        precheck=False,
        nowait_first=False,
        interruptible=False,
        frame_reaction=dict.fromkeys(PinError, Reaction.FAULT),
        poison_span=PoisonSpan.PAGE,
        fetch_from_device=True,
        read_maps_writable=ReadMaps.NEVER,
        exec_grant=ExecGrant.ALWAYS,
        retry_test=RetryTest.GFN,
        fit_sizes=(_PMD_SIZE[fmt.page_shift],),
        relax_in_place=False,
        dirty_mark=DirtyMark.BLOCK_AFTER_UNLOCK,
        on_retry=OnRetry.LOOP,
        memfd_source=MemfdSource.NONE,
        unchanged=Unchanged.SPURIOUS,
        smaller_over_block=SmallerOverBlock.SPLIT,
        present_leaf=PresentLeaf.REPLACE,
        slot_flush=SlotFlush.SLOT,
        userfault=Userfault.ABSENT,
        prefault=Prefault.ABSENT,
        recovers_blocks=False,
        mmio_sign_extension=SignExtension.KEPT,
    )
