"""Decisions of arm64 KVM that are data, by kernel (kvm_handle_guest_abort, user_mem_abort and what they call)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from errno import EFAULT
from typing import Final

from kvmfault.contract.format import Stage2Format
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import PinError
from kvmfault.contract.values import (
    AddressCapture,
    DeviceMemory,
    DirtyMark,
    DistrustedFaults,
    ExecGrant,
    ExternalAborts,
    InjectedLength,
    InjectedTarget,
    InjectedWalk,
    InvalidSlot,
    LoggedSize,
    MemfdSource,
    NestedFetch,
    NestedWalkError,
    OnRetry,
    PoisonSpan,
    Prefault,
    PresentLeaf,
    Reaction,
    ReadMaps,
    RegisterPage,
    RetryTest,
    RootAddressSize,
    SignExtension,
    SlotFlush,
    SmallerOverBlock,
    TagRefusal,
    Topup,
    Unbacked,
    Unchanged,
    UnknownArea,
    UnsupportedAtomics,
    Userfault,
    WideAccesses,
)

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
    """Linux 6.12, with its known bugs."""
    return replace(
        policy_74(fmt),
        topup=Topup.UNLESS_PERMISSION,
        unexplained_permission=EFAULT,
        poison_span=PoisonSpan.MAPPED_AREA,
        dirty_mark=DirtyMark.AFTER_UNLOCK,
        memfd_source=MemfdSource.NONE,
        prefault=Prefault.ABSENT,
        mmio_sign_extension=SignExtension.LOST,
        prefetch_poison=None,
        device_memory=DeviceMemory.BY_FRAME,
        nested_fetch=NestedFetch.LOST,
        nested_walk_error=NestedWalkError.INJECT_AND_FAIL,
        tag_refusal=TagRefusal.UNDER_LOCK,
        external_aborts=ExternalAborts.GUEST,
        address_capture=AddressCapture.ALL_BUT_PERMISSION,
        distrusted_faults=DistrustedFaults.ALL,
        root_address_size=RootAddressSize.UNKNOWN,
        unsupported_atomics=UnsupportedAtomics.FAULT,
        wide_accesses=WideAccesses.AS_DESCRIBED,
        injected_length=InjectedLength.AS_TRAPPED,
        injected_walk=InjectedWalk.PLAIN,
        injected_target=InjectedTarget.KERNEL,
        register_page=RegisterPage.UNHANDLED,
    )


def policy_74(fmt: Stage2Format) -> Policy:
    """Linux 7.4: page-table pages whenever logging (7.3), an unexplained permission fault only warns (7.1),
    KVM_PRE_FAULT_MEMORY (7.4)."""
    return Policy(
        unbacked=Unbacked.LEAVE,
        invalid_slot=InvalidSlot.AS_NONE,
        write_tracking=False,
        topup=Topup.UNLESS_PERMISSION_UNLOGGED,
        unexplained_permission=None,
        area_sizes=_AREA_SIZES[fmt.page_shift],
        unknown_area=UnknownArea.USE,
        check_geometry=True,
        logged_size=LoggedSize.PAGE,
        readonly_slot_logs=False,
        precheck=False,
        nowait_first=False,
        interruptible=False,
        frame_reaction={**dict.fromkeys(PinError, Reaction.FAULT), PinError.HWPOISON: Reaction.SIGBUS},
        poison_span=PoisonSpan.MAPPED,
        fetch_from_device=False,
        read_maps_writable=ReadMaps.UNLESS_LOGGED,
        exec_grant=ExecGrant.ON_FETCH,
        retry_test=RetryTest.PLAIN,
        fit_sizes=(_PMD_SIZE[fmt.page_shift],),
        relax_in_place=True,
        dirty_mark=DirtyMark.BLOCK_AFTER_UNLOCK,
        on_retry=OnRetry.RESUME,
        memfd_source=MemfdSource.SLOT,
        unchanged=Unchanged.RETRY,
        smaller_over_block=SmallerOverBlock.DROP,
        present_leaf=PresentLeaf.REPLACE,
        slot_flush=SlotFlush.SLOT,
        userfault=Userfault.ABSENT,
        prefault=Prefault.OFFERED,
        recovers_blocks=False,
        mmio_sign_extension=SignExtension.KEPT,
        prefetch_poison=Reaction.POISONED,
        device_memory=DeviceMemory.BY_AREA,
        nested_fetch=NestedFetch.KEPT,
        nested_walk_error=NestedWalkError.RETRY_IF_RACED,
        tag_refusal=TagRefusal.BEFORE_LOCK,
        external_aborts=ExternalAborts.VMM_IF_ASKED,
        address_capture=AddressCapture.WHEN_VALID,
        distrusted_faults=DistrustedFaults.TRANSLATION,
        root_address_size=RootAddressSize.RIGHT,
        unsupported_atomics=UnsupportedAtomics.TO_GUEST,
        wide_accesses=WideAccesses.TO_VMM,
        injected_length=InjectedLength.FULL,
        injected_walk=InjectedWalk.LEVEL,
        injected_target=InjectedTarget.CONFIGURED,
        register_page=RegisterPage.RETRANSLATE,
    )
