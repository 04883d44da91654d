"""Policy: the documented differences of decision between architectures and kernel versions, as data.

A policy says *what* differs; the one place that reads a value is named in its docstring (steps of
kvmfault/path). The difference between two targets is the diff of two policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from kvmfault.contract.ports import PinError


class Unbacked(Enum):
    """Where an access without usable memory goes."""

    LEAVE = "leave the path at once"
    REMEMBER = "go on: MMIO is kept in the table"


class InvalidSlot(Enum):
    """How a slot that is being deleted or moved looks."""

    AS_NONE = "as no slot"
    RETRY = "retry the fault"


class Topup(Enum):
    """When table pages are put in reserve."""

    ALWAYS = "always"
    UNLESS_PERMISSION = "not for a permission fault, unless the slot is logged and the access a write"
    UNLESS_PERMISSION_UNLOGGED = "not for a permission fault, unless the slot is logged"


class UnknownArea(Enum):
    """What a host area of an unlisted block size does."""

    USE = "its size is used as it is, with a warning"
    FAULT = "the fault fails with EFAULT"


class LoggedSize(Enum):
    """Mapping size in a dirty-logged slot."""

    PAGE = "one page"
    PAGE_ON_WRITE = "one page for a write, any size for a read"


class Reaction(Enum):
    """What an error frame becomes."""

    FAULT = "error EFAULT"
    SIGBUS = "SIGBUS to the VMM, then retry"
    EMULATE = "emulate the access"
    INTR = "exit to user space, interrupted"
    UNBACKED = "as no slot"
    EINTR = "error EINTR"


class PoisonSpan(Enum):
    """Span that the SIGBUS of a poisoned page names."""

    PAGE = "one page"
    AREA = "the host area's block"
    MAPPED_AREA = "the block that would have been mapped"


class ReadMaps(Enum):
    """Whether a read fault on writable memory installs a writable entry."""

    ALWAYS = "always"
    UNLESS_LOGGED = "unless the slot is logged"
    NEVER = "never"


class ExecGrant(Enum):
    """Which entries are executable."""

    ON_FETCH = "only after a fetch, or with a coherent instruction cache"
    ALWAYS = "all"


class RetryTest(Enum):
    """Which test of the invalidation protocol is made under the lock."""

    PLAIN = "any invalidation"
    GFN = "one that covers the frame"


class DirtyMark(Enum):
    """When a page is marked dirty."""

    WITH_ENTRY = "while the entry is made, logged slots only"
    AFTER_UNLOCK = "after the lock is dropped"


class OnRetry(Enum):
    """What follows a retry."""

    RESUME = "the guest runs and faults again"
    LOOP = "the kernel tries again"


class MemfdSource(Enum):
    """Which accesses take their page from guest_memfd."""

    NONE = "none"
    PRIVATE_ACCESS = "private accesses"
    SLOT = "all accesses to a slot with guest_memfd"


class Unchanged(Enum):
    """What finding the entry already as wanted means."""

    SPURIOUS = "spurious"
    RETRY = "retry, as if another vCPU had won"


class SmallerOverBlock(Enum):
    """Mapping a piece of a block that is mapped whole."""

    SPLIT = "the block is split, its other pieces stay mapped"
    DROP = "the block is dropped, its other pieces fault again"


class SlotFlush(Enum):
    """What deleting or moving a slot drops from the table."""

    SLOT = "what maps the slot"
    TABLE = "the whole table"


class Userfault(Enum):
    """The proposed slot flag KVM_MEM_USERFAULT."""

    ABSENT = "the kernel does not have it"
    V3 = "as in version 3 of the proposal, June 2025"


class Prefault(Enum):
    """KVM_PRE_FAULT_MEMORY."""

    ABSENT = "there is no such ioctl: EINVAL"
    REFUSED = "not with this kind of table: EOPNOTSUPP"
    OFFERED = "maps as reads of the vCPU would"


class SignExtension(Enum):
    """Whether a sign-extending MMIO load does."""

    KEPT = "kept"
    LOST = "lost: the value is cut to the access size after it was extended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One target's values. Each docstring: meaning; the step that reads it; the kernel function it models."""

    unbacked: Unbacked
    """Filters steps leave_unbacked and settle_slot. (kvm_handle_guest_abort / kvm_handle_noslot_fault)"""
    invalid_slot: InvalidSlot
    """lookup, settle_slot. (gfn_to_hva_memslot_prot / kvm_faultin_pfn)"""
    write_tracking: bool
    """Filters track_write: frames that hold guest tables are write-protected. (page_fault_handle_page_track)"""
    topup: Topup
    """topup. (user_mem_abort / mmu_topup_memory_caches)"""
    unexplained_permission: int | None
    """explain_permission: errno for a permission fault that is neither write nor fetch. (user_mem_abort)"""
    area_sizes: Mapping[int, int] | None
    """bound_size: host area block size -> largest block tried; None: no look at the area. (the vma_shift switch)"""
    unknown_area: UnknownArea
    """bound_size."""
    check_geometry: bool
    """bound_size, fit_size: a block must lie in the slot with gfn and hva congruent.
    (fault_supports_stage2_huge_mapping; lpage_info)"""
    logged_size: LoggedSize
    """bound_size. (force_pte; kvm_slot_dirty_track_enabled)"""
    readonly_slot_logs: bool
    """lookup: the log flag counts on a read-only slot. (memslot_is_logging)"""
    precheck: bool
    """Filters precheck and recheck: lockless tests. (mmu_invalidate_retry_gfn_unsafe)"""
    nowait_first: bool
    """pin: the first try may not sleep. (async in __gfn_to_pfn_memslot)"""
    interruptible: bool
    """wait: the second try may be interrupted by a signal."""
    frame_reaction: Mapping[PinError, Reaction]
    """judge_pfn. (after __gfn_to_pfn_memslot; kvm_handle_error_pfn)"""
    poison_span: PoisonSpan
    """judge_pfn: lsb of the SIGBUS. (kvm_send_hwpoison_signal)"""
    fetch_from_device: bool
    """permit: code may run from device memory."""
    read_maps_writable: ReadMaps
    """permit."""
    exec_grant: ExecGrant
    """permit."""
    retry_test: RetryTest
    """stale. (mmu_invalidate_retry; is_page_fault_stale)"""
    fit_sizes: tuple[int, ...]
    """fit_size: block sizes in bytes that a look at the host's table may give; empty: no look.
    (transparent_hugepage_adjust; kvm_mmu_hugepage_adjust)"""
    relax_in_place: bool
    """install: a permission fault at its own granule only adds permissions. (kvm_pgtable_stage2_relax_perms)"""
    dirty_mark: DirtyMark
    """install, account. (make_spte; mark_page_dirty_in_slot after the lock)"""
    on_retry: OnRetry
    """the runner."""
    memfd_source: MemfdSource
    """pin. (kvm_faultin_pfn_private; gmem_abort)"""
    unchanged: Unchanged
    """install. (RET_PF_SPURIOUS; -EAGAIN of the stage-2 map walker)"""
    smaller_over_block: SmallerOverBlock
    """install. (tdp_mmu_split_huge_page; stage2_map_walk_leaf)"""
    slot_flush: SlotFlush
    """Vm.set_region. (kvm_arch_flush_shadow_memslot; kvm_mmu_zap_all_fast by the quirk SLOT_ZAP_ALL)"""
    userfault: Userfault
    """Filters userfault: pages that user space marked in a bitmap leave to it. (kvm_do_userfault, proposed)"""
    prefault: Prefault
    """Guest.prefault. (kvm_arch_vcpu_pre_fault_memory)"""
    recovers_blocks: bool
    """DirtyLogging.recover_blocks: when logging of a slot ends, pages that the host maps by blocks are dropped.
    (kvm_mmu_zap_collapsible_sptes)"""
    mmio_sign_extension: SignExtension
    """completion. (kvm_handle_mmio_return; "KVM: arm64: Fix sign-extension of MMIO loads")"""

    def differs(self, other: Policy) -> dict[str, tuple[object, object]]:
        """Members whose values differ: name -> (this, other)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: (a, b) for name, (a, b) in pairs.items() if a != b}
