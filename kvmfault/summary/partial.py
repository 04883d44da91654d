"""Figures of one stretch of a recording, and how two are put together. Merging is associative, so any cut will do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import polars as pl

from kvmfault.algebra.columns import pred_column, word_column
from kvmfault.contract.tracepoints import Role
from kvmfault.summary import latency, repeats
from kvmfault.summary.latency import Edges
from kvmfault.summary.meaning import Meaning, registers
from kvmfault.summary.repeats import EVER, Changes, Life, Seen
from kvmfault.summary.sums import Rule, combine, scale_for, scale_of

if TYPE_CHECKING:
    from kvmfault.contract.probes import Probe
    from kvmfault.trace.recording import Frames

__all__ = ["ASKED", "BLOCK", "FACTS", "PLACES", "RANGES", "RULES", "TIMES", "Partial", "Reading", "SlotsOf", "Whole"]

TIMES: Final = 256
"""Steps of time in rates and in the map."""
PLACES: Final = 512
"""Different steps of addresses in the map."""
RANGES: Final = 1 << 14
"""Different blocks in the list of busy ranges."""
BLOCK: Final = 21
"""log2 of the bytes of such a block, where there are not too many."""

ASKED: Final = "asked"
"""In the table of entries: faults by the size that was wanted, where that is recorded."""
FACTS: Final = ("kvm_get_fault_gpa", "granule", "is_translation", "is_permission", "is_access_flag", "is_write")
"""What is asked of faults, beside their kind."""

SlotsOf: TypeAlias = "Callable[[pl.DataFrame], pl.Series]"
"""Memslot of each fault: a column of words."""

RULES: Final[Mapping[str, Rule]] = {
    "kinds": Rule(("target", "kind", "granule"), 4096),
    "vcpus": Rule(("pid", "vcpu", "kind"), 1 << 16),
    "slots": Rule(("slot", "kind"), 1 << 16),
    "rate": Rule(("step", "kind"), 1 << 20),
    "map": Rule(("step", "place", "kind"), 1 << 20),
    "ranges": Rule(("block", "kind"), 1 << 20),
    "hot": Rule(("frame",), 1 << 21),
    "mmio": Rule(("gpa", "len", "type"), 1 << 16),
    "undecoded": Rule(("gpa",), 1 << 16),
    "user": Rule(("event", "values"), 4096),
    "walks": Rule(("event", "values"), 4096),
    "host": Rule(("event", "order"), 4096),
    "entries": Rule(("event", "what", "size"), 4096),
    "took": Rule((), 1 << 18),  # keys: the exit's fields too, see `took_rule`
}
"""What each table is. ``step`` and ``place`` are scaled, see `Partial`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """Figures of a part of a recording."""

    span: tuple[int, int] | None = None
    """Times of the first and the last event."""
    events: Mapping[str, int] = field(default_factory=dict)
    """What was looked at, by event name."""
    tables: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    time_scale: int = 0
    """A step of time has 1 << this ns."""
    place_scale: int = 0
    """A step of the map's addresses has 1 << this frames."""
    block_scale: int = 0
    """A block of the list of ranges has 1 << this times `BLOCK`."""
    life: Life | None = None
    edges: Edges | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How stretches are read: the same for all of a recording."""

    meaning: Meaning
    page_shift: int = 12
    slots: SlotsOf | None = None

    def took_rule(self) -> Rule:
        """The table of times from exit to entry."""
        return Rule(("kind", *self.meaning.told_by, "user", "bucket"), 1 << 18)

    def rule(self, name: str) -> Rule:
        """What table *name* is."""
        return self.took_rule() if name == "took" else RULES[name]

    def summarise(self, frames: Frames, faults: pl.DataFrame | None) -> Partial:
        """The figures of one stretch. *faults*: place, time, pid, vcpu, target, kind and `FACTS` as columns."""
        times = [(int(f["time"].min() or 0), int(f["time"].max() or 0)) for f in frames.values()]  # type: ignore[arg-type]  # of an integer column
        if not times:
            return Partial()
        span = min(t[0] for t in times), max(t[1] for t in times)
        time_scale = scale_for(*span, TIMES)
        tables: dict[str, pl.DataFrame | None] = {}
        place_scale = block_scale = 0
        memory: pl.DataFrame | None = None
        if faults is not None and faults.height:
            frame = (pl.col("kvm_get_fault_gpa") // (1 << self.page_shift)).alias("frame")
            memory = faults.drop_nulls("kvm_get_fault_gpa").with_columns(frame)
            counted, place_scale, block_scale = _fault_tables(faults, memory, time_scale, self.page_shift)
            tables.update(counted)
            if self.slots is not None:
                tables["slots"] = _count(memory.select("kind", slot=self.slots(memory)), "slot", "kind")
        pairs, edges = latency.pair(self._steps(frames, faults))
        tables["took"] = _took(pairs)
        tables.update(self._others(frames))
        return Partial(
            span=span,
            events={name: frame.height for name, frame in frames.items()},
            tables={n: t for n, table in tables.items() if (t := combine([table], self.rule(n))) is not None},
            time_scale=time_scale,
            place_scale=place_scale,
            block_scale=block_scale,
            life=self._life(frames, memory),
            edges=edges,
        )

    def merge(self, a: Partial, b: Partial) -> Partial:
        """The figures of both; *a* is the earlier part."""
        if a.span is None or b.span is None:
            return a if b.span is None else b
        span = min(a.span[0], b.span[0]), max(a.span[1], b.span[1])
        time_scale = scale_for(*span, TIMES)
        place_scale, block_scale = (
            _common_scale(a, b, *what)
            for what in (("map", "place", "place_scale", PLACES), ("ranges", "block", "block_scale", RANGES))
        )
        parts = [_rescaled(p, time_scale, place_scale, block_scale) for p in (a, b)]
        assert a.edges is not None
        assert b.edges is not None
        assert a.life is not None
        assert b.life is not None
        pairs, edges = latency.join(a.edges, b.edges)
        names = dict.fromkeys([*a.tables, *b.tables, "took"])
        extra = {"took": _took(pairs)}
        tables = {n: combine([*(p.get(n) for p in parts), extra.get(n)], self.rule(n)) for n in names}
        return Partial(
            span=span,
            events={n: a.events.get(n, 0) + b.events.get(n, 0) for n in dict.fromkeys([*a.events, *b.events])},
            tables={n: t for n, t in tables.items() if t is not None},
            time_scale=time_scale,
            place_scale=place_scale,
            block_scale=block_scale,
            life=repeats.join(a.life, b.life),
            edges=edges,
        )

    def _steps(self, frames: Frames, faults: pl.DataFrame | None) -> pl.DataFrame:
        # Rows for `latency.pair`.
        told = self.meaning.told_by
        schema = {
            "pid": pl.Int32, "place": pl.UInt64, "step": pl.UInt8, "time": pl.Int64, "kind": pl.String,
            **dict.fromkeys(told, pl.Int64),
        }  # fmt: skip
        rows = [pl.DataFrame(schema=schema)]
        sources = [(latency.FAULT, faults)] if faults is not None else []
        for role, step in ((Role.EXIT, latency.EXIT), (Role.USER_EXIT, latency.USER), (Role.ENTRY, latency.ENTRY)):
            sources += [(step, frame) for _, _, frame in self.meaning.frames(frames, role)]
        for step, frame in sources:
            own = {"kind"} if step == latency.FAULT else set(told) if step == latency.EXIT else set()
            rows.append(
                frame.select(
                    pl.col(n).cast(kind, strict=False)
                    if n in {"pid", "place", "time"} or (n in own and n in frame.columns)
                    else pl.lit(step if n == "step" else None, kind).alias(n)
                    for n, kind in schema.items()
                )
            )
        return pl.concat(rows)

    def _life(self, frames: Frames, memory: pl.DataFrame | None) -> Life:
        if memory is None:
            memory = pl.DataFrame(schema={"frame": pl.UInt64, "place": pl.UInt64, "pid": pl.Int32, "was": pl.UInt16})
        else:
            bits = (
                ("is_translation", Seen.MISSING),
                ("is_permission", Seen.PERMISSION),
                ("is_access_flag", Seen.ACCESS_FLAG),
                ("is_write", Seen.WRITE),
            )
            was = pl.sum_horizontal(pl.col(fact).fill_null(False).cast(pl.UInt16) * int(bit) for fact, bit in bits)
            memory = memory.select("frame", "place", "pid", was.cast(pl.UInt16).alias("was"))
        parts: list[Changes] = []
        for _, point, frame in self.meaning.frames(frames, Role.CHANGE):
            if point.change is not None and point.address is not None:
                have = registers(frame, {*_reads(point.change), *point.address.reads})
                size = word_column(point.change.size, have)
                order = np.where(
                    size > 0, np.log2(np.maximum(size, 1).astype(np.float64)).astype(np.int64) - self.page_shift, 63
                )
                parts.append(
                    Changes(
                        np.maximum(order, 0),
                        word_column(point.address, have) >> np.uint64(self.page_shift),
                        frame["place"].to_numpy(),
                        pred_column(point.change.removed, have),
                        pred_column(point.change.protected, have),
                        pred_column(point.change.split, have),
                    )
                )
        changes = Changes(
            np.concatenate([np.empty(0, np.int64), *(p.order for p in parts)]),
            np.concatenate([np.empty(0, np.uint64), *(p.frame for p in parts)]),
            np.concatenate([np.empty(0, np.uint64), *(p.place for p in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(p.removed for p in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(p.protected for p in parts)]),
            np.concatenate([np.empty(0, np.bool_), *(p.split for p in parts)]),
        )
        roles = (Role.UNMAP, Role.AGE, Role.CLEAR)
        assert len(roles) == len(EVER)
        ever = [
            np.sort(
                np.concatenate(
                    [np.empty(0, np.uint64), *(f["place"].to_numpy() for _, _, f in self.meaning.frames(frames, role))]
                )
            )
            for role in roles
        ]
        return repeats.follow(memory, changes, ever)

    def _others(self, frames: Frames) -> dict[str, pl.DataFrame | None]:
        meaning, tables = self.meaning, dict[str, pl.DataFrame | None]()
        for _, _, frame in meaning.frames(frames, Role.MMIO):
            tables["mmio"] = _count(frame, "gpa", "len", "type")
        for _, point, frame in meaning.frames(frames, Role.UNDECODED):
            if (gpa := point.address) is not None:
                places = word_column(gpa, registers(frame, gpa.reads))
                tables["undecoded"] = _count(pl.DataFrame({"gpa": places}), "gpa")
        parts: dict[str, list[pl.DataFrame]] = {role: [] for role in ("user", "walks", "host", "entries")}
        for name, point, frame in meaning.frames(frames, Role.USER_EXIT, Role.WALK, Role.WALK_STEP, Role.WALK_FAILED):
            told = [pl.col(f).cast(pl.String).fill_null("") for f in point.told_by]
            values = pl.concat_str(told, separator=" ") if told else pl.lit("")
            where = "user" if point.role is Role.USER_EXIT else "walks"
            counted = _count(frame.with_columns(values.alias("values")), "values")
            parts[where].append(counted.select(pl.lit(name).alias("event"), "values", "n"))
        for name, _, frame in meaning.frames(frames, Role.UNMAP, Role.AGE, Role.TEST_AGE, Role.REPLACED, Role.CLEAR):
            parts["host"].append(_host(name, frame))
        for name, point, frame in meaning.frames(frames, Role.CHANGE, Role.SET, Role.SPLIT):
            if point.change is not None:
                have = registers(frame, _reads(point.change))
                size = word_column(point.change.size, have)
                for what in ("removed", "protected", "split", "joined", "refused"):
                    parts["entries"].append(_sized(name, what, size[pred_column(getattr(point.change, what), have)]))
                parts["entries"].append(_sized(name, "all", size))
        for name, frame in frames.items():
            if (probe := meaning.sizing(name, frame.columns)) is not None:
                parts["entries"].append(_wanted(name, probe, frame))
        tables.update({n: pl.concat(found) for n, found in parts.items() if found})
        return tables


def _reads(change: object) -> set[str]:
    return {r for name in change.__slots__ for r in getattr(change, name).reads}  # type: ignore[attr-defined]  # a dataclass with slots


def _count(frame: pl.DataFrame, *keys: str) -> pl.DataFrame:
    return frame.group_by(keys).agg(pl.len().cast(pl.UInt64).alias("n"))


def _sized(event: str, what: str, size: repeats.U64) -> pl.DataFrame:
    sizes, counts = np.unique(size, return_counts=True)
    rows = pl.DataFrame({"size": sizes, "n": counts.astype(np.uint64)})
    return rows.select(pl.lit(event).alias("event"), pl.lit(what).alias("what"), "size", "n")


def _wanted(event: str, probe: Probe, frame: pl.DataFrame) -> pl.DataFrame:
    # by the size that was wanted: all, and those that got a smaller one
    counts = Counter[tuple[str, int]]()
    for *fields, n in _count(frame, *probe.sizes).iter_rows():
        with suppress(ValueError):  # there is no such size
            told = probe.read(dict(zip(probe.sizes, fields, strict=True))) or {}
            wanted, size = (told[name] for name in ("wanted", "size"))
            assert isinstance(wanted, int)
            assert isinstance(size, int)
            counts[ASKED, wanted] += n
            counts["refused", wanted] += n * (size < wanted)
    rows = [(event, what, size, n) for (what, size), n in counts.items() if n]
    schema = {"event": pl.String, "what": pl.String, "size": pl.UInt64, "n": pl.UInt64}
    return pl.DataFrame(rows, schema, orient="row")


def _host(event: str, frame: pl.DataFrame) -> pl.DataFrame:
    size = (
        (frame["end"] - frame["start"]).to_numpy()
        if {"start", "end"} <= set(frame.columns)
        else np.zeros(frame.height, np.uint64)
    )
    size = np.where(size < (1 << 63), size, np.uint64(0))
    order = np.frexp(np.maximum(size, 1).astype(np.float64))[1] - 1
    rows = pl.DataFrame({"order": order.astype(np.uint8), "bytes": size})
    counted = rows.group_by("order").agg(pl.len().cast(pl.UInt64).alias("n"), pl.col("bytes").cast(pl.Float64).sum())
    return counted.select(pl.lit(event).alias("event"), "order", "n", "bytes")


def _took(pairs: pl.DataFrame) -> pl.DataFrame:
    took = pairs["took"].to_numpy()
    keys = [name for name in pairs.columns if name != "took"]
    return (
        pairs.with_columns(pl.Series("bucket", latency.bucket(took), pl.UInt16))
        .group_by([*keys, "bucket"])
        .agg(
            pl.len().cast(pl.UInt64).alias("n"), pl.col("took").cast(pl.Float64).sum().alias("ns"),
            pl.col("took").min().alias("min_took"), pl.col("took").max().alias("max_took"),
        )
    )  # fmt: skip


def _fault_tables(
    faults: pl.DataFrame, memory: pl.DataFrame, time_scale: int, page_shift: int
) -> tuple[dict[str, pl.DataFrame | None], int, int]:
    step = (pl.col("time") // (1 << time_scale)).alias("step")
    frame = memory["frame"].to_numpy()
    place_scale = scale_of(frame, PLACES)
    block_scale = scale_of(frame >> np.uint64(max(BLOCK - page_shift, 0)), RANGES)
    stepped = memory.select(
        step, "kind", "frame", place=pl.col("frame") // (1 << place_scale),
        block=pl.col("frame") // (1 << (max(BLOCK - page_shift, 0) + block_scale)),
    )  # fmt: skip
    tables: dict[str, pl.DataFrame | None] = {
        "kinds": _count(faults, "target", "kind", "granule"),
        "vcpus": _count(faults, "pid", "vcpu", "kind"),
        "rate": _count(faults.select(step, "kind"), "step", "kind"),
        "map": _count(stepped, "step", "place", "kind"),
        "ranges": _count(stepped, "block", "kind"),
        "hot": _count(memory, "frame"),
    }
    return tables, place_scale, block_scale


def _common_scale(a: Partial, b: Partial, table: str, column: str, scale: str, cap: int) -> int:
    least = max(getattr(a, scale), getattr(b, scale))
    values = [
        p.tables[table][column].to_numpy() >> np.uint64(least - getattr(p, scale)) for p in (a, b) if table in p.tables
    ]
    return int(least + (scale_of(np.concatenate(values), cap) if values else 0))


def _rescaled(p: Partial, time_scale: int, place_scale: int, block_scale: int) -> dict[str, pl.DataFrame]:
    tables = dict(p.tables)
    step = pl.col("step") // (1 << (time_scale - p.time_scale))
    if "rate" in tables:
        tables["rate"] = tables["rate"].with_columns(step)
    if "map" in tables:
        tables["map"] = tables["map"].with_columns(step, pl.col("place") // (1 << (place_scale - p.place_scale)))
    if "ranges" in tables:
        tables["ranges"] = tables["ranges"].with_columns(pl.col("block") // (1 << (block_scale - p.block_scale)))
    return tables


class Whole:
    """Puts parts together as they come, neighbours of like size first: the work grows with n log n, not n squared."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._parts: list[tuple[int, Partial]] = []

    def add(self, part: Partial) -> None:
        """The next part in time."""
        count = 1
        while self._parts and self._parts[-1][0] <= count:
            earlier = self._parts.pop()
            count, part = earlier[0] + count, self._reading.merge(earlier[1], part)
        self._parts.append((count, part))

    def done(self) -> Partial:
        """All parts together."""
        whole = Partial()
        while self._parts:
            whole = self._reading.merge(self._parts.pop()[1], whole)
        return whole
