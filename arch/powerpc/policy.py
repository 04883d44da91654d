"""Decisions of Book3S HV KVM for radix guests that are data (kvmppc_book3s_radix_page_fault and what it calls).

The same in 6.12 and 7.4: kvm_faultin_pfn took the place of __gfn_to_pfn_memslot in 6.13, and changed no answer. Two
values say what one would not expect. Every error frame is EFAULT, a pending signal and failed memory among them: no
SIGBUS, no exit. And no block is kept inside its slot (see ``joints.refuse_incongruent``).
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

_POLICY: Final = Policy(
    unbacked=Unbacked.LEAVE,
    invalid_slot=InvalidSlot.AS_NONE,
    write_tracking=False,
    topup=Topup.ALWAYS,
    unexplained_permission=None,
    area_sizes=None,
    unknown_area=UnknownArea.USE,
    check_geometry=False,
    logged_size=LoggedSize.PAGE,
    readonly_slot_logs=True,
    precheck=False,
    nowait_first=False,
    interruptible=False,
    frame_reaction=dict.fromkeys(PinError, Reaction.FAULT),
    poison_span=PoisonSpan.PAGE,
    fetch_from_device=True,
    read_maps_writable=ReadMaps.ALWAYS,
    exec_grant=ExecGrant.ALWAYS,
    retry_test=RetryTest.PLAIN,
    fit_sizes=(2 << 20, 1 << 30),
    relax_in_place=False,
    dirty_mark=DirtyMark.ON_HARVEST,
    on_retry=OnRetry.RESUME,
    memfd_source=MemfdSource.NONE,
    unchanged=Unchanged.SPURIOUS,
    smaller_over_block=SmallerOverBlock.DROP,
    present_leaf=PresentLeaf.REPLACE,
    slot_flush=SlotFlush.SLOT,
    userfault=Userfault.ABSENT,
    prefault=Prefault.ABSENT,
    recovers_blocks=False,
    mmio_sign_extension=SignExtension.KEPT,
    logging_drops=True,
    unmap_marks=True,
)


def policy(fmt: Stage2Format) -> Policy:
    """The same for every page size: blocks have 2M and 1G."""
    return _POLICY
