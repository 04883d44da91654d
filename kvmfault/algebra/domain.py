"""The cases of a proof: every value of the bits that are asked about, and of the rest what can make a difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np

from kvmfault.algebra.columns import U64Col
from kvmfault.algebra.expr import Among, Pred, union
from kvmfault.errors import UsageError

__all__ = ["CHUNK", "MAX_BITS", "Digit", "cases", "every_value", "with_representatives"]

MAX_BITS = 28
"""More than 2**28 cases are refused: that many take about a minute."""
CHUNK = 1 << 18
_DIGIT_BITS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Digit:
    """Some bits of one register, and the values in place that they take."""

    register: str
    values: U64Col


def every_value(reads: Mapping[str, int]) -> list[Digit]:
    """Digits for all values of the bits of *reads*, lowest bits first."""
    return [
        Digit(name, np.arange(1 << width, dtype=np.uint64) << np.uint64(low))
        for name, mask in reads.items()
        for run_low, run_width in list(_runs(mask, ())) or [(0, 0)]
        for low, width in list(_short(run_low, run_width)) or [(0, 0)]  # a register without bits still has a column
    ]


def with_representatives(asked: Mapping[str, int], *preds: Pred) -> list[Digit]:
    """All values of the bits *asked*; of the bits that only *preds* read, one value of each kind that they tell apart.

    Where they compare a run of bits with constants, their values are those constants and one other: any other
    value makes the same comparisons fail. So nothing is lost that a proof could depend on.
    """
    leaves = [leaf for pred in preds for leaf in _leaves(pred)]
    digits = every_value(asked)
    for name, mask in union(*(pred.reads for pred in preds)).items():
        rest = mask & ~asked.get(name, 0)
        fields = [leaf for leaf in leaves if leaf.field.register == name]
        cuts = {bit for leaf in fields for bit in (leaf.field.lo, leaf.field.hi + 1)}
        for low, width in _runs(rest, cuts):
            digits.append(Digit(name, _kinds(fields, low, width)))
    return digits


def _kinds(leaves: Iterable[Among], low: int, width: int) -> U64Col:
    piece = (1 << width) - 1
    constants = {
        (value << leaf.field.lo) >> low & piece
        for leaf in leaves
        if leaf.field.mask >> low & 1
        for value in leaf.values
    }
    other = next((v for v in _sparsest_first(width) if v not in constants), 0)
    kinds = sorted(constants | ({other} if len(constants) <= piece else set()))
    return np.array(kinds, np.uint64) << np.uint64(low)


def _sparsest_first(width: int) -> Iterator[int]:
    # a counterexample is to have few bits set
    for ones in range(width + 1):
        yield from sorted(sum(1 << bit for bit in bits) for bits in combinations(range(width), ones))


def cases(digits: list[Digit]) -> Iterator[dict[str, U64Col]]:
    """Every combination of the digits, as columns of up to CHUNK rows. UsageError if they are too many."""
    total = prod(len(d.values) for d in digits)
    if total > 1 << MAX_BITS:
        bits = total.bit_length() - 1
        raise UsageError(f"{bits} bits are read, at most {MAX_BITS} can be enumerated: narrow the expression")
    for start in range(0, total, CHUNK):
        index = np.arange(start, min(start + CHUNK, total), dtype=np.int64)
        columns: dict[str, U64Col] = {}
        for digit in digits:
            part = digit.values[index % len(digit.values)]
            index //= len(digit.values)
            known = columns.get(digit.register)
            columns[digit.register] = part if known is None else known | part
        yield columns or {"none": np.zeros(len(index), np.uint64)}


def _runs(mask: int, cuts: Iterable[int]) -> Iterator[tuple[int, int]]:
    # (lowest bit, width) of the runs of ones, cut where a field begins or ends
    edges = set(cuts)
    bit = 0
    while mask >> bit:
        start = bit
        while mask >> bit & 1 and (bit == start or bit not in edges):
            bit += 1
        if bit > start:
            yield start, bit - start
        else:
            bit += 1


def _short(low: int, width: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, width, _DIGIT_BITS):
        yield low + offset, min(_DIGIT_BITS, width - offset)


def _leaves(pred: Pred) -> list[Among]:
    found: list[Among] = []
    pred.fold(found.append, lambda parts: None, lambda parts: None, lambda part: None)
    return found
