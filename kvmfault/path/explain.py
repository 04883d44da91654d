"""What a step did, in words: the change in the progress, and the outcome's reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from kvmfault.contract.format import PROTS, size_text
from kvmfault.contract.outcome import Fixed, Outcome
from kvmfault.contract.ports import Area, GuestTranslation, Memslot, Pin, PinError
from kvmfault.contract.progress import Progress

__all__ = ["StepRecord", "record", "tell"]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of one run. *changes*: members of Progress that it set, as text."""

    name: str
    because: str
    changes: Mapping[str, str]
    outcome: Outcome | None


def record(
    name: str, before: Mapping[str, object], after: Mapping[str, object], outcome: Outcome | None, settled: str
) -> StepRecord:
    """Describe what happened between two states of the progress; *settled* where nothing did."""
    changes = {
        key: tell(key, value)
        for key, value in after.items()
        if key not in _SILENT and value != before.get(key, getattr(Progress, key, None))
    }
    parts = [f"{_WORDS.get(key, key)} {text}" for key, text in changes.items() if key not in _IMPLIED]
    answer = outcome if outcome is not None else after.get("answer")
    if answer is not None and (outcome is not None or before.get("answer") is None):
        parts.append(_outcome(answer))
    return StepRecord(name, ", ".join(parts) or settled, changes, outcome)


_SILENT = frozenset({"policy", "joints", "looked_up", "answer"})
_IMPLIED = frozenset({"held", "area_size", "wanted", "pfn", "map_writable", "at"})
"""Told by another member that changes with them."""
_WORDS = {"slot_writable": "writable", "page_only": "pages only", "hva": "at hva", "area": "host area:", "pin": "got"}


def _outcome(answer: object) -> str:
    why = getattr(answer, "why", "")
    match answer:
        case Fixed(size, prot):
            return f"{size_text(size)} mapped {prot}"
        case _:
            return f"{type(answer).__name__}: {why}" if why else type(answer).__name__


def tell(key: str, value: object) -> str:
    """A member of Progress for people."""
    match value:
        case bool():
            return "yes" if value else "no"
        case Enum():
            return str(value.value)
        case Pin():
            if value.error is PinError.NO_SLOT:
                return "no page, since there is no slot"
            if value.error is not None:
                return f"nothing: {value.error.value}"
            kind = "device " if value.device else ""
            return f"{kind}pfn {value.pfn or 0:#x}, {'writable' if value.writable else 'read-only'}"
        case Area():
            return f"blocks of {size_text(value.block)}"
        case Memslot():
            last = value.end_gfn - 1
            flags = ", ".join(w for w, on in (("read-only", value.readonly), ("logged", value.logs_dirty)) if on)
            return f"{value.id} (gfn {value.base_gfn:#x}-{last:#x}{', ' + flags if flags else ''})"
        case GuestTranslation():
            return f"gpa {value.gpa:#x}, block {size_text(value.size)}"
        case int() if key == "prot":
            return str(PROTS[value])
        case int() if key in ("size", "max_size", "area_size"):
            return size_text(value)
        case int():
            return f"{value:#x}"
        case None:
            return "none"
        case _:
            return str(value)
