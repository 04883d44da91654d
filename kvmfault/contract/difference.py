"""How targets differ, from the declarations alone: decisions, joints, gaps, and what a usual VM, host and table are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, Flag
from typing import get_type_hints

from kvmfault.contract.accessors import Accessors, Gap
from kvmfault.contract.backend import Joints
from kvmfault.contract.described import Source, documented, geometry, joint_name, one_line, policy_texts
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.settings import spell, spell_int
from kvmfault.contract.target import Target
from kvmfault.vm.caps import HostCaps

__all__ = ["Row", "compare"]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that targets may differ in."""

    name: str
    meaning: str
    values: tuple[str, ...]
    """One for each target."""
    about: Mapping[str, str] = field(default_factory=dict)
    """What a value, or a part of one, means; or why a target has it, by the target's name."""
    readers: tuple[str, ...] = ()
    """Who decides by it."""
    kernel: tuple[Source, ...] = ()
    """Where it comes from, as far as it concerns these targets."""

    @property
    def differs(self) -> bool:
        """Whether some target has another value than the first."""
        return len(set(self.values)) > 1


def compare(targets: Sequence[Target]) -> dict[str, list[Row]]:
    """Every row of the targets, equal ones too, by group."""
    return {
        "policies": _policies(targets),
        "joints": _joints(targets),
        "gaps": _gaps(targets),
        "vm": _members(VmFacts, [t.facts for t in targets], lambda n, v: spell(VmFacts, n, v)),
        "host": _members(HostCaps, [t.backend.host(t.format) for t in targets], _spell_cap),
        "format": _formats(targets),
    }


def _policies(targets: Sequence[Target]) -> list[Row]:
    families = {t.backend.name.partition("-")[0] for t in targets}
    rows = []
    for name, text in policy_texts().items():
        found = [getattr(t.policy, name) for t in targets]
        values = tuple(spell(Policy, name, value) for value in found)
        about = {v: _enum_text(f) for v, f in zip(values, found, strict=True) if isinstance(f, Enum)}
        kernel = tuple(s for s in text.kernel if not s.owner or s.owner in families)
        if len(families) == 1:
            kernel = tuple(Source("", s.text) for s in kernel)
        rows.append(Row(name, text.meaning, values, {v: t for v, t in about.items() if t}, text.readers, kernel))
    return rows


def _enum_text(value: Enum) -> str:
    # some are called what they mean, or begin with it
    name, text = value.name.lower(), str(value.value)
    return "" if text == name else text.removeprefix(f"{name}: ")


def _joints(targets: Sequence[Target]) -> list[Row]:
    rows = []
    for place, meaning in documented(Joints).items():
        found = [{joint_name(joint): one_line(joint) for joint in getattr(t.joints, place)} for t in targets]
        about = {n: text for joints in found for n, text in joints.items() if any(n not in other for other in found)}
        rows.append(Row(place, meaning.rstrip("."), tuple(", ".join(j) or "none" for j in found), about))
    return rows


def _gaps(targets: Sequence[Target]) -> list[Row]:
    rows = []
    for name, meaning in documented(Accessors).items():
        found = [getattr(t.definition, name) for t in targets]
        values = tuple("gap" if isinstance(f, Gap) else "told" for f in found)
        why = {t.name: f.reason for t, f in zip(targets, found, strict=True) if isinstance(f, Gap)}
        rows.append(Row(name, meaning.rstrip("."), values, why))
    return rows


def _members(cls: type, records: Sequence[object], show: Callable[[str, object], str]) -> list[Row]:
    return [
        Row(name, meaning.rstrip("."), tuple(show(name, getattr(record, name)) for record in records))
        for name, meaning in documented(cls).items()
    ]


def _spell_cap(name: str, value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case Flag():
            return "|".join(flag.name.lower() for flag in value if flag.name) or "none"
        case int():
            return spell_int(get_type_hints(HostCaps, include_extras=True)[name], value)
        case tuple():
            return ", ".join(str(item.value) for item in value) or "none"
        case _:
            return str(value)


def _formats(targets: Sequence[Target]) -> list[Row]:
    found = [geometry(t.format) for t in targets]
    return [Row(name, "", tuple(f[name] for f in found)) for name in found[0]]
