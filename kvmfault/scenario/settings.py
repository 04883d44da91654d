"""KEY=VALUE: members of Policy, VmFacts and HostCaps as people spell them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Final

from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.target import Target
from kvmfault.errors import UsageError
from kvmfault.trace.document import near, read_number
from kvmfault.vm.caps import HostCaps

_TRUTHS: Final = {"yes": True, "true": True, "no": False, "false": False}
_SHOWN: Final = 60


def with_policy(target: Target, **values: object) -> Target:
    """The target with other decisions; its name says which."""
    new = object.__new__(type(target))
    new.__dict__.update(target.__dict__)
    new.policy = replace(target.policy, **values)  # type: ignore[arg-type]  # callers read them off a Policy
    new.name = "+".join((target.name, *(f"{name}={spell(value)}" for name, value in values.items())))
    return new


def changed(target: Target, facts: VmFacts, settings: Iterable[str]) -> tuple[Target, VmFacts]:
    """Target and VM facts with ``KEY=VALUE`` settings. Raises UsageError."""
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UsageError(f"{setting[:_SHOWN]!r} is no setting: write KEY=VALUE, such as precheck=no")
        name = key.lower().replace("-", "_")
        if any(f.name == name for f in fields(Policy)):
            target = with_policy(target, **{name: read(target.policy, name, text)})
        elif any(f.name == name for f in fields(VmFacts)):
            facts = replace(facts, **{name: read(facts, name, text)})  # type: ignore[arg-type]  # read has looked
        else:
            known = [f.name for f in (*fields(Policy), *fields(VmFacts))]
            raise UsageError(f"no policy or VM fact {key[:_SHOWN]!r}{near(name, known)}")
    return target, facts


def read(record: Policy | VmFacts | HostCaps, name: str, value: bool | int | str) -> object:
    """The value of a member out of its spelling, by the type of what *record* has. Raises UsageError."""
    if name not in {f.name for f in fields(record)}:
        known = [f.name for f in fields(record)]
        raise UsageError(f"{type(record).__name__} has no member {name[:_SHOWN]!r}{near(name, known)}")
    old = getattr(record, name)
    word = value.lower().replace("-", "_") if isinstance(value, str) else value
    number = read_number(word, units=True)
    match old:
        case bool() if isinstance(word, bool) or word in _TRUTHS:
            return word if isinstance(word, bool) else _TRUTHS[str(word)]
        case Enum() if word in _choices(old):
            return _choices(old)[str(word)]
        case int() if not isinstance(old, bool) and isinstance(number, int) and not isinstance(number, bool):
            return number
        case None if word == "none" or (isinstance(number, int) and not isinstance(number, bool)):
            return None if word == "none" else number
        case tuple() if isinstance(word, str):
            sizes = [read_number(part.strip(), units=True) for part in word.split(",") if word != "none"]
            if all(isinstance(size, int) for size in sizes):
                return tuple(sizes)
    raise UsageError(f"{name}={str(value)[:_SHOWN]}: the value is {_allowed(old)}")


def _choices(value: Enum) -> Mapping[str, Enum]:
    return {choice.name.lower(): choice for choice in type(value)}


def _allowed(old: object) -> str:
    match old:
        case bool():
            return "yes or no"
        case Enum():
            return f"one of: {', '.join(_choices(old))}"
        case int():
            return 'a number such as 7, "0x80" or "2M"'
        case tuple():
            return "sizes with commas, such as 2M,1G; or none"
        case _:
            return "one that cannot be written here"


def spell(value: object) -> str:
    """A value as ``read`` takes it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case Enum():
            return value.name.lower()
        case tuple():
            return ",".join(map(str, value)) or "none"
        case _:
            return str(value)
