"""Settings: KEY=VALUE, a member of Policy or of VmFacts as people spell it.

What a value may be follows from the member's type, so a new member needs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from enum import Enum
from errno import errorcode
from types import NoneType, UnionType
from typing import Annotated, Final, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from kvmfault.contract.format import size_text
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import VmFacts
from kvmfault.errors import UsageError
from kvmfault.types import Errno, Size

__all__ = ["HINTS", "SHOWN", "accepts", "overrides", "parse_setting", "replaced", "spell", "spell_int"]

Record = TypeVar("Record", Policy, VmFacts)

_TRUTHS: Final = {"yes": True, "true": True, "no": False, "false": False}
_UNITS: Final = {"k": 10, "m": 20, "g": 30, "t": 40}
_ERRNOS: Final = {name.lower(): number for number, name in errorcode.items()}
_LARGEST: Final = 1 << 52
_ANY: Final = range(1 << 64)
SHOWN: Final = 60
"""Characters of a wrong value that a message repeats."""

HINTS: Final[Mapping[type, Mapping[str, object]]] = {
    record: get_type_hints(record, include_extras=True) for record in (Policy, VmFacts)
}
"""Members of both records and their types, in order."""


def parse_setting(text: str) -> tuple[str, object]:
    """(member, value) of ``KEY=VALUE``. Case does not matter, nor - instead of _.

    >>> parse_setting("fit-sizes=2M,1G")
    ('fit_sizes', (2097152, 1073741824))

    Raises UsageError that names near members, or the values that there are.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise UsageError(f"{text[:SHOWN]!r} is no setting: write KEY=VALUE, such as precheck=no")
    member = key.lower().replace("-", "_")
    known = {**HINTS[Policy], **HINTS[VmFacts]}
    if member not in known:
        raise _unknown(key, known)
    hint = known[member]
    try:
        found = _read(hint, value.lower())
    except ValueError:
        raise _misfit(member, value, hint) from None
    if not accepts(hint, found):
        raise _misfit(member, value, hint)
    return member, found


def spell(record: type, member: str, value: object) -> str:
    """The value as ``parse_setting`` reads it."""
    return _spell(HINTS[record][member], value)


def replaced(record: Record, values: Mapping[str, object]) -> Record:
    """The record with other values. A mapping by name (``frame_reaction``) changes only what it names.

    Raises UsageError for an unknown member, or a value that is none of its type.
    """
    known = HINTS[type(record)]
    for member, value in values.items():
        if member not in known:
            raise _unknown(member, known)
        if not accepts(known[member], value):
            raise _misfit(member, str(value), known[member])
    merged = {m: {**getattr(record, m), **v} if _is_partial(v) else v for m, v in values.items()}
    return replace(record, **merged)  # type: ignore[arg-type]  # accepts has looked at each


def overrides(base: Policy | VmFacts, changed: Policy | VmFacts) -> Iterator[str]:
    """The settings that make *changed* out of *base*, in the members' order."""
    for f in fields(base):
        was, now = getattr(base, f.name), getattr(changed, f.name)
        if was != now:
            if _is_partial(now):
                now = {key: value for key, value in now.items() if was.get(key) != value}
            yield f"{f.name}={spell(type(base), f.name, now)}"


def _is_partial(value: object) -> TypeGuard[Mapping[Enum, object]]:
    return isinstance(value, Mapping) and all(isinstance(key, Enum) for key in value)


def _unknown(key: str, known: Iterable[str]) -> UsageError:
    names = list(known)
    near = get_close_matches(key[:SHOWN].lower().replace("-", "_"), names, 3)
    there = f"near: {', '.join(near)}" if near else f"there is: {', '.join(names)}"
    return UsageError(f"no policy or VM fact {key[:SHOWN]!r}; {there}")


def _misfit(member: str, value: str, hint: object) -> UsageError:
    return UsageError(f"{member}={value[:SHOWN]}: the value is {_allowed(hint)}")


# One case for each sort of type: Annotated numbers, X | None, sizes, pairs, truths, names, numbers.


def _read(hint: object, text: str) -> object:
    args = get_args(hint)
    if _is_optional(hint):
        return None if text == "none" else _read(_given(hint), text)
    if hint == Errno:
        return _ERRNOS[text] if text in _ERRNOS else _number(text)
    if get_origin(hint) is tuple:
        items = (_read(args[0], part) for part in _parts(text))
        return _ascending(items) if args[0] == Size else tuple(items)
    if get_origin(hint) is Mapping:
        pairs = ((key.strip(), value.strip() if colon else key) for key, colon, value in _pairs(text))
        return {_read(args[0], key): _read(args[1], value) for key, value in pairs}
    if hint is bool:
        return _one_of(_TRUTHS, text)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _one_of({choice.name.lower(): choice for choice in hint}, text)
    return _number(text)


def _one_of(choices: Mapping[str, object], text: str) -> object:
    word = text.replace("-", "_")
    if word not in choices:
        raise ValueError(text)
    return choices[word]


def _parts(text: str) -> list[str]:
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def _ascending(items: object) -> tuple[int, ...]:
    # block sizes: their order means nothing, and steps begin with the smallest
    return tuple(sorted({item for item in items if isinstance(item, int)})) if isinstance(items, Iterable) else ()


def _pairs(text: str) -> Iterator[tuple[str, str, str]]:
    return (part.partition(":") for part in _parts(text))


def _number(text: str) -> int:
    if not text.isascii() or "_" in text:  # int() knows the digits of every script, and separators
        raise ValueError(text)
    shift = _UNITS.get(text[-1:], 0) if not text.startswith("0x") else 0
    return int(text[:-1] if shift else text, 0) << shift


def accepts(hint: object, value: object) -> bool:
    """Whether *value* is one of a member whose type is *hint* (see ``HINTS``)."""
    args = get_args(hint)
    if _is_optional(hint):
        return value is None or accepts(_given(hint), value)
    if get_origin(hint) is tuple:
        fits = isinstance(value, tuple) and all(accepts(args[0], item) for item in value)
        return fits and (args[0] != Size or value == _ascending(value))
    if get_origin(hint) is Mapping:
        pairs = value.items() if isinstance(value, Mapping) else ()
        return bool(pairs) and all(accepts(args[0], key) and accepts(args[1], item) for key, item in pairs)
    if isinstance(hint, type) and issubclass(hint, (bool, Enum)):
        return isinstance(value, hint)
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    if hint == Size:
        return 4096 <= value <= _LARGEST and not value & (value - 1)
    return value in errorcode if hint == Errno else value in _numbers(hint)


def _numbers(hint: object) -> range:
    # what a number may be: as its type declares, or 64 bits
    told = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((arg for arg in told if isinstance(arg, range)), _ANY)


def _spell(hint: object, value: object) -> str:
    args = get_args(hint)
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case Enum():
            return value.name.lower()
        case tuple():
            return ",".join(_spell(args[0], item) for item in value) or "none"
        case Mapping():
            args = get_args(_given(hint))
            pairs = ((_spell(args[0], key), _spell(args[1], item)) for key, item in value.items())
            return ",".join(key if key == item and args[0] == args[1] else f"{key}:{item}" for key, item in pairs)
        case int():
            return spell_int(_given(hint), value)
        case _:
            raise TypeError(f"{value!r} of {hint!r} has no spelling")


def spell_int(hint: object, value: int) -> str:
    """A number by its type: an error's name, a size with its unit; any other in hexadecimal where it is large."""
    if hint == Errno:
        return errorcode.get(value, str(value))
    return size_text(value) if hint == Size else str(value) if value < 1 << 16 else f"{value:#x}"


def _allowed(hint: object) -> str:
    args = get_args(hint)
    if _is_optional(hint):
        return f"{_allowed(_given(hint))}, or none"
    if hint == Errno:
        return "an error's name or number, such as EFAULT"
    if hint == Size:
        return "a size such as 2M: a power of two, 4K or more"
    if get_origin(hint) is tuple:
        return f"a list with commas, each {_allowed(args[0])}; or none"
    if get_origin(hint) is Mapping:
        short = "; NAME alone means NAME:NAME" if args[0] == args[1] else ""
        return f"a list of NAME:VALUE with commas{short}; NAME is {_allowed(args[0])}; VALUE is {_allowed(args[1])}"
    if hint is bool:
        return "yes or no"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of: " + ", ".join(choice.name.lower() for choice in hint)
    numbers = _numbers(hint)
    if numbers.step > 1:
        return "one of: " + ", ".join(map(str, numbers))
    return f"a number, decimal or 0x..., from {numbers[0]} to {spell_int(hint, numbers[-1])}"


def _is_optional(hint: object) -> bool:
    return get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)


def _given(hint: object) -> object:
    return next(arg for arg in get_args(hint) if arg is not NoneType) if _is_optional(hint) else hint
