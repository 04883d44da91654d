"""Counting events as they come: by process, kind and range of guest addresses, interval by interval."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from kvmfault.contract.target import Target, backend, backends
from kvmfault.contract.tracepoints import Role, Sort, Tracepoint, Tracepoints
from kvmfault.errors import LiveError
from kvmfault.live import tasks
from kvmfault.live.kinds import NOWHERE, Kind, reader
from kvmfault.live.selfcheck import nearest, this_machine
from kvmfault.live.stopping import Stop
from kvmfault.live.tap import Tap
from kvmfault.trace.datwriter import Described
from kvmfault.trace.formats import Formats, FormatText, header_page
from kvmfault.trace.frames import Plan, Records, columns_of, read_pages
from kvmfault.trace.ring import Layout

__all__ = [
    "HISTORY",
    "Count",
    "Process",
    "Range",
    "Seen",
    "Shot",
    "Watch",
    "counted",
    "every_event",
    "fitting",
    "watch",
]

HISTORY: Final = 60
"""Intervals that are remembered."""
_MOST_RANGES: Final = 1 << 14
_SHOWN_RANGES: Final = 100
_SHIFT: Final = 21
_TICK: Final = 0.1
_PID, _KIND = 42, 32
"""Where pid and kind stand in what is counted; below them the range, counted from 1."""
_MOST_KINDS: Final = 1 << _PID - _KIND

Process: TypeAlias = "int | None"
"""None: all of them."""


class Count(NamedTuple):
    """How often something happened."""

    rate: float
    """Per second, in the last interval."""
    total: int
    """Since the start."""
    rates: tuple[float, ...] = ()
    """Of the last intervals, oldest first."""


@dataclass(frozen=True, slots=True)
class Range:
    """A range of guest-physical addresses."""

    start: int
    size: int
    counts: Mapping[Sort, Count]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one process did, or all of them together."""

    process: Process
    name: str
    threads: int
    """That did anything in the last interval."""
    counts: Mapping[Sort, Count]
    kinds: Mapping[Kind, Count]
    ranges: tuple[Range, ...]
    """Those with the most, in the last interval and since the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """An interval."""

    seconds: float
    faults: Sort
    """What counts as a fault: Sort.HANDLED where they have no event."""
    lost: int
    """Events that the kernel dropped in the interval."""
    lost_total: int
    seen: tuple[Seen, ...]
    """All together first, then each process."""


class Watch:
    """Takes pages of events, gives intervals. Memory is bounded: ranges get wider when there are many."""

    def __init__(self, target: Target, described: Described) -> None:
        texts = [FormatText(system, text) for system, each in described.formats.items() for text in each]
        formats = Formats("tracefs", texts)
        header = header_page(described.header_page, path="header_page", offset=0)
        watched = {name: point for name, point in counted(target.backend.tracepoints).items() if name in formats}
        self._plan = Plan.of(Layout(described.page_size, header.data, header.long), formats, watched)
        self._readers = {name: reader(target, name, point) for name, point in watched.items()}
        self._owners = tasks.Owners(described.comms)
        self._numbers: dict[Kind, int] = {}
        self._kinds: list[Kind] = []
        self._now: Counter[tuple[int, Kind]] = Counter()
        self._ranges_now: Counter[tuple[int, int, Sort]] = Counter()
        self._active: dict[int, set[int]] = {}
        self._total: Counter[tuple[Process, Kind | Sort]] = Counter()
        self._history: deque[Mapping[tuple[Process, Kind | Sort], float]] = deque(maxlen=HISTORY)
        self._ranges: Counter[tuple[Process, int, Sort]] = Counter()
        self._shift = _SHIFT

    def take(self, cpu: int, pages: bytes) -> None:
        """Count what is in *pages*."""
        read = read_pages(pages, cpu, self._plan)
        for number, some in read.numbers.items():
            event = self._plan.wanted[number]
            rows = columns_of(event, Records(read.words, read.at.take(some), read.size.take(some)))
            kinds, which, address = self._readers[event.name](rows)
            numbers = np.array([self._number(kind) for kind in kinds], np.uint64)[which]
            pids = np.asarray(rows["pid"]).astype(np.uint64)
            key = pids << np.uint64(_PID) | numbers << np.uint64(_KIND)
            if address is not None:
                key |= np.where(address == NOWHERE, np.uint64(0), (address >> np.uint64(_SHIFT)) + np.uint64(1))
            values, counts = np.unique(key, return_counts=True)
            for value, count in zip(values.tolist(), counts.tolist(), strict=True):
                self._count(value, count)

    def turn(self, seconds: float, lost: int, lost_total: int) -> Shot:
        """End an interval."""
        now: Counter[tuple[Process, Kind | Sort]] = Counter()
        for (process, kind), count in self._now.items():
            for whose in (process, None):
                now[whose, kind] += count
                now[whose, kind.sort] += count
        self._total.update(now)
        self._history.append({key: count / seconds for key, count in now.items()})
        ranges_now = self._both(self._ranges_now)
        self._ranges.update(ranges_now)
        shot = Shot(
            seconds=seconds,
            faults=Sort.FAULT if self._total[None, Sort.FAULT] else Sort.HANDLED,
            lost=lost,
            lost_total=lost_total,
            seen=tuple(self._seen(ranges_now, seconds)),
        )
        self._now.clear()
        self._ranges_now.clear()
        self._active.clear()
        self._widen()
        return shot

    def _number(self, kind: Kind) -> int:
        if kind not in self._numbers:
            self._numbers[kind] = min(len(self._kinds), _MOST_KINDS - 1)
            self._kinds.append(kind)
        return self._numbers[kind]

    def _count(self, value: int, count: int) -> None:
        pid, kind = value >> _PID, self._kinds[value >> _KIND & _MOST_KINDS - 1]
        process = self._owners.process(pid)
        self._active.setdefault(process, set()).add(pid)
        self._now[process, kind] += count
        if place := value & (1 << _KIND) - 1:
            self._ranges_now[process, place - 1 >> self._shift - _SHIFT, kind.sort] += count

    @staticmethod
    def _both(counts: Counter[tuple[int, int, Sort]]) -> Counter[tuple[Process, int, Sort]]:
        # of each process, and of all
        both: Counter[tuple[Process, int, Sort]] = Counter()
        for (process, place, sort), count in counts.items():
            both[process, place, sort] += count
            both[None, place, sort] += count
        return both

    def _widen(self) -> None:
        while len(self._ranges) > _MOST_RANGES:
            self._shift += 1
            wider: Counter[tuple[Process, int, Sort]] = Counter()
            for (process, place, sort), count in self._ranges.items():
                wider[process, place >> 1, sort] += count
            self._ranges = wider

    def _seen(self, ranges_now: Counter[tuple[Process, int, Sort]], seconds: float) -> Iterator[Seen]:
        keys: dict[Process, list[Kind | Sort]] = {None: []}
        for process, what in self._total:
            keys.setdefault(process, []).append(what)
        places: dict[Process, dict[int, dict[Sort, Count]]] = {}
        for (process, place, sort), total in self._ranges.items():
            count = Count(ranges_now[process, place, sort] / seconds, total)
            places.setdefault(process, {}).setdefault(place, {})[sort] = count
        for process, whats in sorted(keys.items(), key=lambda item: item[0] or 0):
            counts = {what: self._counted(process, what) for what in whats}
            own = self._active.values() if process is None else [self._active.get(process, set())]
            yield Seen(
                process,
                "all" if process is None else self._owners.name(process),
                sum(map(len, own)),
                {what: count for what, count in counts.items() if isinstance(what, Sort)},
                {what: count for what, count in counts.items() if isinstance(what, Kind)},
                self._busiest(places.get(process, {})),
            )

    def _counted(self, process: Process, what: Kind | Sort) -> Count:
        rates = tuple(past.get((process, what), 0.0) for past in self._history)
        return Count(rates[-1], self._total[process, what], rates)

    def _busiest(self, places: Mapping[int, Mapping[Sort, Count]]) -> tuple[Range, ...]:
        def busy(place: int) -> tuple[float, int]:
            counts = places[place].values()
            return sum(c.rate for c in counts), sum(c.total for c in counts)

        found = nlargest(_SHOWN_RANGES, places, key=busy)
        return tuple(Range(place << self._shift, 1 << self._shift, places[place]) for place in found)


def watch(source: Tap, target: Target, interval: float, stop: Stop) -> Iterator[Shot]:
    """Intervals of *interval* seconds until *stop*; the source has not started."""
    counter = Watch(target, source.described(tasks.names()))
    source.start()
    began, lost_before = time.monotonic(), 0
    while not stop.asked:
        left = began + interval - time.monotonic()
        if left > 0:
            source.wait(min(left, _TICK), stop.fd)
        for cpu, pages in source.pages(partial=left <= 0):
            counter.take(cpu, pages)
        if left <= 0:
            now = time.monotonic()
            lost = sum(count.lost for count in source.counts().values())
            yield counter.turn(now - began, lost - lost_before, lost)
            began, lost_before = now, lost


def counted(points: Tracepoints) -> dict[str, Tracepoint]:
    """Those that are counted."""
    return {name: point for name, point in points.items() if point.role is not None and point.role.sort is not None}


def every_event() -> tuple[str, ...]:
    """What is counted of any backend."""
    return tuple(sorted({name for source in backends().values() for name in counted(source.tracepoints)}))


def fitting(events: Collection[str]) -> Target:
    """The target that tells what the *events* of this machine mean. Raises LiveError if none or several could."""
    try:
        return this_machine()
    except LiveError:
        fit = [
            source.name
            for source in backends().values()
            if any(point.role is Role.FAULT and name in events for name, point in source.tracepoints.items())
        ]
        if len(fit) == 1:
            return backend(f"{fit[0]}@{nearest(os.uname().release, backends()[fit[0]].kernels)}")
        raise
