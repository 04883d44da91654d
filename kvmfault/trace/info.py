"""What a recording holds, found in one pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import polars as pl

from kvmfault.contract.target import backends
from kvmfault.contract.tracepoints import REPLAYED, Role
from kvmfault.trace.assemble import AssembleStats
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.recording import Meta, ReadStats, Recording

__all__ = ["Info", "info_of"]


@dataclass(slots=True)
class Info:
    """What a recording says of itself, and what is in it."""

    path: str
    meta: Meta
    read: ReadStats
    faults: AssembleStats
    first: int | None = None
    """Time of the first event that kvmfault knows, and of the last."""
    last: int | None = None
    vcpus: Counter[int] = field(default_factory=Counter)
    """Entries to the guest, by task; a task that enters it is a vCPU."""
    replayed: tuple[str, ...] = ()
    """Events in it that replay makes use of."""
    known: tuple[str, ...] = ()
    """Others of which the fields are known."""


def info_of(recording: Recording, *, told: str | None = None, progress: Callable[[int], None] | None = None) -> Info:
    """Read *recording* through; *progress* is called with the bytes read so far.

    *told* is the TARGET of faults where no exit tells it. Raises TraceError where nothing can be read.
    """
    points = {name: point for b in backends().values() for name, point in b.tracepoints.items()}
    roles = {name: point.role for name, point in points.items()}
    faults = FaultColumns.of(told, facts=())
    stats = ReadStats()
    info = Info(recording.path, recording.meta, stats, faults.stats)
    cpus: set[int] = set()
    for frames in recording.frames(points.keys(), stats=stats):
        for name, frame in frames.items():
            low, high = frame["time"].min(), frame["time"].max()
            if isinstance(low, int) and isinstance(high, int):
                info.first = low if info.first is None else min(low, info.first)
                info.last = high if info.last is None else max(high, info.last)
            cpus.update(frame["cpu"].drop_nulls().unique().to_list())
            if roles[name] is Role.ENTRY:
                info.vcpus.update(dict(frame.group_by("pid").agg(pl.len()).iter_rows()))
        faults.take(frames)
        if progress is not None:
            progress(stats.bytes)
    faults.end()
    info.meta = recording.meta
    if not info.meta.cpus:
        info.meta = replace(info.meta, cpus=tuple(sorted(cpus)))
    there = [name for name, _ in stats.events.most_common() if name in points]
    info.replayed = tuple(name for name in there if roles[name] in REPLAYED)
    info.known = tuple(name for name in there if roles[name] not in REPLAYED)
    return info
