"""Many faults: expressions over uint64 columns, evaluated block by block.

A block stays in the second-level cache. Inside it, a membership looks only at the byte (or half, or
word) of the register that holds its field: a strided copy of one byte in eight, then 8-bit operations
that the CPU does sixteen or more at a time. That is what keeps one predicate near a C loop.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import reduce
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvmfault.algebra.expr import Among, Maybe, Pred, Term, Word
from kvmfault.errors import DecodeError

U64Col: TypeAlias = NDArray[np.uint64]
BoolCol: TypeAlias = NDArray[np.bool_]
Columns: TypeAlias = Mapping[str, U64Col]
"""Register name -> one value per fault; all of one length."""

BLOCK = 1 << 15
"""Rows evaluated together: 256 KiB of input per register."""


_LANES: tuple[tuple[int, type[np.unsignedinteger]], ...] = ((8, np.uint8), (16, np.uint16), (32, np.uint32))


def pred_column(pred: Pred, columns: Columns) -> BoolCol:
    """Whether *pred* holds, row by row. Raises DecodeError naming a register that is missing."""
    out = np.empty(_rows(columns, pred.reads), np.bool_)
    reads = [(name, columns[name]) for name in pred.reads]
    for start in range(0, len(out), BLOCK):
        stop = start + BLOCK
        out[start:stop] = _Block({name: col[start:stop] for name, col in reads}, len(out[start:stop])).pred(pred)
    return out


def word_column(word: Word, columns: Columns) -> U64Col:
    """The value of *word*, row by row. Raises DecodeError naming a register that is missing."""
    out = np.full(_rows(columns, word.reads), word.const, np.uint64)
    for start in range(0, len(out), BLOCK):
        part = out[start : start + BLOCK]
        for term in word.terms:
            np.bitwise_or(part, _term(term, columns[term.register][start : start + BLOCK]), out=part)
    return out


def maybe_column(maybe: Maybe, columns: Columns) -> tuple[U64Col, BoolCol]:
    """Value and validity, row by row; the value of an invalid row has no meaning."""
    return word_column(maybe.word, columns), pred_column(maybe.valid, columns)


def _rows(columns: Columns, reads: Mapping[str, int]) -> int:
    for name in reads:
        if name not in columns:
            raise DecodeError(f"no column for register {name}; given: {', '.join(columns) or 'none'}", register=name)
    lengths = {len(c) for c in columns.values()}
    if len(lengths) != 1:
        raise DecodeError(f"columns differ in length: {sorted(lengths)}", register=next(iter(columns), ""))
    return lengths.pop()


def _term(term: Term, column: U64Col) -> U64Col:
    bits = column & np.uint64(term.mask)
    shifted = bits >> np.uint64(term.shift) if term.shift >= 0 else bits << np.uint64(-term.shift)
    return shifted if term.table is None else np.array(term.table, np.uint64)[shifted]


class _Block:
    """Lanes of one block, copied out at most once each."""

    def __init__(self, columns: Columns, rows: int) -> None:
        self.columns = columns
        self.rows = rows
        self.lanes: dict[tuple[str, int, int], NDArray[np.unsignedinteger]] = {}

    def pred(self, pred: Pred) -> BoolCol:
        return pred.fold(
            self.among,
            lambda parts: reduce(np.logical_and, parts) if parts else np.ones(self.rows, np.bool_),
            lambda parts: reduce(np.logical_or, parts) if parts else np.zeros(self.rows, np.bool_),
            np.logical_not,
        )

    def among(self, leaf: Among) -> BoolCol:
        lane, low = self.lane(leaf.field.register, leaf.field.hi, leaf.field.lo)
        hits: BoolCol | None = None
        for mask, value in cubes(leaf.values, leaf.field.width):
            hit = (lane & lane.dtype.type(mask << low)) == lane.dtype.type(value << low)
            hits = hit if hits is None else hits | hit
        return np.zeros(self.rows, np.bool_) if hits is None else hits

    def lane(self, register: str, hi: int, lo: int) -> tuple[NDArray[np.unsignedinteger], int]:
        """The narrowest lane that holds bits hi:lo, and the field's low bit within it."""
        for bits, dtype in _LANES:
            if hi // bits == lo // bits:
                key = (register, bits, lo // bits)
                if key not in self.lanes:
                    per_word = 64 // bits
                    place = lo // bits if sys.byteorder == "little" else per_word - 1 - lo // bits
                    view = np.ascontiguousarray(self.columns[register]).view(dtype)
                    self.lanes[key] = np.ascontiguousarray(view[place::per_word])
                return self.lanes[key], lo % bits
        return self.columns[register], lo


def cubes(values: frozenset[int], width: int) -> tuple[tuple[int, int], ...]:
    """*values* as (mask, value) tests, few of them: halves that both lie inside lose their bit."""
    if not values:
        return ()
    full = (1 << width) - 1

    def merged(tests: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        wider = {
            (mask & ~bit, value & ~bit)
            for mask, value in tests
            for bit in (1 << i for i in range(width))
            if mask & bit and (mask, value ^ bit) in tests
        }
        return frozenset(wider)

    primes: set[tuple[int, int]] = set()
    level = frozenset((full, v) for v in values)
    while level:
        wider = merged(level)
        primes |= {(m, v) for m, v in level if not any(m & wm == wm and v & wm == wv for wm, wv in wider)}
        level = wider
    chosen: list[tuple[int, int]] = []
    left = set(values)
    while left:  # greedy cover: not always the fewest tests, always all and only the values
        best = max(sorted(primes), key=lambda t: sum(v & t[0] == t[1] for v in left))
        chosen.append(best)
        left -= {v for v in left if v & best[0] == best[1]}
    return tuple(chosen)
