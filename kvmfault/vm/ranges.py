"""Disjoint half-open ranges with an item each: the one look-up under memslots (by gfn) and host areas (by hva)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Final, Generic, TypeVar

__all__ = ["RangeTable"]

T = TypeVar("T")

_LARGEST_CHUNK: Final = 128


class _Chunk(Generic[T]):
    # Neighbouring ranges as parallel lists, never changed after this. Index 0 of `ends` and `items` is a sentinel that
    # contains nothing, so that a look-up needs no test for "before the first range".
    __slots__ = ("ends", "items", "starts")

    def __init__(self, rows: Sequence[tuple[int, int, T]]) -> None:
        self.starts = [row[0] for row in rows]
        self.ends = [0, *[row[1] for row in rows]]
        self.items: list[T | None] = [None, *[row[2] for row in rows]]

    def rows(self) -> list[tuple[int, int, T]]:
        rows = zip(self.starts, self.ends[1:], self.items[1:], strict=True)
        return [(start, end, item) for start, end, item in rows if item is not None]


class RangeTable(Generic[T]):
    """Ranges ``[start, end)`` of non-negative integers that do not overlap. Immutable: an edit gives a new table.

    Two levels, so that an edit copies a chunk and the list of chunks, not everything.
    """

    __slots__ = ("_chunks", "_firsts")

    def __init__(self, chunks: Sequence[_Chunk[T]] = (), firsts: Sequence[int] = ()) -> None:
        self._chunks = chunks or (_Chunk[T](()),)
        self._firsts = firsts[1:]  # start of every chunk but the first, which also has what lies before it

    def find(self, at: int) -> T | None:
        """The item whose range contains *at*, or None. O(log n)."""
        chunk = self._chunks[bisect_right(self._firsts, at)]
        i = bisect_right(chunk.starts, at)
        return chunk.items[i] if at < chunk.ends[i] else None

    def overlapping(self, start: int, end: int) -> tuple[T, ...]:
        """The items whose range shares at least one number with ``[start, end)``, in order. O(log n + answer)."""
        met: list[T | None] = []
        for chunk in self._meeting(start, end):
            first = bisect_right(chunk.starts, start)
            first += chunk.ends[first] <= start  # the range before *start* ends there, or is the sentinel
            met += chunk.items[first : bisect_left(chunk.starts, end) + 1]
        return tuple(item for item in met if item is not None)

    def splice(self, start: int, end: int, pieces: tuple[tuple[int, int, T], ...]) -> RangeTable[T]:
        """A table where the ranges that overlap ``[start, end)`` are replaced by *pieces* ``(start, end, item)``.

        *pieces* overlap nothing that stays: the caller has made sure.
        """
        old = self._meeting(start, end)
        rows = [row for chunk in old for row in chunk.rows() if row[1] <= start or end <= row[0]]
        rows = sorted([*rows, *pieces], key=itemgetter(0))
        size = _LARGEST_CHUNK // 2 if len(rows) > _LARGEST_CHUNK else _LARGEST_CHUNK
        new = [_Chunk(rows[i : i + size]) for i in range(0, len(rows), size)]
        at = bisect_right(self._firsts, start)
        chunks, firsts = [*self._chunks], [0, *self._firsts]
        chunks[at : at + len(old)] = new
        firsts[at : at + len(old)] = [chunk.starts[0] for chunk in new]
        return RangeTable(chunks, firsts)

    def items(self) -> tuple[T, ...]:
        """All items in the order of their ranges."""
        return tuple(item for chunk in self._chunks for item in chunk.items if item is not None)

    def __len__(self) -> int:
        return sum(len(chunk.starts) for chunk in self._chunks)

    def _meeting(self, start: int, end: int) -> Sequence[_Chunk[T]]:
        # The chunks where ranges that overlap [start, end) are, or would be put; at least one.
        return self._chunks[bisect_right(self._firsts, start) : bisect_left(self._firsts, end) + 1]
