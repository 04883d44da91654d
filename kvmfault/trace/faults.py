"""The faults of a recording as columns: registers, kind, and every fact and accessor of their backend.

It is what `kvmfault.trace.assemble` and ``Target.decode`` give row by row, from the same declarations: a frame has
place, time, cpu, pid (the vCPU's task), ``vcpu`` (its number where the event tells it, else the task), ``target`` (the
backend), ``kind`` (tried, by whom, why it stopped), the fault
registers, and a column for each fact. A value that a fault has not, and a fact that its hardware does not tell (a
`Gap`, whose reason is in the support matrix of the docs), is null.

Facts are computed for every row, not for each distinct syndrome: to find those takes several times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Final

import numpy as np
import polars as pl

from kvmfault.algebra.columns import BoolCol, Columns, U64Col, maybe_column, pred_column, word_column
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.contract.access import kind
from kvmfault.contract.accessors import TRUTHS, VALUES, Gap
from kvmfault.contract.target import Target, backend, backends
from kvmfault.contract.tracepoints import LOCATING, Role, Tracepoint
from kvmfault.trace.assemble import AssembleStats
from kvmfault.trace.frames import FIRST
from kvmfault.trace.recording import Frames

__all__ = ["FaultColumns"]

_AT: Final = ["place", "pid"]
_HEAD: Final = (*FIRST, "vcpu")


class FaultColumns:
    """Feeds on the stretches of one recording in their order.

    *targets* decode the faults, by backend. *told* names the backend whose faults they are where no exit tells. With
    *facts*, only these.
    """

    def __init__(
        self, targets: Mapping[str, Target], *, told: str | None = None, facts: Collection[str] | None = None
    ) -> None:
        self.stats: AssembleStats = AssembleStats()
        self._own = [_Own(name, target, facts) for name, target in targets.items()]
        self._told = told
        self._makers = {name for own in self._own for role in (Role.FAULT, Role.EXIT) for name in own.named(role)}
        self.fresh: Callable[[], FaultColumns] = partial(FaultColumns, targets, told=told, facts=facts)
        """Makes another one like this, in any process, that was fed nothing."""
        self.exits: dict[str, pl.DataFrame] = {}
        """By backend, of each task: whether its last exit makes a fault."""
        self.waiting: dict[str, pl.DataFrame] = {}
        """Faults whose address has not come yet."""
        self.since = 0
        """Place from which on all was fed."""
        self.asked: set[int] = set()
        """Tasks whose last exit before ``since`` decided whose fault an event is."""

    @classmethod
    def of(cls, told: str | None = None, *, facts: Collection[str] | None = None) -> FaultColumns:
        """Faults of every backend; *told* is the TARGET of those that no exit tells. Raises UsageError."""
        targets = {name: backend(name) for name in backends()}
        if told is None:
            return cls(targets, facts=facts)
        target = backend(told)
        return cls({**targets, target.backend.name: target}, told=target.backend.name, facts=facts)

    @property
    def wanted(self) -> frozenset[str]:
        """The events that are needed: ask the recording for these."""
        roles = {Role.FAULT, Role.EXIT, Role.ENTRY, *LOCATING}
        return frozenset(n for own in self._own for n, point in own.points.items() if point.role in roles)

    def end(self) -> None:
        """The recording is over: no event will tell the addresses that faults still wait for."""
        self.stats.without_address += sum(map(len, self.waiting.values()))
        self.waiting.clear()

    def take(self, frames: Frames) -> pl.DataFrame | None:
        """The faults that *frames* complete, by place; None: there is none."""
        found = self.by_backend(frames).values()
        return pl.concat(found, how="diagonal").sort("place") if found else None

    def by_backend(self, frames: Frames) -> dict[str, pl.DataFrame]:
        """The same by backend, each with the columns of its own, the same ones every time."""
        if frames.keys().isdisjoint(self._makers) and not self.waiting:
            return {}
        found: list[tuple[str, pl.DataFrame]] = []
        behind = {own.name: self._last_exits(own, frames) for own in self._own}
        for name in dict.fromkeys(n for own in self._own for n in own.named(Role.FAULT) if n in frames):
            found += self._claimed(name, frames[name], behind)
        for own in self._own:
            found += self._alone(own, frames)
        for own in self._own:
            self.exits[own.name] = behind[own.name].group_by("pid").last().select("place", "pid", "holds")
        return {
            name: pl.concat([frame for of, frame in found if of == name]).sort("place")
            for name in dict.fromkeys(of for of, _ in found)
        }

    def _last_exits(self, own: _Own, frames: Frames) -> pl.DataFrame:
        # every exit, and whether one that follows it is a fault of the backend
        when = next((p.when for p in own.points.values() if p.role is Role.FAULT), None)
        parts = [self.exits[own.name]] if own.name in self.exits else []
        for name in own.named(Role.EXIT):
            if (frame := frames.get(name)) is not None:
                holds = np.ones(len(frame), np.bool_) if when is None else _holds(when, frame, own.points[name])
                parts.append(frame.select("place", "pid").with_columns(holds=pl.Series(holds, dtype=pl.Boolean)))
        empty = pl.DataFrame(schema={"place": pl.UInt64, "pid": pl.Int32, "holds": pl.Boolean})
        return pl.concat([empty, *parts]).sort("place")

    def _claimed(
        self, name: str, frame: pl.DataFrame, behind: Mapping[str, pl.DataFrame]
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        free = np.ones(len(frame), np.bool_)
        for own in self._own:
            point = own.points.get(name)
            if point is None or point.registers is None:
                continue
            mine = free.copy()
            if point.when is not None:
                exits = behind[own.name].with_columns(at="place")
                joined = frame.select(_AT).join_asof(exits, on="place", by="pid", check_sortedness=False)
                if self.since:
                    self.asked.update(joined.filter(pl.col("at").fill_null(0) < self.since)["pid"].unique())
                mine &= joined["holds"].fill_null(own.name == self._told).to_numpy()
            mine &= _present(frame, _reads(point), point)
            if mine.any():
                free &= ~mine
                rows = frame.filter(pl.Series(mine))
                self.stats.faults[own.name] += len(rows)
                yield own.name, own.decoded(_head(rows, point), _registers(rows, point))
        left = frame["place"].filter(pl.Series(free))
        if len(left):
            self.stats.unclaimed[name] += len(left)
            self.stats.unclaimed_lines += left.head(max(0, 5 - len(self.stats.unclaimed_lines))).to_list()

    def _alone(self, own: _Own, frames: Frames) -> Iterator[tuple[str, pl.DataFrame]]:
        # exits that are faults by themselves; an address that they lack is in the next event of the task that has one
        parts = [self.waiting.pop(own.name)] if own.name in self.waiting else []
        awaits = ""
        for name in own.named(Role.EXIT):
            point, frame = own.points[name], frames.get(name)
            if point.registers is None or point.when is None:
                continue
            awaits = point.awaits
            if frame is None:
                continue
            mine = _holds(point.when, frame, point) & _present(frame, _reads(point), point)
            rows = frame.filter(pl.Series(mine, dtype=pl.Boolean))
            head, registers = _head(rows, point), _registers(rows, point)
            if awaits:
                parts.append(head.with_columns(pl.Series(k, v) for k, v in registers.items()))
            elif rows.height:
                self.stats.faults[own.name] += rows.height
                yield own.name, own.decoded(head, registers)
        if not parts or not (waiting := pl.concat(parts).sort("place")).height:
            return
        met = waiting.join_asof(
            own.addresses(frames), on="place", by="pid", strategy="forward", allow_exact_matches=False,
            check_sortedness=False,
        )  # fmt: skip
        self.waiting[own.name] = met.filter(pl.col("ends").is_null()).select(waiting.columns)
        self.stats.without_address += met.filter(pl.col("ends")).height
        rows = met.filter(~pl.col("ends"))
        if rows.height:
            self.stats.faults[own.name] += rows.height
            columns = {name: rows[name].to_numpy() for name in waiting.columns[len(_HEAD) :]}
            yield own.name, own.decoded(rows.select(_HEAD), {**columns, awaits: rows["address"].to_numpy()})


class _Own:
    # A backend, and the expressions that its target asks of faults.
    def __init__(self, name: str, target: Target, facts: Collection[str] | None) -> None:
        self.name = name
        self.target = target
        self.points = target.backend.tracepoints
        points = [p for p in self.points.values() if p.registers is not None]
        self.registers = dict.fromkeys(name for p in points for name in (*(p.registers or {}), p.awaits) if name)
        names = [*VALUES, *TRUTHS, "syndrome", *target.accessors]
        self.facts = {name: _fact(target, name) for name in names if facts is None or name in facts}

    def named(self, role: Role) -> list[str]:
        return [name for name, point in self.points.items() if point.role is role]

    def addresses(self, frames: Frames) -> pl.DataFrame:
        """Events that bring an address, or that end the wait for one."""
        parts = [pl.DataFrame(schema={"place": pl.UInt64, "pid": pl.Int32, "address": pl.UInt64, "ends": pl.Boolean})]
        for name, point in self.points.items():
            frame = frames.get(name)
            if frame is None or point.role not in {Role.EXIT, Role.ENTRY, *LOCATING}:
                continue
            if point.role not in LOCATING:
                parts.append(frame.select(*_AT, address=pl.lit(0, pl.UInt64), ends=pl.lit(True)))
            elif (word := point.address) is not None:
                frame = frame.filter(pl.Series(_present(frame, word.reads, point)))
                address = pl.Series(word_column(word, _fields(frame, word.reads, point)), dtype=pl.UInt64)
                parts.append(frame.select(*_AT, address=address, ends=pl.lit(False)))
        return pl.concat(parts).sort("place")

    def decoded(self, first: pl.DataFrame, registers: Mapping[str, U64Col]) -> pl.DataFrame:
        """Faults with these registers."""
        full = self._full(registers, len(first))
        return first.with_columns(
            pl.lit(self.name).alias("target"),
            self._kinds(full),
            *(
                pl.Series(name, registers[name]) if name in registers else pl.lit(None, pl.UInt64).alias(name)
                for name in self.registers
            ),
            *(_column(name, fact, full) for name, fact in self.facts.items()),
        )

    def _full(self, registers: Mapping[str, U64Col], rows: int) -> dict[str, U64Col]:
        source = self.target.backend
        full = {r.name: np.full(rows, source.defaults.get(r.name, 0), np.uint64) for r in source.registers}
        full.update(registers)
        synthetic = source.registers[-1]
        for name, mark in source.given.items():
            if name in registers:
                full[synthetic.name] = full[synthetic.name] | np.uint64(synthetic[mark].mask)
        return full

    def _kinds(self, full: Columns) -> pl.Series:
        # few combinations of truths: one fault of each is asked in words
        truths = [fact for name in TRUTHS if isinstance(fact := _fact(self.target, name), Pred)]
        key = np.zeros(len(next(iter(full.values()))), np.uint64)
        for bit, truth in enumerate(truths):
            key |= pred_column(truth, full).astype(np.uint64) << np.uint64(bit)
        keys = pl.Series("key", key)
        first = keys.to_frame().with_row_index().group_by("key").first()
        rows = ({name: int(column[n]) for name, column in full.items()} for n in first["index"])
        words = [kind(self.target.access(self.target.decode(**row))) for row in rows]
        return keys.replace_strict(first["key"], words, return_dtype=pl.String).alias("kind")


def _fact(target: Target, name: str) -> Pred | Word | Maybe | Gap:
    if name not in VALUES:
        return target.expression(name)
    valid, word = (target.expression(member) for member in VALUES[name])
    if isinstance(valid, Pred) and isinstance(word, Word):
        return Maybe(word, valid)
    return valid


def _column(name: str, fact: Pred | Word | Maybe | Gap, full: Columns) -> pl.Series:
    match fact:
        case Gap():
            dtype = pl.UInt64 if name in VALUES else pl.Boolean
            return pl.Series(name, [None], dtype).new_from_index(0, len(next(iter(full.values()))))
        case Maybe():
            value, valid = maybe_column(fact, full)
            return pl.select(pl.when(pl.Series(valid)).then(pl.Series(value)).alias(name)).to_series()
        case Pred():
            return pl.Series(name, pred_column(fact, full))
        case Word():
            return pl.Series(name, word_column(fact, full))


def _head(rows: pl.DataFrame, point: Tracepoint) -> pl.DataFrame:
    number = [pl.col(point.vcpu)] if point.vcpu in rows.columns else []
    return rows.select(*FIRST, vcpu=pl.coalesce(c.cast(pl.UInt64, strict=False) for c in (*number, pl.col("pid"))))


def _reads(point: Tracepoint) -> set[str]:
    return {name for word in (point.registers or {}).values() for name in word.reads}


def _present(frame: pl.DataFrame, names: Collection[str], point: Tracepoint) -> BoolCol:
    # rows in which no field is missing that expressions read and the declaration gives no value for
    have = np.ones(len(frame), np.bool_)
    for name in names:
        if name not in point.missing:
            have &= frame[name].is_not_null().to_numpy() if name in frame.columns else np.False_
    return have


def _fields(frame: pl.DataFrame, names: Collection[str], point: Tracepoint) -> dict[str, U64Col]:
    # a signed field has the bits that an expression sees of it; what is missing has the value declared for it
    columns = {}
    for name in names:
        given = (
            frame[name] if name in frame.columns else pl.Series(name, [None], pl.UInt64).new_from_index(0, len(frame))
        )
        whole = given.fill_null(point.missing.get(name, 0)).to_numpy()
        columns[name] = whole.view(np.uint64) if whole.dtype == np.int64 else whole.astype(np.uint64, copy=False)
    return columns


def _registers(frame: pl.DataFrame, point: Tracepoint) -> dict[str, U64Col]:
    given = _fields(frame, _reads(point), point)
    rows = len(frame)
    return {
        name: word_column(word, given) if word.reads else np.full(rows, word.const, np.uint64)
        for name, word in (point.registers or {}).items()
    }


def _holds(when: Pred, frame: pl.DataFrame, point: Tracepoint) -> BoolCol:
    return pred_column(when, _fields(frame, when.reads, point)) & _present(frame, when.reads, point)
