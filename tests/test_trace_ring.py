"""Binary recordings: every record of every recording, as trace-cmd reports it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import ReadStats, Recording
from tests.conftest import recording, recordings

LINE = re.compile(r".*-(\d+)\s+\[(\d+)\]\s+(\d+)(?:\.(\d+))?: +([^\s:]+):")


def whole(source: Recording) -> tuple[dict[str, pl.DataFrame], ReadStats]:
    """All frames of a recording joined, by event."""
    stats = ReadStats()
    parts: dict[str, list[pl.DataFrame]] = {}
    for frames in source.frames(stats=stats):
        for name, frame in frames.items():
            parts.setdefault(name, []).append(frame)
    return {name: pl.concat(some) for name, some in parts.items()}, stats


def reported(path: Path) -> Counter[tuple[int, int, int, str]]:
    """What trace-cmd says: time, CPU, pid and event of every record."""
    if shutil.which("trace-cmd") is None:
        pytest.skip("trace-cmd not installed")
    done = subprocess.run(
        ["trace-cmd", "report", "-t", "-R", str(path)], capture_output=True, text=True, errors="replace", check=False
    )
    return Counter(
        (int(m[3] + (m[4] or "")), int(m[2]), int(m[1]), m[5]) for m in map(LINE.match, done.stdout.splitlines()) if m
    )


@pytest.mark.parametrize("path", recordings("*/*/*.dat"))
def test_every_record_is_as_trace_cmd_reports_it(path: Path) -> None:
    frames, stats = whole(open_recording(str(path)))
    ours = Counter(
        (*row, name) for name, frame in frames.items() for row in frame.select("time", "cpu", "pid").iter_rows()
    )
    assert ours == reported(path)
    assert stats.damage is None
    places = pl.concat([frame["place"] for frame in frames.values()]).sort()
    assert places.to_list() == list(range(1, sum(ours.values()) + 1))


@pytest.mark.parametrize("path", recordings("*/*/counts.txt"))
def test_counts(path: Path) -> None:
    binary = path.with_name("trace.dat")
    if not binary.exists():  # raw pages, or perf.data
        return
    _, stats = whole(open_recording(str(binary)))
    counts = path.read_text().split()
    told = {name: int(n) for n, name in zip(counts[::2], counts[1::2], strict=True)}
    if "tracing_mark_write" in told:  # as text shows the event `print`
        told["print"] = told.pop("tracing_mark_write")
    assert stats.events == told


@pytest.mark.parametrize(
    ("one", "other", "formats"),
    [
        ("x86/b2-longmode2-cpl3/trace.dat", "x86/b2-longmode2-cpl3/trace-v6-uncompressed.dat", None),
        ("arm64/a-page_fault_anon_P40_4K/trace.dat", "arm64/a-page_fault_anon_P40_4K/trace-v6.dat", None),
        *(
            (f"x86/{name}/trace.dat", f"x86/{name}/cpu0.raw", f"x86/formats-6.12.117-bochs-{name[:2]}")
            for name in ("e1-longmode2-cpl3", "e1-memslot_mod_stress", "e2-behaviours", "e3-dirty_log_small")
        ),
    ],
)
def test_the_same_run_reads_the_same(one: str, other: str, formats: str | None) -> None:
    a, _ = whole(open_recording(str(recording(one))))
    folder = None if formats is None else str(recording(formats))
    b, _ = whole(open_recording(str(recording(other)), formats=folder))
    assert a.keys() == b.keys()
    for name, frame in a.items():
        assert frame.equals(b[name]), name
