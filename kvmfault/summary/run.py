"""From a recording to its summary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvmfault.contract.target import backends
from kvmfault.contract.tracepoints import Role
from kvmfault.summary.faults import Faults
from kvmfault.summary.figures import Summary
from kvmfault.summary.given import Source
from kvmfault.summary.meaning import Meaning
from kvmfault.summary.partial import Reading, Whole
from kvmfault.summary.slots import slots_of
from kvmfault.summary.telling import tell
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.slots import SlotSource

PAGE: Final = 4096
"""Bytes of a host's page where a recording does not say."""


def summarise(
    path: str,
    *,
    formats: str | None = None,
    instance: str | None = None,
    slots: SlotSource | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Summary:
    """What matters in the recording *path*; *formats* and *instance* as for `open_recording`. *progress* is told the
    bytes read so far.

    Raises UsageError or TraceError where nothing can be read; damage behind that is told in the summary.
    """
    recording = open_recording(path, formats=formats, instance=instance)
    meaning = Meaning.of(backends().values())
    reading = Reading(
        meaning, (recording.meta.page_size or PAGE).bit_length() - 1, slots_of(slots) if slots is not None else None
    )
    whole, stats, faults = Whole(reading), ReadStats(), Faults(backends())
    for frames in recording.frames(meaning.names(*Role), stats=stats):
        whole.add(reading.summarise(frames, faults.of(frames)))
        progress(stats.bytes)
    source = Source(path, recording.meta, stats.events, stats.gaps, stats.damage, faults.unclaimed)
    return tell(whole.done(), reading, source)
