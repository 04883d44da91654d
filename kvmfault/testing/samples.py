"""Fault registers to try a backend with: such as hardware produces, and any at all."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import islice
from math import prod
from random import Random
from typing import Final

import numpy as np

from kvmfault.algebra.columns import pred_column
from kvmfault.algebra.domain import Digit, cases, with_representatives
from kvmfault.algebra.expr import Pred, union
from kvmfault.contract.accessors import FACTS, Gap, stand_in
from kvmfault.contract.target import Target

__all__ = ["TRIED", "Row", "any_rows", "predicates", "reachable_rows"]

TRIED: Final = 1 << 16
"""Combinations of what predicates tell apart: up to so many are all tried, of more as many by chance."""

Row = dict[str, int]
"""Registers by name; one that is left out was not captured."""


def predicates(target: Target) -> dict[str, Pred]:
    """The truths of a target by name, a gap as what it assumes."""
    facts = {name: getattr(target.definition, name) for name in FACTS}
    return {name: stand_in(fact) for name, fact in facts.items() if isinstance(fact, (Pred, Gap))}


@cache
def reachable_rows(target: Target, count: int = 300) -> tuple[Row, ...]:
    """Up to *count* different faults that the target's hardware produces; the same ones every time.

    What facts tell apart is covered as evenly as chance does it; bits that decide nothing are any, reserved ones 0.
    """
    dice = Random(1)
    preds = [*predicates(target).values(), target.backend.reachable]
    digits = with_representatives({}, *preds)
    decisive = union(*(pred.reads for pred in preds))
    found: list[Row] = []
    columns = _columns(digits, target)
    inside = np.flatnonzero(pred_column(target.backend.reachable, columns))
    for index in dice.sample(list(map(int, inside)), min(count, len(inside))):
        row = {name: int(column[index]) for name, column in columns.items()}
        for register in target.backend.registers:
            free = sum(f.mask for f in register) & ~decisive.get(register.name, 0)
            row[register.name] |= _some(dice, register.width) & free
        found.append(_captured(target, row))
    return tuple(found)


def _columns(digits: list[Digit], target: Target) -> Mapping[str, np.ndarray[tuple[int], np.dtype[np.uint64]]]:
    if prod(len(d.values) for d in digits) <= TRIED:
        parts = list(cases(digits))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    else:
        chance = np.random.default_rng(1)
        columns = {}
        for digit in digits:
            part = digit.values[chance.integers(0, len(digit.values), TRIED)]
            columns[digit.register] = columns[digit.register] | part if digit.register in columns else part
    rows = len(next(iter(columns.values())))
    return {name: columns.get(name, np.zeros(rows, np.uint64)) for name in target.order}


def _captured(target: Target, row: Row) -> Row:
    # a register whose mark is not set was not captured
    synthetic = target.backend.registers[-1]
    gone = {name for name, mark in target.backend.given.items() if not row[synthetic.name] & synthetic[mark].mask}
    return {name: value for name, value in row.items() if name not in gone}


def any_rows(target: Target, count: int = 200) -> tuple[Row, ...]:
    """Registers of any value that fits: all zero, all ones, single bits, and values by chance."""
    dice = Random(2)
    registers = target.backend.registers
    rows: list[Row] = [{}, dict.fromkeys(target.order, 0), {r.name: (1 << r.width) - 1 for r in registers}]
    rows += [{r.name: 1 << bit} for r in registers for bit in range(r.width)]
    while len(rows) < count:
        rows.append({r.name: _some(dice, r.width) for r in registers if dice.random() < 0.8})
    return tuple(islice(dice.sample(rows, len(rows)), count))


def _some(dice: Random, width: int) -> int:
    # few bits set as often as any number: fields are mostly zero
    few = dice.getrandbits(width) & dice.getrandbits(width) & dice.getrandbits(width)
    return few if dice.random() < 0.5 else dice.getrandbits(width)
