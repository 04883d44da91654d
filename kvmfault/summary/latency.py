"""From an exit to the next entry of the same task: how long, why, and what happened between.

An exit counts where the next exit or entry of its task is an entry. What lies at the edges of a stretch is kept and
paired when stretches are put together: `Edges` has, of every task, the rows up to its first exit or entry, and those
from its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvmfault.summary.sums import Rule, sample

__all__ = ["BUCKETS", "ENTRY", "EXIT", "FAULT", "USER", "Edges", "bounds", "bucket", "join", "pair", "percentile"]

EXIT, FAULT, USER, ENTRY = range(4)
"""Column ``step``: the order of events that have one place."""
BUCKETS: Final = 32
"""Steps of a histogram for each doubling of the time: a percentile is exact to 1 part in 32."""
_TASKS: Final = Rule(("pid",), 1 << 16, "pid")


class Edges(NamedTuple):
    """Rows that wait for what comes before or after; columns pid, place, step, time, kind and those of the exit."""

    head: pl.DataFrame
    tail: pl.DataFrame


def pair(rows: pl.DataFrame) -> tuple[pl.DataFrame, Edges]:
    """Exits with the entry that follows (the exit's columns, with ``kind``, ``user`` and ``took``), and the edges."""
    rows = rows.sort("pid", "place", "step")
    pid, step, time = (rows[name].to_numpy() for name in ("pid", "step", "time"))
    bound = (step == EXIT) | (step == ENTRY)
    starts = bound.copy()
    starts[:1] = True
    starts[1:] |= pid[1:] != pid[:-1]
    first = np.flatnonzero(starts)  # a segment: an exit or entry with what follows it, or what precedes the first
    segment = np.cumsum(starts) - 1
    fault, user = (_last(step == what, segment, len(first)) for what in (FAULT, USER))
    exits = np.flatnonzero(step[first] == EXIT)
    exits = exits[exits + 1 < len(first)]
    followed = (step[first[exits + 1]] == ENTRY) & (pid[first[exits + 1]] == pid[first[exits]])
    exits = exits[followed]
    pairs = (
        rows[first[exits]]
        .with_columns(
            rows["kind"]
            .gather(pl.Series(np.where(fault[exits] < 0, 0, fault[exits])))
            .set(pl.Series(fault[exits] < 0), None),
            pl.Series("user", user[exits] >= 0),
            pl.Series("took", time[first[exits + 1]] - time[first[exits]]),
        )
        .drop("pid", "place", "step", "time")
    )
    needed = bound.copy()
    needed[np.r_[fault[fault >= 0], user[user >= 0]]] = True
    return pairs, _edges(rows, pid, (step == EXIT) | (step == ENTRY), needed)


def _last(which: NDArray[np.bool_], segment: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    # The row of each segment's last one, -1: there is none.
    last = np.full(count, -1)
    at = np.flatnonzero(which)
    last[segment[at]] = at
    return last


def _edges(rows: pl.DataFrame, pid: NDArray[np.int32], bound: NDArray[np.bool_], needed: NDArray[np.bool_]) -> Edges:
    if not len(rows):
        return Edges(rows, rows)
    before = np.cumsum(bound)
    task = np.flatnonzero(np.r_[True, pid[1:] != pid[:-1]])
    counts = np.diff(np.r_[task, len(rows)])
    at_start: NDArray[np.int64] = np.repeat((before - bound)[task], counts)
    at_end = np.repeat(before[task + counts - 1], counts)
    head: NDArray[np.bool_] = (before - bound) == at_start  # no exit or entry of this task lies before
    tail = before == at_end
    return Edges(*(sample(rows.filter(pl.Series(needed & side)), _TASKS) for side in (head, tail)))


def join(a: Edges, b: Edges) -> tuple[pl.DataFrame, Edges]:
    """What comes of two neighbours, *a* first: the pairs across the cut, and the edges of both together."""
    pairs, _ = pair(pl.concat([a.tail, b.head]))
    _, heads = pair(pl.concat([a.head, b.head]))
    _, tails = pair(pl.concat([a.tail, b.tail]))
    return pairs, Edges(heads.head, tails.tail)


def bucket(took: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Number of the step that holds a time: exact below 32 ns, then 32 steps for each doubling."""
    value = np.maximum(took, 0).astype(np.uint64)
    high = np.frexp(value.astype(np.float64))[1]  # bits of the number; a rounding up is mended below
    high = high - ((np.uint64(1) << np.minimum(np.maximum(high - 1, 0), 63).astype(np.uint64)) > value)
    drop = np.maximum(high - 6, 0)
    number: NDArray[np.int64] = (drop << 5) + (value >> drop.astype(np.uint64)).astype(np.int64)
    return number.astype(np.uint16)


def bounds(number: int) -> tuple[int, int]:
    """Smallest time of a step, and the smallest of the next."""
    if number < 64:
        return number, number + 1
    drop = (number >> 5) - 1
    base = number - (drop << 5)
    return base << drop, (base + 1) << drop


def percentile(counts: Sequence[tuple[int, int]], share: float, largest: int) -> int:
    """The time that *share* of all did not exceed: the last ns of the step that holds it, but never above *largest*.

    *counts*: (step, how many), in order of the steps.
    """
    wanted = share * sum(n for _, n in counts)
    seen = 0
    for number, n in counts:
        seen += n
        if seen >= wanted:
            return min(bounds(number)[1] - 1, largest)
    return largest
