"""Decisions of s390 KVM that are data, by kernel (vcpu_post_run_handle_fault and what it calls).

- 6.12: gmap_fault. The guest's addresses are translated by segments of 1M to those of the VMM, without a look at
  memslots, and the page tables below are the VMM's own.
- 6.18: __kvm_s390_handle_dat_fault. The memslot gives the frame (since 6.15), the page tables are still the VMM's.
- 7.4: kvm_s390_faultin_gfn. KVM has page tables of its own (since 7.0), and the invalidation protocol.

Where the tables are the VMM's own, a page that is invalidated meanwhile is looked up again before the fault ends
(fixup_user_fault): RetryTest.GFN with OnRetry.LOOP says the same of the table that the model keeps for every kernel.

Blocks of 1M are left out, as KVM leaves them out: the VMM has to ask (KVM_CAP_S390_HPAGE_1M). ``fit_sizes=1M`` asks.
"""

from __future__ import annotations

from dataclasses import replace
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

_POLICY_74: Final = Policy(
    unbacked=Unbacked.LEAVE,
    invalid_slot=InvalidSlot.AS_NONE,
    write_tracking=False,
    topup=Topup.ALWAYS,
    unexplained_permission=None,
    area_sizes=None,
    unknown_area=UnknownArea.USE,
    check_geometry=True,
    logged_size=LoggedSize.ANY,
    readonly_slot_logs=False,
    precheck=False,
    nowait_first=True,
    interruptible=False,
    # read-only memory and signals: see joints.other_errors
    frame_reaction={**dict.fromkeys(PinError, Reaction.FAULT), PinError.SIGPENDING: Reaction.EINTR},
    poison_span=PoisonSpan.PAGE,
    fetch_from_device=True,
    read_maps_writable=ReadMaps.NEVER,
    exec_grant=ExecGrant.ALWAYS,
    retry_test=RetryTest.GFN,
    fit_sizes=(),
    relax_in_place=False,
    dirty_mark=DirtyMark.ON_HARVEST,
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
    age_flushes=True,
)
_POLICY_612: Final = replace(_POLICY_74, invalid_slot=InvalidSlot.KEPT)


def policy_612(fmt: Stage2Format) -> Policy:
    """Linux 6.12: a slot that is being changed is mapped until gmap is told."""
    return _POLICY_612


def policy_74(fmt: Stage2Format) -> Policy:
    """Linux 6.18 and 7.4; in what they differ is in the joints."""
    return _POLICY_74
