"""Decisions of x86 KVM that are data (kvm_tdp_page_fault, kvm_faultin_pfn, kvm_tdp_mmu_map and what they call).

What nested and shadow paging do differently is in formats and joints, but for one value of 7.4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, TypeAlias

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
    present_leaf=PresentLeaf.REPLACE,
    slot_flush=SlotFlush.TABLE,
    userfault=Userfault.ABSENT,
    prefault=Prefault.OFFERED,
    recovers_blocks=True,
    mmio_sign_extension=SignExtension.KEPT,
    marks_rewritten=False,
)


NESTED_74: Final = replace(POLICY, present_leaf=PresentLeaf.KEEP_IF_ALLOWED, marks_rewritten=True)
SHADOW_612: Final = replace(POLICY, prefault=Prefault.REFUSED)  # the guest's addresses are virtual
SHADOW_74: Final = replace(SHADOW_612, present_leaf=PresentLeaf.KEEP_FOR_PREFETCH, marks_rewritten=True)

# The same for every format: x86 hosts have 4K pages.
Policies: TypeAlias = Mapping[str, Callable[[Stage2Format], Policy]]
NESTED: Final[Policies] = {"6.12": lambda fmt: POLICY, "7.4": lambda fmt: NESTED_74}
SHADOW: Final[Policies] = {"6.12": lambda fmt: SHADOW_612, "7.4": lambda fmt: SHADOW_74}
