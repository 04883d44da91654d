"""The kernel's functions that kernel-map.md names, and what shows each right. Their places are found, not listed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_DECISIONS: Final = ("vectors/arm64_decisions.json", "test_arm64_decide.py")
_ARM64: Final = ("vectors/arm64_vectors.json", "test_arm64_vectors.py")
_X86: Final = ("vectors/x86_vectors.json", "test_x86_vectors.py")
_INVALIDATE: Final = ("vectors/x86_vectors.json", "test_invalidate.py")
_SLOTS: Final = ("vectors/memslot_ioctl_cases-6.12.117-svm-npt.json", "test_memslots.py")

FUNCTIONS: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "arm64": {
        "kvm_handle_guest_abort": _DECISIONS,
        "user_mem_abort": (*_DECISIONS, "test_path_memory.py"),
        "gmem_abort": ("test_path_memory.py",),
        "kvm_is_exec_fault": _ARM64,
        "kvm_is_write_fault": _ARM64,
        "kvm_get_fault_gpa": (*_ARM64, "test_contract_facts.py"),
        "io_mem_abort": (*_DECISIONS, "test_path_mmio.py"),
        "kvm_handle_mmio_return": (*_DECISIONS, "test_path_mmio.py"),
        "kvm_handle_guest_sea": _DECISIONS,
        "handle_access_fault": _DECISIONS,
        "fault_supports_stage2_huge_mapping": (*_DECISIONS, "test_path_memory.py"),
        "transparent_hugepage_adjust": (*_DECISIONS, "test_path_memory.py"),
        "sanitise_mte_tags": _DECISIONS,
        "kvm_pgtable_stage2_map": (*_DECISIONS, "test_machine_stage2.py"),
        "kvm_pgtable_stage2_relax_perms": (*_DECISIONS, "test_arm64_stage2.py"),
        "kvm_walk_nested_s2": _DECISIONS,
        "kvm_s2_handle_perm_fault": (*_DECISIONS, *_ARM64),
        "__get_fault_info": _ARM64,
        "kvm_inject_size_fault": _DECISIONS,
        "kvm_translate_vncr": ("test_arm64_vncr.py",),
        "kvm_handle_vncr_abort": ("test_arm64_vncr.py",),
    },
    "x86": {
        "kvm_mmu_page_fault": _X86,
        "kvm_mmu_do_page_fault": _X86,
        "handle_mmio_page_fault": _X86,
        "page_fault_handle_page_track": _X86,
        "fast_page_fault": (*_X86, "test_x86_joints.py"),
        "kvm_faultin_pfn": _X86,
        "__kvm_faultin_pfn": _X86,
        "kvm_faultin_pfn_private": _X86,
        "kvm_handle_noslot_fault": _X86,
        "kvm_handle_error_pfn": (*_X86, "test_path_memory.py"),
        "kvm_mmu_prepare_memory_fault_exit": _X86,
        "is_page_fault_stale": (*_X86, "test_path_races.py"),
        "kvm_mmu_hugepage_adjust": _X86,
        "kvm_tdp_mmu_map": (*_X86, "test_machine_stage2.py"),
        "make_spte": ("test_x86_spte.py",),
        "make_mmio_spte": ("test_x86_spte.py",),
        "kvm_mmu_write_protect_fault": (*_X86, "test_x86_joints.py"),
        "npf_interception": _X86,
    },
    "generic": {
        "__kvm_set_memory_region": (*_SLOTS, "test_memslots_rules.py"),
        "kvm_set_memslot": (*_SLOTS, "test_memslots_steps.py"),
        "gfn_to_memslot": _SLOTS,
        "gfn_to_hva_memslot_prot": (*_DECISIONS, *_X86),
        "__gfn_to_pfn_memslot": (*_DECISIONS, "test_hostmem.py"),
        "kvm_gmem_get_pfn": _X86,
        "kvm_handle_hva_range": ("test_memslots_steps.py", "test_path_races.py"),
        "kvm_mmu_invalidate_begin": _INVALIDATE,
        "kvm_mmu_invalidate_range_add": _INVALIDATE,
        "kvm_mmu_invalidate_end": _INVALIDATE,
        "mmu_invalidate_retry": _INVALIDATE,
        "mmu_invalidate_retry_gfn": _INVALIDATE,
        "mmu_invalidate_retry_gfn_unsafe": _INVALIDATE,
        "kvm_age_gfn": ("test_path_races.py",),
        "mark_page_dirty_in_slot": (*_DECISIONS, "test_path_memory.py"),
        "kvm_get_dirty_log_protect": ("test_dirty_log.py", "test_behaviours.py", "test_live.py"),
        "kvm_clear_dirty_log_protect": ("test_dirty_log.py", "test_behaviours.py", "test_live.py"),
        "kvm_dirty_ring_push": ("test_dirty_log.py", "test_live.py"),
        "kvm_vm_set_mem_attributes": ("test_private_memory.py", "test_behaviours.py"),
        "kvm_gmem_punch_hole": ("test_private_memory.py",),
        "kvm_vcpu_pre_fault_memory": ("test_prefault.py", "test_behaviours.py", "test_live.py"),
    },
}
"""The kernel's functions that the page tells the place of, and what shows each right (below tests/)."""
