"""``kvmfault path``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

from kvmfault.cli.render import columns, to_json
from kvmfault.contract.target import Target, backend
from kvmfault.path.run import PATH, Locked, Step

__all__ = ["run"]


def run(target: str, settings: Sequence[str], *, long: bool, json: bool) -> int:
    """Print PATH, marking what the target has of it."""
    on = backend(target).with_settings(settings)
    rows = [_row(on, step, locked) for step, locked in _steps()]
    if json:
        print(to_json({"target": on.name, "steps": rows}))
        return 0
    present = sum(row.present for row in rows)
    print(f"{on.name}: {present} of {len(rows)} steps; L: under mmu_lock, held for read")
    shown = [
        (
            str(i),
            "L" if row.locked else " ",
            row.name if row.present else f"({row.name})",
            ", ".join(row.functions) if row.present else "not on this target",
        )
        for i, row in enumerate(rows, 1)
    ]
    if not long:
        print(columns(shown, right=frozenset({0})))
        return 0
    for line, row in zip(columns(shown, right=frozenset({0})).splitlines(), rows, strict=True):
        print(line)
        print(fill(row.doc, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    return 0


def _steps() -> list[tuple[Step, bool]]:
    flat: list[tuple[Step, bool]] = []
    for entry in PATH:
        flat.extend([(step, True) for step in entry.steps] if isinstance(entry, Locked) else [(entry, False)])
    return flat


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    locked: bool
    present: bool
    functions: tuple[str, ...]
    doc: str


def _row(target: Target, step: Step, locked: bool) -> _Row:
    functions = step.functions(target.policy, target.joints)
    mark = "joint " if step.run is None else ""
    names = [f"{mark}{f.__name__}" for f in functions]
    if functions:
        names += [f"joint {f.__name__}" for place in step.asks for f in getattr(target.joints, place)]
    return _Row(step.name, locked, bool(functions), tuple(names), " ".join(step.doc.split()))
