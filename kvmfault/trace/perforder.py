"""Samples of perf.data put in order of time, in bounded memory, and made columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import polars as pl

from kvmfault.trace.frames import Column, Plan, Records, columns_of
from kvmfault.trace.perfwalk import Samples
from kvmfault.trace.recording import Frames, Lost, ReadStats
from kvmfault.trace.ring import Index, U64Col

__all__ = ["AT_ONCE", "HELD", "Mark", "Order"]

AT_ONCE: Final = 1 << 17
"""Samples that are given out together, or a little more."""
HELD: Final = 1 << 26
"""Bytes that wait to be put in order; perf's rounds are far smaller."""
_GAPS: Final = 10_000


class Mark(NamedTuple):
    """What stands between samples: the end of a round, or ``lost`` events."""

    record: int
    """Its place among the records of the piece."""
    cpu: int | None = None
    """None: the file does not tell."""
    lost: int | None = None


class Order:
    """Takes samples in the order of the file; gives those that no later one can come before."""

    def __init__(self, plan: Plan, stats: ReadStats) -> None:
        self._plan = plan
        self._stats = stats
        self._pending: list[Samples] = []
        self._rows = 0
        self._held = 0
        self._latest: int | None = None
        self._previous: int | None = None
        self._bound: int | None = None
        self._given: int | None = None
        self._place = 1
        self._last: dict[int, int] = {}
        self._open: list[tuple[int, int | None, int | None]] = []
        self.late: int = 0
        """Samples earlier than what had been given already."""

    def add(self, samples: Samples | None, marks: Sequence[Mark]) -> None:
        """The next samples of the file, and what stands between them."""
        if samples is not None and not len(samples.at):
            samples = None
        if samples is not None:
            self._pending.append(samples)
            self._rows += len(samples.at)
            self._held += samples.words.nbytes
            if self._given is not None:
                self.late += int(np.count_nonzero(samples.time < self._given))
            self._count(samples)
        self._rounds(samples, [mark.record for mark in marks if mark.lost is None])
        self._losses(samples, [mark for mark in marks if mark.lost is not None])

    def _count(self, samples: Samples) -> None:
        counts = np.bincount(samples.words[samples.at] & np.uint32(0xFFFF))
        for kind in np.flatnonzero(counts).tolist():
            name = self._plan.names.get(kind, f"unknown-{kind}")
            self._stats.events[name] += int(counts[kind])
            if kind not in self._plan.wanted:
                self._stats.skipped[name] += int(counts[kind])

    def _rounds(self, samples: Samples | None, rounds: list[int]) -> None:
        # a round is over: what follows is not earlier than the end of the one before
        if samples is None:
            for _ in rounds:
                self._bound, self._previous = self._previous, self._latest
            return
        latest = np.maximum.accumulate(samples.time)
        if self._latest is not None:
            latest = np.maximum(latest, self._latest)
        for upto in np.searchsorted(samples.record, rounds).tolist():
            self._bound, self._previous = self._previous, int(latest[upto - 1]) if upto else self._latest
        self._latest = int(latest[-1])

    def _losses(self, samples: Samples | None, losses: list[Mark]) -> None:
        own = {}
        if samples is not None:
            cpus = np.unique(samples.cpu).tolist()
            own = {cpu: np.flatnonzero(samples.cpu == cpu) for cpu in (cpus if losses or self._open else ())}
            for gap in self._open:
                if gap[0] in own:
                    self._stats.gaps.append(Lost(*gap, int(samples.time[own[gap[0]][0]])))
            self._open = [gap for gap in self._open if gap[0] not in own]
        for record, cpu, lost in losses:
            if cpu is None:
                self._stats.overwritten += lost or 0
                continue
            self._stats.lost[cpu] += lost or 0
            if len(self._stats.gaps) + len(self._open) >= _GAPS:
                continue
            after, before = self._last.get(cpu), None
            if samples is not None and cpu in own:
                at = int(np.searchsorted(samples.record[own[cpu]], record))
                after = int(samples.time[own[cpu][at - 1]]) if at else after
                before = int(samples.time[own[cpu][at]]) if at < len(own[cpu]) else None
            if before is None:
                self._open.append((cpu, lost, after))
            else:
                self._stats.gaps.append(Lost(cpu, lost, after, before))
        if samples is not None:
            latest, first = np.unique(samples.cpu[::-1], return_index=True)
            self._last.update(zip(latest.tolist(), samples.time[::-1][first].tolist(), strict=True))

    def ready(self) -> Iterator[Frames]:
        """What can be given now, if it is worth the while."""
        if self._held > HELD:  # no rounds, or none that end: half of it must go
            times = np.concatenate([s.time for s in self._pending])
            yield from self._give(max(self._bound or 0, int(np.partition(times, len(times) // 2)[len(times) // 2])))
        elif self._rows > AT_ONCE and self._bound is not None:
            yield from self._give(self._bound)

    def rest(self) -> Iterator[Frames]:
        """All that is left."""
        self._stats.gaps += [Lost(*gap, None) for gap in self._open]
        while self._pending:
            times = np.concatenate([s.time for s in self._pending])
            some = min(4 * AT_ONCE, len(times)) - 1
            yield from self._give(int(np.partition(times, some)[some]))

    def _give(self, bound: int) -> Iterator[Frames]:
        taken, kept = [], []
        for samples in self._pending:
            now = samples.time <= bound
            taken.append(_some(samples, now))
            if not now.all():
                kept.append(_some(samples, ~now))
        self._pending = kept
        self._held = sum(samples.words.nbytes for samples in kept)
        count = sum(len(s.at) for s in taken)
        if not count:
            return
        self._rows -= count
        self._given = bound if self._given is None else max(bound, self._given)
        frames = self._frames(taken)
        self._place += count
        if frames:
            yield frames

    def _frames(self, taken: list[Samples]) -> dict[str, pl.DataFrame]:
        times = np.concatenate([s.time for s in taken])
        places: U64Col = np.empty(len(times), np.uint64)
        places[np.argsort(times, kind="stable")] = np.arange(self._place, self._place + len(times), dtype=np.uint64)
        parts: dict[str, list[pl.DataFrame]] = {}
        start = 0
        for samples in taken:
            kinds = samples.words[samples.at] & np.uint32(0xFFFF)
            for kind in np.unique(kinds).tolist():
                event = self._plan.wanted.get(kind)
                if event is None:
                    continue
                which: Index = np.flatnonzero(kinds == kind)
                short = samples.size[which] < event.size
                if short.any():
                    self._stats.misfits[event.name] += int(np.count_nonzero(short))
                    which = which[~short]
                columns: dict[str, Column] = {
                    "place": places[start + which],
                    "time": samples.time[which],
                    "cpu": samples.cpu[which],
                }
                columns.update(columns_of(event, Records(samples.words, samples.at[which], samples.size[which])))
                parts.setdefault(event.name, []).append(pl.DataFrame(columns))
            start += len(samples.at)
        made = {name: pl.concat(some).sort("place") for name, some in parts.items()}
        return {name: frame for name, frame in made.items() if len(frame)}


def _some(samples: Samples, which: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Samples:
    words, record, time, cpu, at, size = samples
    return Samples(words, record[which], time[which], cpu[which], at[which], size[which])
