"""Frames that fault again, and what was recorded between one fault and the next.

Of each frame a part of a recording keeps the first fault and the last one, and when its entry was last taken away or
write-protected, so that two parts tell what happened across the cut. Places (numbers of records) stand for times:
they never tie. 0 is never.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntFlag
from typing import Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvmfault.summary.sums import Rule, combine, sample

__all__ = ["BLOCKS", "EVER", "FRAMES", "REPEATS", "U64", "Changes", "Life", "Seen", "follow", "join"]

U64 = NDArray[np.uint64]

FRAMES: Final = Rule(("frame",), 1 << 18)
"""Frames of which everything is kept; beyond, a sample."""
REPEATS: Final = Rule(("frame", "seen"), 1 << 18, "frame")
"""Of the frames that are kept."""
BLOCKS: Final = Rule(("order", "block"), 1 << 20)
"""What large entries lost."""
EVER: Final = ("unmapped", "aged", "cleared")
"""What happens to more than one frame, or to frames that are not told."""


class Seen(IntFlag):
    """Of two successive faults on one frame, and of what was recorded between them."""

    MISSING = 1
    """No entry mapped the page at the second fault."""
    PERMISSION = 2
    """An entry forbade the access."""
    ACCESS_FLAG = 4
    """An entry lacked its access flag."""
    WRITE = 8
    """The second was a write."""
    WROTE = 16
    """The first was a write."""
    SAME_TASK = 32
    """Both are of one vCPU."""
    REMOVED = 64
    """The entry of the frame was taken away."""
    PROTECTED = 128
    """The entry of the frame lost write permission."""
    UNMAPPED = 256
    """The host unmapped some range of the process."""
    AGED = 512
    """The host aged some range of the process."""
    CLEARED = 1024
    """The whole table was dropped."""
    SPLIT = 2048
    """The large entry over the frame was replaced by a table."""


_OF_FAULT: Final = int(Seen.MISSING | Seen.PERMISSION | Seen.ACCESS_FLAG | Seen.WRITE)


class Changes(NamedTuple):
    """Entries that were taken away, protected or split, in any order; a large one under the order of its size."""

    order: NDArray[np.int64]
    """log2 of the frames that the entry maps."""
    frame: U64
    place: U64
    removed: NDArray[np.bool_]
    protected: NDArray[np.bool_]
    split: NDArray[np.bool_]


class Life(NamedTuple):
    """What is kept of frames."""

    frames: pl.DataFrame
    """frame, n, then of its first fault: first, first_pid, first_as, and the last place before it at which each of
    EVER, its removal, protection and splitting happened; of its last: last, last_pid, last_as; and removed, protected,
    split."""
    blocks: pl.DataFrame | None
    """order, block, max_removed, max_protected, max_split."""
    repeats: pl.DataFrame | None
    """frame, seen, n."""
    ever: tuple[int, ...]
    """Last place of each of EVER."""


_LAST: Final = ("removed", "protected", "split")
_BEFORE: Final = tuple(f"before_{name}" for name in (*_LAST, *EVER))
_SCHEMA: Final = {
    "frame": pl.UInt64,
    "n": pl.UInt64,
    "first": pl.UInt64,
    "first_pid": pl.Int32,
    "first_as": pl.UInt16,
    **dict.fromkeys(_BEFORE, pl.UInt64),
    "last": pl.UInt64,
    "last_pid": pl.Int32,
    "last_as": pl.UInt16,
    **dict.fromkeys(_LAST, pl.UInt64),
}


def follow(faults: pl.DataFrame, changes: Changes, ever: Sequence[U64]) -> Life:
    """*faults*: frame, place, pid and ``was`` (bits of Seen about the fault alone). *ever*: sorted places."""
    faults = faults.sort("frame", "place")
    frame, place, pid, was = (faults[name].to_numpy() for name in ("frame", "place", "pid", "was"))
    before = {
        **{f"before_{name}": _before(frame, place, changes, getattr(changes, name)) for name in _LAST},
        **{f"before_{name}": _latest(place, places) for name, places in zip(EVER, ever, strict=True)},
    }
    again = np.zeros(len(frame), np.bool_)
    again[1:] = frame[1:] == frame[:-1]
    second = np.flatnonzero(again)
    seen = _seen(
        was[second - 1],
        was[second],
        place[second - 1],
        pid[second - 1] == pid[second],
        [before[b][second] for b in _BEFORE],
    )
    repeats = (
        pl.DataFrame({"frame": frame[second], "seen": seen})
        .group_by("frame", "seen")
        .agg(pl.len().cast(pl.UInt64).alias("n"))
    )
    first = np.flatnonzero(~again)
    last = np.r_[first[1:], len(frame)] - 1 if len(first) else first
    rows = pl.DataFrame(
        {
            "frame": frame[first],
            "n": (last - first + 1).astype(np.uint64),
            "first": place[first],
            "first_pid": pid[first],
            "first_as": was[first],
            **{name: values[first] for name, values in before.items()},
            "last": place[last],
            "last_pid": pid[last],
            "last_as": was[last],
        }
    )
    lost = _lost(changes)
    single = lost.filter(pl.col("order") == 0).select(
        pl.col("block").alias("frame"), *(pl.col(f"max_{name}").alias(name) for name in _LAST)
    )
    rows = rows.join(single, on="frame", how="full", coalesce=True).sort("frame")
    frames = sample(_shaped(rows), FRAMES)
    blocks = combine([lost.filter(pl.col("order") > 0)], BLOCKS)
    return Life(frames, blocks, _kept(frames, repeats), tuple(int(p[-1]) if len(p) else 0 for p in ever))


def _shaped(rows: pl.DataFrame) -> pl.DataFrame:
    missing = [pl.lit(None, kind).alias(name) for name, kind in _SCHEMA.items() if name not in rows.columns]
    return rows.with_columns(missing).select(pl.col(n).cast(k).fill_null(0) for n, k in _SCHEMA.items())


def _lost(changes: Changes) -> pl.DataFrame:
    order = np.minimum(changes.order, 63).astype(np.uint64)
    kept = changes.removed | changes.protected | changes.split
    return (
        pl.DataFrame(
            {
                "order": order[kept],
                "block": (changes.frame >> order)[kept],
                **{f"max_{n}": np.where(getattr(changes, n), changes.place, np.uint64(0))[kept] for n in _LAST},
            }
        )
        .group_by("order", "block")
        .agg(pl.col(*(f"max_{name}" for name in _LAST)).max())
    )


def _before(frame: U64, place: U64, changes: Changes, which: NDArray[np.bool_]) -> U64:
    # For each fault the last place before it at which an entry over its frame changed so, whatever the entry's size.
    latest = np.zeros(len(frame), np.uint64)
    for order in np.unique(changes.order[which]):
        chosen = which & (changes.order == order)
        shift = np.uint64(min(int(order), 63))
        keys = np.concatenate([frame >> shift, changes.frame[chosen] >> shift])
        places = np.concatenate([place, changes.place[chosen]])
        is_fault = np.zeros(len(keys), np.bool_)
        is_fault[: len(frame)] = True
        sequence = np.lexsort((places, keys))
        marks = np.where(is_fault[sequence], -1, np.arange(len(keys)))
        last = np.maximum.accumulate(marks)
        same = (last >= 0) & (keys[sequence][last] == keys[sequence])
        found = np.empty(len(keys), np.uint64)
        found[sequence] = np.where(same, places[sequence][last], np.uint64(0))
        np.maximum(latest, found[: len(frame)], out=latest)
    return latest


def _latest(place: U64, events: U64) -> U64:
    at = np.searchsorted(events, place)
    return (
        np.where(at > 0, events[np.maximum(at, 1) - 1], np.uint64(0))
        if len(events)
        else np.zeros(len(place), np.uint64)
    )


def _seen(
    first: NDArray[np.uint16], second: NDArray[np.uint16], since: U64, same: NDArray[np.bool_], before: Sequence[U64]
) -> NDArray[np.uint16]:
    seen = second & _OF_FAULT
    seen |= np.where(first & Seen.WRITE, np.uint16(Seen.WROTE), np.uint16(0))
    seen |= np.where(same, np.uint16(Seen.SAME_TASK), np.uint16(0))
    for bit, at in zip(
        (Seen.REMOVED, Seen.PROTECTED, Seen.SPLIT, Seen.UNMAPPED, Seen.AGED, Seen.CLEARED), before, strict=True
    ):
        seen |= np.where(at > since, np.uint16(bit), np.uint16(0))
    return seen.astype(np.uint16)


def join(a: Life, b: Life) -> Life:
    """What is known of both parts together, *a* the earlier."""
    late = _with_blocks(b.frames, a)
    both = a.frames.join(late, on="frame", how="full", coalesce=True, suffix="_b").fill_null(0)
    at = {name: both[name].to_numpy() for name in both.columns}
    before = {f"before_{name}": at[f"before_{name}_b"] for name in (*_LAST, *EVER)}
    for name in _LAST:
        before[f"before_{name}"] = np.maximum(before[f"before_{name}"], at[name])
    for name, last in zip(EVER, a.ever, strict=True):
        column = before[f"before_{name}"]
        before[f"before_{name}"] = np.where(column > 0, column, np.uint64(last))
    has_a, has_b = at["n"] > 0, at["n_b"] > 0
    pairs = np.flatnonzero(has_a & has_b)
    seen = _seen(
        at["last_as"][pairs],
        at["first_as_b"][pairs],
        at["last"][pairs],
        at["last_pid"][pairs] == at["first_pid_b"][pairs],
        [before[name][pairs] for name in _BEFORE],
    )
    repeats = pl.DataFrame({"frame": at["frame"][pairs], "seen": seen, "n": np.ones(len(pairs), np.uint64)})
    rows = {"frame": at["frame"], "n": at["n"] + at["n_b"]}
    for name in ("first", "first_pid", "first_as"):
        rows[name] = np.where(has_a, at[name], at[f"{name}_b"])
    for name in _BEFORE:  # of a frame without a fault nothing was before the first one
        rows[name] = np.where(has_a, at[name], np.where(has_b, before[name], np.uint64(0)))
    for name in ("last", "last_pid", "last_as"):
        rows[name] = np.where(has_b, at[f"{name}_b"], at[name])
    for name in _LAST:
        rows[name] = np.maximum(at[name], at[f"{name}_b"])
    frames = sample(_shaped(pl.DataFrame(rows).sort("frame")), FRAMES)
    ever = tuple(map(max, a.ever, b.ever))
    return Life(frames, combine([a.blocks, b.blocks], BLOCKS), _kept(frames, a.repeats, b.repeats, repeats), ever)


def _kept(frames: pl.DataFrame, *repeats: pl.DataFrame | None) -> pl.DataFrame | None:
    whole = combine(repeats, REPEATS)
    return whole if whole is None or frames.height < FRAMES.cap else whole.join(frames, on="frame", how="semi")


def _with_blocks(frames: pl.DataFrame, earlier: Life) -> pl.DataFrame:
    # What large entries lost before this part began counts as before the first fault of each of their frames.
    if earlier.blocks is None:
        return frames
    for order in earlier.blocks["order"].unique():
        blocks = earlier.blocks.filter(pl.col("order") == order).drop("order")
        frames = (
            frames.with_columns((pl.col("frame") // (1 << int(order))).alias("block"))
            .join(blocks, on="block", how="left")
            .with_columns(
                pl.max_horizontal(f"before_{name}", pl.col(f"max_{name}").fill_null(0)).alias(f"before_{name}")
                for name in _LAST
            )
            .drop("block", *(f"max_{name}" for name in _LAST))
        )
    return frames
