"""Policy: the documented differences of decision between architectures and kernel versions, as data.

A policy says *what* differs; the one place that reads a value is named in its docstring (steps of
kvmfault/path). The difference between two targets is the diff of two policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

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
from kvmfault.types import Errno, Size

__all__ = ["Policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One target's values. Members with a default are about things that most architectures do not have.

    Each docstring: ``readers: meaning. (kernel functions; commit titles)``. A reader is a step, or a function outside
    the path; the meaning may be left to the type's docstring; a source may begin with whose it is, ``arm64: ...``.
    ``contract.described`` takes them apart, for the documentation and for ``compare policies``.
    """

    unbacked: Unbacked
    """leave_unbacked, settle_slot, Prefaulting.prefault.
    (arm64: kvm_handle_guest_abort, io_mem_abort; x86: kvm_handle_noslot_fault; riscv: gstage_page_fault; loongarch:
    EFAULT of kvm_map_page; s390: is_noslot_pfn in kvm_s390_faultin_gfn, gmap_fault in 6.12; powerpc:
    kvmppc_book3s_radix_page_fault)"""
    invalid_slot: InvalidSlot
    """lookup, settle_slot.
    (arm64: gfn_to_hva_memslot_prot; x86: kvm_faultin_pfn; riscv: gfn_to_hva_memslot_prot; loongarch:
    gfn_to_hva_memslot_prot; s390: gmap has no such look-up in 6.12, __kvm_faultin_pfn later; powerpc:
    KVM_MEMSLOT_INVALID in kvmppc_book3s_radix_page_fault)"""
    write_tracking: bool
    """track_write, fit_size, protect_tracked: frames that hold guest tables are write-protected.
    (arm64: tracks no writes; x86: page_fault_handle_page_track, kvm_gfn_is_write_tracked; riscv: tracks no writes;
    loongarch: tracks no writes; s390: tracks none but those of vSIE, not modelled; powerpc: tracks no writes)"""
    topup: Topup
    """topup.
    (arm64: user_mem_abort; x86: mmu_topup_memory_caches; riscv: head of kvm_riscv_gstage_map; loongarch:
    kvm_mmu_topup_memory_cache in kvm_map_page; s390: kvm_s390_mmu_cache_topup, __gmap_link before 7.0; powerpc:
    kvmppc_create_pte, before it takes the lock)"""
    unexplained_permission: Errno | None
    """explain_permission: errno for a permission fault that is neither write nor fetch.
    (arm64: head of user_mem_abort, only VM_WARN_ON_ONCE since 7.1; x86: has no such test; riscv: has no such test;
    loongarch: has no such test; s390: has no such test; powerpc: has no such test)"""
    area_sizes: Mapping[Size, Size] | None
    """snapshot, bound_size: host area block size -> largest block tried; None: no look at the area.
    (arm64: the vma_shift switch of user_mem_abort; x86: kvm_mmu_hugepage_adjust looks at the host's table only; riscv:
    vma_pagesize in kvm_riscv_gstage_map; loongarch: looks at the host's table only; s390: looks at no area; powerpc:
    looks at the host's table only)"""
    unknown_area: UnknownArea
    """bound_size.
    (arm64: default of the vma_shift switch; x86: looks at no area; riscv: end of the look at the area in
    kvm_riscv_gstage_map; loongarch: looks at no area; s390: looks at no area; powerpc: looks at no area)"""
    check_geometry: bool
    """bound_size, fit_size: a block must lie in the slot with gfn and hva congruent.
    (arm64: fault_supports_stage2_huge_mapping; x86: lpage_info; riscv: kvm_riscv_gstage_map has no such check in 6.12;
    loongarch: kvm_hugepage_capable, fault_supports_huge_mapping; s390: slots are whole segments,
    kvm_arch_prepare_memory_region; powerpc: only congruence, for the level of kvmppc_book3s_instantiate_page)"""
    logged_size: LoggedSize
    """bound_size, Surroundings.repair_fast.
    (arm64: force_pte of user_mem_abort; x86: kvm_slot_dirty_track_enabled in kvm_mmu_hugepage_adjust; riscv: logging
    in kvm_riscv_gstage_map; loongarch: fault_supports_huge_mapping; s390: kvm_s390_faultin_gfn does not ask; powerpc:
    large_enable in kvmppc_book3s_instantiate_page)"""
    readonly_slot_logs: bool
    """lookup: the log flag counts on a read-only slot.
    (arm64: memslot_is_logging; x86: kvm_slot_dirty_track_enabled; riscv: logging in kvm_riscv_gstage_map; loongarch:
    kvm_slot_dirty_track_enabled in fault_supports_huge_mapping; s390: has no read-only slots; powerpc: large_enable in
    kvmppc_book3s_instantiate_page)"""
    precheck: bool
    """precheck, recheck: lockless tests for an invalidation of the frame.
    (arm64: tests under the lock only; x86: mmu_invalidate_retry_gfn_unsafe in kvm_faultin_pfn; riscv: tests under the
    lock only; loongarch: tests under the lock only; s390: since 7.0 mmu_invalidate_retry_gfn_unsafe once the frame is
    there, which only saves taking the lock; powerpc: tests under the lock only)"""
    nowait_first: bool
    """pin, wait: the first try may not sleep.
    (arm64: __gfn_to_pfn_memslot without async; x86: __kvm_faultin_pfn; riscv: gfn_to_pfn_prot without async;
    loongarch: gfn_to_pfn_prot without async; s390: FOLL_NOWAIT of kvm_s390_faultin_gfn, FAULT_FLAG_RETRY_NOWAIT in
    6.12; powerpc: __gfn_to_pfn_memslot without async)"""
    interruptible: bool
    """wait: the second try may be interrupted by a signal.
    (arm64: __gfn_to_pfn_memslot, not interruptible; x86: __kvm_faultin_pfn; riscv: gfn_to_pfn_prot, not interruptible;
    loongarch: gfn_to_pfn_prot, not interruptible; s390: kvm_s390_faultin_gfn, not interruptible; powerpc:
    __gfn_to_pfn_memslot, not interruptible)"""
    frame_reaction: Mapping[PinError, Reaction]
    """judge_pfn: what each error frame becomes.
    (arm64: user_mem_abort after __gfn_to_pfn_memslot; x86: kvm_handle_error_pfn; riscv: kvm_riscv_gstage_map after
    gfn_to_pfn_prot; loongarch: is_error_noslot_pfn in kvm_map_page; s390: kvm_s390_faultin_gfn, gmap_fault in 6.12;
    powerpc: is_error_noslot_pfn in kvmppc_book3s_instantiate_page)"""
    poison_span: PoisonSpan
    """judge_pfn: lsb of the SIGBUS.
    (arm64: kvm_send_hwpoison_signal with vma_shift, "KVM: arm64: Fix vma_shift staleness on nested hwpoison path";
    x86: kvm_send_hwpoison_signal with PAGE_SHIFT; riscv: send_sig_mceerr with vma_pageshift in kvm_riscv_gstage_map;
    loongarch: sends no SIGBUS; s390: sends no SIGBUS; powerpc: sends no SIGBUS)"""
    fetch_from_device: bool
    """permit: code may run from device memory.
    (arm64: ENOEXEC of user_mem_abort; x86: make_spte; riscv: kvm_riscv_gstage_map makes no test; loongarch:
    kvm_map_page makes no test; s390: gmap_link makes no test; powerpc: kvmppc_book3s_instantiate_page makes no test)"""
    read_maps_writable: ReadMaps
    """permit.
    (arm64: writable and logging_active in user_mem_abort; x86: map_writable of kvm_faultin_pfn, make_spte; riscv:
    writable in kvm_riscv_gstage_map; loongarch: __WRITEABLE in kvm_map_page for a write only; s390: gmap_link protects
    what is not dirty; powerpc: upgrade_write in kvmppc_book3s_instantiate_page)"""
    exec_grant: ExecGrant
    """permit, fit_size, install.
    (arm64: user_mem_abort; x86: make_spte; riscv: page_exec of gstage_map_page; loongarch: kvm_map_page never sets
    _PAGE_NO_EXEC; s390: no entry of gmap forbids it; powerpc: _PAGE_EXEC in kvmppc_book3s_instantiate_page)"""
    retry_test: RetryTest
    """stale.
    (arm64: mmu_invalidate_retry in user_mem_abort; x86: mmu_invalidate_retry_gfn in is_page_fault_stale; riscv:
    mmu_invalidate_retry in kvm_riscv_gstage_map; loongarch: mmu_invalidate_retry_gfn in kvm_map_page; s390:
    mmu_invalidate_retry_gfn in kvm_s390_faultin_gfn, fixup_user_fault before 7.0; powerpc: mmu_invalidate_retry in
    kvmppc_create_pte)"""
    fit_sizes: tuple[Size, ...]
    """fit_size, DirtyLogging.recover_blocks: block sizes in bytes that a look at the host's table may give; empty: no
    look.
    (arm64: transparent_hugepage_adjust; x86: kvm_mmu_hugepage_adjust; riscv: kvm_riscv_gstage_map does not look in
    6.12; loongarch: host_pfn_mapping_level; s390: only where KVM_CAP_S390_HPAGE_1M asked; powerpc: find_kvm_host_pte
    in kvmppc_book3s_instantiate_page)"""
    relax_in_place: bool
    """fit_size, install: a permission fault at its own granule only adds permissions.
    (arm64: kvm_pgtable_stage2_relax_perms; x86: kvm_tdp_mmu_map writes the entry anew; riscv: gstage_set_pte writes
    the entry anew; loongarch: kvm_map_page writes the entry anew; s390: gmap_link writes the entry anew; powerpc:
    kvmppc_create_pte adds, which is modelled as anew)"""
    dirty_mark: DirtyMark
    """install, account, Surroundings.repair_fast, DirtyLogging.get_dirty_log, DirtyLogging.clear_dirty_log,
    DirtyLogging.reset_rings, DirtyLogging.slot_changed.
    (arm64: mark_page_dirty_in_slot at the end of user_mem_abort; x86: make_spte; powerpc: kvm_radix_test_clear_dirty;
    s390: gmap_sync_dirty_log; riscv: mark_page_dirty in kvm_riscv_gstage_map; loongarch: mark_page_dirty_in_slot at
    the end of kvm_map_page)"""
    on_retry: OnRetry
    """the caller.
    (arm64: kvm_handle_guest_abort returns 1; x86: RET_PF_RETRY in kvm_mmu_page_fault; riscv: kvm_riscv_gstage_map
    returns 0; loongarch: retry of kvm_map_page, schedules after 100; s390: loop of kvm_s390_faultin_gfn, without holes
    since "KVM: s390: Fix fault-in code", fixup_user_fault before 7.0; powerpc: RESUME_GUEST for EAGAIN of
    kvmppc_create_pte)"""
    memfd_source: MemfdSource
    """lookup, check_private, pin.
    (arm64: gmem_abort, "KVM: arm64: Handle guest_memfd-backed guest page faults"; x86: kvm_faultin_pfn_private; riscv:
    has no guest_memfd; loongarch: has no guest_memfd; s390: has no guest_memfd; powerpc: has no guest_memfd)"""
    unchanged: Unchanged
    """install.
    (arm64: EAGAIN of stage2_map_walker_try_leaf; x86: RET_PF_SPURIOUS; riscv: gstage_set_pte writes it again;
    loongarch: kvm_map_page_fast; s390: gmap_try_fixup_minor; powerpc: kvmppc_create_pte finds the same entry)"""
    smaller_over_block: SmallerOverBlock
    """State.
    (arm64: stage2_map_walk_leaf; x86: tdp_mmu_split_huge_page; riscv: gstage_set_pte; loongarch: kvm_split_huge; s390:
    dat_split_ste, gmap_pmd_split before 7.0; powerpc: kvmppc_create_pte unmaps the larger leaf)"""
    present_leaf: PresentLeaf
    """keep_present.
    (arm64: has unchanged instead; x86: tdp_mmu_map_handle_target_level, mmu_set_spte, "KVM: x86/mmu: Treat TDP MMU
    faults as spurious if access is already allowed"; riscv: gstage_set_pte; loongarch: kvm_set_pte in kvm_map_page;
    s390: gmap_link; powerpc: kvmppc_create_pte)"""
    slot_flush: SlotFlush
    """Vm.set_region.
    (arm64: kvm_arch_flush_shadow_memslot; x86: kvm_mmu_zap_all_fast by the quirk SLOT_ZAP_ALL; riscv:
    kvm_arch_flush_shadow_memslot; loongarch: kvm_arch_flush_shadow_memslot; s390: kvm_arch_commit_memory_region;
    powerpc: kvmppc_radix_flush_memslot)"""
    userfault: Userfault
    """userfault, State. (kvm_do_userfault, proposed)"""
    prefault: Prefault
    """Prefaulting.prefault.
    (arm64: "Implement KVM_PRE_FAULT_MEMORY", 7.4; x86: kvm_arch_vcpu_pre_fault_memory; riscv: has no such ioctl;
    loongarch: has no such ioctl; s390: has no such ioctl; powerpc: has no such ioctl)"""
    recovers_blocks: bool
    """DirtyLogging.recover_blocks: pages that the host maps by blocks are dropped when logging ends.
    (arm64: keeps the pages; x86: kvm_mmu_zap_collapsible_sptes; riscv: keeps the pages; loongarch: keeps the pages;
    s390: keeps the pages; powerpc: has logging_drops instead)"""
    mmio_sign_extension: SignExtension
    """access_and_completion.
    (arm64: kvm_handle_mmio_return, "KVM: arm64: Fix sign-extension of MMIO loads"; x86: the emulator extends; riscv:
    kvm_riscv_vcpu_mmio_return; loongarch: kvm_complete_mmio_read; s390: has no device accesses; powerpc:
    kvmppc_complete_mmio_load)"""
    prefetch_poison: Reaction | None = None
    """judge_pfn: a poisoned page that nobody waits for; None: as any.
    (arm64: "KVM: arm64: Propagate EHWPOISON in kvm_s2_fault_pin_pfn()"; x86: as any)"""
    device_memory: DeviceMemory = DeviceMemory.BY_FRAME
    """permit.
    (arm64: user_mem_abort, "KVM: arm64: Allow cacheable stage 2 mapping using VMA flags"; x86: the entry keeps no such
    type of the area; riscv: gstage_map_page, whose entries name no kind; loongarch: pfn_valid in kvm_map_page; s390:
    entries name no kind; powerpc: the host's own entry decides, in kvmppc_book3s_instantiate_page)"""
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
    logging_drops: bool = False
    """DirtyLogging.slot_changed: when logging begins or ends, what maps the slot is dropped.
    (arm64: protects or splits instead; x86: as arm64; powerpc: kvmppc_core_commit_memory_region_hv; riscv:
    gstage_wp_memory_region protects instead; loongarch: kvm_arch_commit_memory_region cleans instead; s390: leaves the
    entries to the next harvest)"""
    unmap_marks: bool = False
    """DirtyLogging.drop: pages that entries know to be written are marked before these entries go.
    (arm64: marked when it was mapped; x86: as arm64; powerpc: kvmppc_unmap_pte; s390: not, see _gmap_unmap_pte)"""
    age_flushes: bool = False
    """Vm.age: what was made old is flushed from the TLBs.
    (arm64: kvm_age_gfn flushes nothing; x86: as arm64; s390: gmap_age_gfn, with the entry)"""
    marks_rewritten: bool = True
    """State: a writable leaf over an entry that was writable is marked dirty again.
    (arm64: has no dirty state; x86: make_spte, "KVM: x86/mmu: Always set SPTE's dirty bit if it's created as
    writable")"""
    register_page: RegisterPage = RegisterPage.UNHANDLED
    """handle_vncr_abort, vncr_path. (arm64: kvm_handle_vncr_abort, "KVM: arm64: nv: Re-translate VNCR before
    injecting abort"; x86: no such page)"""

    def differs(self, other: Policy) -> dict[str, tuple[object, object]]:
        """Members whose values differ: name -> (this, other)."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return {name: (a, b) for name, (a, b) in pairs.items() if a != b}
