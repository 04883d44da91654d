"""Proofs by enumeration: two expressions compared on every value of the bits that either reads.

Predicates: all combinations. Words: they are XORs of terms that each see one field, so all values of
the bits that feed tables, times zero and the one-hot values of the rest, decide equality exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kvmfault.algebra.columns import BoolCol, U64Col, pred_column, word_column
from kvmfault.algebra.domain import MAX_BITS, Digit, branches, cases, conjuncts, every_value, with_representatives
from kvmfault.algebra.expr import ALWAYS, Pred, Word, union
from kvmfault.errors import UsageError

FEW_BITS = 20
"""Up to so many bits every combination is tried, even of those that only narrow the question."""

Witness: TypeAlias = dict[str, int]
"""Register name -> value: the smallest that shows something (fewest bits set, then lowest, register by register)."""
Rank: TypeAlias = tuple[int, tuple[int, ...]]


__all__ = [
    "FEW_BITS",
    "MAX_BITS",
    "Rank",
    "Relation",
    "Witness",
    "bits_read",
    "combinations",
    "relate",
    "smallest",
    "where",
    "words_differ",
]


@dataclass(frozen=True, slots=True)
class Relation:
    """How two predicates relate on *cases* combinations of *reads*; each count with its smallest witness."""

    reads: dict[str, int]
    cases: int
    both: int
    only_a: int
    only_b: int
    neither: int
    kinds: bool
    """Not all values were tried: of some bits one value of each kind that the expressions tell apart, which decides."""
    witnesses: dict[str, Witness]
    """By the names of the four counts; absent where the count is 0."""

    @property
    def equal(self) -> bool:
        """The same answer everywhere."""
        return not self.only_a and not self.only_b

    @property
    def a_implies_b(self) -> bool:
        """Wherever a holds, b holds."""
        return not self.only_a

    @property
    def b_implies_a(self) -> bool:
        """Wherever b holds, a holds."""
        return not self.only_b

    @property
    def disjoint(self) -> bool:
        """Never both."""
        return not self.both


def relate(a: Pred, b: Pred, within: Pred = ALWAYS, *, by_kinds: bool = False) -> Relation:
    """Compare two predicates on every combination of the bits read, where *within* holds.

    Bits that only *within* reads are enumerated in full while they are few, else by representatives
    (``domain.with_representatives``), and so are all bits where there would be too many cases, or *by_kinds* asks for
    it: that decides the same and finds the same witnesses, quicker, but its counts mean little. Raises UsageError if
    there are more than 2**MAX_BITS cases even so.
    """
    asked = union(a.reads, b.reads)
    reads = union(asked, within.reads)
    if by_kinds or bits_read(asked) > MAX_BITS:
        spaces = [(with_representatives({}, a, b, *parts), parts) for parts in branches(within)]
        return _relation(a, b, spaces, reads, kinds=True)
    parts = conjuncts(within)
    few = bits_read(reads) <= FEW_BITS
    digits = every_value(reads) if few else with_representatives(asked, a, b, within)
    try:
        return _relation(a, b, [(digits, parts)], reads, kinds=not few)
    except UsageError:
        return relate(a, b, within, by_kinds=True)


def _relation(
    a: Pred, b: Pred, spaces: list[tuple[list[Digit], list[Pred]]], reads: dict[str, int], *, kinds: bool
) -> Relation:
    counts = {"both": 0, "only_a": 0, "only_b": 0, "neither": 0}
    best: dict[str, tuple[Rank, Witness]] = {}
    count = 0
    for columns in (columns for digits, parts in spaces for columns in cases(digits, parts)):
        rows = len(next(iter(columns.values())))
        if reads:
            columns = {name: columns[name] if name in columns else np.zeros(rows, np.uint64) for name in reads}
        count += rows
        va, vb = pred_column(a, columns), pred_column(b, columns)
        cells = {"both": va & vb, "only_a": va & ~vb, "only_b": vb & ~va, "neither": ~va & ~vb}
        for name, hit in cells.items():
            found = int(hit.sum())
            counts[name] += found
            if found:
                candidate = smallest(columns, hit)
                best[name] = min(best.get(name, candidate), candidate, key=lambda c: c[0])
    return Relation(reads, count, **counts, kinds=kinds, witnesses={name: w for name, (_, w) in best.items()})


def where(pred: Pred) -> Witness | None:
    """The smallest registers on which *pred* holds, or None: there are none."""
    return relate(ALWAYS, ALWAYS, pred, by_kinds=True).witnesses.get("both")


def words_differ(a: Word, b: Word) -> Witness | None:
    """The smallest registers on which the two words differ, or None: they are equal (exact, see the module text)."""
    tables: dict[str, int] = {}
    for term in (*a.terms, *b.terms):
        if term.table is not None:
            tables[term.register] = tables.get(term.register, 0) | term.mask
    reads = union(a.reads, b.reads)
    linear = {name: mask & ~tables.get(name, 0) for name, mask in reads.items()}
    found: list[tuple[Rank, Witness]] = []
    for columns in combinations(tables or {next(iter(reads), "none"): 0}):
        rows = len(next(iter(columns.values())))
        for name, bit in [("", 0)] + [(n, 1 << i) for n, m in linear.items() for i in range(64) if m >> i & 1]:
            probe = {n: columns.get(n, np.zeros(rows, np.uint64)) | np.uint64(bit * (n == name)) for n in reads}
            hit = word_column(a, probe) != word_column(b, probe) if probe else np.array([a.const != b.const])
            if hit.any():
                found.append(smallest(probe, hit) if probe else ((0, ()), {}))
    return min(found, key=lambda c: c[0])[1] if found else None


def bits_read(reads: dict[str, int]) -> int:
    """How many bits in all."""
    return sum(mask.bit_count() for mask in reads.values())


def combinations(reads: dict[str, int]) -> Iterator[dict[str, U64Col]]:
    """Every combination of the bits of *reads*, as columns of limited length. UsageError if they are too many."""
    return cases(every_value(reads))


def smallest(columns: dict[str, U64Col], hit: BoolCol) -> tuple[Rank, Witness]:
    """Of the rows of *columns* where *hit* holds, at least one, the one with the fewest bits; and its rank."""
    rows = np.flatnonzero(hit)
    ones = np.zeros(len(rows), np.uint64)
    for column in columns.values():
        ones += np.bitwise_count(column[rows])
    rows = rows[ones == ones.min()]
    for column in columns.values():
        values = column[rows]
        rows = rows[values == values.min()]
    witness = {name: int(column[rows[0]]) for name, column in columns.items() if name != "none"}
    return (int(ones.min()), tuple(witness.values())), witness
