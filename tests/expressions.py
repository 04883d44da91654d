"""Made-up registers, and random expressions over them, each with its meaning in plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from hypothesis import strategies as st

from kvmfault.algebra.expr import ALWAYS, NEVER, Pred, Word
from kvmfault.algebra.layout import Field, join, register
from kvmfault.errors import LayoutError
from kvmfault.types import U64

Registers = Mapping[str, int]

# Fields in every lane of a column (one byte, two, four, all eight) and across the borders between them.
WIDE: Final = register(
    "WIDE", 64, "made up", {"THREE": {0: "none", 5: "five"}, "TOP": {1: "set"}},
    TOP=63, HIGH=(62, 50), CROSS=(40, 27), WORD=(26, 16), BYTES=(13, 6), THREE=(4, 2), TWO=(1, 0),
)  # fmt: skip
SMALL: Final = register("SMALL", 9, "made up", A=(8, 7), B=6, C=(5, 3), D=2, E=1, F=0)
ORDER: Final = ("WIDE", "SMALL")
FIELDS: Final[tuple[Field, ...]] = (*WIDE, *SMALL)
NAMES: Final[dict[str, Pred | Word]] = {f.name: f for f in FIELDS}


@dataclass(frozen=True)
class Meant:
    """An expression and what it means. *text* is Python for people who read a failure."""

    text: str
    pred: Pred
    holds: Callable[[Registers], bool]

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class MeantWord:
    """A word and its value."""

    text: str
    word: Word
    value: Callable[[Registers], int]

    def __repr__(self) -> str:
        return self.text


def bits(f: Field, registers: Registers) -> int:
    """The field's value, without help from the library."""
    return registers[f.register] >> f.lo & (1 << f.hi - f.lo + 1) - 1


def values_of(f: Field) -> st.SearchStrategy[int]:
    """A value that the field can hold."""
    return st.integers(0, (1 << f.width) - 1)


@st.composite
def leaves(draw: st.DrawFn, fields: tuple[Field, ...] = FIELDS) -> Meant:
    """One field holds one of some values."""
    f = draw(st.sampled_from(fields))
    values = frozenset(draw(st.sets(values_of(f), min_size=1, max_size=6)))
    return Meant(f"{f.name} in {sorted(values)}", f.one_of(tuple(values)), lambda r: bits(f, r) in values)


CONSTANTS: Final = (Meant("ALWAYS", ALWAYS, lambda r: True), Meant("NEVER", NEVER, lambda r: False))


def _and(p: tuple[Meant, Meant]) -> Meant:
    a, b = p
    return Meant(f"({a} & {b})", a.pred & b.pred, lambda r: a.holds(r) and b.holds(r))


def _or(p: tuple[Meant, Meant]) -> Meant:
    a, b = p
    return Meant(f"({a} | {b})", a.pred | b.pred, lambda r: a.holds(r) or b.holds(r))


def _not(a: Meant) -> Meant:
    return Meant(f"~{a}", ~a.pred, lambda r: not a.holds(r))


def preds(fields: tuple[Field, ...] = FIELDS) -> st.SearchStrategy[Meant]:
    """Any tree of memberships under and, or, not, with the two constants."""
    base = leaves(fields) | st.sampled_from(CONSTANTS)
    return st.recursive(
        base, lambda p: st.tuples(p, p).map(_and) | st.tuples(p, p).map(_or) | p.map(_not), max_leaves=12
    )


def _field_word(f: Field) -> MeantWord:
    return MeantWord(f.name, f, lambda r: bits(f, r))


@st.composite
def _tables(draw: st.DrawFn) -> MeantWord:
    f = draw(st.sampled_from([f for f in FIELDS if f.width <= 8]))
    table = draw(st.dictionaries(values_of(f), st.integers(0, U64), min_size=1, max_size=4))
    return MeantWord(f"{f.name}.table({table})", f.table(table), lambda r: table.get(bits(f, r), 0))


@st.composite
def _shifted(draw: st.DrawFn, words: st.SearchStrategy[MeantWord]) -> MeantWord:
    w, n = draw(words), draw(st.integers(0, 70))
    if draw(st.booleans()):
        return MeantWord(f"({w} << {n})", w.word << n, lambda r: w.value(r) << n & U64)
    return MeantWord(f"({w} >> {n})", w.word >> n, lambda r: w.value(r) >> n)


def _joined(pair: tuple[MeantWord, MeantWord]) -> MeantWord:
    a, b = pair
    try:
        return MeantWord(f"join({a}, {b})", join(a.word, b.word), lambda r: a.value(r) | b.value(r))
    except LayoutError:  # they overlap: refused, as another test shows
        return a


def words() -> st.SearchStrategy[MeantWord]:
    """Fields and tables, shifted and joined."""
    base = st.sampled_from(FIELDS).map(_field_word) | _tables()
    return st.recursive(base, lambda w: _shifted(w) | st.tuples(w, w).map(_joined), max_leaves=6)


def registers() -> st.SearchStrategy[dict[str, int]]:
    """Values of both registers: anything, and often a single bit, a few, or none."""
    few = st.sets(st.integers(0, 63), max_size=3).map(lambda s: sum(1 << b for b in s))
    wide = few | st.integers(0, U64) | few.map(lambda v: v ^ U64)
    return st.fixed_dictionaries({"WIDE": wide, "SMALL": st.integers(0, 511)})


INTERESTING: Final[tuple[dict[str, int], ...]] = tuple(
    [{"WIDE": 0, "SMALL": 0}, {"WIDE": U64, "SMALL": 511}]
    + [{"WIDE": 1 << i, "SMALL": 0} for i in range(64)]
    + [{"WIDE": U64 ^ 1 << i, "SMALL": 0} for i in range(64)]
    + [{"WIDE": 0, "SMALL": 1 << i} for i in range(9)]
)
"""Zero, all ones, every one-hot word and its complement."""
