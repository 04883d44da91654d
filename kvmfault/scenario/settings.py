"""Settings as a scenario file spells them: true or false, a number, or the name of a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum

from kvmfault.contract.settings import HINTS, parse_setting
from kvmfault.errors import UsageError
from kvmfault.trace.document import near, read_number
from kvmfault.vm.caps import HostCaps

__all__ = ["cap", "has", "member", "setting", "told"]

_SHOWN = 60


def setting(name: str, value: bool | int | str) -> str:
    """``KEY=VALUE`` as ``--set`` takes it."""
    return f"{name}={_word(value)}"


def told(values: Mapping[str, bool | int | str]) -> str:
    """Settings for people."""
    return ", ".join(f"{name} = {_word(value)}" for name, value in values.items())


def _word(value: bool | int | str) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def member(record: type, name: str, value: bool | int | str) -> object:
    """The value of a member of Policy or VmFacts. Raises UsageError for an unknown one, or no value of it."""
    if name not in HINTS[record]:
        raise UsageError(f"{record.__name__} has no member {name[:_SHOWN]!r}{near(name, list(HINTS[record]))}")
    return parse_setting(setting(name, value))[1]


def has(value: object, wanted: object) -> bool:
    """Whether a member has the value; of a mapping by name what is wanted may be a part."""
    if isinstance(value, Mapping) and isinstance(wanted, Mapping) and all(isinstance(k, Enum) for k in wanted):
        return all(value.get(key) == item for key, item in wanted.items())
    return value == wanted


def cap(caps: HostCaps, name: str, value: bool | int | str) -> object:
    """The value of a limit of the host. Raises UsageError for one that is none, or cannot be written in a file."""
    known = [f.name for f in fields(HostCaps)]
    if name not in known:
        raise UsageError(f"HostCaps has no member {name[:_SHOWN]!r}{near(name, known)}")
    old, number = getattr(caps, name), read_number(value, units=True)
    if isinstance(old, bool):
        if isinstance(value, bool):
            return value
        raise UsageError(f"{name}={str(value)[:_SHOWN]}: the value is true or false")
    if type(old) is int and type(number) is int and 0 <= number < 1 << 64:
        return number
    raise UsageError(f'{name}={str(value)[:_SHOWN]}: the value is a number such as 7, "0x80" or "2M"')
