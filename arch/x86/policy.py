"""Decisions of x86 KVM that are data (kvm_tdp_page_fault, kvm_faultin_pfn, kvm_tdp_mmu_map and what they call).

The three backends differ in none of them: what nested and shadow paging do differently is in formats and joints.
No difference between 6.12 and 7.4 is known that these values could express.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from kvmfault.contract.format import Stage2Format
from kvmfault.contract.policy import (
    DirtyMark,
    ExecGrant,
    InvalidSlot,
    LoggedSize,
    MemfdSource,
    OnRetry,
    PoisonSpan,
    Policy,
    Prefault,
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
from kvmfault.contract.ports import PinError

_M, _G = 1 << 20, 1 << 30

POLICY: Final = Policy(
    unbacked=Unbacked.REMEMBER,
    invalid_slot=InvalidSlot.RETRY,
    write_tracking=True,
    topup=Topup.ALWAYS,
    unexplained_permission=None,
    area_sizes=None,
    unknown_area=UnknownArea.USE,
    check_geometry=True,
    logged_size=LoggedSize.PAGE,
    readonly_slot_logs=True,
    precheck=True,
    nowait_first=True,
    interruptible=True,
    frame_reaction={
        PinError.FAULT: Reaction.FAULT,
        PinError.HWPOISON: Reaction.SIGBUS,
        PinError.RO_FAULT: Reaction.EMULATE,
        PinError.SIGPENDING: Reaction.INTR,
        PinError.NO_SLOT: Reaction.UNBACKED,
    },
    poison_span=PoisonSpan.PAGE,
    fetch_from_device=True,
    read_maps_writable=ReadMaps.ALWAYS,
    exec_grant=ExecGrant.ALWAYS,
    retry_test=RetryTest.GFN,
    fit_sizes=(2 * _M, _G),
    relax_in_place=False,
    dirty_mark=DirtyMark.WITH_ENTRY,
    on_retry=OnRetry.RESUME,
    memfd_source=MemfdSource.PRIVATE_ACCESS,
    unchanged=Unchanged.SPURIOUS,
    smaller_over_block=SmallerOverBlock.SPLIT,
    slot_flush=SlotFlush.TABLE,
    userfault=Userfault.ABSENT,
    prefault=Prefault.OFFERED,
    recovers_blocks=True,
    mmio_sign_extension=SignExtension.KEPT,
)


def shadow_policy(fmt: Stage2Format) -> Policy:
    """Shadow paging has no addresses to pre-fault: those of the guest are virtual."""
    return replace(POLICY, prefault=Prefault.REFUSED)


def policy(fmt: Stage2Format) -> Policy:
    """The same for every format: x86 hosts have 4K pages."""
    return POLICY
