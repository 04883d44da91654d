"""What probed functions of x86 KVM say of its decisions.

The fields of a kprobe event have the names that whoever defined it gave them; these are the ones read here: ``ret``
everywhere, members of struct kvm_page_fault under their own names, ``gpa``, ``size``, ``slot``, ``start``, ``end``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    error_text,
    fields,
    number,
)
from kvmfault.contract.tracepoints import Values
from kvmfault.types import Gpa
from kvmfault.vm.memslot_request import ChangeKind

RET_PF: Final = {0: CONTINUE, 1: RETRY, 2: EMULATE, 3: WRITE_PROTECTED, 4: "not here", 5: FIXED, 6: SPURIOUS}
NO_SLOT: Final = 1 << 63
ERROR: Final = 0x7FF << 52
"""KVM_PFN_ERR_MASK; KVM_PFN_ERR_FAULT is the mask itself, those after it count up."""
PIN_ERRORS: Final = {
    ERROR: PinError.FAULT,
    ERROR + 1: PinError.HWPOISON,
    ERROR + 2: PinError.RO_FAULT,
    ERROR + 3: PinError.SIGPENDING,
}
_ACC_EXEC, _ACC_USER = 1, 4
"""Bits of a role's access; ACC_WRITE_MASK is W."""
_ADDRESS: Final = (1 << 52) - (1 << 12)
_DIRTY, _BLOCK = 1 << 6, 1 << 7
_LARGEST_LEVEL: Final = 3
_ROOT_LEVEL: Final = 5
CHANGES: Final = (ChangeKind.CREATE, ChangeKind.DELETE, ChangeKind.MOVE, ChangeKind.FLAGS_ONLY)
"""enum kvm_mr_change."""
_SIZES: Final = {"max_size": "max_level", "wanted": "req_level", "size": "goal_level"}


def size_of(level: int) -> int:
    """Bytes of a level: 1 is a page. ValueError for one that there is not."""
    if not 1 <= level <= _ROOT_LEVEL:
        raise ValueError(level)
    return 1 << 12 + 9 * (level - 1)


def answer(ret: int) -> str:
    """RET_PF_* or -errno in neutral words."""
    return error_text(-ret) if ret < 0 else RET_PF.get(ret, f"RET_PF {ret}")


_ECHO: Final = {
    "PFERR_PRESENT": "present",
    "PFERR_WRITE": "write",
    "PFERR_USER": "user",
    "PFERR_RSVD": "rsvd",
    "PFERR_FETCH": "exec",
    "vetoed": "huge_disallowed",
    "address": "addr",
    "pferr": "error_code",
}
"""The kernel's own accessors and what else the members of struct kvm_page_fault repeat."""


def _answered(*names: str) -> Callable[[Values], Values]:
    rest = fields(*names, **_ECHO)

    def read(recorded: Values) -> Values:
        sizes = {new: size_of(number(recorded, old)) for new, old in _SIZES.items() if old in recorded}
        return {"answer": answer(number(recorded, "ret")), **sizes, **rest(recorded)}

    return read


def _slot(recorded: Values) -> Values:
    if not number(recorded, "slotp"):  # without a memslot the probe read these through a null pointer
        return {}
    return {
        **fields(flags="sflags")(recorded),
        "slot": number(recorded, "slot") & 0xFFFF,
        "hva": number(recorded, "hva"),
    }


def _prot(recorded: Values) -> Values:
    if "access" not in recorded:
        return {}
    access = number(recorded, "access")
    return {"prot": (R if access & _ACC_USER else 0) | access & W | (X if access & _ACC_EXEC else 0)}


def _pinned(recorded: Values) -> Values:
    made: dict[str, int | str] = {"answer": answer(number(recorded, "ret"))}
    made |= {**fields("gfn")(recorded), **_slot(recorded), **_prot(recorded)}
    pfn = number(recorded, "pfn")
    if pfn in PIN_ERRORS:
        made["error"] = PIN_ERRORS[pfn].name
    elif pfn and not pfn & (NO_SLOT | ERROR):
        made["pfn"] = pfn
        made["writable"] = number(recorded, "map_writable")
    return made


def _mapped(recorded: Values) -> Values:
    read: Values = {**_answered("gfn")(recorded), **_slot(recorded)}
    return {**read, **fields("pfn", writable="map_writable")(recorded)} if "slot" in read else read


def _setting(recorded: Values) -> Values:
    return {**fields("slot", "gfn", "pfn", place="sptep")(recorded), **_prot(recorded)}


def _changing(recorded: Values) -> Values:
    return {"kind": CHANGES[number(recorded, "change")].value} if "change" in recorded else {}


def _split(recorded: Values) -> Values:
    level = {"size": size_of(number(recorded, "target_level"))} if "target_level" in recorded else {}
    return {**fields("slot")(recorded), **level}


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


_NAME: Final = "names an object of the kernel"
_USER: Final = "user space asks"
_HOST: Final = "the host answers"
_KERNEL: Final = "the host's memory management asks"
_LENGTH: Final = "bytes of the instruction: for the emulator"
_EMULATOR: Final = "the instruction, which is not recorded"
_PARAMETER: Final = "a parameter of the module, or whether the CPU logs writes"


def _of_slot(says: Said, taken: Mapping[str, str] | None = None) -> Probe:
    return Probe(says, fields("slot"), compared="slot", taken=taken or {})


_FAULT: Final = fields(address="cr2_or_gpa", pferr="error_code", vcpu="vcpu")
_RANGE: Final = fields("slot", "start", "end")
_ENTRIES: Final = {
    "kvm_mmu_page_fault": Probe(
        Said.FAULT, _FAULT, compared="cr2_or_gpa error_code", taken={"vcpu": _NAME, "insn_len": _LENGTH}
    ),
    "__kvm_set_memory_region": Probe(Said.SLOT, fields(), taken={"kvm": _NAME, "slot flags gpa size hva": _USER}),
    "kvm_set_memslot": Probe(Said.SLOT_CHANGING, _changing, compared="change", taken={"old new": _NAME}),
    "kvm_arch_flush_shadow_memslot": Probe(
        Said.SLOT_FLUSH, fields("slot", gfn="base_gfn", pages="npages"), compared="slot base_gfn npages"
    ),
    "__kvm_mmu_zap_all_fast_front_half": Probe(Said.TABLE_RETIRED, fields(vm="kvm"), compared="kvm"),
    "kvm_mmu_slot_remove_write_access": _of_slot(Said.WRITES_WATCHED, {"start_level": _PARAMETER}),
    "kvm_mmu_slot_try_split_huge_pages": Probe(Said.BLOCKS_SPLIT, _split, compared="slot target_level"),
    "kvm_mmu_zap_collapsible_sptes": _of_slot(Said.BLOCKS_RECOVERED),
    "kvm_mmu_notifier_invalidate_range_start": Probe(
        Said.INVALIDATE, fields("start", "end"), taken={"start end flags event": _KERNEL}
    ),
    "kvm_mmu_notifier_invalidate_range_end": Probe(Said.INVALIDATED, fields("start", "end"), compared="start end"),
    "kvm_unmap_gfn_range": Probe(Said.UNMAP, _RANGE, compared="slot start end"),
    "kvm_age_gfn": Probe(Said.AGE, _RANGE, taken={"slot start end": _KERNEL}),
    "kvm_test_age_gfn": Probe(Said.TEST_AGE, _RANGE, taken={"slot start end": _KERNEL}),
    "kvm_get_dirty_log_protect": Probe(Said.GET_LOG, fields("slot"), taken={"slot": _USER}),
    "kvm_clear_dirty_log_protect": Probe(
        Said.CLEAR_LOG,
        fields("slot", first="first_page", pages="num_pages"),
        taken={"slot first_page num_pages": _USER},
    ),
    "kvm_arch_mmu_enable_log_dirty_pt_masked": Probe(
        Said.LOG_PROTECT, fields("slot", "mask", first="gfn_offset"), compared="slot gfn_offset mask"
    ),
    "kvm_mmu_track_write": Probe(Said.WRITES, fields("gpa", size="bytes"), taken={"gpa bytes": _EMULATOR}),
    "mmu_set_spte": Probe(Said.SETTING, _setting, compared="slot sptep access gfn pfn"),
    "mmu_try_to_unsync_pages": Probe(
        Said.UNSYNC,
        fields("gfn"),
        compared="gfn",
        taken={"can_unsync prefetch": "how tables follow those of the guest"},
    ),
    "x86_emulate_instruction": Probe(
        Said.EMULATING, fields(address="cr2_or_gpa"), compared="cr2_or_gpa", taken={"type insn_len": _EMULATOR}
    ),
    "kvm_inject_page_fault": Probe(
        Said.INJECTED,
        fields("address", code="error_code"),
        compared="address",
        taken={"vector error_code nested": "what the guest's own tables held, which is not all recorded"},
    ),
    "kvm_arch_vcpu_pre_fault_memory": Probe(Said.PREFAULT, fields("gpa", "size"), taken={"gpa size": _USER}),
}
_SIZED: Final = " ".join(_SIZES.values())
_DECIDED: Final = Probe(
    Said.DECIDED,
    _answered("gfn", "prefetch"),
    (_SIZES["wanted"], _SIZES["size"]),
    compared=f"ret gfn prefetch {' '.join(_ECHO.values())} {_SIZED}",
)
_RETURNED: Final = fields("ret")
_RETURNS: Final = {
    "kvm_mmu_page_fault": Probe(
        Said.RETURNED,
        fields("ret", address="cr2_or_gpa", pferr="error_code"),
        compared="ret cr2_or_gpa error_code",
    ),
    "kvm_faultin_pfn": Probe(
        Said.PINNED,
        _pinned,
        compared="ret gfn slot sflags hva access",
        taken={"slotp": _NAME, "pfn map_writable": _HOST},
    ),
    "fast_page_fault": Probe(Said.REPAIR_TRIED, _answered("gfn"), compared="ret gfn"),
    "kvm_tdp_mmu_map": Probe(
        Said.MAPPED,
        _mapped,
        compared=f"ret gfn slot sflags pfn hva map_writable huge_disallowed {_SIZED}",
        taken={"slotp": _NAME},
    ),
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
    "kvm_set_memslot": Probe(Said.SLOT_CHANGED, _RETURNED, compared="ret"),
    "__kvm_set_memory_region": Probe(Said.SLOT_DONE, _RETURNED, compared="ret"),
    "kvm_unmap_gfn_range": Probe(Said.UNMAPPED, fields("flush"), compared="flush"),
    "kvm_get_dirty_log_protect": Probe(Said.GOT_LOG, _RETURNED, compared="ret"),
    "kvm_clear_dirty_log_protect": Probe(Said.CLEARED_LOG, _RETURNED, compared="ret"),
    "mmu_set_spte": Probe(Said.SET, _answered("gfn"), compared="ret gfn"),
    "mmu_try_to_unsync_pages": Probe(Said.UNSYNCED, _RETURNED, compared="ret"),
    "x86_emulate_instruction": Probe(Said.EMULATED, _RETURNED, taken={"ret": _EMULATOR}),
    "kvm_arch_vcpu_pre_fault_memory": Probe(Said.PREFAULTED, _RETURNED, compared="ret"),
}
_NAMES: Final = {
    "page_fault": "kvm_mmu_page_fault",
    "faultin_pfn": "kvm_faultin_pfn",
    "tdp_map": "kvm_tdp_mmu_map",
    "memslot": "__kvm_set_memory_region",
    "memslot_change": "kvm_set_memslot",
    "flush_slot": "kvm_arch_flush_shadow_memslot",
    "zap_all_fast": "__kvm_mmu_zap_all_fast_front_half",
    "slot_remove_write": "kvm_mmu_slot_remove_write_access",
    "slot_split_huge": "kvm_mmu_slot_try_split_huge_pages",
    "slot_collapse": "kvm_mmu_zap_collapsible_sptes",
    "inv_start": "kvm_mmu_notifier_invalidate_range_start",
    "inv_end": "kvm_mmu_notifier_invalidate_range_end",
    "unmap_gfn": "kvm_unmap_gfn_range",
    "age_gfn": "kvm_age_gfn",
    "test_age_gfn": "kvm_test_age_gfn",
    "get_dirty_log": "kvm_get_dirty_log_protect",
    "clear_dirty_log": "kvm_clear_dirty_log_protect",
    "log_pt_masked": "kvm_arch_mmu_enable_log_dirty_pt_masked",
    "track_write": "kvm_mmu_track_write",
    "unsync": "mmu_try_to_unsync_pages",
    "emulate": "x86_emulate_instruction",
    "inject_pf": "kvm_inject_page_fault",
    "pre_fault": "kvm_arch_vcpu_pre_fault_memory",
}
PROBES: Final = Probes(
    names=_NAMES,
    entries=_ENTRIES,
    returns=_RETURNS,
    walk=guest_walk,
    unread={
        "kvm_vm_ioctl": "what user space asks is told by the functions that do it",
        "kvm_dirty_ring_reset": "what user space has taken out of a ring is not recorded",
    },
    # without the TDP MMU no block is split ahead of a write (kvm_mmu_slot_try_split_huge_pages)
    settings={"direct_page_fault": ("eager-split=no",)},
)
