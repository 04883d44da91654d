"""The cases of a proof: every value of the bits that are asked about, and of the rest what can make a difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Final

import numpy as np

from kvmfault.algebra.columns import U64Col, pred_column
from kvmfault.algebra.expr import AllOf, Among, AnyOf, Not, Pred, union
from kvmfault.errors import UsageError
from kvmfault.types import U64

__all__ = [
    "CHUNK",
    "FEW",
    "MAX_BITS",
    "MAX_BRANCHES",
    "Digit",
    "branches",
    "cases",
    "conjuncts",
    "every_value",
    "with_representatives",
]

MAX_BITS = 28
"""More than 2**28 cases are refused: that many take about a minute."""
CHUNK = 1 << 18
_DIGIT_BITS = 10
FEW: Final = 8
"""A choice that reads up to so many bits is enumerated, not divided."""
MAX_BRANCHES: Final = 64


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


def cases(digits: Sequence[Digit], parts: Sequence[Pred] = ()) -> Iterator[dict[str, U64Col]]:
    """Every combination of the digits on which all *parts* hold, as columns of up to CHUNK rows, not to be written to.

    A part is asked as soon as all its bits are there, so what it excludes is not combined with the rest. UsageError if
    there are too many combinations even so.
    """
    due = _due(digits, parts)
    columns: dict[str, U64Col] = {}
    rows, done = 1, 0
    while done < len(digits) and rows * len(digits[done].values) <= CHUNK:
        columns = _where(_times(columns, rows, digits[done]), due[done])
        rows, done = _rows(columns), done + 1
    rest = digits[done:]
    total = rows * prod(len(d.values) for d in rest)
    if total > 1 << MAX_BITS:
        bits = total.bit_length() - 1
        raise UsageError(f"{bits} bits are read, at most {MAX_BITS} can be enumerated: narrow the expression")
    asked = [part for some in due[done:] for part in some]
    # what does not fit a chunk: slices of the next digit, and one value of each of the others
    slices = [_sliced(digit, max(1, CHUNK // max(1, rows)) if n == 0 else 1) for n, digit in enumerate(rest)]
    for chosen in product(*reversed(slices)) if rows else ():
        made = columns or {"none": np.zeros(1, np.uint64)}
        for digit in reversed(chosen):
            made = _times(made, _rows(made), digit)
        made = _where(made, asked)
        if _rows(made):
            yield made


def _due(digits: Sequence[Digit], parts: Sequence[Pred]) -> list[list[Pred]]:
    # for each digit the parts that need no later one; after the last, those that need none
    due: list[list[Pred]] = [[] for _ in range(len(digits) + 1)]
    bits = [int(np.bitwise_or.reduce(d.values)) or U64 for d in digits] if parts else []
    for part in parts:
        reads = part.reads
        needs = [n for n, d in enumerate(digits) if reads.get(d.register, 0) & bits[n]]
        due[needs[-1] if needs else -1].append(part)
    return due


def _rows(columns: Mapping[str, U64Col]) -> int:
    return len(next(iter(columns.values())))


def _times(columns: Mapping[str, U64Col], rows: int, digit: Digit) -> dict[str, U64Col]:
    # every row with every value of the digit, which varies slowest
    count = len(digit.values)
    made = {name: np.tile(column, count) if count > 1 else column for name, column in columns.items()}
    part = np.repeat(digit.values, rows)
    made[digit.register] = made[digit.register] | part if digit.register in made else part
    return made


def _where(columns: dict[str, U64Col], parts: Sequence[Pred]) -> dict[str, U64Col]:
    if not parts:
        return columns
    keep = pred_column(AllOf(tuple(parts)), columns)
    return columns if keep.all() else {name: column[keep] for name, column in columns.items()}


def _sliced(digit: Digit, length: int) -> list[Digit]:
    starts = range(0, len(digit.values), length)
    return [Digit(digit.register, digit.values[start : start + length]) for start in starts]


def branches(pred: Pred) -> list[list[Pred]]:
    """Parts, all of which hold; where *pred* is a choice of some, one list for each. One of them holds where it does.

    A choice that reads up to FEW bits stays one part, and so does what would make more than MAX_BRANCHES lists.
    """

    def width(part: Pred) -> int:
        return sum(mask.bit_count() for mask in part.reads.values())

    done: list[list[Pred]] = []
    waiting: list[list[Pred]] = [[pred]]
    while waiting:
        parts = [p for part in waiting.pop() for p in conjuncts(part)]
        choices = [p for p in parts if isinstance(p, AnyOf) and width(p) > FEW]
        widest = max(choices, key=width, default=None)
        if widest is None or len(done) + len(waiting) + len(widest.parts) > MAX_BRANCHES:
            done.append(parts)
            continue
        others = [p for p in parts if p is not widest]
        waiting += [[*others, part] for part in widest.parts]
    return done


def conjuncts(pred: Pred) -> list[Pred]:
    """*pred* as parts that must all hold. None of them is a conjunction, or a negation but of a comparison."""
    match pred:
        case AllOf(parts):
            return [p for part in parts for p in conjuncts(part)]
        case Not(AnyOf(parts)):
            return [p for part in parts for p in conjuncts(~part)]
        case Not(AllOf(parts)):
            return [AnyOf(tuple(~part for part in parts))]
        case Not(Not(of)):
            return conjuncts(of)
        case _:
            return [pred]


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
