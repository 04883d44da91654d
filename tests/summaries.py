"""Recordings made up for tests of summaries: events as columns, in any cuts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

import polars as pl

from kvmfault.contract.target import backends
from kvmfault.summary.meaning import Meaning
from kvmfault.summary.partial import FACTS, Partial, Reading, Whole
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.recording import Frames

READING: Final = Reading(Meaning.of(backends().values()))
LEAF, TABLE, NONE = 0x5_0000_0867, 0x1_0000_0827, 0x8000_0000_0000_0000
READ_ONLY: Final = LEAF & ~2
_COMMON: Final = {"place": pl.UInt64, "time": pl.Int64, "cpu": pl.UInt16, "pid": pl.Int32}


class Made(NamedTuple):
    """One event."""

    name: str
    pid: int
    fields: dict[str, int]
    after: int = 1000
    """ns since the event before."""


def exit_(pid: int = 1, reason: int = 0x400, after: int = 1000) -> Made:
    """The guest stopped: for a nested page fault, unless told otherwise."""
    return Made("kvm_exit", pid, {"exit_reason": reason, "isa": 2, "vcpu_id": pid}, after)


def misconfigured(pid: int = 1) -> Made:
    """An exit for a misconfigured entry of an EPT, whose address comes with a later event."""
    return Made("kvm_exit", pid, {"exit_reason": 49, "isa": 1, "vcpu_id": pid})


def fault(gfn: int, code: int = 4, pid: int = 1) -> Made:
    """A nested page fault; *code* as EXITINFO1: 1 present, 2 write, 0x10 fetch."""
    return Made("kvm_page_fault", pid, {"fault_address": gfn << 12, "error_code": 1 << 32 | code, "vcpu_id": pid})


def entry(pid: int = 1, after: int = 1000) -> Made:
    """The guest runs."""
    return Made("kvm_entry", pid, {"vcpu_id": pid}, after)


def handled(gfn: int, code: int = 4, pid: int = 1) -> list[Made]:
    """A fault from exit to entry."""
    return [exit_(pid), fault(gfn, code, pid), entry(pid)]


def change(gfn: int, old: int, new: int, level: int = 1) -> Made:
    """An entry changed."""
    return Made("kvm_tdp_mmu_spte_changed", 9, {"gfn": gfn, "old_spte": old, "new_spte": new, "level": level})


def unmap(start: int = 0x7000_0000, size: int = 0x1000) -> Made:
    """The host unmaps."""
    return Made("kvm_unmap_hva_range", 9, {"start": start, "end": start + size})


def age() -> Made:
    """The host ages."""
    return Made("kvm_age_hva", 9, {"start": 0x7000_0000, "end": 0x7000_1000})


def mmio(gpa: int, kind: int, size: int = 4, pid: int = 1) -> Made:
    """A device access: 0 a read left to user space, 1 a read, 2 a write."""
    return Made("kvm_mmio", pid, {"type": kind, "len": size, "gpa": gpa, "val": 0})


def user(pid: int = 1, reason: int = 6, errno: int = 0) -> Made:
    """KVM_RUN returned."""
    return Made("kvm_userspace_exit", pid, {"reason": reason, "errno": errno})


def stretches(events: Sequence[Made], cuts: Iterable[int] = ()) -> list[Frames]:
    """The events as frames, cut before the events of those numbers."""
    edges = [0, *sorted({c for c in cuts if 0 < c < len(events)}), len(events)]
    times = [0]
    for event in events:
        times.append(times[-1] + event.after)
    return [
        {name: _frame([(i, times[i + 1], events[i]) for i in range(a, b) if events[i].name == name]) for name in names}
        for a, b in pairwise(edges)
        for names in [dict.fromkeys(e.name for e in events[a:b])]
    ]


def _frame(rows: Sequence[tuple[int, int, Made]]) -> pl.DataFrame:
    signed = {"errno"}
    columns = {
        "place": [i + 1 for i, _, _ in rows],
        "time": [time for _, time, _ in rows],
        "cpu": [0] * len(rows),
        "pid": [event.pid for _, _, event in rows],
    }
    schema = dict[str, type[pl.DataType]](_COMMON)
    for name in rows[0][2].fields:
        columns[name] = [event.fields[name] for _, _, event in rows]
        schema[name] = pl.Int64 if name in signed else pl.UInt64
    return pl.DataFrame(columns, schema=schema)


def gathered(frames: Iterable[Frames], reading: Reading = READING) -> Partial:
    """What the stretches come to, put together as the library does."""
    whole, faults = Whole(reading), FaultColumns.of(facts=FACTS)
    for stretch in frames:
        whole.add(reading.summarise(stretch, faults.take(stretch)))
    return whole.done()
