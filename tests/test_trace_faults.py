"""Faults as columns: the same as the rows give, over every recording, whatever the stretches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from kvmfault.contract.access import kind
from kvmfault.contract.accessors import TRUTHS, VALUES, Gap
from kvmfault.contract.target import Target, backend, backends
from kvmfault.contract.tracepoints import Fields
from kvmfault.errors import TraceError
from kvmfault.trace import textframes
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.events import FaultEvent
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import Frames, RecordedEvent, Recording
from kvmfault.trace.rows import events
from tests.conftest import recordings

TARGETS = {name: backend(name) for name in backends()}
Row = tuple[object, ...]


def by_rows(recording: Recording, told: str | None) -> tuple[list[Row], Assembler]:
    assembler = Assembler(backends().values(), told=told)
    rows: list[Row] = []
    for event in events(recording, assembler.patterns.keys()):
        for made in assembler.feed(event):
            if isinstance(made, FaultEvent):
                target = TARGETS[made.target]
                access = target.access(target.decode(**made.registers))
                rows.append((made.line, made.time, made.vcpu, made.target, kind(access), dict(made.registers)))
    assembler.end()
    return sorted(rows, key=lambda row: row[0] if isinstance(row[0], int) else 0), assembler


def by_columns(recording: Recording, told: str | None) -> tuple[pl.DataFrame | None, FaultColumns]:
    columns = FaultColumns(TARGETS, told=told)
    found = [frame for frames in recording.frames(columns.wanted) if (frame := columns.take(frames)) is not None]
    columns.end()
    return (pl.concat(found, how="diagonal").sort("place") if found else None), columns


def same(recording: Recording, told: str | None = None) -> int:
    rows, assembler = by_rows(recording, told)
    frame, columns = by_columns(recording, told)
    assert columns.stats.faults == assembler.stats.faults
    assert columns.stats.unclaimed == assembler.stats.unclaimed
    assert columns.stats.unclaimed_lines == assembler.stats.unclaimed_lines
    assert columns.stats.without_address == assembler.stats.without_address
    assert (0 if frame is None else len(frame)) == len(rows)
    if frame is None:
        return 0
    registers = [r.name for r in (r for t in TARGETS.values() for r in t.backend.registers) if r.name in frame.columns]
    for given, want in zip(frame.iter_rows(named=True), rows, strict=True):
        found = {name: given[name] for name in dict.fromkeys(registers) if given[name] is not None}
        assert (given["place"], given["time"], str(given["pid"]), given["target"], given["kind"], found) == want
    check_facts(frame)
    return len(rows)


def check_facts(frame: pl.DataFrame) -> None:
    # one fault of each combination of registers, as the target decodes it
    for name, target in TARGETS.items():
        own = frame.filter(pl.col("target") == name)
        have = [r.name for r in target.backend.registers if r.name in frame.columns and own[r.name].is_not_null().any()]
        for row in own.unique(have or None).head(300).iter_rows(named=True):
            fault = target.decode(**{r: row[r] for r in have if row[r] is not None})
            named = target.named(fault)
            assert row["syndrome"] == fault.syndrome
            told = {n: not isinstance(target.expression(n), Gap) for n in TRUTHS}
            assert {n: row[n] for n in TRUTHS} == {n: getattr(fault, n) if told[n] else None for n in TRUTHS}
            values = {
                "kvm_get_fault_gpa": fault.kvm_get_fault_gpa(),
                **{n: getattr(fault, n) for n in VALUES if n[0] != "k"},
            }
            known = {n: v if not isinstance(target.expression(VALUES[n][0]), Gap) else None for n, v in values.items()}
            assert {n: row[n] for n in VALUES} == known
            accessors = {n: a.on(named) for n, a in target.accessors.items()}
            assert {n: row[n] for n in accessors} == accessors


@pytest.mark.parametrize("path", recordings("*/*/trace.dat"))
def test_columns_are_what_rows_give(path: Path) -> None:
    assert same(open_recording(str(path))) > 0


@pytest.mark.parametrize(
    "path", [*recordings("x86/e3-behaviours/[tr]*.txt.gz"), *recordings("arm64/a-kvm*/report.txt.gz")]
)
@pytest.mark.parametrize("at_once", [997])
def test_whatever_the_stretches(path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textframes, "AT_ONCE", at_once)
    try:
        recording = open_recording(str(path))
        next(recording.frames())
    except TraceError:
        pytest.skip("no recording")
    same(recording)


class Made:
    """A recording of one event at a time."""

    path = "made"

    def __init__(self, *rows: tuple[str, int, Fields]) -> None:
        self.rows = [RecordedEvent(n, n, 0, pid, name, fields) for n, (name, pid, fields) in enumerate(rows, 1)]

    @property
    def meta(self) -> object:
        return None

    def frames(self, wanted: object = None, *, stats: object = None) -> Iterator[Frames]:
        for row in self.rows:
            types = {"place": pl.UInt64, "time": pl.Int64, "cpu": pl.UInt16, "pid": pl.Int32}
            first = pl.DataFrame([(row.place, row.time, row.cpu, row.pid)], schema=types, orient="row")
            fields = [pl.Series(k, [v], pl.UInt64) for k, v in row.fields.items()]
            yield {row.name: first.with_columns(fields)}


FAULT = ("kvm_page_fault", 1, {"fault_address": 0x5000, "error_code": 0x182})
VIOLATION = ("kvm_exit", 1, {"exit_reason": 48, "isa": 1})
MISCONFIG = ("kvm_exit", 1, {"exit_reason": 49, "isa": 1})
NMI = ("kvm_exit", 1, {"exit_reason": 0, "isa": 1})  # trace-cmd's plugin: without intr_info
ENTRY = ("kvm_entry", 1, {"rip": 0})


@pytest.mark.parametrize(
    ("rows", "told", "targets", "unclaimed", "without_address"),
    [
        ([VIOLATION, FAULT], None, ["x86-ept"], 0, 0),
        ([VIOLATION, FAULT, FAULT], None, ["x86-ept"] * 2, 0, 0),
        ([NMI, FAULT], None, ["x86-shadow"], 0, 0),
        ([FAULT], None, [], 1, 0),
        ([FAULT], "x86-npt", ["x86-npt"], 0, 0),
        ([VIOLATION, FAULT], "x86-npt", ["x86-ept"], 0, 0),
        ([VIOLATION, ("kvm_page_fault", 2, FAULT[2])], None, [], 1, 0),
        ([MISCONFIG, ("vcpu_match_mmio", 1, {"gpa": 0x9000})], None, ["x86-ept"], 0, 0),
        ([MISCONFIG, ("kvm_mmu_spte_requested", 1, {"gfn": 9})], None, ["x86-ept"], 0, 0),
        ([MISCONFIG, ("kvm_mmio", 2, {"gpa": 0x9000}), ENTRY], None, [], 0, 1),
        ([MISCONFIG, ENTRY, ("kvm_mmio", 1, {"gpa": 0x9000})], None, [], 0, 1),
        ([MISCONFIG, MISCONFIG, ("kvm_mmio", 1, {"gpa": 0x9000})], None, ["x86-ept"], 0, 1),
        ([MISCONFIG], None, [], 0, 1),  # the file ends before its address
        ([VIOLATION, ("kvm_page_fault", 1, {"fault_address": 1})], None, [], 1, 0),  # a field is missing
    ],
)
def test_state_is_carried_from_stretch_to_stretch(
    rows: list[tuple[str, int, Fields]], told: str | None, targets: list[str], unclaimed: int, without_address: int
) -> None:
    recording = Made(*rows)
    frame, columns = by_columns(recording, told)  # type: ignore[arg-type]  # it has no meta
    assert ([] if frame is None else frame["target"].to_list()) == targets
    assert columns.stats.unclaimed.total() == unclaimed
    assert columns.stats.without_address == without_address
    same(recording, told)  # type: ignore[arg-type]  # it has no meta


def test_a_fact_that_the_hardware_does_not_tell_is_null() -> None:
    frame, _ = by_columns(Made(VIOLATION, FAULT), None)  # type: ignore[arg-type]  # it has no meta
    assert frame is not None
    target: Target = TARGETS["x86-ept"]
    gaps = [name for name in TRUTHS if isinstance(target.expression(name), Gap)]
    assert gaps
    assert all(frame[name].null_count() == 1 for name in gaps)
