"""The CPUs of a recording merged in time order, block by block."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from kvmfault.errors import TraceError
from kvmfault.parallel import ALONE, Workers
from kvmfault.trace.extents import Clock, Extent, Stream, read_extent
from kvmfault.trace.formats import Formats
from kvmfault.trace.frames import Block, Plan
from kvmfault.trace.recording import Frames, Lost, Meta, ReadStats, Recording
from kvmfault.trace.ring import Layout
from kvmfault.trace.stretches import LONG_AGO, Held, Near, Piece, Run, absolute, far_runs, made, near_runs, there

__all__ = ["AT_ONCE", "Damage", "RingRecording", "runs"]

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
        self.streams: list[Stream] = sorted(streams, key=lambda s: s.cpu)
        """What there is of each CPU."""
        self._clock = clock or Clock()
        self._damage = damage

    def of_interest(self) -> frozenset[str]:
        """See `Formats.of_interest`."""
        return self.formats.of_interest()

    def probes(self) -> frozenset[str]:
        """See `Formats.probes`."""
        return self.formats.probes()

    def frames(self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None) -> Iterator[Frames]:
        """See `Recording.frames`."""
        stats = ReadStats() if stats is None else stats
        stats.ticks = self.meta.ticks
        plan = Plan.of(self.layout, self.formats, wanted)
        for place, pieces in self._stretches(partial(read_extent, plan=plan, clock=self._clock), stats, ALONE):
            if frames := made(pieces, place, plan):
                yield frames

    def runs(
        self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None, where: Workers = ALONE
    ) -> Iterator[Run]:
        """The same stretches, some at a time, for *where* to work on: the same whatever that is. Here they are read
        once; workers apart read them themselves, after they have told what must be known to cut them."""
        stats = ReadStats() if stats is None else stats
        stats.ticks = self.meta.ticks
        plan = Plan.of(self.layout, self.formats, wanted)
        if where.apart:
            yield from far_runs(
                self._stretches(partial(there, plan=plan.index(), clock=self._clock), stats, where), plan, self._clock
            )
        else:
            read = self._stretches(partial(read_extent, plan=plan, clock=self._clock), stats, where)
            yield from near_runs(read, plan)

    def _stretches(
        self, read: Callable[[Extent], Block], stats: ReadStats, where: Workers
    ) -> Iterator[tuple[int, list[Piece]]]:
        # The place of the first record of each stretch, and what it takes of each CPU.
        size = max(_SMALLEST, min(_PAGES * self.layout.page, AT_ONCE // max(1, len(self.streams))))
        ahead = max(1, -(-2 * where.jobs // max(1, len(self.streams))))
        damage = Damage()
        if self._damage is not None:
            damage.add(self._damage)
        for wrong in self.formats.chosen(self.formats.of_interest())[1]:
            damage.add(wrong)
        cpus = []
        for stream in self.streams:
            extents = _Extents(absolute(stream.extents(size)) if where.apart else stream.extents(size))
            cpus.append(_Cpu(stream.cpu, extents, where.in_order(read, extents, ahead=ahead), stats, damage))
        yield from _merged(cpus)
        stats.damage = damage.text()


def runs(recording: Recording, wanted: Collection[str] | None, *, stats: ReadStats, where: Workers) -> Iterator[Run]:
    """See `RingRecording.runs`; of any other recording each stretch as it is read here."""
    if isinstance(recording, RingRecording):
        yield from recording.runs(wanted, stats=stats, where=where)
        return
    earlier: Frames = {}
    for frames in recording.frames(wanted, stats=stats):
        yield Near(min(int(frame["place"][0]) for frame in frames.values()), (frames,), earlier)
        earlier = frames


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


class _Extents(Iterator[Extent]):
    # Those of one CPU. What is given and not yet taken back is being read.
    def __init__(self, source: Iterator[Extent]) -> None:
        self._source = source
        self._given: deque[Extent] = deque()
        self.wrong: TraceError | None = None

    def __next__(self) -> Extent:
        try:
            extent = next(self._source)
        except TraceError as e:  # told when all before it has been read
            self.wrong = e
            raise StopIteration from None
        self._given.append(extent)
        return extent

    def back(self) -> Extent:
        return self._given.popleft()


class _Cpu:
    # What one CPU still has to give. Time may go back on a CPU (a clock that is not monotonic): a record waits for the
    # one before it, so what counts is the latest time up to it.
    def __init__(self, cpu: int, extents: _Extents, blocks: Iterator[Block], stats: ReadStats, damage: Damage) -> None:
        self.waiting: deque[Held] = deque()
        self._cpu = cpu
        self._extents = extents
        self._blocks = blocks
        self._stats = stats
        self._damage = damage
        self._ended = False
        self._latest = LONG_AGO
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
        block = next(self._blocks, None)
        if block is None:
            if self._extents.wrong is not None:
                self._damage.add(self._extents.wrong)
            self._ended = True
            self._close(None)
            return
        extent = self._extents.back()
        self._stats.bytes += sum(part.stored for part in extent.parts)
        self._stats.events.update(block.events)
        self._stats.skipped.update(block.skipped)
        self._stats.misfits.update(block.misfits)
        for where, what in block.damage:
            self._damage.add(TraceError(what, path=extent.path, offset=where))
        self._gaps(block)
        if len(block.time):
            self.waiting.append(Held.of(extent, block, self._latest))
            self._latest = self.last

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


def _merged(cpus: list[_Cpu]) -> Iterator[tuple[int, list[Piece]]]:
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
        yield place, pieces
        place += sum(p.stop - p.start for p in pieces)


def _take(cpu: _Cpu, bound: int, *, inclusive: bool) -> Iterator[Piece]:
    while cpu.waiting:
        held = cpu.waiting[0]
        stop = int(np.searchsorted(held.key, bound, side="right" if inclusive else "left"))
        if stop > held.done:
            yield Piece(held, held.done, stop)
            held.done = stop
        if stop < len(held.key):
            return
        cpu.waiting.popleft()
