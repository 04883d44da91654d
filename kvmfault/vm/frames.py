"""A set of frames kept as ranges: as small as the ranges are few, and forks in constant time."""

from __future__ import annotations

from collections.abc import Iterator

from kvmfault.vm.ranges import RangeTable

__all__ = ["FrameSet"]


class FrameSet:
    """Non-negative frame numbers (gfns, or pages of a slot). Equal sets have equal keys: neighbours are merged."""

    __slots__ = ("_ranges",)

    def __init__(self, ranges: RangeTable[range] | None = None) -> None:
        self._ranges = ranges or RangeTable()

    def add(self, start: int, end: int | None = None) -> None:
        """Put frames ``[start, end)`` in; one frame without *end*."""
        end = start + 1 if end is None else end
        if start < end:
            # one more on each side: a range that only touches is merged too
            met = self._ranges.overlapping(max(start - 1, 0), end + 1)
            whole = range(min([start, *(r.start for r in met)]), max([end, *(r.stop for r in met)]))
            self._ranges = self._ranges.splice(whole.start, whole.stop, ((whole.start, whole.stop, whole),))

    def discard(self, start: int, end: int | None = None) -> bool:
        """Take frames ``[start, end)`` out; whether any was in."""
        end = start + 1 if end is None else end
        met = self._ranges.overlapping(start, end) if start < end else ()
        if met:
            rest = [range(r.start, start) for r in met if r.start < start] + [
                range(end, r.stop) for r in met if end < r.stop
            ]
            self._ranges = self._ranges.splice(start, end, tuple((r.start, r.stop, r) for r in rest))
        return bool(met)

    def meeting(self, start: int, end: int) -> tuple[range, ...]:
        """The parts of the set in ``[start, end)``, in order."""
        return tuple(range(max(start, r.start), min(end, r.stop)) for r in self._ranges.overlapping(start, end))

    def covers(self, start: int, end: int) -> bool:
        """Every frame of ``[start, end)`` is in."""
        return self.meeting(start, end) == (range(start, end),)

    def ranges(self) -> tuple[range, ...]:
        """Everything, as ranges that do not touch."""
        return self._ranges.items()

    def fork(self) -> FrameSet:
        """An independent copy, in constant time."""
        return FrameSet(self._ranges)

    def key(self) -> tuple[range, ...]:
        """The content, hashable."""
        return self._ranges.items()

    def __contains__(self, frame: object) -> bool:
        return isinstance(frame, int) and self._ranges.find(frame) is not None

    def __iter__(self) -> Iterator[int]:
        return (frame for r in self._ranges.items() for frame in r)

    def __len__(self) -> int:
        return sum(len(r) for r in self._ranges.items())

    def __bool__(self) -> bool:
        return len(self._ranges) > 0
