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
    unbacked=Unbacked.LEAVE,
    invalid_slot=InvalidSlot.AS_NONE,
    write_tracking=False,
    topup=Topup.ALWAYS,
    unexplained_permission=None,
    area_sizes={4 * _K: 4 * _K, 2 * _M: 2 * _M, _G: _G},
    unknown_area=UnknownArea.FAULT,
    check_geometry=False,
    logged_size=LoggedSize.PAGE,
    readonly_slot_logs=False,
    precheck=False,
    nowait_first=False,
    interruptible=False,
    frame_reaction={
        PinError.FAULT: Reaction.FAULT,
        PinError.HWPOISON: Reaction.SIGBUS,
        PinError.RO_FAULT: Reaction.FAULT,
        PinError.SIGPENDING: Reaction.EINTR,
        PinError.NO_SLOT: Reaction.FAULT,
    },
    poison_span=PoisonSpan.AREA,
    fetch_from_device=True,
    read_maps_writable=ReadMaps.UNLESS_LOGGED,
    exec_grant=ExecGrant.ALWAYS,
    retry_test=RetryTest.PLAIN,
    fit_sizes=(),
    relax_in_place=False,
    dirty_mark=DirtyMark.WITH_ENTRY,
    on_retry=OnRetry.RESUME,
    memfd_source=MemfdSource.NONE,
    unchanged=Unchanged.SPURIOUS,
    smaller_over_block=SmallerOverBlock.REFUSE,
    present_leaf=PresentLeaf.REPLACE,
    slot_flush=SlotFlush.SLOT,
    userfault=Userfault.ABSENT,
    prefault=Prefault.ABSENT,
    recovers_blocks=False,
    mmio_sign_extension=SignExtension.KEPT,
)


def policy_612(fmt: Stage2Format) -> Policy:
    """Linux 6.12: the same for every format, since pages have 4K."""
    return _POLICY
