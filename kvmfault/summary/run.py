"""From a recording to its summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Final, NamedTuple

from kvmfault.contract.target import backends
from kvmfault.errors import TraceError
from kvmfault.parallel import ALONE, Workers
from kvmfault.summary.figures import Summary
from kvmfault.summary.given import Source
from kvmfault.summary.meaning import Meaning
from kvmfault.summary.partial import FACTS, Partial, Reading, Whole
from kvmfault.summary.slots import slots_of
from kvmfault.summary.telling import tell
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.guess import by_runs
from kvmfault.trace.merge import runs
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import Frames, ReadStats, Recording
from kvmfault.trace.slotfile import read_slots, recorded_slots
from kvmfault.trace.slots import SlotSource
from kvmfault.trace.truth import beside, probe_events

__all__ = ["PAGE", "summarise"]

PAGE: Final = 4096
"""Bytes of a host's page where a recording does not say."""


def summarise(
    path: str,
    *,
    formats: str | None = None,
    instance: str | None = None,
    slots: SlotSource | None = None,
    told: str | None = None,
    where: Workers = ALONE,
    progress: Callable[[int], object] = lambda _: None,
) -> Summary:
    """What matters in the recording *path*; *formats* and *instance* as for `open_recording`. *told* is the TARGET of
    faults whose encoding no exit tells. *where* works on it, and the summary is the same wherever that is. *progress*
    is told the bytes read so far.

    Raises UsageError or TraceError where nothing can be read; damage behind that is told in the summary.
    """
    faults = FaultColumns.of(told, facts=FACTS)
    recording = open_recording(path, formats=formats, instance=instance)
    slots = _recorded(recording, path) if slots is None else slots
    how = _How((recording.meta.page_size or PAGE).bit_length() - 1, slots)
    reading = how.reading()
    whole, stats = Whole(reading), ReadStats()
    wanted = (*reading.meaning.wanted, *probe_events(recording, reading.meaning.probes))
    if where.apart:
        parts = by_runs(partial(_whole, how), runs(recording, wanted, stats=stats, where=where), faults, where)
    else:
        parts = _parts(reading, recording.frames(wanted, stats=stats), faults)
    for part in parts:
        whole.add(part)
        progress(stats.bytes)
    faults.end()
    unclaimed, unplaced = faults.stats.unclaimed.total(), faults.stats.without_address
    origin = None if slots is None else slots.origin
    source = Source(path, recording.meta, stats.events, stats.gaps, stats.damage, unclaimed, unplaced, origin)
    return tell(whole.done(), reading, source)


def _recorded(recording: Recording, path: str) -> SlotSource | None:
    # the memslots that probes tell, in the recording or beside it
    every = [source.probes for source in backends().values()]
    asked = {function for probes in every for function in probes.slots}
    names = [name for name, function in probe_events(recording, every).items() if function in asked]
    if names:
        with suppress(TraceError):  # none was hit, or a field is missing
            return recorded_slots(recording, names)
    if path != "-" and (near := beside(path)) is not None:
        with suppress(TraceError):
            return read_slots(near)
    return None


class _How(NamedTuple):
    # What makes a Reading, in any process.
    page_shift: int
    slots: SlotSource | None

    def reading(self) -> Reading:
        found = slots_of(self.slots) if self.slots is not None else None
        return Reading(Meaning.of(backends().values()), self.page_shift, found)


def _parts(reading: Reading, stretches: Iterable[Frames], faults: FaultColumns) -> Iterator[Partial]:
    return (reading.summarise(frames, faults.take(frames)) for frames in stretches)


def _whole(how: _How, faults: FaultColumns, stretches: Iterator[Frames]) -> Partial:
    reading = how.reading()
    whole = Whole(reading)
    for part in _parts(reading, stretches, faults):
        whole.add(part)
    return whole.done()
