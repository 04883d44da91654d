"""``kvmfault trace top``: as a table or JSON; on a terminal the application of cli/topapp.py."""

from __future__ import annotations

import json as json_
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

from kvmfault.cli.record import say
from kvmfault.cli.render import columns
from kvmfault.contract.target import Target, backend
from kvmfault.contract.tracepoints import Sort
from kvmfault.errors import needs
from kvmfault.live.stopping import stopping
from kvmfault.live.tap import Wanted, tap

if TYPE_CHECKING:
    from kvmfault.cli.topapp import Top
    from kvmfault.live.kinds import Kind
    from kvmfault.live.watch import Count, Range, Seen, Shot

__all__ = [
    "TITLES",
    "application",
    "as_data",
    "by_rate",
    "number",
    "place",
    "rate",
    "run",
    "shown_sorts",
    "sparkline",
    "table",
]

_RANGES: Final = 15
_BARS: Final = "▁▂▃▄▅▆▇█"
TITLES: Final = {
    Sort.FAULT: "faults",
    Sort.HANDLED: "handled",
    Sort.ENTRY: "entries",
    Sort.MMIO: "MMIO",
    Sort.INVALIDATION: "invalid.",
    Sort.EXIT: "exits",
    Sort.USER_EXIT: "to user",
    Sort.WALK: "walks",
}
"""Headings, in their order."""


def run(pids: Sequence[int], interval: float, target: str | None, *, once: bool, json: bool) -> int:
    """Watch until the user ends it; one interval with *once*, or where nobody watches."""
    with needs("trace", "trace top"):
        from kvmfault.live.watch import every_event, fitting, watch
    printed = json or once or not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    app = None if printed else application()
    named = backend(target) if target is not None else None
    wanted = Wanted(events=every_event(), lenient=True, pids=tuple(pids))
    with stopping() as stop, tap(wanted, say) as source:
        fit = named or fitting([event for own in source.chosen.values() for event in own])
        shots = watch(source, fit, interval, stop)
        if app is None:
            _print(islice(shots, 1) if once or not json else shots, fit, json=json)
        else:
            shown = app(shots, f"{fit.name} on Linux {os.uname().release}, every {interval:g} s", stop)
            shown.run()
            if shown.error is not None:
                raise shown.error
    return 0


def application() -> type[Top]:
    """What shows intervals on a terminal. Raises UsageError where its package is not installed."""
    with needs("top", "trace top"):
        from kvmfault.cli.topapp import Top
    return Top


def _print(shots: Iterator[Shot], target: Target, *, json: bool) -> None:
    for shot in shots:
        if json:
            print(json_.dumps({"target": target.name, **as_data(shot)}), flush=True)
        else:
            print(f"{target.name} on Linux {os.uname().release}, {shot.seconds:.1f} s, {shot.lost:,} events lost\n")
            print(table(shot), flush=True)


def table(shot: Shot) -> str:
    """An interval as text: rates per second."""
    sorts = shown_sorts(shot)
    right = frozenset(range(2, 3 + len(sorts)))
    rows = [["process", "", "threads", *(TITLES[s] + "/s" for s in sorts)]]
    rows += [
        [str(seen.process or ""), seen.name, str(seen.threads), *(number(rate(seen.counts, s)) for s in sorts)]
        for seen in shot.seen
    ]
    everything = shot.seen[0]
    kinds = [["what", "kind", "per second", "total"]]
    kinds += [
        [TITLES[kind.sort], str(kind), number(count.rate), number(count.total)] for kind, count in by_rate(everything)
    ]
    where = [s for s in sorts if any(s in r.counts for r in everything.ranges)]
    ranges = [["guest addresses", *(TITLES[s] + "/s" for s in where), "total"]]
    ranges += [
        [place(r), *(number(rate(r.counts, s)) for s in where), number(sum(c.total for c in r.counts.values()))]
        for r in everything.ranges[:_RANGES]
    ]
    parts = [
        columns(rows, right=right),
        columns(kinds, right=frozenset({2, 3})),
        columns(ranges, right=frozenset(range(1, 2 + len(where)))),
    ]
    if not everything.counts:
        parts = [parts[0], "nothing happened: is a VM running?"]
    elif shot.faults is Sort.HANDLED:
        parts.append("Faults have no event of their own on this machine: `handled` counts what they came to.")
    return "\n\n".join(parts)


def as_data(shot: Shot) -> dict[str, object]:
    """An interval for --json."""
    return {
        "seconds": round(shot.seconds, 3),
        "lost": shot.lost,
        "lost_total": shot.lost_total,
        "faults": shot.faults.value,
        "processes": [
            {
                "process": seen.process,
                "name": seen.name,
                "threads": seen.threads,
                "counts": _counts(seen.counts),
                "kinds": [
                    {"sort": kind.sort.value, "event": kind.event, "detail": kind.detail, **_count(count)}
                    for kind, count in by_rate(seen)
                ],
                "ranges": [{"start": r.start, "size": r.size, "counts": _counts(r.counts)} for r in seen.ranges],
            }
            for seen in shot.seen
        ],
    }


def _counts(counts: Mapping[Sort, Count]) -> dict[str, object]:
    return {sort.value: _count(count) for sort, count in counts.items()}


def _count(count: Count) -> dict[str, float]:
    return {"rate": round(count.rate, 3), "total": count.total}


def shown_sorts(shot: Shot) -> list[Sort]:
    """What there was any of; what counts as a fault always."""
    everything = shot.seen[0].counts
    return [sort for sort in TITLES if sort is shot.faults or sort in everything]


def by_rate(seen: Seen) -> list[tuple[Kind, Count]]:
    """Kinds in the order of what they are, then the most frequent first."""
    order = list(TITLES)
    return sorted(seen.kinds.items(), key=lambda item: (order.index(item[0].sort), -item[1].rate, -item[1].total))


def rate(counts: Mapping[Sort, Count], sort: Sort) -> float:
    """Per second; 0 where there was none."""
    return counts[sort].rate if sort in counts else 0.0


def place(r: Range) -> str:
    """A range for people."""
    return f"{r.start:#012x} + {r.size >> 20} MiB"


def number(value: float) -> str:
    """A count or a rate, in at most seven characters."""
    value = float(value)
    if value == 0:
        return "0"
    if value < 9.95 and not value.is_integer():
        return f"{value:.1f}"
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:,.0f}"


def sparkline(rates: Sequence[float], width: int) -> str:
    """The last *width* rates as bars, the largest of them all as the highest."""
    most = max(rates, default=0)
    shown = rates[-width:]
    return "".join(_BARS[min(int(r / most * 8), 7)] if r else " " for r in shown).rjust(width)
