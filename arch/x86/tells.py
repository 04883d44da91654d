"""What trace events of the x86 MMU tell a check, under the names of `kvmfault.contract.probes.Said`."""

from __future__ import annotations

from typing import Final

from arch.x86.probes import ERROR, NO_SLOT, size_of
from kvmfault.contract.probes import fields, number
from kvmfault.contract.tracepoints import Tells, Values


def _requested(recorded: Values) -> Values:
    made: dict[str, int | str] = {"gfn": recorded["gfn"], "size": size_of(number(recorded, "level"))}
    pfn = number(recorded, "pfn")
    return made if pfn & (NO_SLOT | ERROR) else {**made, "pfn": pfn}


def _fast(recorded: Values) -> Values | None:
    return {"gpa": number(recorded, "cr2_or_gpa"), "old": recorded["old_spte"], "new": recorded["new_spte"]}


def _set_spte(recorded: Values) -> Values:
    size = size_of(number(recorded, "level"))
    gpa = number(recorded, "gfn") << 12
    made = {"gpa": gpa & -size, "size": size, "desc": number(recorded, "spte")}
    return {**made, "place": number(recorded, "sptep") & 0xFFF} if "sptep" in recorded else made


def _spte_changed(recorded: Values) -> Values:
    size = size_of(number(recorded, "level"))
    gpa = number(recorded, "gfn") << 12
    made = {"gpa": gpa & -size, "size": size, "as_id": number(recorded, "as_id")}
    return {**made, "old": recorded["old_spte"], "new": recorded["new_spte"]}


def _marked_mmio(recorded: Values) -> Values:
    return {"gpa": number(recorded, "gfn") << 12, "generation": number(recorded, "gen")}


def _table_page(recorded: Values) -> Values:
    # the role as a number (union kvm_mmu_page_role), or in the kernel's words for it
    if "role" in recorded:
        role = number(recorded, "role")
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


REQUESTED: Final = Tells(_requested)
REPAIRED: Final = Tells(_fast)
SET: Final = Tells(_set_spte)
CHANGED: Final = Tells(_spte_changed)
REMEMBERED: Final = Tells(_marked_mmio)
WALK: Final = Tells(fields(address="addr"))
WALK_STEP: Final = Tells(fields("level", desc="pte"))
WALK_MARKED: Final = Tells(fields("gpa"))
WALK_FAILED: Final = Tells(fields(code="pferr"))
SHADOWED: Final = Tells(_table_page, _page_texts(" {created:w}"))
TABLE: Final = Tells(_table_page, _page_texts(""))
