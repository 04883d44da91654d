"""Decisions of arm64 KVM that are data, by kernel (kvm_handle_guest_abort, user_mem_abort and what they call)."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EFAULT
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

_K, _M, _G = 1 << 10, 1 << 20, 1 << 30
_AREA_SIZES: Final[Mapping[int, Mapping[int, int]]] = {
    12: {4 * _K: 4 * _K, 64 * _K: 4 * _K, 2 * _M: 2 * _M, 32 * _M: 2 * _M, _G: _G},
    14: {16 * _K: 16 * _K, 2 * _M: 16 * _K, 32 * _M: 32 * _M, _G: 32 * _M},
    16: {64 * _K: 64 * _K, 2 * _M: 64 * _K, 512 * _M: 512 * _M, 16 * _G: 512 * _M},
}
"""The vma_shift switch: page, contiguous PTEs (mapped as pages), PMD, contiguous PMDs (as PMDs), and with 4K pages PUD
(other page sizes have no huge pages of that size, pud_sect_supported)."""
_PMD_SIZE: Final = {12: 2 * _M, 14: 32 * _M, 16: 512 * _M}


def policy_612(fmt: Stage2Format) -> Policy:
    """Linux 6.12."""
    return _policy(
        fmt,
        topup=Topup.UNLESS_PERMISSION,
        unexplained_permission=EFAULT,
        memfd_source=MemfdSource.NONE,
        prefault=Prefault.ABSENT,
        mmio_sign_extension=SignExtension.LOST,
    )


def policy_74(fmt: Stage2Format) -> Policy:
    """Linux 7.4: page-table pages whenever logging (7.3), an unexplained permission fault only warns (7.1),
    KVM_PRE_FAULT_MEMORY (7.4)."""
    return _policy(
        fmt,
        topup=Topup.UNLESS_PERMISSION_UNLOGGED,
        unexplained_permission=None,
        memfd_source=MemfdSource.SLOT,
        prefault=Prefault.OFFERED,
        mmio_sign_extension=SignExtension.KEPT,
    )


def _policy(
    fmt: Stage2Format,
    *,
    topup: Topup,
    unexplained_permission: int | None,
    memfd_source: MemfdSource,
    prefault: Prefault,
    mmio_sign_extension: SignExtension,
) -> Policy:
    return Policy(
        unbacked=Unbacked.LEAVE,
        invalid_slot=InvalidSlot.AS_NONE,
        write_tracking=False,
        topup=topup,
        unexplained_permission=unexplained_permission,
        area_sizes=_AREA_SIZES[fmt.page_shift],
        unknown_area=UnknownArea.USE,
        check_geometry=True,
        logged_size=LoggedSize.PAGE,
        readonly_slot_logs=False,
        precheck=False,
        nowait_first=False,
        interruptible=False,
        frame_reaction={**dict.fromkeys(PinError, Reaction.FAULT), PinError.HWPOISON: Reaction.SIGBUS},
        poison_span=PoisonSpan.MAPPED_AREA,
        fetch_from_device=False,
        read_maps_writable=ReadMaps.UNLESS_LOGGED,
        exec_grant=ExecGrant.ON_FETCH,
        retry_test=RetryTest.PLAIN,
        fit_sizes=(_PMD_SIZE[fmt.page_shift],),
        relax_in_place=True,
        dirty_mark=DirtyMark.AFTER_UNLOCK,
        on_retry=OnRetry.RESUME,
        memfd_source=memfd_source,
        unchanged=Unchanged.RETRY,
        smaller_over_block=SmallerOverBlock.DROP,
        slot_flush=SlotFlush.SLOT,
        userfault=Userfault.ABSENT,
        prefault=prefault,
        recovers_blocks=False,
        mmio_sign_extension=mmio_sign_extension,
    )
