"""From the gathered figures of a whole recording to its summary."""

from __future__ import annotations

from kvmfault.summary.by_event import event_sections, unsaid
from kvmfault.summary.by_fault import fault_sections, place_sections
from kvmfault.summary.by_time import times
from kvmfault.summary.figures import Cell, Summary
from kvmfault.summary.given import Given, Source
from kvmfault.summary.partial import Partial, Reading

__all__ = ["tell"]


def tell(whole: Partial, reading: Reading, source: Source) -> Summary:
    """What *whole* says. Sections without rows are left out."""
    given = Given(whole, reading, source)
    timed, histograms = times(given)
    sections = [*fault_sections(given), *timed, *place_sections(given), *event_sections(given)]
    start = whole.span[0] >> whole.time_scale if whole.span else 0
    frame = reading.page_shift + whole.place_scale
    return Summary(
        path=source.path,
        about=_about(given),
        events=dict(sorted(source.events.items(), key=lambda e: (-e[1], e[0]))),
        sections=tuple(s for s in sections if s.rows),
        unsaid=tuple(unsaid(given)),
        start=start << whole.time_scale,
        step=1 << whole.time_scale,
        rate=tuple((step - start, kind, n) for step, kind, n in given.rows("rate")),
        place_step=1 << frame,
        map=tuple((step - start, place << frame, kind, n) for step, place, kind, n in given.rows("map")),
        histograms=tuple(histograms),
        ticks=source.meta.ticks,
        damaged=source.damage is not None,
    )


def _about(given: Given) -> dict[str, Cell]:
    meta, span = given.source.meta, given.whole.span
    length = span[1] - span[0] if span else 0
    return {
        "format": meta.kind,
        "kernel": meta.release,
        "machine": meta.machine,
        "page_size": 1 << given.shift,
        "clock": meta.clock,
        "ticks": meta.ticks,
        "first": span[0] if span else None,
        "last": span[1] if span else None,
        "duration": length,
        "events": sum(given.source.events.values()),
        "faults": given.faults,
        "faults_per_second": given.faults / (length / 1e9) if length and not meta.ticks else None,
    }
