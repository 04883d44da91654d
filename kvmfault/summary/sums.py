"""Tables of sums that can be put together in any grouping, in bounded memory.

A table has key columns and value columns; rows with the same key become one. What does not fit is made smaller by a
rule that depends on the whole alone, never on the order or on the places where it was cut, so that one process and
many give the same figures:

* a *sample* keeps the keys whose hash is smallest. A kept key has its exact value; how many were left out is known
  only of what is counted elsewhere;
* a *scale* halves the resolution of a column until few enough values are left. Nothing is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

__all__ = ["Rule", "combine", "sample", "scale_for", "scale_of"]

_SUMS: Final = ("n", "bytes", "ns")
"""Value columns; one that begins with ``min_`` or ``max_`` keeps the smallest or largest."""


class Rule(NamedTuple):
    """What a table is."""

    keys: tuple[str, ...]
    cap: int
    """Rows kept, or with *by*: values of that column."""
    by: str | None = None
    """Column whose hash decides; None: that of all keys."""


def combine(tables: Iterable[pl.DataFrame | None], rule: Rule) -> pl.DataFrame | None:
    """One table out of several; None if there is nothing."""
    parts = [t for t in tables if t is not None and t.height]
    if not parts:
        return None
    whole = pl.concat(parts) if len(parts) > 1 else parts[0]
    values = [_aggregate(name) for name in whole.columns if name not in rule.keys]
    return sample(whole.group_by(rule.keys).agg(values).sort(rule.keys, nulls_last=True), rule)


def _aggregate(name: str) -> pl.Expr:
    column = pl.col(name)
    if name.startswith("min_"):
        return column.min()
    if name.startswith("max_"):
        return column.max()
    assert name in _SUMS, name
    return column.sum()


def sample(table: pl.DataFrame, rule: Rule) -> pl.DataFrame:
    """Only the rows that the rule keeps, in their order."""
    if table.height <= rule.cap:
        return table
    order = _hash(table, (rule.by,) if rule.by else rule.keys)
    distinct = np.unique(order)
    if len(distinct) <= rule.cap:
        return table
    return table.filter(pl.Series(order <= distinct[rule.cap - 1]))


def _hash(table: pl.DataFrame, keys: tuple[str, ...]) -> NDArray[np.uint64]:
    # splitmix64, the same on every machine and in every version of what is below
    mixed = np.zeros(table.height, np.uint64)
    for key in keys:
        column = table[key]
        mixed ^= (
            _text(column)
            if column.dtype == pl.String
            else column.cast(pl.UInt64, strict=False, wrap_numerical=True).fill_null((1 << 64) - 1).to_numpy()
        )
        mixed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _text(column: pl.Series) -> NDArray[np.uint64]:
    distinct = {word: int.from_bytes(f"{word}".encode()[-8:], "big") for word in column.unique()}
    return np.array([distinct[word] for word in column], np.uint64)


def scale_for(low: int, high: int, cap: int) -> int:
    """Bits to drop so that the values from *low* to *high* fall into at most *cap* steps."""
    bits = 0
    while (high >> bits) - (low >> bits) >= cap:
        bits += 1
    return bits


def scale_of(values: NDArray[np.uint64], cap: int, bits: int = 0) -> int:
    """Bits to drop, *bits* at least, so that at most *cap* different values are left."""
    distinct = np.unique(values >> np.uint64(bits))
    while len(distinct) > cap:
        distinct = np.unique(distinct >> np.uint64(1))
        bits += 1
    return bits
