"""``kvmfault decode``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from textwrap import fill

from kvmfault.cli.render import columns, to_json
from kvmfault.contract.access import show
from kvmfault.contract.format import size_text
from kvmfault.contract.target import backend
from kvmfault.decode import (
    MAX_INPUT,
    Description,
    FactText,
    RegisterText,
    describe_entry,
    describe_fault,
    entry_lines,
    parse_input,
    parse_number,
    split_words,
)
from kvmfault.errors import KvmfaultError, UsageError

__all__ = ["entry", "one", "render", "stream"]


def one(target: str, words: Sequence[str], *, brief: bool, accessors: bool, json: bool) -> int:
    """Decode the words of the command line."""
    on = backend(target)
    given = [w for word in words for w in split_words(word)]
    text = describe_fault(on, parse_input(on, given), accessors=accessors or json)
    print(_json(text) if json else text.headline if brief else render(text, accessors=accessors))
    return 0


def stream(target: str, lines: Iterable[str], *, brief: bool, accessors: bool, json: bool) -> int:
    """Decode one input per line; a bad line is reported and the rest goes on. Status 2 if any was bad."""
    on = backend(target)
    bad = seen = 0
    for number, line in enumerate(lines, 1):
        words = split_words(line[:MAX_INPUT])
        if not words or words[0].startswith("#"):
            continue
        seen += 1
        try:
            text = describe_fault(on, parse_input(on, words), accessors=accessors or json)
        except KvmfaultError as e:
            bad += 1
            print(f"kvmfault: <stdin>:{number}: {e}", file=sys.stderr)
            continue
        if json:
            print(to_json(_jsonable(text), indent=None))
        else:
            print(text.headline if brief else render(text, accessors=accessors) + "\n")
    if not seen:
        raise UsageError("nothing to decode on standard input: give one fault per line")
    return 2 if bad else 0


def entry(target: str, descriptor: str, level: str | None, *, json: bool) -> int:
    """Explain a page-table entry."""
    texts = describe_entry(backend(target), parse_number(descriptor), level)
    if json:
        print(to_json([{"level": t.level, **dict(entry_lines(t)), "value": t.entry.value} for t in texts]))
        return 0
    for text in texts:
        print(f"{text.target}  {text.entry.value:#x} as an entry of {text.level}")
        print(columns(entry_lines(text), indent="  "))
    return 0


def render(text: Description, *, accessors: bool) -> str:
    """A description as text."""
    parts = [f"{text.target}  {text.headline}"]
    parts += [_register(register) for register in text.registers]
    known = [(f.name, _answer(f), f.why) for f in text.facts if f.known]
    unknown = [(f.name, "unknown", f.why) for f in text.facts if not f.known]
    parts.append("facts\n" + columns(known + unknown, indent="  "))
    if accessors:
        parts.append("kernel's accessors\n" + columns([(f.name, _answer(f)) for f in text.accessors], indent="  "))
    if text.notes:
        parts.append("notes\n" + "\n".join(f"  {note}" for note in text.notes))
    return "\n".join(parts)


def _register(register: RegisterText) -> str:
    # what says something, and on one line what is 0: most bits of most syndromes are
    telling = [f for f in register.fields if f.value or (f.meaning and f.wide)]
    rows = [(f.name, f.place.split()[-1], f"{f.value:#x}", f.meaning) for f in telling]
    zero = " ".join(f.name for f in register.fields if f not in telling)
    parts = [f"{register.name} = {register.value:#x}"]
    parts += [columns(rows, indent="  ", right=frozenset({1, 2}))] * bool(rows)
    parts += [fill(zero, 100, initial_indent="  zero: ", subsequent_indent="        ")] * bool(zero)
    return "\n".join(parts)


def _answer(fact: FactText) -> str:
    if fact.answer is None:
        return "none"
    if isinstance(fact.answer, bool):
        return show(fact.answer)
    if fact.name == "granule":
        return size_text(fact.answer)
    return str(fact.answer) if fact.answer < 10 or fact.name.startswith("mmio_") else f"{fact.answer:#x}"


def _json(text: Description) -> str:
    return to_json(_jsonable(text))


def _jsonable(text: Description) -> dict[str, object]:
    access = {k: (v.name.lower() if k == "cause" else v) for k, v in asdict(text.access).items()}
    return {
        "target": text.target,
        "headline": text.headline,
        "access": access,
        "registers": {
            r.name: {"value": r.value, "fields": {f.name: {"value": f.value, "meaning": f.meaning} for f in r.fields}}
            for r in text.registers
        },
        "facts": {f.name: {"answer": f.answer, "known": f.known, "why": f.why} for f in text.facts},
        "accessors": {f.name: f.answer for f in text.accessors},
        "notes": list(text.notes),
    }
