"""Sections about faults by what they are, and about repeated ones."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import polars as pl

from kvmfault.summary.figures import Cell, Column, Section
from kvmfault.summary.given import TOP, Given, ranked, shares
from kvmfault.summary.partial import BLOCK
from kvmfault.summary.reasons import DEVICE, INVALIDATION, REASONS, STORM, STORM_NAME, reason
from kvmfault.summary.repeats import FRAMES, Seen

__all__ = ["fault_sections", "place_sections"]


def fault_sections(given: Given) -> Iterator[Section]:
    """By backend, kind, cause, access, level, slot and vCPU."""
    kinds = given.kinds
    yield shares("targets", "Faults by backend", Column("backend", "text"), ((t, n) for t, _, _, n in kinds))
    yield shares("kinds", "Faults by kind", Column("kind", "text"), ((k, n) for _, k, _, n in kinds))
    parts = [(*kind.rpartition(", ")[::2], n) for _, kind, _, n in kinds]
    yield shares("causes", "Faults by cause", Column("cause", "text"), ((cause, n) for _, cause, n in parts))
    yield shares("accesses", "Faults by access", Column("access", "text"), ((access, n) for access, _, n in parts))
    # where no fault tells its level (a fault of the CPU's own does on some architectures only) there is no table
    if any(g for _, _, g, _ in kinds):
        note = "what one entry maps at the level where translation ended; - where the fault does not tell it"
        yield shares("levels", "Faults by level", Column("entry", "bytes"), ((g, n) for _, _, g, n in kinds), note)
    pairs = ((s, n) for s, _, n in given.rows("slots"))
    origin = [f"memslots: {given.source.slots}"] * (given.source.slots is not None)
    yield shares("slots", "Faults by memslot", Column("slot", "text"), pairs, *origin)
    yield _vcpus(given)


def _vcpus(given: Given) -> Section:
    counts: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for pid, vcpu, kind, n in given.rows("vcpus"):
        counts[vcpu, pid][kind] += n
    comms = given.source.meta.comms
    rows = tuple(
        (str(vcpu), str(pid), comms.get(pid), kinds.total(), ranked(kinds)[0][0])
        for (vcpu, pid), kinds in sorted(counts.items(), key=lambda c: (-c[1].total(), c[0]))
    )
    columns = (*(Column(c, "text") for c in ("vcpu", "task", "name")), Column("faults"), Column("mostly", "text"))
    return Section("vcpus", "Faults by vCPU", columns, rows, keys=3, notes=given.cut("vcpus"))


def place_sections(given: Given) -> Iterator[Section]:
    """Hot frames and ranges, and why frames faulted again."""
    why = list(_why(given))
    yield _hot(given, why)
    yield _ranges(given)
    yield _repeats(given, why)


def _hot(given: Given, why: list[tuple[int, str, int]]) -> Section:
    table = given.whole.tables.get("hot")
    if table is None:
        return Section("hot_frames", "", (), ())
    top = table.filter(pl.col("n") > 1).sort(["n", "frame"], descending=[True, False]).head(TOP)
    frames: dict[int, Counter[str]] = defaultdict(Counter)
    for frame, name, n in why:
        frames[frame][name] += n

    def again(frame: int) -> str | None:
        return ", ".join(f"{name} {n}" for name, n in ranked(frames[frame])[:3]) or None

    rows = tuple((f << given.shift, n, n / given.faults, again(f)) for f, n in top.iter_rows())
    columns = (Column("frame", "address"), Column("faults"), Column("share", "share"), Column("again, why", "text"))
    notes = (*given.cut("hot"), f"different frames that faulted: {table.height:,}")
    return Section("hot_frames", "Frames that fault most", columns, rows, notes=notes)


def _ranges(given: Given) -> Section:
    size = 1 << (max(BLOCK, given.shift) + given.whole.block_scale)
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for block, kind, n in given.rows("ranges"):
        counts[block][kind] += n
    ranges: list[tuple[int, int, Counter[str]]] = []
    for block in sorted(counts):
        last, here = ranges[-1] if ranges else None, counts[block].total()
        if last and last[0] + last[1] == block * size and _alike(last[2].total() * size / last[1], here):
            ranges[-1] = last[0], last[1] + size, last[2] + counts[block]
        else:
            ranges.append((block * size, size, counts[block]))
    ranges.sort(key=lambda r: (-r[2].total(), r[0]))
    rows = tuple(
        (start, length, kinds.total(), kinds.total() / given.faults, ranked(kinds)[0][0])
        for start, length, kinds in ranges[:TOP]
    )
    columns = (
        Column("from", "address"), Column("size", "bytes"), Column("faults"), Column("share", "share"),
        Column("mostly", "text"),
    )  # fmt: skip
    note = f"blocks of {size >> 20} MiB; neighbours with about as many faults are one range"
    return Section("hot_ranges", "Ranges that fault most", columns, rows, keys=2, notes=(note,))


def _alike(a: float, b: float) -> bool:
    return a / 2 <= b <= a * 2


def _why(given: Given) -> Iterator[tuple[int, str, int]]:
    # (frame, reason, faults)
    life = given.whole.life
    if life is None or life.repeats is None:
        return
    devices = {gpa >> given.shift for name in ("mmio", "undecoded") for gpa, *_ in given.rows(name)}
    named = {seen: reason(Seen(seen), given.known) for seen in life.repeats["seen"].unique()}
    again = Counter[tuple[int, str]]()
    for frame, seen, n in life.repeats.iter_rows():
        again[frame, DEVICE.name if frame in devices else named[seen]] += n
    for (frame, why), n in sorted(again.items()):
        yield frame, STORM_NAME if why == INVALIDATION and n >= STORM else why, n


def _repeats(given: Given, why: list[tuple[int, str, int]]) -> Section:
    counts, frames = Counter[str](), Counter[str]()
    for _, name, n in why:
        counts[name] += n
        frames[name] += 1
    about = {rule.name: rule.about for rule in (*REASONS, DEVICE)}
    about[STORM_NAME] = f"{about[INVALIDATION]}, {STORM} times or more on the frame"
    total = counts.total()
    rows: list[tuple[Cell, ...]] = [(name, n, n / total, frames[name], about[name]) for name, n in ranked(counts)]
    columns = (
        Column("likely reason", "text"), Column("faults"), Column("share", "share"), Column("frames"),
        Column("because", "text"),
    )  # fmt: skip
    life = given.whole.life
    sampled = life is not None and life.frames.height >= FRAMES.cap
    notes = (f"of a sample of {FRAMES.cap:,} frames",) * sampled
    return Section("repeats", "Faults on a frame that had faulted before", columns, tuple(rows), notes=notes)
