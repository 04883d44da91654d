"""What probed functions and trace events of x86 KVM say of its decisions.

The fields of a kprobe event have the names that whoever defined it gave them; these are the ones read here: ``ret``
everywhere, members of struct kvm_page_fault under their own names, ``gpa``, ``size``, ``slot``, ``start``, ``end``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from arch.x86.pferr import PRESENT, USER, WRITE
from kvmfault.contract.format import R, W, X
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, PinError
from kvmfault.contract.probes import (
    CONTINUE,
    EMULATE,
    FIXED,
    RETRY,
    SPURIOUS,
    WRITE_PROTECTED,
    Probe,
    Probes,
    Said,
    Values,
    error_text,
    fields,
)
from kvmfault.types import Gpa

RET_PF: Final = {0: CONTINUE, 1: RETRY, 2: EMULATE, 3: WRITE_PROTECTED, 4: "not here", 5: FIXED, 6: SPURIOUS}
_NO_SLOT: Final = 1 << 63
_ERROR: Final = 0x7FF << 52
"""KVM_PFN_ERR_MASK; KVM_PFN_ERR_FAULT is the mask itself, those after it count up."""
PIN_ERRORS: Final = {
    _ERROR: PinError.FAULT,
    _ERROR + 1: PinError.HWPOISON,
    _ERROR + 2: PinError.RO_FAULT,
    _ERROR + 3: PinError.SIGPENDING,
}
_ACC_EXEC, _ACC_USER = 1, 4
"""Bits of a role's access; ACC_WRITE_MASK is W."""
_ADDRESS: Final = (1 << 52) - (1 << 12)
_DIRTY, _BLOCK = 1 << 6, 1 << 7
_LARGEST_LEVEL: Final = 3
_ROOT_LEVEL: Final = 5
_SIZES: Final = {"max_size": "max_level", "wanted": "req_level", "size": "goal_level"}


def _number(recorded: Values, name: str) -> int:
    value = recorded.get(name, 0)
    return value if isinstance(value, int) else int(value, 0)


def size_of(level: int) -> int:
    """Bytes of a level: 1 is a page. ValueError for one that there is not."""
    if not 1 <= level <= _ROOT_LEVEL:
        raise ValueError(level)
    return 1 << 12 + 9 * (level - 1)


def answer(ret: int) -> str:
    """RET_PF_* or -errno in neutral words."""
    return error_text(-ret) if ret < 0 else RET_PF.get(ret, f"RET_PF {ret}")


def _answered(*names: str) -> Callable[[Values], Values]:
    rest = fields(*names)

    def read(recorded: Values) -> Values:
        sizes = {new: size_of(_number(recorded, old)) for new, old in _SIZES.items() if old in recorded}
        return {"answer": answer(_number(recorded, "ret")), **sizes, **rest(recorded)}

    return read


def _pinned(recorded: Values) -> Values:
    made: dict[str, int | str] = {"answer": answer(_number(recorded, "ret"))}
    if "gfn" in recorded:
        made["gfn"] = recorded["gfn"]
    if _number(recorded, "slotp"):  # without a memslot the probe read these through a null pointer
        made["slot"] = _number(recorded, "slot") & 0xFFFF
        made["hva"] = _number(recorded, "hva")
    if "access" in recorded:
        access = _number(recorded, "access")
        made["prot"] = (R if access & _ACC_USER else 0) | access & W | (X if access & _ACC_EXEC else 0)
    pfn = _number(recorded, "pfn")
    if pfn in PIN_ERRORS:
        made["error"] = PIN_ERRORS[pfn].name
    elif pfn and not pfn & (_NO_SLOT | _ERROR):
        made["pfn"] = pfn
        made["writable"] = _number(recorded, "map_writable")
    return made


def guest_walk(
    entries: Sequence[tuple[int, int]], address: int, write: bool
) -> GuestTranslation | GuestWalkFault | None:
    """Where entries of long-mode tables lead: (descriptor, level) from the root on; None: the last one is missing.

    A page that is not marked dirty is mapped writable only by the write that marks it.
    Kernel: FNAME(walk_addr_generic), FNAME(protect_clean_gpte).
    """
    writable = user = executable = True
    for desc, level in entries:
        if not desc & PRESENT:
            return GuestWalkFault(level=level)
        writable, user = writable and bool(desc & WRITE), user and bool(desc & USER)
        executable = executable and not desc >> 63
        if level == 1 or (level <= _LARGEST_LEVEL and desc & _BLOCK):
            size = size_of(level)
            gpa = desc & _ADDRESS & -size | address & (size - 1) & -4096
            marked = write or bool(desc & _DIRTY)
            return GuestTranslation(Gpa(gpa), size, True, writable and marked, executable, level, user)
    return None


def _requested(recorded: Values) -> Values:
    made: dict[str, int | str] = {"gfn": recorded["gfn"], "size": size_of(_number(recorded, "level"))}
    pfn = _number(recorded, "pfn")
    return made if pfn & (_NO_SLOT | _ERROR) else {**made, "pfn": pfn}


def _fast(recorded: Values) -> Values | None:
    return {"gpa": _number(recorded, "cr2_or_gpa"), "old": recorded["old_spte"], "new": recorded["new_spte"]}


def _set_spte(recorded: Values) -> Values:
    size = size_of(_number(recorded, "level"))
    gpa = _number(recorded, "gfn") << 12
    made = {"gpa": gpa & -size, "size": size, "desc": _number(recorded, "spte")}
    return {**made, "place": _number(recorded, "sptep") & 0xFFF} if "sptep" in recorded else made


def _spte_changed(recorded: Values) -> Values:
    size = size_of(_number(recorded, "level"))
    gpa = _number(recorded, "gfn") << 12
    made = {"gpa": gpa & -size, "size": size, "as_id": _number(recorded, "as_id")}
    return {**made, "old": recorded["old_spte"], "new": recorded["new_spte"]}


def _marked_mmio(recorded: Values) -> Values:
    return {"gpa": _number(recorded, "gfn") << 12, "generation": _number(recorded, "gen")}


def _table_page(recorded: Values) -> Values:
    # the role as a number (union kvm_mmu_page_role), or in the kernel's words for it
    if "role" in recorded:
        role = _number(recorded, "role")
        return {"gfn": recorded["gfn"], "level": role & 0xF, "direct": role >> 7 & 1}
    level = str(recorded.get("level", "")).removeprefix("l")
    return {"gfn": recorded["gfn"], "level": int(level) if level.isdigit() else 0, "direct": int("direct" in recorded)}


def _page_texts(*ends: str) -> tuple[str, ...]:
    return tuple(
        f"sp gen {{gen:d}} gfn {{gfn:x}} {{level:w}} {{gpte:w}} {{quadrant:w}} {direct}{{access:w}}{gone} {{nxe:w}} "
        f"{{ad:w}} root {{roots:d}} {{sync:w}}{end}"
        for end in ends
        for direct in ("{direct:w} ", "")
        for gone in ("", " invalid")
    )


_ENTRIES: Final = {
    "kvm_mmu_page_fault": Probe(Said.FAULT, fields(address="cr2_or_gpa", code="error_code", vcpu="vcpu")),
    "__kvm_set_memory_region": Probe(Said.SLOT, fields()),
    "kvm_set_memslot": Probe(Said.SLOT_CHANGING, fields()),
    "kvm_arch_flush_shadow_memslot": Probe(Said.SLOT_FLUSH, fields("slot")),
    "__kvm_mmu_zap_all_fast_front_half": Probe(Said.TABLE_RETIRED, fields("kvm")),
    "kvm_mmu_slot_remove_write_access": Probe(Said.WRITES_WATCHED, fields("slot")),
    "kvm_mmu_slot_try_split_huge_pages": Probe(Said.BLOCKS_SPLIT, fields("slot")),
    "kvm_mmu_zap_collapsible_sptes": Probe(Said.BLOCKS_RECOVERED, fields("slot")),
    "kvm_mmu_notifier_invalidate_range_start": Probe(Said.INVALIDATE, fields("start", "end")),
    "kvm_mmu_notifier_invalidate_range_end": Probe(Said.INVALIDATED, fields("start", "end")),
    "kvm_unmap_gfn_range": Probe(Said.UNMAP, fields("slot", "start", "end")),
    "kvm_age_gfn": Probe(Said.AGE, fields("slot", "start", "end")),
    "kvm_test_age_gfn": Probe(Said.TEST_AGE, fields("slot", "start", "end")),
    "kvm_get_dirty_log_protect": Probe(Said.GET_LOG, fields("slot")),
    "kvm_clear_dirty_log_protect": Probe(Said.CLEAR_LOG, fields("slot", first="first_page", pages="num_pages")),
    "kvm_arch_mmu_enable_log_dirty_pt_masked": Probe(Said.LOG_PROTECT, fields("slot", "mask", first="gfn_offset")),
    "kvm_mmu_track_write": Probe(Said.WRITES, fields("gpa", size="bytes")),
    "mmu_set_spte": Probe(Said.SETTING, fields("gfn", "pfn", place="sptep")),
    "mmu_try_to_unsync_pages": Probe(Said.UNSYNC, fields("gfn")),
    "x86_emulate_instruction": Probe(Said.EMULATING, fields(address="cr2_or_gpa")),
    "kvm_inject_page_fault": Probe(Said.INJECTED, fields("address", code="error_code")),
    "kvm_arch_vcpu_pre_fault_memory": Probe(Said.PREFAULT, fields("gpa", "size")),
}
_DECIDED: Final = Probe(Said.DECIDED, _answered("gfn", "prefetch"))
_RETURNS: Final = {
    "kvm_mmu_page_fault": Probe(Said.RETURNED, fields("ret")),
    "kvm_faultin_pfn": Probe(Said.PINNED, _pinned),
    "fast_page_fault": Probe(Said.REPAIR_TRIED, _answered("gfn")),
    "kvm_tdp_mmu_map": Probe(Said.MAPPED, _answered("gfn")),
    **dict.fromkeys(
        (
            "kvm_tdp_page_fault",
            "direct_page_fault",
            "nonpaging_page_fault",
            "paging64_page_fault",
            "paging32_page_fault",
            "ept_page_fault",
        ),
        _DECIDED,
    ),
    "kvm_set_memslot": Probe(Said.SLOT_CHANGED, fields("ret")),
    "__kvm_set_memory_region": Probe(Said.SLOT_DONE, fields("ret")),
    "kvm_get_dirty_log_protect": Probe(Said.GOT_LOG, fields("ret")),
    "kvm_clear_dirty_log_protect": Probe(Said.CLEARED_LOG, fields("ret")),
    "mmu_try_to_unsync_pages": Probe(Said.UNSYNCED, fields("ret")),
    "x86_emulate_instruction": Probe(Said.EMULATED, fields("ret")),
    "kvm_arch_vcpu_pre_fault_memory": Probe(Said.PREFAULTED, fields("ret")),
}
_EVENTS: Final = {
    "kvm_mmu_set_spte": Probe(Said.INSTALLED, _set_spte),
    "kvm_mmu_spte_requested": Probe(Said.REQUESTED, _requested),
    "kvm_tdp_mmu_spte_changed": Probe(Said.CHANGED, _spte_changed),
    "fast_page_fault": Probe(Said.REPAIRED, _fast),
    "kvm_mmu_pagetable_walk": Probe(Said.WALK, fields(address="addr")),
    "kvm_mmu_paging_element": Probe(Said.WALK_ENTRY, fields("level", desc="pte")),
    **dict.fromkeys(("kvm_mmu_set_accessed_bit", "kvm_mmu_set_dirty_bit"), Probe(Said.WALK_MARKED, fields("gpa"))),
    "kvm_mmu_walker_error": Probe(Said.WALK_FAILED, fields(code="pferr")),
    "mark_mmio_spte": Probe(Said.MMIO_INSTALLED, _marked_mmio),
    "kvm_mmu_get_page": Probe(Said.SHADOWED, _table_page, _page_texts(" {created:w}")),
    "kvm_mmu_sync_page": Probe(Said.SYNCED, _table_page, _page_texts("")),
    "kvm_mmu_prepare_zap_page": Probe(Said.UNSHADOWED, _table_page, _page_texts("")),
}
PROBES: Final = Probes(
    entries=_ENTRIES,
    returns=_RETURNS,
    events=_EVENTS,
    walk=guest_walk,
    # without the TDP MMU no block is split ahead of a write (kvm_mmu_slot_try_split_huge_pages)
    settings={"direct_page_fault": ("eager-split=no",)},
)
