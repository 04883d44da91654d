"""The benchmarks run, on sizes that take no time, and say what they measured. How long it took is not looked at."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable

import pytest

from bench.cloop import compiler
from bench.columns import FACTS, column_rows
from bench.faults import GIB, decode_rows, is_write_by_hand, path_rows, scale_rows, slot_rows
from bench.measure import Each, Row, machine, markdown, seconds, seconds_each, table
from bench.spin import spin_rows
from bench.traces import SMALL, trace_rows
from bench.whole import command_rows, proof_rows, recordings, replay_rows
from kvmfault.contract.target import backend
from tests.conftest import ROOT
from tests.spin.checker import missing_tool


@pytest.mark.parametrize(
    ("measure", "works"),
    [
        (lambda: decode_rows(count=64, rounds=1), ["registers by name", "snapshot", "is_write of a fault"]),
        (lambda: path_rows(["arm64:16k@6.12", "x86-npt"], count=64, rounds=1), ["arm64:16k@6.12", "", "x86-npt", ""]),
        (lambda: scale_rows(count=64, rounds=1, many=16, large=2 * GIB), ["path, 16 slots", "path, guest of 2 GiB"]),
        (lambda: slot_rows(lookups=32, rounds=1, many=16), ["at random, 16 slots", "in rising order, 16 slots"]),
        (lambda: proof_rows(["x86-npt"], rounds=1), ["pairs"]),
        (lambda: command_rows(rounds=1), ["kvmfault decode"]),
        (lambda: replay_rows([ROOT / "tests/data/traces/guest_fault.trace.txt"], rounds=1), ["guest_fault.trace.txt"]),
    ],
    ids=["decode", "path", "scale", "slots", "proof", "command", "replay"],
)
def test_each_part_gives_its_rows(measure: Callable[[], list[Row]], works: list[str]) -> None:
    rows = measure()
    assert len(rows) == len(works)
    for row, work in zip(rows, works, strict=True):
        assert work in row.work
        assert math.isfinite(row.value)
        assert row.value > 0


def test_columns_beside_c() -> None:
    if compiler() is None:
        pytest.skip("cc not installed: no C compiler")
    rows = column_rows(rows=1000, rounds=1)
    assert [row.work for row in rows] == [f"{fact} over 1,000 faults" for fact in FACTS]
    assert all(row.budget == "at most 3x" and row.ratio for row in rows)


def test_traces_beside_trace_cmd() -> None:
    if shutil.which("trace-cmd") is None:
        pytest.skip("trace-cmd not installed")
    rows = trace_rows(SMALL, rounds=1, large=1 << 20, calls=100)
    assert len(rows) in (23, 26)  # perf may be missing, or may not record
    assert all(row.value > 0 for row in rows)
    assert sum(row.budget == "at least 15x" for row in rows) == 3


def test_the_explorer_beside_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    if missing_tool() is not None:
        pytest.skip(f"{missing_tool()} not installed")
    rows = spin_rows(((1, 1),))
    assert len(rows) == 6
    assert all(row.value > 0 and row.other for row in rows)
    monkeypatch.setattr("shutil.which", lambda name: None)
    alone = spin_rows(((1, 1),))
    assert [row.work for row in alone] == [row.work for row in rows if not row.work.endswith("spin")]


def test_columns_without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    rows = column_rows(rows=1000, rounds=1)
    assert [row.other for row in rows] == [None] * len(FACTS)
    assert "C compiler: none" in machine()


def test_there_are_recordings_of_both_architectures() -> None:
    names = [path.name for path in recordings()]
    assert {name.split("-")[0] for name in names} >= {"arm64", "x86"}


def test_the_yardstick_is_right() -> None:
    for syndrome in range(1 << 8):
        for ec in (0x20, 0x24):
            code = ec << 26 | syndrome
            assert is_write_by_hand(code) is backend("arm64").decode(ESR_EL2=code).is_write


@pytest.mark.parametrize(
    ("row", "budget", "verdict"),
    [
        (Row("w", 3.0, "us"), "", ""),
        (Row("w", 3.0, "us", limit=7), "at most 7 us", "met"),
        (Row("w", 14.0, "us", limit=7), "at most 7 us", "missed: 2.00 times the budget"),
        (Row("w", 4.0, "ns", "C:", 2.0, limit=3), "at most 3x", "met"),
        (Row("w", 30.0, "M/s", "that:", 2.0, limit=15, least=True), "at least 15x", "met"),
        (Row("w", 15.0, "M/s", "that:", 2.0, limit=15, least=True), "at least 15x", "missed: 0.50 times the budget"),
        (Row("w", 9.0, "ns", "C:", 2.0, limit=3), "at most 3x", "missed: 1.50 times the budget"),
        (Row("w", 99.0, "ms", "bare:", 9.0, limit=90, on_value=True), "at most 90 ms", "missed: 1.10 times the budget"),
    ],
)
def test_verdict(row: Row, budget: str, verdict: str) -> None:
    assert (row.budget, row.verdict) == (budget, verdict)


def test_the_table_is_aligned_and_the_page_has_the_same_rows() -> None:
    rows = [Row("short", 1234.5, "ns", "C:", 2.0, limit=3), Row("a longer one", 0.5, "us")]
    head, _, first, second = table(rows).splitlines()
    assert head.index("measured") == first.index("1,234 ns") == second.index("0.5 us")
    page = [line for line in markdown(rows).splitlines() if line.startswith("|")]
    assert {len(line) for line in page} == {len(page[0])}
    assert [[cell.strip() for cell in line.split("|")][1] for line in page[2:]] == ["short", "a longer one"]


def test_the_page_names_no_place() -> None:
    text = markdown([])
    for place in (str(ROOT), sys.prefix):
        assert place not in text


def test_each_work_begins_anew_in_each_round() -> None:
    seen: list[str] = []

    def begin(name: str) -> Callable[[int], object]:
        seen.append(name)
        return lambda item: seen.append(f"{name}{item}")

    seconds_each(Each([1, 2], lambda: begin("a")), Each([3], lambda: begin("b")), rounds=2)
    assert seen == ["a", "a1", "a2", "b", "b3"] * 2
    assert len(seconds(lambda: seen.append("x"), lambda: None, rounds=3)) == 2
    assert seen[-3:] == ["x"] * 3
