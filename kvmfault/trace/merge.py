"""The CPUs of a recording merged in time order, block by block."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import polars as pl

from kvmfault.errors import TraceError
from kvmfault.trace.extents import Clock, Stream, read_extent
from kvmfault.trace.formats import Formats
from kvmfault.trace.frames import Block, Column, Plan
from kvmfault.trace.recording import Frames, Lost, Meta, ReadStats
from kvmfault.trace.ring import I64Col, Layout, U64Col

AT_ONCE: Final = 1 << 25
"""Bytes of pages that are columns at one time, of all CPUs together, or a little more."""
_PAGES: Final = 1 << 10
"""Pages of a block at most: enough that what a step of the walk costs apart from its work is shared by many, and so
few that what is made of them stays in the cache."""
_SMALLEST: Final = 1 << 16
_NEVER: Final = (1 << 63) - 1
_GAPS: Final = 10_000
"""Windows of lost events that are listed; all are counted."""


class RingRecording:
    """A recording that holds ring-buffer pages: trace.dat, or raw pages."""

    def __init__(
        self,
        path: str,
        meta: Meta,
        formats: Formats,
        layout: Layout,
        streams: Sequence[Stream],
        clock: Clock | None = None,
        damage: TraceError | None = None,
    ) -> None:
        self.path = path
        self.meta = meta
        self.formats = formats
        self.layout = layout
        self.streams = sorted(streams, key=lambda s: s.cpu)
        """What there is of each CPU."""
        self._clock = clock or Clock()
        self._damage = damage

    def of_interest(self) -> frozenset[str]:
        """See `Formats.of_interest`."""
        return self.formats.of_interest()

    def frames(self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None) -> Iterator[Frames]:
        """See `Recording.frames`."""
        stats = ReadStats() if stats is None else stats
        stats.ticks = self.meta.ticks
        plan = Plan.of(self.layout, self.formats, wanted)
        size = max(_SMALLEST, min(_PAGES * self.layout.page, AT_ONCE // max(1, len(self.streams))))
        damage = Damage()
        if self._damage is not None:
            damage.add(self._damage)
        yield from _merged([_Cpu(stream, size, plan, self._clock, stats, damage) for stream in self.streams])
        stats.damage = damage.text()


@dataclass(slots=True)
class Damage:
    """What was wrong with a file: the first place is told, the others are counted."""

    first: str | None = None
    more: int = 0

    def add(self, what: TraceError) -> None:
        """One more place."""
        if self.first is None:
            where = "" if what.offset is None else f"at byte {what.offset:#x}: "
            self.first = where + what.message
        else:
            self.more += 1

    def text(self) -> str | None:
        """All of it in one line."""
        return f"{self.first}; and {self.more} more places" if self.more else self.first


@dataclass(slots=True)
class _Waiting:
    # A block of which the records from `done` on wait. Time may go back on a CPU (a clock that is not monotonic): a
    # record waits for the one before it, so what counts is the latest time up to it.
    block: Block
    key: I64Col
    done: int = 0


class _Cpu:
    # What one CPU still has to give.
    def __init__(self, stream: Stream, size: int, plan: Plan, clock: Clock, stats: ReadStats, damage: Damage) -> None:
        self.waiting: deque[_Waiting] = deque()
        self._cpu = stream.cpu
        self._extents = stream.extents(size)
        self._plan = plan
        self._clock = clock
        self._stats = stats
        self._damage = damage
        self._ended = False
        self._latest = -(1 << 63)
        self._last: int | None = None  # time of the last record, in the order of the file
        self._open: list[tuple[int | None, int | None]] = []  # gaps after which nothing has come yet

    @property
    def last(self) -> int:
        # What comes later is not earlier than this.
        return _NEVER if self._ended else int(self.waiting[-1].key[-1])

    def fill(self) -> None:
        # One record or more, and rather half a block than a few.
        while not self._ended and sum(len(w.key) - w.done for w in self.waiting) * 2 < self._usual:
            self._next()

    @property
    def _usual(self) -> int:
        return max((len(w.key) for w in self.waiting), default=1)

    def _next(self) -> None:
        try:
            extent = next(self._extents, None)
        except TraceError as e:
            self._damage.add(e)
            extent = None
        if extent is None:
            self._ended = True
            self._close(None)
            return
        block = read_extent(extent, self._plan, self._clock)
        self._stats.bytes += sum(part.stored for part in extent.parts)
        self._stats.events.update(block.events)
        self._stats.skipped.update(block.skipped)
        self._stats.misfits.update(block.misfits)
        for where, what in block.damage:
            self._damage.add(TraceError(what, path=extent.path, offset=where))
        self._gaps(block)
        if len(block.time):
            key = block.time
            if key[0] < self._latest or (key[1:] < key[:-1]).any():
                key = np.maximum.accumulate(np.maximum(key, self._latest))
            self._latest = int(key[-1])
            self.waiting.append(_Waiting(block, key))

    def _gaps(self, block: Block) -> None:
        times = block.time
        if len(times):
            self._close(int(times[0]))
        for before, events in block.gaps:
            if events is None:
                self._stats.lost_unknown += 1
            else:
                self._stats.lost[self._cpu] += events
            self._open.append((events, int(times[before - 1]) if before else self._last))
            if before < len(times):
                self._close(int(times[before]))
        if len(times):
            self._last = int(times[-1])

    def _close(self, time: int | None) -> None:
        room = _GAPS - len(self._stats.gaps)
        self._stats.gaps += [Lost(self._cpu, events, after, time) for events, after in self._open[:room]]
        self._open.clear()


def _merged(cpus: list[_Cpu]) -> Iterator[Frames]:
    place = 1
    while True:
        for cpu in cpus:
            cpu.fill()
        cpus = [cpu for cpu in cpus if cpu.waiting]
        if not cpus:
            return
        # All up to the time that the first CPU to run dry has reached; of equal times, the lowest CPU's come first.
        # That CPU gives all it has, so there is progress whatever the times are.
        bound = min(cpu.last for cpu in cpus)
        first = next(n for n, cpu in enumerate(cpus) if cpu.last == bound)
        pieces = [p for n, cpu in enumerate(cpus) for p in _take(cpu, bound, inclusive=n <= first)]
        made = _frames(pieces, place)
        place += sum(p.stop - p.start for p in pieces)
        if made:
            yield made


class _Piece(NamedTuple):
    # Records of a block that belong to a stretch.
    block: Block
    key: I64Col
    start: int
    stop: int


def _take(cpu: _Cpu, bound: int, *, inclusive: bool) -> Iterator[_Piece]:
    while cpu.waiting:
        w = cpu.waiting[0]
        stop = int(np.searchsorted(w.key, bound, side="right" if inclusive else "left"))
        if stop > w.done:
            yield _Piece(w.block, w.key, w.done, stop)
            w.done = stop
        if stop < len(w.key):
            return
        cpu.waiting.popleft()


def _frames(pieces: list[_Piece], place: int) -> dict[str, pl.DataFrame]:
    parts: dict[str, list[dict[str, Column]]] = {}
    for piece, numbers in zip(pieces, _places(pieces, place), strict=True):
        for name, rows in piece.block.rows.items():
            some = slice(*np.searchsorted(rows.number, (piece.start, piece.stop)))
            if some.start < some.stop:
                number = rows.number[some]
                columns: dict[str, Column] = {
                    "place": numbers.take(number - piece.start),
                    "time": piece.block.time.take(number),
                    "cpu": np.full(len(number), piece.block.cpu, np.uint16),
                }
                columns.update((key, column[some]) for key, column in rows.columns.items())
                parts.setdefault(name, []).append(columns)
    return {name: _frame(some[0] if len(some) == 1 else _woven(some)) for name, some in parts.items()}


def _frame(columns: dict[str, Column]) -> pl.DataFrame:
    # As a list, for polars takes longer to look through a dict.
    return pl.DataFrame([pl.Series(name, column) for name, column in columns.items()])


def _woven(parts: list[dict[str, Column]]) -> dict[str, Column]:
    # One after the other would not be in order of place.
    order = np.argsort(np.concatenate([part["place"] for part in parts]), kind="stable")
    woven: dict[str, Column] = {}
    for key in parts[0]:
        columns = [part[key] for part in parts]
        series = [column for column in columns if isinstance(column, pl.Series)]
        arrays = [column for column in columns if not isinstance(column, pl.Series)]
        woven[key] = pl.concat(series).gather(order) if series else np.concatenate(arrays).take(order)
    return woven


def _places(pieces: list[_Piece], place: int) -> list[U64Col]:
    lengths = [p.stop - p.start for p in pieces]
    numbers = np.arange(place, place + sum(lengths), dtype=np.uint64)
    if len(pieces) == 1:
        return [numbers]
    places = np.empty_like(numbers)
    places[np.argsort(np.concatenate([p.key[p.start : p.stop] for p in pieces]), kind="stable")] = numbers
    return np.split(places, np.cumsum(lengths)[:-1])
