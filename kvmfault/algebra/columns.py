"""Many faults: expressions over uint64 columns, evaluated block by block.

A membership becomes a few tests ``byte & mask == value`` on single bytes of a register, compiled once per predicate.
A block copies each byte that is looked at out of the registers once, as uint8; all that follows are 8-bit operations,
which the CPU does sixteen or more at a time, on buffers that stay in its second-level cache. The cost is nearly that
of reading the columns, which is why one predicate keeps up with a C loop over 64-bit values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvmfault.algebra.cubes import cubes
from kvmfault.algebra.expr import Among, Maybe, Pred, Term, Word
from kvmfault.errors import DecodeError

__all__ = ["BLOCK", "BoolCol", "Columns", "U64Col", "maybe_column", "pred_column", "word_column"]

U64Col: TypeAlias = NDArray[np.uint64]
BoolCol: TypeAlias = NDArray[np.bool_]
Columns: TypeAlias = Mapping[str, U64Col]
"""Register name -> one value per fault; all of one length."""

BLOCK: Final = 1 << 16
"""Rows evaluated together: 512 KiB of input per register, 64 KiB per byte of it that is looked at."""


def pred_column(pred: Pred, columns: Columns) -> BoolCol:
    """Whether *pred* holds, row by row. Raises DecodeError naming a register that is missing."""
    reads = pred.reads
    out = np.empty(_rows(columns, reads), np.bool_)
    given = _plain(columns, reads)
    rule = _rule(pred)
    for start in range(0, len(out), BLOCK):
        stop = min(start + BLOCK, len(out))
        out[start:stop] = rule(_Block({name: col[start:stop] for name, col in given.items()}, stop - start))
    return out


def word_column(word: Word, columns: Columns) -> U64Col:
    """The value of *word*, row by row. Raises DecodeError naming a register that is missing."""
    reads = word.reads
    out = np.empty(_rows(columns, reads), np.uint64)
    given = _plain(columns, reads)
    terms = [(given[term.register], _term(term)) for term in word.terms]
    const = np.uint64(word.const)
    for start in range(0, len(out), BLOCK):
        part = out[start : start + BLOCK]
        for number, (column, value_into) in enumerate(terms):
            rows = column[start : start + BLOCK]
            if number == 0:
                value_into(rows, part)
            else:
                np.bitwise_or(part, value_into(rows, np.empty_like(part)), out=part)
        if not terms:
            part[:] = const
        elif const:
            np.bitwise_or(part, const, out=part)
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


def _plain(columns: Columns, reads: Mapping[str, int]) -> Columns:
    # in the memory order that _Block.byte relies on; columns usually are, then nothing is copied
    return {name: np.ascontiguousarray(columns[name], np.uint64) for name in reads}


# Words.


def _term(term: Term) -> Callable[[U64Col, U64Col], U64Col]:
    # a function that writes the term's value of some rows into its second argument and returns that
    mask, by = np.uint64(term.mask), np.uint64(abs(term.shift))
    shift = np.right_shift if term.shift >= 0 else np.left_shift
    table = None if term.table is None else np.array(term.table, np.uint64)

    def into(rows: U64Col, out: U64Col) -> U64Col:
        bits = np.bitwise_and(rows, mask, out=out if table is None else None)
        if by:
            shift(bits, by, out=bits)
        # an index never exceeds the table: "clip" is there because numpy checks less with it
        return bits if table is None else np.take(table, bits.view(np.int64), out=out, mode="clip")

    return into


# Predicates.


class _Block:
    """Some rows of the columns, and the bytes copied out of them so far."""

    __slots__ = ("columns", "lanes", "rows")

    def __init__(self, columns: Columns, rows: int) -> None:
        self.columns = columns
        self.rows = rows
        self.lanes: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def byte(self, register: str, number: int) -> NDArray[np.uint8]:
        """Bits ``8 * number + 7`` to ``8 * number`` of the register. Shared: not to be written to."""
        lane = self.lanes.get((register, number))
        if lane is None:
            column = self.columns[register]
            if number == 0:
                lane = column.astype(np.uint8)  # a conversion, several times as fast as the copy below
            else:
                place = number if sys.byteorder == "little" else 7 - number
                lane = column.view(np.uint8)[place::8].copy()
            self.lanes[register, number] = lane
        return lane


_Rule: TypeAlias = Callable[[_Block], BoolCol]
"""A predicate, compiled. It always gives a new array, which whoever called it may overwrite."""


@lru_cache(maxsize=256)
def _rule(pred: Pred) -> _Rule:
    return pred.fold(_among, _all_of, _any_of, _negated)


def _among(leaf: Among) -> _Rule:
    field = leaf.field
    tests = cubes(leaf.values, field.width)
    return _any_of([_cube(field.register, mask << field.lo, value << field.lo) for mask, value in tests])


def _cube(register: str, mask: int, value: int) -> _Rule:
    bytes_of = [(number, mask >> 8 * number & 0xFF, value >> 8 * number & 0xFF) for number in range(8)]
    return _all_of([_byte_is(register, number, np.uint8(m), np.uint8(v)) for number, m, v in bytes_of if m])


def _byte_is(register: str, number: int, mask: np.uint8, value: np.uint8) -> _Rule:
    if mask == 0xFF:
        return lambda block: block.byte(register, number) == value
    return lambda block: (block.byte(register, number) & mask) == value


def _all_of(parts: Sequence[_Rule]) -> _Rule:
    return _joined(parts, np.logical_and, True)


def _any_of(parts: Sequence[_Rule]) -> _Rule:
    return _joined(parts, np.logical_or, False)


def _joined(parts: Sequence[_Rule], join: np.ufunc, without_parts: bool) -> _Rule:
    if not parts:
        return lambda block: np.full(block.rows, without_parts)
    first, *rest = parts

    def run(block: _Block) -> BoolCol:
        hits = first(block)
        for part in rest:
            join(hits, part(block), out=hits)
        return hits

    return run if rest else first


def _negated(part: _Rule) -> _Rule:
    def run(block: _Block) -> BoolCol:
        hits = part(block)
        return np.logical_not(hits, out=hits)

    return run
