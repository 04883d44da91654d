"""What the toy's KVM decides where architectures differ, and what a usual host is."""

from __future__ import annotations

from errno import EFAULT
from typing import Final

from kvmfault.contract.format import Stage2Format
from kvmfault.contract.policy import Policy
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
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import HostCaps

POLICY: Final = Policy(
    unbacked=Unbacked.LEAVE,
    invalid_slot=InvalidSlot.AS_NONE,
    write_tracking=False,
    topup=Topup.ALWAYS,
    unexplained_permission=EFAULT,
    area_sizes=None,
    unknown_area=UnknownArea.USE,
    check_geometry=True,
    logged_size=LoggedSize.PAGE,
    readonly_slot_logs=False,
    precheck=False,
    nowait_first=False,
    interruptible=False,
    frame_reaction={},
    poison_span=PoisonSpan.PAGE,
    fetch_from_device=False,
    read_maps_writable=ReadMaps.UNLESS_LOGGED,
    exec_grant=ExecGrant.ALWAYS,
    retry_test=RetryTest.PLAIN,
    fit_sizes=(1 << 21,),
    relax_in_place=False,
    dirty_mark=DirtyMark.AFTER_UNLOCK,
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
)


def host(fmt: Stage2Format) -> HostCaps:
    """A host with all the memory that the table can map."""
    last = (1 << fmt.gpa_bits - fmt.page_shift) - 1
    return HostCaps(page_shift=fmt.page_shift, max_gfn=Gfn(last), beyond_errno=EFAULT, user_top=Hva(1 << 47))
