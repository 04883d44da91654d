"""Policy: the documented differences of decision between architectures and kernel versions, as data.

A policy says *what* differs; the one place that reads a value is named in its docstring (steps of
kvmfault/path). The difference between two targets is the diff of two policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from kvmfault.contract.ports import PinError
from kvmfault.types import Errno, Size


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
    POISONED = "error EHWPOISON"


class PoisonSpan(Enum):
    """Span that the SIGBUS of a poisoned page names."""

    PAGE = "one page"
    AREA = "the host area's block"
    MAPPED_AREA = "the block that would have been mapped, were a nested guest's own not smaller"
    MAPPED = "the block that would have been mapped"


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
    BLOCK_AFTER_UNLOCK = "after the lock is dropped, the first frame of what was mapped"


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


class PresentLeaf(Enum):
    """What becomes of a leaf of the wanted size that is there already."""

    REPLACE = "the new entry replaces it"
    KEEP_FOR_PREFETCH = "it stays, and the fault is spurious, if nobody waits for the page"
    KEEP_IF_ALLOWED = "as for a prefetch, also if it allows the access"


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


class ExternalAborts(Enum):
    """Who is told of an external abort that the host's error handling leaves."""

    GUEST = "the guest: an SError"
    VMM_IF_ASKED = "the VMM if it asked and the abort is not the host's own, or else the guest"


class AddressCapture(Enum):
    """When the register with the faulting guest-physical address is read."""

    GIVEN = "always: hardware gives it with the fault"
    ALL_BUT_PERMISSION = "always; a permission fault's address is translated again"
    WHEN_VALID = "where hardware defines it; elsewhere the address is translated again, or there is none"


class DistrustedFaults(Enum):
    """Which addresses a CPU with the erratum gets by translating again, since a fault may be misreported."""

    NONE = "none"
    ALL = "of all faults but those on a walk"
    TRANSLATION = "of translation faults"


class RootAddressSize(Enum):
    """Which status code stands for an address-size fault above level 0 (-1)."""

    UNKNOWN = "none"
    MISTAKEN = "that of a granule protection fault"
    RIGHT = "its own"


class UnsupportedAtomics(Enum):
    """What an exclusive or atomic access to memory without support for it ends in."""

    FAULT = "error EFAULT"
    TO_GUEST = "a data abort with the same status, unless no memory is there"


class WideAccesses(Enum):
    """What a device access of 64 bytes is."""

    AS_DESCRIBED = "what the other fields of the syndrome describe"
    TO_VMM = "decoded by the VMM"


class NestedWalkError(Enum):
    """What follows when the walk of a nested guest's own table fails for another reason than the table's content."""

    INJECT_AND_FAIL = "the guest gets a fault and KVM_RUN fails"
    RETRY_IF_RACED = "the same, but after a race the guest resumes"


class NestedFetch(Enum):
    """Whether a page that the nested guest's own table makes non-executable stays so."""

    LOST = "lost: a fetch through a missing entry makes it executable"
    KEPT = "kept"


class TagRefusal(Enum):
    """When memory that may not hold tags is refused to a guest that uses them."""

    UNDER_LOCK = "under the lock, after the test for invalidations"
    BEFORE_LOCK = "before the lock"


class DeviceMemory(Enum):
    """What is mapped as device memory."""

    BY_FRAME = "frames that are not host memory"
    BY_AREA = "the same in areas of raw frames; cacheable ones as memory if the hardware can, or EFAULT"


class InjectedLength(Enum):
    """Instruction length in the syndrome of an injected abort."""

    AS_TRAPPED = "as in the trapped syndrome"
    FULL = "32 bits"


class InjectedWalk(Enum):
    """Status of an abort injected for an access of the guest's own first-stage walk."""

    PLAIN = "as for any access"
    LEVEL = "on a walk, with the level that walking again finds; none if it finds nothing"


class InjectedTarget(Enum):
    """Who gets an injected abort, and where."""

    KERNEL = "the guest's kernel"
    CONFIGURED = "whom the guest's configuration names, at the SError vector if it says so"


class RegisterPage(Enum):
    """What is done with an abort on the page that holds a nested hypervisor's registers."""

    UNHANDLED = "undefined instruction"
    LOOKUP = "translated, unless the last translation still holds: then a permission fault is injected"
    RETRANSLATE = "translated anew; what that still forbids is injected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One target's values. Members with a default are about things that most architectures do not have.

    Each docstring: ``readers: meaning. (kernel functions; commit titles)``. A reader is a step, or a function outside
    the path; the meaning may be left to the type's docstring; a source may begin with whose it is, ``arm64: ...``.
    ``contract.described`` takes them apart, for the documentation and for ``compare policies``.
    """

    unbacked: Unbacked
    """leave_unbacked, settle_slot.
    (arm64: kvm_handle_guest_abort, io_mem_abort; x86: kvm_handle_noslot_fault)"""
    invalid_slot: InvalidSlot
    """lookup. (arm64: gfn_to_hva_memslot_prot; x86: kvm_faultin_pfn)"""
    write_tracking: bool
    """track_write, fit_size, protect_tracked: frames that hold guest tables are write-protected.
    (arm64: tracks no writes; x86: page_fault_handle_page_track, kvm_gfn_is_write_tracked)"""
    topup: Topup
    """topup. (arm64: user_mem_abort; x86: mmu_topup_memory_caches)"""
    unexplained_permission: Errno | None
    """explain_permission: errno for a permission fault that is neither write nor fetch.
    (arm64: head of user_mem_abort, only VM_WARN_ON_ONCE since 7.1; x86: has no such test)"""
    area_sizes: Mapping[Size, Size] | None
    """snapshot, bound_size: host area block size -> largest block tried; None: no look at the area.
    (arm64: the vma_shift switch of user_mem_abort; x86: kvm_mmu_hugepage_adjust looks at the host's table only)"""
    unknown_area: UnknownArea
    """bound_size. (arm64: default of the vma_shift switch; x86: looks at no area)"""
    check_geometry: bool
    """bound_size, fit_size: a block must lie in the slot with gfn and hva congruent.
    (arm64: fault_supports_stage2_huge_mapping; x86: lpage_info)"""
    logged_size: LoggedSize
    """bound_size.
    (arm64: force_pte of user_mem_abort; x86: kvm_slot_dirty_track_enabled in kvm_mmu_hugepage_adjust)"""
    readonly_slot_logs: bool
    """lookup: the log flag counts on a read-only slot.
    (arm64: memslot_is_logging; x86: kvm_slot_dirty_track_enabled)"""
    precheck: bool
    """precheck, recheck: lockless tests for an invalidation of the frame.
    (arm64: tests under the lock only; x86: mmu_invalidate_retry_gfn_unsafe in kvm_faultin_pfn)"""
    nowait_first: bool
    """pin, wait: the first try may not sleep.
    (arm64: __gfn_to_pfn_memslot without async; x86: __kvm_faultin_pfn)"""
    interruptible: bool
    """wait: the second try may be interrupted by a signal.
    (arm64: __gfn_to_pfn_memslot, not interruptible; x86: __kvm_faultin_pfn)"""
    frame_reaction: Mapping[PinError, Reaction]
    """judge_pfn: what each error frame becomes.
    (arm64: user_mem_abort after __gfn_to_pfn_memslot; x86: kvm_handle_error_pfn)"""
    poison_span: PoisonSpan
    """judge_pfn: lsb of the SIGBUS. (arm64: kvm_send_hwpoison_signal with vma_shift,
    "KVM: arm64: Fix vma_shift staleness on nested hwpoison path"; x86: kvm_send_hwpoison_signal with PAGE_SHIFT)"""
    fetch_from_device: bool
    """permit: code may run from device memory. (arm64: ENOEXEC of user_mem_abort; x86: make_spte)"""
    read_maps_writable: ReadMaps
    """permit.
    (arm64: writable and logging_active in user_mem_abort; x86: map_writable of kvm_faultin_pfn, make_spte)"""
    exec_grant: ExecGrant
    """permit. (arm64: user_mem_abort; x86: make_spte)"""
    retry_test: RetryTest
    """stale.
    (arm64: mmu_invalidate_retry in user_mem_abort; x86: mmu_invalidate_retry_gfn in is_page_fault_stale)"""
    fit_sizes: tuple[Size, ...]
    """fit_size: block sizes in bytes that a look at the host's table may give; empty: no look.
    (arm64: transparent_hugepage_adjust; x86: kvm_mmu_hugepage_adjust)"""
    relax_in_place: bool
    """fit_size, install: a permission fault at its own granule only adds permissions.
    (arm64: kvm_pgtable_stage2_relax_perms; x86: kvm_tdp_mmu_map writes the entry anew)"""
    dirty_mark: DirtyMark
    """install, account. (arm64: mark_page_dirty_in_slot at the end of user_mem_abort; x86: make_spte)"""
    on_retry: OnRetry
    """the caller. (arm64: kvm_handle_guest_abort returns 1; x86: RET_PF_RETRY in kvm_mmu_page_fault)"""
    memfd_source: MemfdSource
    """lookup, check_private, pin.
    (arm64: gmem_abort, "KVM: arm64: Handle guest_memfd-backed guest page faults"; x86: kvm_faultin_pfn_private)"""
    unchanged: Unchanged
    """install. (arm64: EAGAIN of stage2_map_walker_try_leaf; x86: RET_PF_SPURIOUS)"""
    smaller_over_block: SmallerOverBlock
    """Surroundings. (arm64: stage2_map_walk_leaf; x86: tdp_mmu_split_huge_page)"""
    present_leaf: PresentLeaf
    """keep_present. (arm64: has unchanged instead; x86: tdp_mmu_map_handle_target_level, mmu_set_spte,
    "KVM: x86/mmu: Treat TDP MMU faults as spurious if access is already allowed")"""
    slot_flush: SlotFlush
    """Vm.set_region.
    (arm64: kvm_arch_flush_shadow_memslot; x86: kvm_mmu_zap_all_fast by the quirk SLOT_ZAP_ALL)"""
    userfault: Userfault
    """userfault, Surroundings. (kvm_do_userfault, proposed)"""
    prefault: Prefault
    """Guest.prefault. (arm64: "Implement KVM_PRE_FAULT_MEMORY", 7.4; x86: kvm_arch_vcpu_pre_fault_memory)"""
    recovers_blocks: bool
    """DirtyLogging.slot_changed, Vm.change_userfault: pages that the host maps by blocks are dropped when logging ends.
    (arm64: keeps the pages; x86: kvm_mmu_zap_collapsible_sptes)"""
    mmio_sign_extension: SignExtension
    """access_and_completion.
    (arm64: kvm_handle_mmio_return, "KVM: arm64: Fix sign-extension of MMIO loads"; x86: the emulator extends)"""
    prefetch_poison: Reaction | None = None
    """judge_pfn: a poisoned page that nobody waits for; None: as any.
    (arm64: "KVM: arm64: Propagate EHWPOISON in kvm_s2_fault_pin_pfn()"; x86: as any)"""
    device_memory: DeviceMemory = DeviceMemory.BY_FRAME
    """permit. (arm64: user_mem_abort, "KVM: arm64: Allow cacheable stage 2 mapping using VMA flags";
    x86: the entry keeps no such type of the area)"""
    nested_fetch: NestedFetch = NestedFetch.KEPT
    """permit. (arm64: user_mem_abort, "KVM: arm64: nv: Forward FEAT_XNX permissions to the shadow stage-2";
    x86: a shadow entry has the guest's rights)"""
    nested_walk_error: NestedWalkError = NestedWalkError.INJECT_AND_FAIL
    """walk_nested. (arm64: kvm_walk_nested_s2,
    "KVM: arm64: nv: Implement HW access flag management in stage-2 SW PTW"; x86: reflects every failed walk)"""
    tag_refusal: TagRefusal = TagRefusal.BEFORE_LOCK
    """refuse_tags, prepare_tags.
    (arm64: user_mem_abort, "KVM: arm64: Hoist MTE validation check out of MMU lock path"; x86: has no memory tags)"""
    external_aborts: ExternalAborts = ExternalAborts.GUEST
    """external_abort. (arm64: kvm_handle_guest_sea, "KVM: arm64: VM exit to userspace to handle SEA";
    x86: machine checks instead)"""
    address_capture: AddressCapture = AddressCapture.GIVEN
    """lose_address. (arm64: __get_fault_info, "KVM: arm64: Only read HPFAR_EL2 when value is architecturally valid";
    x86: the address comes with the exit)"""
    distrusted_faults: DistrustedFaults = DistrustedFaults.NONE
    """lose_address: the scope of the workaround for erratum 834220. (arm64: __get_fault_info,
    "KVM: arm64: Only read HPFAR_EL2 when value is architecturally valid"; x86: none)"""
    root_address_size: RootAddressSize = RootAddressSize.UNKNOWN
    """lose_address: with address_capture WHEN_VALID. (arm64: esr_fsc_is_addr_sz_fault,
    "arm64: Correct value returned by ESR_ELx_FSC_ADDRSZ_nL()"; x86: no such code)"""
    unsupported_atomics: UnsupportedAtomics = UnsupportedAtomics.FAULT
    """unsupported_status, refuse_exclusive. (arm64: kvm_handle_guest_abort,
    "KVM: arm64: Handle DABT caused by LS64* instructions on unsupported memory"; x86: no such fault)"""
    wide_accesses: WideAccesses = WideAccesses.AS_DESCRIBED
    """decode_access. (arm64: io_mem_abort, "KVM: arm64: Add exit to userspace on {LD,ST}64B* outside of memslots";
    x86: the emulator splits)"""
    injected_length: InjectedLength = InjectedLength.FULL
    """unhandled, external, atomic, size_fault. (arm64: inject_abt64, "KVM: arm64: Unconditionally set IL for
    injected abort exceptions"; x86: no such bit)"""
    injected_walk: InjectedWalk = InjectedWalk.PLAIN
    """external, atomic, size_fault. (arm64: inject_abt64, "KVM: arm64: Populate level on S1PTW SEA injection";
    x86: no such status)"""
    injected_target: InjectedTarget = InjectedTarget.KERNEL
    """external, atomic, size_fault. (arm64: kvm_inject_sea, kvm_sea_target_is_el2, effective_sctlr2_ease;
    x86: reflects to the hypervisor by its own rules)"""
    register_page: RegisterPage = RegisterPage.UNHANDLED
    """handle_vncr_abort, vncr_path. (arm64: kvm_handle_vncr_abort, "KVM: arm64: nv: Re-translate VNCR before
    injecting abort"; x86: no such page)"""

    def differs(self, other: Policy) -> dict[str, tuple[object, object]]:
        """Members whose values differ: name -> (this, other)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: (a, b) for name, (a, b) in pairs.items() if a != b}
