"""The faults of a stretch as columns: whose they are, their kind, and the facts that a summary asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvmfault.algebra.columns import U64Col, pred_column, word_column
from kvmfault.contract.access import kind
from kvmfault.contract.accessors import VALUES, stand_in
from kvmfault.contract.backend import Backend
from kvmfault.contract.target import Target, backend
from kvmfault.contract.tracepoints import Role, Tracepoint
from kvmfault.summary.meaning import registers
from kvmfault.trace.recording import Frames

_TRUTHS: Final = (
    "is_read", "is_write", "is_exec", "is_table_walk", "is_translation", "is_permission",
    "is_access_flag", "is_reserved", "is_address_size", "is_external_abort",
)  # fmt: skip
_VALUES: Final = {name: VALUES[name] for name in ("kvm_get_fault_gpa", "granule")}
_COMMON: Final = ("place", "time", "cpu", "pid")


class Faults:
    """Feeds on stretches in their order: the exit that tells a fault's encoding may be in the stretch before."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self.unclaimed = 0
        self._backends = {name: (b, backend(name)) for name, b in backends.items()}
        self._exits: dict[str, pl.DataFrame] = {}
        """The last exit of each task, by event name."""

    def of(self, frames: Frames) -> pl.DataFrame | None:
        """place, time, cpu, pid, vcpu, target, kind and facts, by place; None: there is none."""
        found = [*self._faults(frames), *self._exits_alone(frames)]
        for name in self._names(Role.EXIT):
            if name in frames:
                parts = [f for f in (self._exits.get(name), frames[name]) if f is not None]
                last = pl.concat(parts, how="diagonal_relaxed").group_by("pid", maintain_order=True).last()
                self._exits[name] = last.select(frames[name].columns).sort("place")
        return pl.concat(found).sort("place") if found else None

    def _names(self, role: Role) -> list[str]:
        names = (n for b, _ in self._backends.values() for n, point in b.tracepoints.items() if point.role is role)
        return list(dict.fromkeys(names))

    def _faults(self, frames: Frames) -> Iterator[pl.DataFrame]:
        for name in self._names(Role.FAULT):
            if (frame := frames.get(name)) is None:
                continue
            claimed = np.zeros(frame.height, np.bool_)
            for own, target in self._backends.values():
                point = own.tracepoints.get(name)
                if point is None or point.role is not Role.FAULT:
                    continue
                mine = ~claimed & self._after(frame, own, point, frames)
                if mine.any():
                    claimed |= mine
                    yield _decoded(frame.filter(pl.Series(mine)), own, target, point, {})
            self.unclaimed += int((~claimed).sum())

    def _after(self, frame: pl.DataFrame, own: Backend, point: Tracepoint, frames: Frames) -> NDArray[np.bool_]:
        # Which faults come behind an exit that the backend declares; without any recorded exit none does.
        if point.when is None:
            return np.ones(frame.height, np.bool_)
        name, exit_ = next((n, p) for n, p in own.tracepoints.items() if p.role is Role.EXIT)
        parts = [f for f in (self._exits.get(name), frames.get(name)) if f is not None]
        if not parts:
            return np.zeros(frame.height, np.bool_)
        exits = pl.concat(parts, how="diagonal_relaxed").sort("place")
        holds = pl.Series("holds", pred_column(point.when, _given(exits, point.when.reads, exit_)))
        told = exits.select("place", "pid", holds)
        joined = frame.select("place", "pid").join_asof(told, on="place", by="pid", check_sortedness=False)
        return joined["holds"].fill_null(False).to_numpy()

    def _exits_alone(self, frames: Frames) -> Iterator[pl.DataFrame]:
        # An exit that is a fault by itself; its address is in the next event of the task that has one.
        for own, target in self._backends.values():
            for name, point in own.tracepoints.items():
                if point.role is not Role.EXIT or point.registers is None or point.when is None or name not in frames:
                    continue
                frame = frames[name]
                holds = pl.Series(pred_column(point.when, _given(frame, point.when.reads, point)))
                alone = _with_address(frame.filter(holds), frames, own)
                if alone.height:
                    yield _decoded(alone, own, target, point, {point.awaits: alone["address"].to_numpy()})


def _with_address(exits: pl.DataFrame, frames: Frames, own: Backend) -> pl.DataFrame:
    shift = next(iter(own.formats.values())).page_shift
    sources: list[pl.DataFrame] = []
    ends: list[pl.DataFrame] = []
    for name, point in own.tracepoints.items():
        frame = frames.get(name)
        if frame is None:
            continue
        if point.role in {Role.ADDRESS, Role.MMIO}:
            address = pl.col("gpa") if "gpa" in frame.columns else pl.col("gfn") * (1 << shift)
            sources.append(frame.select("place", "pid", address.alias("address"), at="place"))
        elif point.role in {Role.EXIT, Role.ENTRY}:
            ends.append(frame.select("place", "pid", end="place"))
    if not sources or not exits.height:
        return exits.clear().with_columns(pl.lit(None, pl.UInt64).alias("address"))
    for others in (sources, ends):
        later = pl.concat(others).sort("place")
        exits = exits.join_asof(
            later, on="place", by="pid", strategy="forward", allow_exact_matches=False, check_sortedness=False
        )
    in_time = pl.col("at").is_not_null() & (pl.col("end").is_null() | (pl.col("at") < pl.col("end")))
    return exits.filter(in_time).drop("at", "end")


def _given(frame: pl.DataFrame, reads: Mapping[str, int], point: Tracepoint) -> dict[str, U64Col]:
    # Fields as registers; one that the recording leaves out has the value that the declaration gives it.
    lacking = [pl.lit(None, pl.UInt64).alias(name) for name in reads if name not in frame.columns]
    whole = frame.with_columns(lacking).with_columns(
        pl.col(name).fill_null(value) for name, value in point.missing.items() if name in reads
    )
    return registers(whole, reads)


def _decoded(
    frame: pl.DataFrame, own: Backend, target: Target, point: Tracepoint, more: Mapping[str, U64Col]
) -> pl.DataFrame:
    words = point.registers or {}
    have = _given(frame, {r: m for word in words.values() for r, m in word.reads.items()}, point)
    captured = {
        name: word_column(word, have) if word.reads else _all(word.const, frame) for name, word in words.items()
    }
    captured.update(more)
    full = {r.name: _all(own.defaults.get(r.name, 0), frame) for r in own.registers} | captured
    synthetic = own.registers[-1]
    for name, flag in own.given.items():
        if name in captured:
            full[synthetic.name] = full[synthetic.name] | np.uint64(synthetic[flag].mask)
    d = target.definition
    facts = {name: pl.Series(pred_column(stand_in(getattr(d, name)), full)) for name in _TRUTHS}
    for name, (valid, value) in _VALUES.items():
        there, values = pred_column(stand_in(getattr(d, valid)), full), word_column(getattr(d, value), full)
        facts[name] = pl.Series(values).set(pl.Series(~there), None)
    vcpu = "vcpu_id" if "vcpu_id" in frame.columns else "pid"
    return frame.select(
        *_COMMON,
        pl.col(vcpu).cast(pl.String).alias("vcpu"),
        pl.lit(target.name.partition(":")[0]).alias("target"),
        _kinds(full, captured, target).alias("kind"),
    ).with_columns(**facts)


def _kinds(full: Mapping[str, U64Col], captured: Mapping[str, U64Col], target: Target) -> pl.Series:
    # by the bits that decide it: few of them differ
    d = target.definition
    code = np.zeros(len(next(iter(full.values()))), np.uint64)
    for bit, name in enumerate(_TRUTHS):
        code |= pred_column(stand_in(getattr(d, name)), full).astype(np.uint64) << np.uint64(bit)
    codes, first = np.unique(code, return_index=True)
    names = {}
    width = {r.name: (1 << r.width) - 1 for r in target.backend.registers}
    for number, at in zip(codes, first, strict=True):
        fault = target.decode(**{name: int(column[at]) & width[name] for name, column in captured.items()})
        names[int(number)] = kind(target.access(fault))
    return pl.Series(code).replace_strict(names, return_dtype=pl.String)


def _all(value: int, frame: pl.DataFrame) -> U64Col:
    return np.full(frame.height, value, np.uint64)
