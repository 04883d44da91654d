"""Trace events of the x86 MMU (kvmmmu): entries set and changed, tables made and dropped, walks of the guest's own."""

from __future__ import annotations

from itertools import product
from typing import Final

from arch.x86 import tells
from arch.x86.spte import PAGE_SIZES
from kvmfault.algebra.expr import Pred
from kvmfault.contract.tracepoints import Change, Printed, Role, Tracepoint, Tracepoints, Words, recorded, words

_CREATED: Final = words("created", existing=0, new=1)
_UNSYNC: Final = words("unsync", sync=0, unsync=1)
# the role of a table is printed in words that differ between kernels, and wrongly by trace-cmd: left out
_PAGE: Final = "sp gen {mmu_valid_gen:d} gfn {gfn:x} {:p} root {root_count:d} {unsync:w}"
_PAGE_FIELDS: Final = "mmu_valid_gen:d gfn:d role:d root_count:d unsync:d"


def _old_page(role: Role | None) -> Tracepoint:
    told = None if role is None else tells.TABLE
    texts = (_PAGE, "{:p} root {root_count:d} {unsync:w}")
    return Tracepoint(role, texts, _PAGE_FIELDS, {"unsync": _UNSYNC}, tells=told)


# "(rwxu)": u is left out where the entry has no such bit
_PERMISSIONS: Final = Words(
    "r",
    {
        f"({r}{w}{x}{u})": {"r": r == "r", "x": x == "x", "u": {"u": 1, "-": 0, "": -1}[u]}
        for r, w, x, u in product("r-", "w-", "x-", ("u", "-", ""))
    },
)
_PFERR: Final = Words(
    "error_code", {"": {"error_code": 0}}, {
        "P": 1 << 0, "W": 1 << 1, "U": 1 << 2, "RSVD": 1 << 3, "F": 1 << 4, "PK": 1 << 5, "SS": 1 << 6, "SGX": 1 << 15,
    },
)  # fmt: skip
# whether a pointer is real (0x, by trace-cmd and perf) or hashed (by the kernel) is told by its prefix
_FAST: Final = tuple(
    Printed(f"vcpu {{vcpu_id:i}} gva {{cr2_or_gpa:x}} {code} {entry} old {{old_spte:x}} new {{new_spte:x}} "
            "spurious {:w} fixed {:w}", implied)
    for code, implied in (("error_code {error_code:w}", {}), ("error_code", {"error_code": 0}))
    for entry in ("sptep 0x{sptep:x}", "sptep {:w}")
)  # fmt: skip
_MARKED: Final = Tracepoint(Role.WALK_MARKED, ("gpa {gpa:x}",), tells=tells.WALK_MARKED)

# What an event says of an entry: SPTE_MMU_PRESENT_MASK, PT_PAGE_SIZE_MASK and PT_WRITABLE_MASK are the same everywhere.
_FRAME: Final = recorded("gfn", 51, 0) << 12
_LEVEL: Final = recorded("level", 2, 0)
_SIZE: Final = _LEVEL.table({number: 1 << shift for number, shift in enumerate(sorted(PAGE_SIZES), 1)})
_DONE: Final = recorded("errno").is_(0)


def _is_present(spte: str) -> Pred:
    return recorded(spte, 11, 11).is_set


def _is_leaf(spte: str) -> Pred:
    return _is_present(spte) & (_LEVEL.is_(1) | recorded(spte, 7, 7).is_set)


def _is_table(spte: str) -> Pred:
    return _is_present(spte) & ~_LEVEL.is_(1) & ~recorded(spte, 7, 7).is_set


def _writes(spte: str) -> Pred:
    return recorded(spte, 1, 1).is_set


MMU_TRACEPOINTS: Final[Tracepoints] = {
    "vcpu_match_mmio": Tracepoint(
        Role.ADDRESS,
        ("gva {gva:x} gpa {gpa:x} {write:w} {gpa_match:w}",),
        "gva:x gpa:x write:d gpa_match:d",
        {"write": words("write", Read=0, Write=1), "gpa_match": words("gpa_match", GVA=0, GPA=1)},
        address=recorded("gpa") << 0,
    ),
    # a misconfiguration of an entry from before a memslot change takes the slow path: only its frame is traced
    "kvm_mmu_spte_requested": Tracepoint(
        Role.REQUESTED,
        ("gfn {gfn:x} pfn {pfn:x} level {level:d}",),
        told_by=("level",),
        address=_FRAME,
        tells=tells.REQUESTED,
    ),
    "kvm_mmu_set_spte": Tracepoint(
        Role.SET,
        ("gfn {gfn:x} spte {spte:x} {r:w} level {level:d} at {sptep:x}",),
        "gfn:x spte:x sptep:x level:d r:d x:d u:i",
        {"r": _PERMISSIONS},
        told_by=("level",),
        address=_FRAME,
        change=Change(size=_SIZE),
        tells=tells.SET,
    ),
    "kvm_tdp_mmu_spte_changed": Tracepoint(
        Role.CHANGE,
        ("as id {as_id:d} gfn {gfn:x} level {level:d} old_spte {old_spte:x} new_spte {new_spte:x}",),
        "gfn:x old_spte:x new_spte:x level:d as_id:d",
        told_by=("level",),
        address=_FRAME,
        tells=tells.CHANGED,
        change=Change(
            size=_SIZE,
            removed=_is_leaf("old_spte") & ~_is_present("new_spte"),
            protected=_is_leaf("old_spte") & _is_leaf("new_spte") & _writes("old_spte") & ~_writes("new_spte"),
            split=_is_leaf("old_spte") & _is_table("new_spte"),
            joined=_is_table("old_spte") & _is_leaf("new_spte"),
        ),
    ),
    "kvm_mmu_split_huge_page": Tracepoint(
        Role.SPLIT,
        ("gfn {gfn:x} spte {spte:x} level {level:i} errno {errno:i}",),
        told_by=("level",),
        address=_FRAME,
        change=Change(size=_SIZE, split=_DONE, refused=~_DONE),
    ),
    "kvm_mmu_get_page": Tracepoint(
        Role.SHADOWED,
        (_PAGE + " {created:w}", "{created:w} sp gfn {gfn:x} {:p} root {root_count:d} {unsync:w}"),
        _PAGE_FIELDS + " created:d",
        {"unsync": _UNSYNC, "created": _CREATED},
        tells=tells.SHADOWED,
    ),
    "kvm_mmu_prepare_zap_page": _old_page(Role.UNSHADOWED),
    "kvm_mmu_sync_page": _old_page(Role.SYNCED),
    "kvm_mmu_unsync_page": _old_page(None),
    "kvm_mmu_zap_all_fast": Tracepoint(
        Role.CLEAR, ("kvm-mmu-valid-gen {mmu_valid_gen:d} used_pages {mmu_used_pages:x}",)
    ),
    "kvm_mmu_pagetable_walk": Tracepoint(
        Role.WALK, ("addr {addr:x} pferr {pferr:x} {:w}", "addr {addr:x} pferr {pferr:x}"), tells=tells.WALK
    ),
    "kvm_mmu_paging_element": Tracepoint(
        Role.WALK_STEP, ("pte {pte:x} level {level:d}",), told_by=("level",), tells=tells.WALK_STEP
    ),
    "kvm_mmu_set_accessed_bit": _MARKED,
    "kvm_mmu_set_dirty_bit": _MARKED,
    "kvm_mmu_walker_error": Tracepoint(
        Role.WALK_FAILED, ("pferr {pferr:x} {:w}", "pferr {pferr:x}"), told_by=("pferr",), tells=tells.WALK_FAILED
    ),
    "fast_page_fault": Tracepoint(  # its address is the guest's own under shadow paging
        Role.REPAIRED,
        _FAST,
        "vcpu_id:i cr2_or_gpa:x error_code:d sptep:x old_spte:x new_spte:x ret:i",
        {"error_code": _PFERR},
        told_by=("ret",),
        tells=tells.REPAIRED,
    ),
    "handle_mmio_page_fault": Tracepoint(
        Role.RECALLED, ("addr:{addr:x} gfn {gfn:x} access {access:x}",), address=_FRAME
    ),
    "mark_mmio_spte": Tracepoint(
        Role.REMEMBERED,
        tuple(f"sptep:{entry} gfn {{gfn:x}} access {{access:x}} gen {{gen:x}}" for entry in ("0x{sptep:x}", "{:w}")),
        "sptep:x gfn:x access:x gen:x",
        tells=tells.REMEMBERED,
    ),
    "check_mmio_spte": Tracepoint(
        None, ("spte {spte:x} kvm_gen {kvm_gen:x} spte-gen {spte_gen:x} valid {:w}",), "kvm_gen:x spte_gen:x spte:x"
    ),
}
