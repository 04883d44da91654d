"""Frames as rows: the events of a recording one after the other, as they happened."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from heapq import merge
from itertools import repeat
from typing import TYPE_CHECKING, Final

from kvmfault.trace.recording import RecordedEvent, Recording

if TYPE_CHECKING:
    import polars as pl

    from kvmfault.trace.recording import ReadStats

__all__ = ["events", "of_interest", "probes"]

_AT_ONCE: Final = 1 << 15
"""Rows of a frame that are Python objects at one time."""


def of_interest(recording: Recording) -> Collection[str] | None:
    """What to ask `Recording.frames` for to learn of faults: KVM's events and probes; None, all, if it cannot tell."""
    choose = getattr(recording, "of_interest", None)
    return None if choose is None else choose()


def probes(recording: Recording) -> frozenset[str]:
    """The kprobe events that it may hold; none if it cannot tell."""
    choose = getattr(recording, "probes", None)
    return frozenset() if choose is None else choose()


def events(
    recording: Recording, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None
) -> Iterator[RecordedEvent]:
    """The events named in *wanted*, or all, in the order of their places. Raises what `Recording.frames` raises."""
    for frames in recording.frames(wanted, stats=stats):
        yield from merge(*(_rows(name, frame) for name, frame in frames.items()))


def _rows(name: str, frame: pl.DataFrame) -> Iterator[RecordedEvent]:
    names = frame.columns[4:]
    holes = any(frame.null_count().row(0))
    for start in range(0, len(frame), _AT_ONCE):
        some = frame.slice(start, _AT_ONCE)
        columns = [some[column].to_list() for column in some.columns]
        values = zip(*columns[4:], strict=True) if names else repeat((), len(some))
        for place, time, cpu, pid, fields in zip(*columns[:4], values, strict=True):
            known = dict(zip(names, fields, strict=True))
            if holes:
                known = {key: value for key, value in known.items() if value is not None}
            yield RecordedEvent(place, time, cpu, pid, name, known)
