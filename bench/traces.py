"""Recordings: events per second from file to columns and to Parquet, beside trace-cmd on the same file.

Every run is a process of its own on one CPU, begun anew, and what counts is the CPU time that it used, start and all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from bench.measure import Row

ROOT = Path(__file__).resolve().parents[1]
LARGE = ROOT.parent / "shared" / "traces" / "big_kvm_4.49M_v7zstd.dat"
SMALL = ROOT / "tests" / "data" / "fuzz" / "v7-none.dat"

COLUMNS = """
import sys
from kvmfault.trace.opening import open_recording
from kvmfault.trace.rows import of_interest
from kvmfault.trace.recording import ReadStats
recording, stats = open_recording(sys.argv[1]), ReadStats()
rows = sum(len(f) for frames in recording.frames(of_interest(recording), stats=stats) for f in frames.values())
print(stats.events.total(), rows)
"""
"""All events of interest as columns, every field of theirs."""


class Run(NamedTuple):
    """What a process used."""

    seconds: float
    mebibytes: float
    out: str


def trace_rows(path: Path | None = None, rounds: int = 3, large: int = 2 << 30) -> list[Row]:
    """Speed and memory on *path*, and memory on a file of *large* bytes made of it. Nothing without trace-cmd."""
    path = path or (LARGE if LARGE.exists() else SMALL)
    if shutil.which("trace-cmd") is None:
        return []
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.dat"
        repeat(path, plain, 0)
        rows = [row for name, file in (("zstd", path), ("plain", plain)) for row in _rows(name, file, folder, rounds)]
        return rows + _memory(path, Path(folder), large)


def _rows(name: str, path: Path, folder: str, rounds: int) -> list[Row]:
    out = str(Path(folder) / "out.parquet")
    convert = "from kvmfault.cli.main import main; main(['trace', 'convert', *__import__('sys').argv[1:]])"
    works = {
        "to columns": [sys.executable, "-c", COLUMNS, str(path)],
        "to Parquet": [sys.executable, "-c", convert, str(path), out],
        "report": ["trace-cmd", "report", str(path)],
        "report -R": ["trace-cmd", "report", "-R", str(path)],
        "start": [sys.executable, "-c", "import kvmfault.trace.opening"],
    }
    runs: dict[str, list[Run]] = {work: [] for work in works}
    for _ in range(rounds):
        for work, command in works.items():
            runs[work].append(run(command, quiet=command[0] == "trace-cmd"))
    events = int(runs["to columns"][0].out.split()[0])
    rate = {work: events / 1e6 / median(r.seconds for r in some) for work, some in runs.items()}
    start = median(r.seconds for r in runs["start"])
    inside = events / 1e6 / max(median(r.seconds for r in runs["to columns"]) - start, 1e-6)
    what = f"trace.dat ({name}), {events:,} events"
    rows = []
    for beside in ("report", "report -R"):
        for work, least in (("to columns", 15), ("to Parquet", 10)):
            limit = least if beside == "report" else None
            rows.append(
                Row(f"{what} {work}", rate[work], "M events/s", f"trace-cmd {beside}:", rate[beside], limit, least=True)
            )
    rows.append(
        Row(f"{what} to columns, once started", inside, "M events/s", "trace-cmd report:", rate["report"], least=True)
    )
    rows += [
        Row(f"{what} {work}: memory", median(r.mebibytes for r in runs[work]), "MiB", limit=500)
        for work in ("to columns", "to Parquet")
    ]
    return rows


def _memory(path: Path, folder: Path, size: int) -> list[Row]:
    big = folder / "big.dat"
    repeat(path, big, size)
    used = run([sys.executable, "-c", COLUMNS, str(big)])
    row = Row(f"trace.dat of {big.stat().st_size >> 20:,} MiB to columns: memory", used.mebibytes, "MiB", limit=500)
    big.unlink()
    return [row]


def repeat(path: Path, big: Path, size: int) -> None:
    """An uncompressed trace.dat with the pages of *path*, once or again and again up to about *size* bytes."""
    from kvmfault.trace.extents import pages
    from kvmfault.trace.tracedat import open_tracedat
    from tests.ringfile import DatFile

    recording = open_tracedat(str(path))
    page = recording.layout.page
    head = DatFile({}, formats=recording.formats.texts(), page=page, clock=recording.meta.clock or "local")
    once = sum(len(pages(extent, page)) for stream in recording.streams for extent in stream.extents(1 << 22))
    ranges = {}
    with big.open("wb") as out:
        out.write(head.begin())
        for stream in recording.streams:
            out.write(bytes(-out.tell() % page))
            start = out.tell()
            for _ in range(max(1, size // max(once, 1))):
                for extent in stream.extents(1 << 22):
                    out.write(pages(extent, page))
            ranges[stream.cpu] = (start, out.tell() - start)
        end = out.tell()
        out.write(head.end(ranges))
        out.seek(head.first)
        out.write(end.to_bytes(8, "little"))


def run(command: Sequence[str], *, quiet: bool = False) -> Run:
    """Run *command* on one CPU, in one thread; what it used, and what it printed unless *quiet*."""
    environment = {**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.DEVNULL if quiet else subprocess.PIPE
    cpu = max(os.sched_getaffinity(0))

    def alone() -> None:
        os.sched_setaffinity(0, {cpu})

    with subprocess.Popen(
        command, stdout=out, stderr=subprocess.DEVNULL, env=environment, preexec_fn=alone, text=True
    ) as process:
        text = process.stdout.read() if process.stdout is not None else ""
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}")
    return Run(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, text)
