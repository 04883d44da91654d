"""Trace events of x86: kvm_exit, kvm_entry, kvm_page_fault and what tells the address of an EPT misconfiguration.

kvm_page_fault has one column ``error_code`` and three encodings: the exit qualification under EPT, EXITINFO1
under NPT, the error code of the #PF under shadow paging. Only the kvm_exit before it says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final

from arch.common import COMMON
from arch.x86.pferr import PRIVATE_ACCESS
from arch.x86.registers import EPT_MISCONFIG, EPT_VIOLATION, KVM
from arch.x86.spte import PAGE_SIZES
from kvmfault.algebra.expr import Pred
from kvmfault.algebra.layout import Register, register
from kvmfault.contract.tracepoints import Change, Fields, Role, Tracepoint, Tracepoints

_VMX, _SVM = 1, 2
_SVM_PF, _SVM_NPF = 0x4E, 0x400
_PAGE_FAULT_EVENT: Final = 0x80000000 | 3 << 8 | 14
"""VM-exit interruption information: valid, hardware exception, vector 14; bit 11 (error code present) left out."""
_EVENT_MASK: Final = 0x800007FF


class Exit(Enum):
    """Which kind of fault an exit is."""

    VIOLATION = "EPT violation"
    MISCONFIG = "EPT misconfiguration"
    NPF = "nested page fault"
    PF = "intercepted #PF"


def exit_kind(exit_: Fields) -> Exit | None:
    """What the fields of a kvm_exit say; None: not a page fault. Reasons come as numbers (with ``isa``) from raw
    recordings, and as words from tracefs and from the plugin of trace-cmd, each with its own."""
    reason = exit_.get("exit_reason")
    if isinstance(reason, str) and reason.removeprefix("-").isdigit():
        reason = int(reason)
    if isinstance(reason, int):
        return _by_number(reason, exit_.get("isa"), exit_)
    match reason:
        case "EPT_VIOLATION":
            return Exit.VIOLATION
        case "EPT_MISCONFIG":
            return Exit.MISCONFIG
        case "npf" | "EXIT_NPF":
            return Exit.NPF
        case "EXIT_EXCP_PF":
            return Exit.PF
        case "PF" if exit_.get("exit_detail") == "excp":
            return Exit.PF
        case "EXCEPTION_NMI":
            return Exit.PF if _is_page_fault(exit_) else None
        case _:
            return None


def _by_number(reason: int, isa: int | str | None, exit_: Fields) -> Exit | None:
    if isa == _SVM:
        return {_SVM_NPF: Exit.NPF, _SVM_PF: Exit.PF}.get(reason)
    if isa != _VMX:
        return None
    match reason & 0xFFFF:
        case n if n == EPT_VIOLATION:
            return Exit.VIOLATION
        case n if n == EPT_MISCONFIG:
            return Exit.MISCONFIG
        case 0 if _is_page_fault(exit_):
            return Exit.PF
        case _:
            return None


def _is_page_fault(exit_: Fields) -> bool:
    # trace-cmd's plugin leaves intr_info out; a kvm_page_fault after such an exit can be nothing else
    info = exit_.get("intr_info")
    return not isinstance(info, int) or info & _EVENT_MASK == _PAGE_FAULT_EVENT


def ept_registers(fault: Fields) -> Mapping[str, int]:
    """kvm_page_fault after an EPT violation: ``error_code`` is the exit qualification (handle_ept_violation)."""
    return {
        "EXIT_REASON": EPT_VIOLATION,
        "EXIT_QUALIFICATION": _number(fault, "error_code"),
        "GUEST_PHYSICAL_ADDRESS": _number(fault, "fault_address"),
    }


def npt_registers(fault: Fields) -> Mapping[str, int]:
    """kvm_page_fault after an NPF: EXITINFO1, to which KVM has added PRIVATE (npf_interception)."""
    code = _number(fault, "error_code")
    return {
        "EXITINFO1": code & ~PRIVATE_ACCESS,
        "EXITINFO2": _number(fault, "fault_address"),
        "KVM": KVM["PRIVATE"].mask if code & PRIVATE_ACCESS else 0,
    }


def shadow_registers(fault: Fields) -> Mapping[str, int]:
    """kvm_page_fault after an intercepted #PF: its error code, and CR2 (kvm_handle_page_fault)."""
    return {"ERROR_CODE": _number(fault, "error_code"), "CR2": _number(fault, "fault_address")}


def _number(fields: Fields, name: str) -> int:
    value = fields[name]
    return value if isinstance(value, int) else int(value, 0)


def _after(
    kind: Exit, read: Callable[[Fields], Mapping[str, int]]
) -> Callable[[Fields, Fields], Mapping[str, int] | None]:
    # without an exit the TARGET has said that faults are this backend's
    return lambda fault, exit_: read(fault) if not exit_ or exit_kind(exit_) is kind else None


def _misconfig(exit_: Fields, before: Fields) -> Mapping[str, int] | None:
    return {"EXIT_REASON": EPT_MISCONFIG} if exit_kind(exit_) is Exit.MISCONFIG else None


_EXIT_TAIL: Final = (
    "rip {guest_rip:x} info1 {info1:x} info2 {info2:x} intr_info {intr_info:x} error_code {error_code:x}"
)
_EXIT_TEXTS: Final = tuple(
    f"{vcpu} {reason} {tail}"
    for vcpu, tails in (
        ("vcpu {vcpu_id:d} reason", (_EXIT_TAIL, _EXIT_TAIL + " requests {requests:x}")),
        ("reason", ("rip {guest_rip:x} info {info1:x} {info2:x}",)),  # the plugin of trace-cmd
    )
    for tail in tails
    # "PF excp", "EPT_VIOLATION FAILED_VMENTRY": some reasons are two words
    for reason in ("{exit_reason:w}", "{exit_reason:w} {exit_detail:w}")
)
_EXIT_FIELDS: Final = (
    "exit_reason:d guest_rip:x isa:d info1:x info2:x intr_info:x? error_code:x? vcpu_id:d? requests:x?"
)
_ENTRY_TEXTS: Final = (
    "vcpu {vcpu_id:d}, rip {rip:x}",
    "vcpu {vcpu_id:d} rip {rip:x}",
    "vcpu {vcpu_id:d}, rip {rip:x}[immediate exit]",
    "vcpu {vcpu_id:d}, rip {rip:x} intr_info {intr_info:x} error_code {error_code:x}",
    "vcpu {vcpu_id:d}, rip {rip:x} intr_info {intr_info:x} error_code {error_code:x}[immediate exit]",
)


_OLD, _NEW = (
    register(
        name,
        64,
        "SPTEs as KVM keeps them: SPTE_MMU_PRESENT_MASK, PT_PAGE_SIZE_MASK, PT_WRITABLE_MASK",
        PRESENT=11,
        BLOCK=7,
        WRITE=1,
    )
    for name in ("old_spte", "new_spte")
)
_GFN: Final = register("gfn", 64, "a frame of 4K", FRAME=(63, 0))["FRAME"]
_LEVEL: Final = register("level", 64, "enum pg_level", LEVEL=(2, 0))["LEVEL"]
_SIZE: Final = _LEVEL.table({n: 1 << shift for n, shift in enumerate(sorted(PAGE_SIZES), 1)})
_SPLIT_DONE: Final = register("errno", 64, "0 or a negative errno", ERRNO=(31, 0))["ERRNO"].is_(0)


def _is_leaf(spte: Register) -> Pred:
    return spte["PRESENT"].is_set & (_LEVEL.is_(1) | spte["BLOCK"].is_set)


def _is_table(spte: Register) -> Pred:
    return spte["PRESENT"].is_set & ~_LEVEL.is_(1) & ~spte["BLOCK"].is_set


_TABLE_EVENTS: Final[Tracepoints] = {
    "kvm_tdp_mmu_spte_changed": Tracepoint(
        Role.CHANGE,
        ("as id {as_id:d} gfn {gfn:x} level {level:d} old_spte {old_spte:x} new_spte {new_spte:x}",),
        "gfn:x old_spte:x new_spte:x level:d as_id:d",
        change=Change(
            frame=_GFN,
            size=_SIZE,
            removed=_is_leaf(_OLD) & ~_NEW["PRESENT"].is_set,
            protected=_is_leaf(_OLD) & _is_leaf(_NEW) & _OLD["WRITE"].is_set & ~_NEW["WRITE"].is_set,
            split=_is_leaf(_OLD) & _is_table(_NEW),
            joined=_is_table(_OLD) & _is_leaf(_NEW),
        ),
    ),
    "kvm_mmu_set_spte": Tracepoint(
        Role.SET,
        ("gfn {gfn:x} spte {spte:x} ({access:w}) level {level:d} at {sptep:x}",),
        "gfn:x spte:x sptep:x level:d r:d x:d u:d",
        change=Change(frame=_GFN, size=_SIZE),
    ),
    "kvm_mmu_split_huge_page": Tracepoint(
        Role.SPLIT,
        ("gfn {gfn:x} spte {spte:x} level {level:d} errno {errno:d}",),
        "gfn:x spte:x level:d errno:d",
        change=Change(frame=_GFN, size=_SIZE, split=_SPLIT_DONE, refused=~_SPLIT_DONE),
    ),
    "kvm_mmu_zap_all_fast": Tracepoint(
        Role.CLEAR,
        ("kvm-mmu-valid-gen {mmu_valid_gen:d} used_pages {mmu_used_pages:x}",),
        "mmu_valid_gen:d mmu_used_pages:d",
    ),
    "kvm_mmu_pagetable_walk": Tracepoint(
        Role.WALK, ("addr {addr:x} pferr {pferr:x} {flags:w}", "addr {addr:x} pferr {pferr:x}"), "addr:x pferr:x"
    ),
    "kvm_mmu_paging_element": Tracepoint(
        Role.WALK_STEP, ("pte {pte:x} level {level:d}",), "pte:x level:d", told_by=("level",)
    ),
    "kvm_mmu_walker_error": Tracepoint(
        Role.WALK_FAILED, ("pferr {pferr:x} {flags:w}", "pferr {pferr:x}"), "pferr:x", told_by=("pferr",)
    ),
}


def _tracepoints(kind: Exit, read: Callable[[Fields], Mapping[str, int]], *, misconfig: bool = False) -> Tracepoints:
    return {
        **COMMON,
        "kvm_exit": Tracepoint(
            Role.EXIT,
            _EXIT_TEXTS,
            _EXIT_FIELDS,
            _misconfig if misconfig else None,
            awaits="GUEST_PHYSICAL_ADDRESS" if misconfig else "",
            told_by=("exit_reason", "isa"),
        ),
        "kvm_entry": Tracepoint(Role.ENTRY, _ENTRY_TEXTS, "vcpu_id:d rip:x"),
        "kvm_page_fault": Tracepoint(
            Role.FAULT,
            ("vcpu {vcpu_id:d} rip {guest_rip:x} address {fault_address:x} error_code {error_code:x}",),
            registers=_after(kind, read),
            needs_exit=True,
        ),
        "vcpu_match_mmio": Tracepoint(Role.ADDRESS, ("gva {gva:x} gpa {gpa:x} {access:w} {match:w}",), "gva:x gpa:x"),
        "kvm_fast_mmio": Tracepoint(Role.ADDRESS, ("fast mmio at gpa {gpa:x}",)),
        # a misconfiguration of an entry from before a memslot change takes the slow path: only its frame is traced
        "kvm_mmu_spte_requested": Tracepoint(Role.ADDRESS, ("gfn {gfn:x} pfn {pfn:x} level {level:d}",)),
        **_TABLE_EVENTS,
    }


EPT_TRACEPOINTS: Final = _tracepoints(Exit.VIOLATION, ept_registers, misconfig=True)
NPT_TRACEPOINTS: Final = _tracepoints(Exit.NPF, npt_registers)
SHADOW_TRACEPOINTS: Final = _tracepoints(Exit.PF, shadow_registers)
