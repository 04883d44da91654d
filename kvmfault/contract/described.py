"""What declarations say of themselves: docstrings of members, taken apart for the documentation and the commands."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import groupby
from typing import Final, get_type_hints

from kvmfault.algebra.expr import Term, Word
from kvmfault.algebra.layout import Register
from kvmfault.contract.format import Stage2Format, size_text
from kvmfault.contract.policy import Policy

__all__ = [
    "PolicyText",
    "Source",
    "bits_text",
    "documented",
    "geometry",
    "joint_name",
    "one_line",
    "policy_texts",
    "spell_word",
]

_POLICY: Final = re.compile(r"(?P<readers>[^:(]*?)(?:: (?P<meaning>.*?))?\.?(?: \((?P<kernel>(?:[^()]|\(\))*)\))?")
_OWNER: Final = re.compile(r"(\w+): (.*)")


@cache
def documented(cls: type) -> Mapping[str, str]:
    """Members of a dataclass with the docstrings below them, as one line each; a run of members shares the next one."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    waiting: list[str] = []
    for node in body.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                waiting.append(name)
            case ast.Expr(value=ast.Constant(value=str(text))):
                found |= dict.fromkeys(waiting, " ".join(text.split()))
                waiting.clear()
    return {f.name: found.get(f.name, "") for f in fields(cls)}


@dataclass(frozen=True, slots=True)
class Source:
    """Where in the kernel something comes from. *owner*: the only backends that it is about, by the first word of
    their names; empty: all."""

    owner: str
    text: str

    def __str__(self) -> str:
        return f"{self.owner}: {self.text}" if self.owner else self.text


@dataclass(frozen=True, slots=True)
class PolicyText:
    """The docstring of one member of Policy, taken apart."""

    meaning: str
    readers: tuple[str, ...]
    """Steps of the path, and functions outside it."""
    kernel: tuple[Source, ...]


@cache
def policy_texts() -> Mapping[str, PolicyText]:
    """Every member of Policy. A meaning that the docstring leaves out is that of the member's type."""
    hints = get_type_hints(Policy)
    return {name: _policy_text(text, hints[name]) for name, text in documented(Policy).items()}


def _policy_text(text: str, kind: object) -> PolicyText:
    found = _POLICY.fullmatch(text)
    if found is None:
        return PolicyText(text, (), ())
    meaning = found["meaning"] or (one_line(kind).rstrip(".") if isinstance(kind, type) and kind is not bool else "")
    readers = tuple(filter(None, found["readers"].split(", ")))
    sources = (_OWNER.fullmatch(s) or s for s in (found["kernel"] or "").split("; ") if s)
    kernel = tuple(Source("", s) if isinstance(s, str) else Source(s[1], s[2]) for s in sources)
    return PolicyText(meaning[:1].upper() + meaning[1:], readers, kernel)


def one_line(thing: object) -> str:
    """The docstring as one line."""
    return " ".join((inspect.getdoc(thing) or "").split())


def joint_name(joint: Callable[..., object]) -> str:
    """Name of a joint. One that a function made has that function's name, with what it was made for."""
    names = [
        getattr(cell.cell_contents, "__name__", repr(cell.cell_contents))
        for cell in getattr(joint, "__closure__", None) or ()
    ]
    name = joint.__qualname__.partition(".")[0]
    return f"{name}({', '.join(names)})" if names else name


def geometry(fmt: Stage2Format) -> dict[str, str]:
    """What tells one format from another; a size in brackets is one that no leaf has."""
    sizes = ((size_text(1 << level.shift), level.leaf) for level in fmt.levels)
    return {
        "host page": size_text(1 << fmt.page_shift),
        "levels, root first": " ".join(size if leaf else f"({size})" for size, leaf in sizes),
        "gpa bits": str(fmt.gpa_bits),
        "MMIO generation bits": str(fmt.mmio_generation_bits() or "no MMIO entries"),
    }


def bits_text(reads: Mapping[str, int]) -> str:
    """Register bits as text: ``7 bits: ESR_EL2 31:26 7``."""
    runs = [f"{register} {_bits(mask)}" for register, mask in reads.items()]
    count = sum(mask.bit_count() for mask in reads.values())
    return f"{count} bit{'s' * (count > 1)}: {', '.join(runs)}"


def _bits(mask: int) -> str:
    numbers = [bit for bit in range(63, -1, -1) if mask >> bit & 1]
    runs = [[bit for _, bit in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[0] + pair[1])]
    return " ".join(f"{run[0]}:{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def spell_word(word: Word, registers: Sequence[Register]) -> str:
    """A word as text: fields by name, shifts as written, tables with their entries; ``0`` for one without terms."""
    texts = [_term(term, registers) for term in word.terms if term.mask]
    return " | ".join(texts + [f"{word.const:#x}" if word.const else "0"] * (word.const != 0 or not texts))


def _term(term: Term, registers: Sequence[Register]) -> str:
    layout = next(r for r in registers if r.name == term.register)
    low = (term.mask & -term.mask).bit_length() - 1
    names = [f"{term.register}.{f.name}" for f in layout if f.mask == term.mask]
    name = names[0] if names else f"{term.register}[{_bits(term.mask)}]"
    if term.table is None:
        return f"{name} << {low - term.shift}" if low > term.shift else name
    sizes = ", ".join(f"{value:#x}: {size_text(got)}" for value, got in enumerate(term.table) if got)
    return f"{name} -> {{{sizes}}}"
