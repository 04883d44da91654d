"""Invalidations of host memory as a recording shows them: that one began, and by when it had ended at the latest.

Only the begin of an MMU notifier has a trace event. A task that does anything else has ended its invalidation, and so
had every invalidation under which a fault was not started over. What is unmapped without a notifier belongs to a slot
that is deleted or moved; how user addresses and those of the guest go together is learned from ranges of one size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

from kvmfault.check.handled import Handled

__all__ = ["Invalidations", "Reason"]

_MOST: Final = 64
"""Invalidations remembered, the latest."""


@dataclass(slots=True)
class _Interval:
    began: int
    pid: int
    ended: int | None = None
    noticed: bool = False
    """A fault was started over because of it."""


class Reason(Enum):
    """Why a range was taken out of the table."""

    HOST = "a notifier asked for it"
    SLOT = "its slot was deleted or moved"
    EITHER = "one of the two"


class Invalidations:
    """*page*: bytes of a page of the host."""

    def __init__(self, page: int) -> None:
        self._page = page
        # one may run already when the recording begins
        self._intervals: deque[_Interval] = deque([_Interval(-1, -1)], maxlen=_MOST)
        self._asked: dict[int, tuple[int, int]] = {}
        self._places: deque[tuple[int, int, int]] = deque(maxlen=_MOST)
        self._told = False

    def begins(self, place: int, pid: int, start: int, end: int) -> None:
        """A notifier is about to invalidate user addresses."""
        self.acts(pid, place)
        self._told = True
        self._asked[pid] = start & -self._page, -(-end // self._page) * self._page

    def unmaps(self, place: int, pid: int, start: int, end: int) -> Reason:
        """A range of the guest is taken out of the table."""
        reason = self._reason(pid, start, end)
        if reason is Reason.SLOT:
            self.acts(pid, place)
        else:
            self._intervals.append(_Interval(place, pid))
        if reason is not Reason.HOST:
            kept = [p for p in self._places if p[1] <= start or end <= p[0]]
            self._places = deque(kept, maxlen=_MOST)
        return reason

    def _reason(self, pid: int, start: int, end: int) -> Reason:
        asked = self._asked.get(pid)
        if asked is None:
            return Reason.SLOT if self._told else Reason.HOST
        away = next((away for first, last, away in self._places if first <= start < last), None)
        if away is not None:
            return Reason.HOST if asked[0] < end + away and start + away < asked[1] else Reason.SLOT
        if asked[1] - asked[0] != end - start:
            return Reason.EITHER if end - start < asked[1] - asked[0] else Reason.SLOT
        self._places.append((start, end, asked[0] - start))
        return Reason.HOST

    def acts(self, pid: int, place: int, until: int | None = None) -> None:
        """The task does something else, from *place* on; what it invalidated meanwhile had ended by *until*."""
        self._asked.pop(pid, None)
        for interval in self._intervals:
            if interval.pid == pid and interval.ended is None:
                interval.ended = place if until is None or interval.began < place else until

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
