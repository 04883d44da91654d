"""Invalidations of host memory as a recording shows them: that one began, and by when it had ended at the latest.

Only the begin of an MMU notifier has a trace event. A task that does anything else has ended its invalidation, and so
had every invalidation under which a fault was not started over.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from kvmfault.contract.probes import Said
from kvmfault.replay.handled import Handled
from kvmfault.trace.truth import Told


_MOST: Final = 64
"""Invalidations remembered, the latest."""


@dataclass(slots=True)
class _Interval:
    began: int
    pid: int
    ended: int | None = None
    noticed: bool = False
    """A fault was started over because of it."""


class Invalidations:
    """*page*: bytes of a page of the host."""

    def __init__(self, page: int) -> None:
        self._page = page
        # one may run already when the recording begins
        self._intervals: deque[_Interval] = deque([_Interval(-1, -1)], maxlen=_MOST)
        self._left: dict[int, int] = {}
        self._told = False

    def told(self, place: int, told: Told) -> bool:
        """A probe spoke; whether what it says, if it is that a range was unmapped, is part of an invalidation.

        Where notifiers are recorded, a range that none of them explains belongs to a slot that is deleted or moved.
        """
        if told.says is not Said.RANGE_UNMAPPED:
            self.acts(told.pid, place)
        if told.says is Said.INVALIDATE:
            self._told = True
            # user addresses need not be whole pages
            self._left[told.pid] = told.number("end") - told.number("start") + 2 * self._page
        if told.says is not Said.RANGE_UNMAPPED:
            return False
        left = self._left.get(told.pid, 0) - told.number("size")
        if self._told and left < 0:
            self.acts(told.pid, place)
            return False
        self._left[told.pid] = left
        self._intervals.append(_Interval(place, told.pid))
        return True

    def acts(self, pid: int, place: int) -> None:
        """The task does something else."""
        self._left.pop(pid, None)
        for interval in self._intervals:
            if interval.pid == pid and interval.ended is None:
                interval.ended = place

    def met(self, handled: Handled) -> bool:
        """Whether an invalidation may have run, or ended, while the fault was handled."""
        return any(_overlaps(i, handled) for i in self._intervals)

    def runs(self, handled: Handled) -> bool:
        """Whether one of those made another fault start over, and is not known to have ended."""
        return any(i.noticed and _overlaps(i, handled) for i in self._intervals)

    def started_over(self, handled: Handled) -> None:
        """The fault was started over because of one."""
        for interval in self._intervals:
            interval.noticed |= _overlaps(interval, handled)

    def ended_before(self, handled: Handled) -> None:
        """The fault was not started over: nothing was being invalidated when it took the lock."""
        place = handled.mapping[0] if handled.mapping is not None else handled.effect
        for interval in self._intervals:
            if interval.ended is None and interval.began < place:
                interval.ended = place


def _overlaps(interval: _Interval, handled: Handled) -> bool:
    return interval.began < handled.effect and (interval.ended is None or interval.ended > handled.began)
