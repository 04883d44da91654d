"""Decode: from what people have (a code, registers, a pasted line, a table entry) to what it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from kvmfault.algebra.explain import explain
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.algebra.layout import Field, Register
from kvmfault.contract.access import Access, Cause, show
from kvmfault.contract.accessors import TRUTHS, VALUES, Gap
from kvmfault.contract.format import Entry, Kind, Level, size_text
from kvmfault.contract.target import Target
from kvmfault.errors import DecodeError, UsageError
from kvmfault.types import U64

__all__ = [
    "MAX_INPUT",
    "Description",
    "EntryText",
    "FactText",
    "FieldText",
    "RegisterText",
    "describe_entry",
    "describe_fault",
    "entry_lines",
    "headline",
    "one_line",
    "parse_input",
    "parse_number",
    "split_words",
]

_TYPED = re.compile(r"(\w+=)?(0[xdbo])?[0-9a-f]+", re.IGNORECASE | re.ASCII)
MAX_INPUT = 64 * 1024
"""Longest line taken as input."""


class FieldText(NamedTuple):
    """One field of one register. *meaning* is empty where the value has no name."""

    name: str
    place: str
    value: int
    meaning: str
    wide: bool
    """More than two bits: its value 0 may be a code of its own."""


class RegisterText(NamedTuple):
    """One register that was given."""

    name: str
    value: int
    fields: tuple[FieldText, ...]


class FactText(NamedTuple):
    """One fact: *answer* is a bool, a number, or None where there is none; *why* names what decides."""

    name: str
    answer: bool | int | None
    known: bool
    why: str


class Description(NamedTuple):
    """A fault taken apart for people."""

    target: str
    headline: str
    access: Access
    registers: tuple[RegisterText, ...]
    facts: tuple[FactText, ...]
    accessors: tuple[FactText, ...]
    notes: tuple[str, ...]


def parse_number(text: str) -> int:
    """A number as people write registers: ``0x92000007``, ``0d182``, ``0b101``.

    Digits alone are refused where hexadecimal and decimal differ. Raises UsageError saying what would be right.
    """
    try:
        if not text.isascii():
            raise ValueError  # int() knows the digits of every script
        if text[:2].lower() == "0d":
            return int(text[2:])
        if text[:2].lower() in ("0x", "0b", "0o"):
            return int(text, 0)
        value = int(text, 16)
    except ValueError:
        raise UsageError(f"{text[:60]!r} is not a number: write 0x..., 0d... (decimal) or 0b...") from None
    if value >= 10:
        hint = f"0x{text} or 0d{text}" if text.isdigit() else f"0x{text}"
        raise UsageError(f"{text[:60]!r} is ambiguous: write {hint}")
    return value


def parse_input(target: Target, words: Iterable[str]) -> dict[str, int]:
    """Registers from a CODE and NAME=VALUE words, or from a pasted line. Raises UsageError or DecodeError."""
    given = list(words)
    line = " ".join(given)
    if len(line) > MAX_INPUT:
        raise UsageError(f"a line of {len(line)} characters: at most {MAX_INPUT}")
    registers: dict[str, int] = {}
    try:
        for word in given:
            name, equals, value = word.partition("=")
            name = name if equals else target.backend.code
            if name in registers:
                raise DecodeError(f"{name} is given twice", register=name)
            registers[name] = parse_number(value if equals else word)
        target.registers(registers)
    except (UsageError, DecodeError):
        pasted = target.backend.paste(line) if target.backend.paste is not None else None
        typed = all(_TYPED.fullmatch(word) for word in given)  # by hand: nothing of it may be passed over
        if pasted and not (typed and len(pasted) < len(given)):
            return dict(pasted)
        if typed or len(given) == 1:
            raise
        raise UsageError(
            f"no register of {target.backend.name} in this line: give a value of {target.backend.code}, NAME=VALUE "
            f"words (names: {', '.join(target.order[:-1])}), or a line of a log or trace"
        ) from None
    if not registers:
        raise UsageError(f"nothing to decode: give a value of {target.backend.code}, NAME=VALUE, or a pasted line")
    return registers


def describe_fault(target: Target, registers: Mapping[str, int], *, accessors: bool = True) -> Description:
    """Everything that can be said about a fault with these registers; without *accessors*, not the kernel's own names.

    Raises DecodeError for bad registers.
    """
    fault = target.decode(**registers)
    named = target.named(fault)
    access = target.access(fault)
    return Description(
        target=target.name,
        headline=one_line(target, registers),
        access=access,
        registers=tuple(_register(target, name, named) for name in target.order if name in registers),
        facts=tuple(_facts(target, named)),
        accessors=tuple(_named_fact(n, e, named) for n, e in target.accessors.items()) if accessors else (),
        notes=target.backend.unusual(named) if target.backend.unusual is not None else (),
    )


def headline(access: Access, status: str = "") -> str:
    """One line: who tried what where, and why it stopped; *status* where that is no matter of translation."""
    kinds = [word for word, on in (("read", access.read), ("write", access.write), ("fetch", access.exec)) if on]
    what = "+".join(kinds) or "access"
    if access.cache_op:
        what = f"cache maintenance ({what})"
    if access.on_walk:
        what = f"{what} by a walk of the guest's tables"
    if access.private:
        what = f"private {what}"
    if access.prefetch:
        what = f"prefetched {what}"
    if access.gpa is not None:
        where = f" at gpa {access.gpa | (access.offset or 0):#x}"
    elif access.gva is not None:
        where = f" at gva {access.gva:#x}"
    else:
        where = ""
    cause = access.cause or Cause.OTHER
    why = (status or "no fault of translation") if cause is Cause.OTHER else cause.value
    size = f", {access.size} bytes, register {access.register}" if access.size is not None else ""
    return f"{what}{where}: {why}{size}"


def _status(target: Target, named: Mapping[str, int]) -> str:
    # the codes of the register that reports the fault, in words
    text = _register(target, target.backend.code, named)
    return ", ".join(f.meaning for f in text.fields if f.wide and f.meaning)


def _register(target: Target, name: str, named: Mapping[str, int]) -> RegisterText:
    choose = target.backend.layouts.get(name)
    layout: Register = choose(named) if choose is not None else target.backend.registers[target.order.index(name)]
    fields = sorted(layout, key=lambda f: -f.hi)
    return RegisterText(name, named[name], tuple(_field(f, f.on(named)) for f in fields))


def _field(f: Field, value: int) -> FieldText:
    return FieldText(f.name, f.place, value, f.meanings.get(value, ""), wide=f.width > 2)


def _facts(target: Target, named: Mapping[str, int]) -> Iterator[FactText]:
    for name, (valid, word) in VALUES.items():
        exists, value = target.expression(valid), target.expression(word)
        if isinstance(exists, Pred) and isinstance(value, Word):
            yield _named_fact(name, value.when(exists), named)
        elif isinstance(exists, Gap):
            yield FactText(name, None, False, exists.reason)
    decodes = target.expression("mmio_valid")
    described = isinstance(decodes, Pred) and decodes.on(named)
    for name in TRUTHS:
        if described or not name.startswith("mmio_"):
            yield _named_fact(name, target.expression(name), named)


def _named_fact(name: str, expression: Pred | Word | Maybe | Gap, named: Mapping[str, int]) -> FactText:
    match expression:
        case Gap():
            return FactText(name, None, False, expression.reason)
        case Maybe():
            return FactText(name, expression.on(named), True, explain(expression.valid, named))
        case Word():
            return FactText(name, expression.on(named), True, "")
        case Pred():
            return FactText(name, expression.on(named), True, explain(expression, named))


# -- table entries -----------------------------------------------------------------------------------


class EntryText(NamedTuple):
    """A table entry taken apart, at one level."""

    target: str
    level: str
    entry: Entry


def describe_entry(target: Target, desc: int, level: str | None = None) -> tuple[EntryText, ...]:
    """What a descriptor means: at *level* (its name or size such as 2M), or at every level where it differs.

    Raises UsageError for an unknown level or a value of more than 64 bits.
    """
    if not 0 <= desc <= U64:
        raise UsageError(f"{desc:#x} does not fit the 64 bits of an entry")
    found: dict[tuple[object, ...], EntryText] = {}
    names: dict[tuple[object, ...], list[str]] = {}
    levels = [lv for lv in target.format.levels if level is None or level.lower() in (lv.name.lower(), _size(lv))]
    if not levels:
        have = ", ".join(f"{lv.name} ({_size(lv)})" for lv in target.format.levels)
        raise UsageError(f"{target.name} has no level {level!r}; it has: {have}")
    for lv in reversed(levels):
        entry = target.format.entry(desc, lv.shift)
        key = (entry.kind, entry.hpa, entry.prot, entry.memory, entry.notes)
        names.setdefault(key, []).append(f"{lv.name} ({_size(lv)})")
        found.setdefault(key, EntryText(target.name, "", entry))
    return tuple(EntryText(e.target, ", ".join(names[k]), e.entry) for k, e in found.items())


def _size(level: Level) -> str:
    return size_text(1 << level.shift).lower()


def entry_lines(text: EntryText) -> list[tuple[str, str]]:
    """The members of an entry for people, as (name, words)."""
    entry = text.entry
    lines = [("kind", entry.kind.value)]
    if entry.hpa is not None:
        lines.append(("hpa", f"{entry.hpa:#x}"))
    if entry.kind is Kind.LEAF:
        lines += [("prot", str(entry.prot)), ("accessed", show(entry.accessed)), ("dirty", show(entry.dirty))]
        lines += [("memory", entry.memory.value)] if entry.memory is not None else []
        for name in ("host_writable", "mmu_writable"):
            if getattr(entry, name) is not None:
                lines.append((name, show(getattr(entry, name))))
    if entry.kind is Kind.MMIO:
        lines += [("gpa", show(entry.gpa)), ("prot", str(entry.prot)), ("generation", show(entry.generation))]
    return lines + [("note", note) for note in entry.notes]


def split_words(line: str) -> list[str]:
    """Words of an input line; commas separate too."""
    return [word for word in re.split(r"[\s,]+", line.strip()) if word]


def one_line(target: Target, registers: Mapping[str, int]) -> str:
    """The headline of registers, with what is wrong about them if hardware gives no such values. Raises DecodeError."""
    fault = target.decode(**registers)
    named, access = target.named(fault), target.access(fault)
    code = target.backend.code
    if code not in registers and _tried(access) == _tried(target.access(target.decode())):
        return f"{code} is not given: nothing says what was tried"
    text = headline(access, _status(target, named))
    if target.backend.unusual is None or target.backend.reachable.on(named):
        return text
    return " ".join([text, *(f"({note})" for note in target.backend.unusual(named)[:1])])


def _tried(access: Access) -> Access:
    return replace(access, gpa=None, gva=None, offset=None)
