"""From the gathered figures to what people read: sections of rows, the same for text, JSON and the page."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import polars as pl

from kvmfault.contract.tracepoints import Role
from kvmfault.summary import latency
from kvmfault.summary.partial import BLOCK, RULES, Partial, Reading
from kvmfault.summary.reasons import DEVICE, INVALIDATION, LIKELY, REASONS, STORM, STORM_NAME, Known, reason
from kvmfault.summary.repeats import FRAMES, Seen

if TYPE_CHECKING:
    from kvmfault.trace.recording import Lost, Meta

Cell = str | int | float | None
TOP: Final = 20
"""Rows of a list of the busiest."""


@dataclass(frozen=True, slots=True)
class Column:
    """Name and unit of a column: text, count, share, time, rate, address, bytes or change."""

    name: str
    unit: str = "count"
    wide: bool = False
    """Of those that are left out first where there is little room."""


@dataclass(frozen=True, slots=True)
class Section:
    """One table."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: int = 1
    """Columns that name a row; the others are figures."""
    notes: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Cell]]:
        """The rows for JSON."""
        return [dict(zip((c.name for c in self.columns), row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Times from exit to entry: (from ns, to ns, how many)."""

    name: str
    steps: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that is told of a recording."""

    path: str
    about: Mapping[str, Cell]
    events: Mapping[str, int]
    """Count by name of everything in the file."""
    sections: tuple[Section, ...]
    unsaid: tuple[str, ...]
    """What the recording does not tell, and why."""
    start: int = 0
    step: int = 1
    """Width of a step of time, in units of the recording's clock."""
    rate: tuple[tuple[int, str, int], ...] = ()
    """(number of the step from ``start``, kind, faults)."""
    place_step: int = 1
    map: tuple[tuple[int, int, str, int], ...] = ()
    """(number of the step, address, kind, faults); an address stands for ``place_step`` bytes."""
    histograms: tuple[Histogram, ...] = ()
    ticks: bool = False
    damaged: bool = False

    def section(self, key: str) -> Section | None:
        """The table of that key."""
        return next((s for s in self.sections if s.key == key), None)


@dataclass(frozen=True, slots=True)
class Source:
    """What readers tell beside the events."""

    path: str
    meta: Meta
    events: Mapping[str, int]
    lost: Sequence[Lost] = ()
    damage: str | None = None
    unclaimed: int = 0
    """Fault events whose encoding is not known."""


def figures(whole: Partial, reading: Reading, source: Source) -> Summary:
    """What *whole* says."""
    make = _Maker(whole, reading, source)
    sections = [s for s in make.sections() if s is not None and s.rows]
    rate = whole.tables.get("rate")
    shown = whole.tables.get("map")
    start = whole.span[0] >> whole.time_scale if whole.span else 0
    frame = reading.page_shift + whole.place_scale
    return Summary(
        path=source.path,
        about=make.about(),
        events=dict(sorted(source.events.items(), key=lambda e: (-e[1], e[0]))),
        sections=tuple(sections),
        unsaid=tuple(make.unsaid()),
        start=start << whole.time_scale,
        step=1 << whole.time_scale,
        rate=tuple((s - start, k, n) for s, k, n in rate.iter_rows()) if rate is not None else (),
        place_step=1 << frame,
        map=tuple((s - start, p << frame, k, n) for s, p, k, n in shown.iter_rows()) if shown is not None else (),
        histograms=tuple(make.histograms()),
        ticks=source.meta.ticks,
        damaged=source.damage is not None,
    )


class _Maker:
    def __init__(self, whole: Partial, reading: Reading, source: Source) -> None:
        self._whole, self._reading, self._source = whole, reading, source
        self._kinds = list(self._rows("kinds"))
        self._faults = sum(n for *_, n in self._kinds)
        self._pairs = list(self._took())
        meaning = reading.meaning
        there = set(source.events)
        self._known = Known(
            entries=bool(there.intersection(meaning.names(Role.CHANGE))),
            host=bool(there.intersection(meaning.names(Role.UNMAP, Role.AGE))),
        )

    def about(self) -> dict[str, Cell]:
        meta, span = self._source.meta, self._whole.span
        length = span[1] - span[0] if span else 0
        return {
            "format": meta.kind, "kernel": meta.release, "machine": meta.machine, "page_size": 1 << self._reading.page_shift,
            "clock": meta.clock, "ticks": meta.ticks, "first": span[0] if span else None, "last": span[1] if span else None,
            "duration": length, "events": sum(self._source.events.values()), "faults": self._faults,
            "faults_per_second": self._faults / (length / 1e9) if length and not meta.ticks else None,
        }  # fmt: skip

    def sections(self) -> Iterator[Section | None]:
        yield self._shares("targets", "Faults by backend", "backend", ((t, n) for t, _, _, n in self._kinds))
        yield self._shares("kinds", "Faults by kind", "kind", ((k, n) for _, k, _, n in self._kinds))
        yield self._shares(
            "causes", "Faults by cause", "cause", ((k.rpartition(", ")[2], n) for _, k, _, n in self._kinds)
        )
        yield self._shares(
            "accesses", "Faults by access", "access", ((k.rpartition(", ")[0], n) for _, k, _, n in self._kinds)
        )
        yield self._levels()
        yield self._shares("slots", "Faults by memslot", "slot", ((s, n) for s, _, n in self._rows("slots")))
        yield self._vcpus()
        yield self._latency()
        yield self._exits()
        yield self._user()
        yield self._hot()
        yield self._ranges()
        yield self._repeats()
        yield self._mmio()
        yield self._large()
        yield self._walks()
        yield self._host()
        yield self._lost()

    def _rows(self, name: str) -> Iterable[tuple[Any, ...]]:
        table = self._whole.tables.get(name)
        return () if table is None else table.iter_rows()

    def _cut(self, name: str) -> tuple[str, ...]:
        table, rule = self._whole.tables.get(name), RULES[name]
        full = table is not None and table.height >= rule.cap
        return (f"more than {rule.cap} different ones: a sample of them is counted",) if full else ()

    def _shares(self, key: str, title: str, name: str, pairs: Iterable[tuple[Cell, int]]) -> Section:
        counts: Counter[Cell] = Counter()
        for value, n in pairs:
            counts[value] += n
        total = counts.total()
        rows = tuple((value, n, n / total) for value, n in _most(counts))
        return Section(key, title, (Column(name, "text"), Column("faults"), Column("share", "share")), rows)

    def _levels(self) -> Section:
        counts = Counter[Cell]()
        for _, _, granule, n in self._kinds:
            counts[granule] += n
        total = counts.total()
        rows = tuple((g, n, n / total) for g, n in _most(counts))
        columns = (Column("entry", "bytes"), Column("faults"), Column("share", "share"))
        notes = ("the size that one entry maps at the level where translation ended; - where the fault does not tell",)
        return Section("levels", "Faults by level", columns, rows, notes=notes)

    def _vcpus(self) -> Section:
        counts: dict[tuple[Cell, Cell], Counter[Cell]] = defaultdict(Counter)
        for pid, vcpu, kind, n in self._rows("vcpus"):
            counts[vcpu, pid][kind] += n
        comms = self._source.meta.comms
        rows = [
            (vcpu, pid, comms.get(pid), kinds.total(), kinds.most_common(1)[0][0])
            for (vcpu, pid), kinds in sorted(counts.items(), key=lambda c: (-c[1].total(), str(c[0])))
        ]
        columns = (
            Column("vcpu", "text"),
            Column("task", "text"),
            Column("name", "text"),
            Column("faults"),
            Column("mostly", "text"),
        )
        return Section("vcpus", "Faults by vCPU", columns, tuple(rows), keys=3, notes=self._cut("vcpus"))

    # -- times from exit to entry

    def _took(self) -> Iterator[tuple[str, str, str, int, int, float, int, int]]:
        """(kind, exit, way, bucket, n, sum, smallest, largest)"""
        told = self._reading.meaning.told_by
        words: dict[tuple[Cell, ...], str] = {}
        for kind, *rest in self._rows("took"):
            values, (user, number, n, ns, low, high) = tuple(rest[: len(told)]), rest[len(told) :]
            if values not in words:
                words[values] = self._reading.meaning.word(Role.EXIT, dict(zip(told, values, strict=True)))
            yield kind or "", words[values], "user space" if user else "kernel", number, n, ns, low, high

    def _timed(self, key: int) -> dict[tuple[str, str], list[tuple[int, int, float, int, int]]]:
        groups: dict[tuple[str, str], list[tuple[int, int, float, int, int]]] = defaultdict(list)
        for row in self._pairs:
            groups[row[key], row[2]].append(row[3:])
        return groups

    def _times(
        self,
        key: str,
        title: str,
        name: str,
        groups: Mapping[tuple[str, str], list[tuple[int, int, float, int, int]]],
        notes: tuple[str, ...],
    ) -> Section:
        rows = []
        for (what, way), steps in groups.items():
            counts = _by_bucket(steps)
            largest, total, ns = max(s[4] for s in steps), sum(s[1] for s in steps), sum(s[2] for s in steps)
            at = [latency.percentile(counts, share, largest) for share in (0.5, 0.9, 0.99)]
            rows.append((what, way, total, *at, largest, ns / total, ns))
        rows.sort(key=lambda row: (-row[2], row[0], row[1]))
        columns = (Column(name, "text"), Column("handled in", "text"), Column("exits"))
        columns += tuple(
            Column(c, "time", wide=c in ("mean", "total")) for c in ("p50", "p90", "p99", "max", "mean", "total")
        )
        return Section(key, title, columns, tuple(rows), keys=2, notes=notes)

    def _latency(self) -> Section:
        groups = {what: steps for what, steps in self._timed(0).items() if what[0]}
        notes = (
            "from kvm_exit to the next kvm_entry of the task, percentiles exact to 1 in 32; user space: KVM_RUN returned in between",
        )
        return self._times("latency", "Time from exit to entry, by kind of fault", "kind", groups, notes)

    def _exits(self) -> Section:
        return self._times("exits", "Exits by reason", "reason", self._timed(1), ())

    def histograms(self) -> Iterator[Histogram]:
        groups: dict[str, list[tuple[int, int, float, int, int]]] = defaultdict(list)
        for kind, _, _, *step in self._pairs:
            groups[kind or "other exits"].append(tuple(step))  # type: ignore[arg-type]  # five, as the row has
        for name, steps in sorted(groups.items(), key=lambda g: (-sum(s[1] for s in g[1]), g[0])):
            yield Histogram(name=name, steps=tuple((*latency.bounds(b), n) for b, n in _by_bucket(steps)))

    def _user(self) -> Section:
        points = {n: self._reading.meaning.points[n][0] for n in self._reading.meaning.names(Role.USER_EXIT)}
        rows = Counter[Cell]()
        for event, values, n in self._rows("user"):
            told = points[event].told_by
            numbers = {f: int(v) if v else None for f, v in zip(told, values.split(" "), strict=True)}
            rows[self._reading.meaning.word(Role.USER_EXIT, numbers)] += n
        return Section(
            "user_exits", "Returns to user space", (Column("reason", "text"), Column("returns")), tuple(_most(rows))
        )

    # -- where

    def _hot(self) -> Section:
        table = self._whole.tables.get("hot")
        if table is None:
            return _nothing("hot")
        why = self._why_by_frame()
        top = table.sort(["n", "frame"], descending=[True, False]).head(TOP)
        shift = self._reading.page_shift
        rows = tuple(
            (f << shift, n, n / self._faults, "; ".join(f"{w} {c}" for w, c in why[f].most_common(3)) or None)
            for f, n in top.iter_rows()
            if n > 1
        )
        notes = (*self._cut("hot"), f"{table.height} different frames faulted")
        columns = (Column("frame", "address"), Column("faults"), Column("share", "share"), Column("again, why", "text"))
        return Section("hot_frames", "Frames that fault most", columns, rows, notes=notes)

    def _ranges(self) -> Section:
        size = 1 << (BLOCK + self._whole.block_scale)
        if self._reading.page_shift > BLOCK:
            size = 1 << (self._reading.page_shift + self._whole.block_scale)
        counts: dict[int, Counter[Cell]] = defaultdict(Counter)
        for block, kind, n in self._rows("ranges"):
            counts[block][kind] += n
        ranges: list[tuple[int, int, Counter[Cell]]] = []
        for block in sorted(counts):
            if ranges and ranges[-1][0] + ranges[-1][1] == block * size and _alike(ranges[-1], counts[block], size):
                start, length, kinds = ranges[-1]
                ranges[-1] = start, length + size, kinds + counts[block]
            else:
                ranges.append((block * size, size, Counter(counts[block])))
        ranges.sort(key=lambda r: (-r[2].total(), r[0]))
        rows = tuple(
            (start, length, kinds.total(), kinds.total() / self._faults, kinds.most_common(1)[0][0])
            for start, length, kinds in ranges[:TOP]
        )
        columns = (
            Column("from", "address"),
            Column("size", "bytes"),
            Column("faults"),
            Column("share", "share"),
            Column("mostly", "text"),
        )
        notes = (f"blocks of {size >> 20} MiB; neighbours of about the same density are one range",)
        return Section("hot_ranges", "Ranges that fault most", columns, rows, notes=notes)

    def _why(self) -> Iterator[tuple[int, str, int]]:
        life = self._whole.life
        if life is None or life.repeats is None:
            return
        shift = self._reading.page_shift
        devices = {gpa >> shift for gpa, *_ in self._rows("mmio")} | {
            gpa >> shift for gpa, _ in self._rows("undecoded")
        }
        named = {seen: reason(Seen(seen), self._known) for seen in life.repeats["seen"].unique()}
        again = (
            life.repeats.with_columns(pl.col("seen").replace_strict(named, return_dtype=pl.String).alias("why"))
            .with_columns(
                pl.when(pl.col("frame").is_in(list(devices))).then(pl.lit(DEVICE.name)).otherwise("why").alias("why")
            )
            .group_by("frame", "why")
            .agg(pl.col("n").sum())
            .sort("frame", "why")
        )
        storm = pl.col("why").is_in([INVALIDATION, LIKELY]) & (pl.col("n") >= STORM)
        again = again.with_columns(
            pl.when(storm & (pl.col("why") == INVALIDATION)).then(pl.lit(STORM_NAME)).otherwise("why").alias("why")
        )
        yield from again.select("frame", "why", "n").iter_rows()

    def _why_by_frame(self) -> dict[int, Counter[str]]:
        frames: dict[int, Counter[str]] = defaultdict(Counter)
        for frame, why, n in self._why():
            frames[frame][why] += n
        return frames

    def _repeats(self) -> Section:
        counts, frames = Counter[str](), Counter[str]()
        for _, why, n in self._why():
            counts[why] += n
            frames[why] += 1
        about = {rule.name: rule.about for rule in (*REASONS, DEVICE)}
        about[STORM_NAME] = f"{about[INVALIDATION]}, {STORM} times or more on the frame"
        total = counts.total()
        rows = tuple((why, n, n / total, frames[why], about[why]) for why, n in _most(counts))
        columns = (
            Column("likely reason", "text"),
            Column("faults"),
            Column("share", "share"),
            Column("frames"),
            Column("because", "text"),
        )
        life = self._whole.life
        sampled = life is not None and life.frames.height >= FRAMES.cap
        notes = (f"of a sample of {FRAMES.cap} frames",) * sampled
        return Section("repeats", "Faults on a frame that had faulted before", columns, rows, notes=notes)

    def _mmio(self) -> Section:
        counts: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
        for gpa, size, way, n in self._rows("mmio"):
            counts[gpa, size][min(int(way or 0), 2)] += n
        ranked = sorted(counts.items(), key=lambda c: (-(c[1][1] + c[1][2]), c[0]))
        rows = tuple(
            (gpa, size, reads, writes, unsatisfied) for (gpa, size), (unsatisfied, reads, writes) in ranked[: 2 * TOP]
        )
        columns = (
            Column("address", "address"),
            Column("bytes"),
            Column("reads"),
            Column("writes"),
            Column("reads left to user space"),
        )
        notes = (*self._cut("mmio"), f"{len(counts)} different addresses and sizes")
        return Section("mmio", "Device accesses by address and size", columns, rows, keys=2, notes=notes)

    # -- what KVM did

    def _large(self) -> Section:
        page = 1 << self._reading.page_shift
        rows = Counter[tuple[str, int]]()
        meaning = self._reading.meaning
        early = set(meaning.names(Role.SPLIT))
        names = {
            "split": "split: a table took its place",
            "joined": "formed: took the place of a table",
            "removed": "lost: taken away",
            "protected": "write-protected",
        }
        for event, what, size, n in self._rows("entries"):
            if event in early:
                word = {"split": "split ahead, all at once", "refused": "refused to split"}.get(str(what))
            else:
                word = names.get(str(what)) or (
                    "set for a fault" if event in meaning.names(Role.SET) and what == "all" else None
                )
            if word is not None and (int(size or 0) > page or "set" in word):
                rows[word, size] += n
        columns = (Column("what", "text"), Column("size", "bytes"), Column("entries"))
        ranked = tuple((what, size, n) for (what, size), n in sorted(rows.items(), key=lambda r: (r[0][0], -r[0][1])))
        notes = (
            (
                "one that is split ahead is told by an event of its own, and counted a second time where a table took its place",
            )
            if any("ahead" in r[0] for r in ranked)
            else ()
        )
        return Section("large_pages", "Entries set, and large ones lost", columns, ranked, keys=2, notes=notes)

    def _walks(self) -> Section:
        meaning = self._reading.meaning
        rows: list[tuple[Cell, ...]] = []
        on_walk = sum(n for _, kind, _, n in self._kinds if "on walk" in str(kind))
        if on_walk:
            rows.append(("faults on the guest's own walk", None, on_walk))
        for event, values, n in self._rows("walks"):
            point = meaning.points[str(event)][0]
            detail = (
                " ".join(f"{f} {v}" for f, v in zip(point.told_by, str(values).split(" "), strict=True))
                if point.told_by
                else None
            )
            rows.append((point.role.value if point.role else event, detail, n))
        columns = (Column("what", "text"), Column("of", "text"), Column("times"))
        return Section("walks", "Table walks", columns, tuple(rows), keys=2)

    def _host(self) -> Section:
        meaning = self._reading.meaning
        counts: dict[Cell, list[float]] = defaultdict(lambda: [0, 0, 0])
        for event, order, n, size in self._rows("host"):
            row = counts[event]
            row[0] += n
            row[1] += size
            row[2] = max(row[2], 2 << int(order or 0))
        rows = tuple(
            (meaning.points[str(e)][0].role.value, int(n), int(size) or None, int(largest) if size else None)  # type: ignore[union-attr]  # has a role
            for e, (n, size, largest) in sorted(counts.items(), key=lambda c: (-c[1][0], str(c[0])))
        )
        columns = (
            Column("what", "text"),
            Column("events"),
            Column("in all", "bytes"),
            Column("largest below", "bytes"),
        )
        return Section("host", "What the host did to guest memory", columns, rows)

    def _lost(self) -> Section:
        times = [t for gap in self._source.lost for t in (gap.after, gap.before) if t is not None]
        start = min([*times, *(self._whole.span or ())], default=0)
        rows = tuple(
            (
                str(gap.cpu),
                gap.events,
                gap.after - start if gap.after is not None else None,
                gap.before - start if gap.before is not None else None,
            )
            for gap in self._source.lost[: 5 * TOP]
        )
        columns = (Column("cpu", "text"), Column("events"), Column("after", "time"), Column("before", "time"))
        total = sum(gap.events or 0 for gap in self._source.lost)
        unknown = sum(gap.events is None for gap in self._source.lost)
        notes = (
            f"{total} events in {len(self._source.lost)} gaps" + (f", {unknown} of unknown size" if unknown else ""),
        )
        return Section("lost", "Events that the kernel dropped", columns, rows, keys=3, notes=notes)

    # -- what is missing

    def unsaid(self) -> Iterator[str]:
        there, meaning, source = set(self._source.events), self._reading.meaning, self._source

        def none(*roles: Role) -> str | None:
            names = meaning.names(*roles)
            return None if there.intersection(names) else " or ".join(names)

        if names := none(Role.FAULT):
            yield f"faults: no {names} is recorded"
        if source.unclaimed:
            yield f"{source.unclaimed} faults: what encoding they have is told by the exit before them, which is not recorded; --backend says it"
        for role, what in (
            (Role.EXIT, "times and reasons of exits"), (Role.ENTRY, "times from exit to entry"),
            (Role.MMIO, "device accesses"), (Role.UNMAP, "what the host unmapped"), (Role.USER_EXIT, "returns to user space"),
        ):  # fmt: skip
            if names := none(role):
                yield f"{what}: no {names} is recorded, or none happened"
        if names := none(Role.CHANGE):
            yield f"how entries changed, large pages lost: no {names} is recorded; reasons of repeated faults are then likely ones"
        yield "large pages refused: the size that the host had is not recorded, only the one that was used"
        if self._reading.slots is None and self._faults:
            yield "memslots: trace events do not tell them; --slots gives them"
        if source.meta.ticks:
            yield f"times in ns: the clock{f' {source.meta.clock}' if source.meta.clock else ''} counts ticks, all times are in those"
        if source.lost:
            yield "what happened where events were lost: counts are too low there, and times across a gap may be too long"
        if source.damage:
            yield f"what comes after the damage: {source.damage}"


def _most(counts: Mapping[Cell, int] | Counter[str]) -> list[tuple[Cell, int]]:
    return sorted(counts.items(), key=lambda c: (-c[1], str(c[0])))


def _alike(before: tuple[int, int, Counter[Cell]], counts: Counter[Cell], size: int) -> bool:
    density, here = before[2].total() / (before[1] / size), counts.total()
    return density / 2 <= here <= density * 2


def _by_bucket(steps: Iterable[tuple[int, int, float, int, int]]) -> list[tuple[int, int]]:
    counts = Counter[int]()
    for number, n, *_ in steps:
        counts[number] += n
    return sorted(counts.items())


def _nothing(key: str) -> Section:
    return Section(key, "", (), ())
