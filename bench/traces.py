"""Recordings: events per second from file to columns and to Parquet, beside trace-cmd and perf on the same file.

Every run is a process of its own on one CPU, begun anew, the tools in turn, and what counts is CPU time. Of ours it is
told twice: from opening the file to the end, and whole, with what Python, numpy, polars and the backends take to load
(the same for a file of any size). The tools' is always whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

import numpy as np

from bench.measure import Row

ROOT = Path(__file__).resolve().parents[1]
LARGE = ROOT.parent / "shared" / "traces" / "big_kvm_4.49M_v7zstd.dat"
SMALL = ROOT / "tests" / "data" / "fuzz" / "v7-none.dat"

_LARGER = 4
"""Times that the recording stands in the larger one: to start takes less of that."""

_COLUMNS = """
import sys
from time import process_time
import polars, kvmfault.trace.{reader}
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.rows import of_interest
begun = process_time()
recording, stats = open_recording(sys.argv[1]), ReadStats()
for frames in recording.frames({wanted}, stats=stats):
    pass
print(stats.events.total(), process_time() - begun)
"""
COLUMNS = _COLUMNS.format(reader="tracedat", wanted="of_interest(recording)")
"""All events of interest as columns, every field of theirs."""
PERF = _COLUMNS.format(reader="perfdata", wanted="None")
PARQUET = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO
from time import process_time
import kvmfault.cli.main, kvmfault.cli.convert, kvmfault.trace.tracedat
from kvmfault.cli.options import Where
from kvmfault.trace.faults import FaultColumns
FaultColumns.of()  # loads the backends
begun = process_time()
with redirect_stdout(StringIO()) as said:
    kvmfault.cli.convert.run(sys.argv[1], sys.argv[2], None, None, None, Where(), json=True)
print(sum(json.loads(said.getvalue())["events"].values()), process_time() - begun)
"""
"""``kvmfault trace convert``, which decodes the faults, too."""


COMPILED = str(Path(gettempdir()) / f"kvmfault-bench-{os.getuid()}")
"""Where Python keeps what it compiled: installed packages are compiled once, not at each start."""


class Run(NamedTuple):
    """What a process used."""

    seconds: float
    mebibytes: float
    out: str


def trace_rows(path: Path | None = None, rounds: int = 3, large: int = 2 << 30, calls: int = 500_000) -> list[Row]:
    """Speed and memory on *path*, and memory on a file of *large* bytes made of it. Nothing without trace-cmd.

    Beside perf script: a perf.data of a program that makes *calls* reads and writes, where perf can record one.
    """
    path = path or (LARGE if LARGE.exists() else SMALL)
    if shutil.which("trace-cmd") is None:
        return []
    with TemporaryDirectory() as name:
        folder = Path(name)
        plain, larger = folder / "plain.dat", folder / "larger.dat"
        repeat(path, plain, 1)
        rows = _rows("zstd", path, folder, rounds) + _rows("plain", plain, folder, rounds, raw=False)
        repeat(path, larger, _LARGER)
        rows += _rows(f"plain, {_LARGER} times", larger, folder, 1, raw=False)
        larger.unlink()
        return rows + _memory(path, folder, large) + _perf(folder, rounds, calls)


def _rows(name: str, path: Path, folder: Path, rounds: int, *, raw: bool = True) -> list[Row]:
    ours = {"to columns": COLUMNS, "to Parquet": PARQUET}
    theirs = [["report"], ["report", "-R"]] if raw else [["report"]]
    runs: dict[str, list[Run]] = {}
    for _ in range(rounds):
        for work, program in ours.items():
            command = [sys.executable, "-c", program, str(path), str(folder / "out.parquet")]
            runs.setdefault(work, []).append(run(command))
        for options in theirs:
            made = run(["trace-cmd", *options, str(path)], quiet=True)
            runs.setdefault(f"trace-cmd {' '.join(options)}:", []).append(made)
    events = int(runs["to columns"][0].out.split()[0])
    what = f"trace.dat ({name}), {events:,} events"
    rows = []
    for beside in [name for name in runs if name not in ours]:
        other = events / 1e6 / median(r.seconds for r in runs[beside])
        for work, least in (("to columns", 15), ("to Parquet", 10)):
            inside = events / 1e6 / median(float(r.out.split()[1]) for r in runs[work])
            whole = events / 1e6 / median(r.seconds for r in runs[work])
            limit = least if beside == "trace-cmd report:" else None
            rows.append(Row(f"{what} {work}", inside, "M events/s", beside, other, limit, least=True))
            rows.append(Row(f"{what} {work}, with Python's start", whole, "M events/s", beside, other))
    rows += [Row(f"{what} {work}: memory", median(r.mebibytes for r in runs[work]), "MiB", limit=500) for work in ours]
    return rows


def _perf(folder: Path, rounds: int, calls: int) -> list[Row]:
    path = folder / "perf.data"
    events = [option for way in ("enter", "exit") for option in ("-e", f"raw_syscalls:sys_{way}")]
    program = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", f"count={calls}"]
    record = ["perf", "record", "-q", "-o", str(path), *events, "--", *program]
    if shutil.which("perf") is None or subprocess.run(record, capture_output=True, check=False).returncode:
        return []
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(run([sys.executable, "-c", PERF, str(path)]))
        theirs.append(run(["perf", "script", "-i", str(path)], quiet=True))
    count = int(ours[0].out.split()[0])
    other = count / 1e6 / median(r.seconds for r in theirs)
    what = f"perf.data, {count:,} samples to columns"
    inside, whole = (
        count / 1e6 / median(some) for some in ([float(r.out.split()[1]) for r in ours], [r.seconds for r in ours])
    )
    return [
        Row(what, inside, "M events/s", "perf script:", other),
        Row(f"{what}, with Python's start", whole, "M events/s", "perf script:", other),
        Row(f"{what}: memory", median(r.mebibytes for r in ours), "MiB", limit=500),
    ]


def _memory(path: Path, folder: Path, size: int) -> list[Row]:
    big = folder / "big.dat"
    once = (folder / "plain.dat").stat().st_size
    repeat(path, big, max(1, size // once))
    used = run([sys.executable, "-c", COLUMNS, str(big)])
    row = Row(f"trace.dat of {big.stat().st_size >> 20:,} MiB to columns: memory", used.mebibytes, "MiB", limit=500)
    big.unlink()
    return [row]


def repeat(path: Path, big: Path, times: int) -> None:
    """An uncompressed trace.dat with the pages of *path* so many *times*, each time later than the one before."""
    from kvmfault.trace.extents import pages
    from kvmfault.trace.tracedat import open_tracedat
    from tests.ringfile import DatFile

    recording = open_tracedat(str(path))
    page = recording.layout.page
    head = DatFile({}, formats=recording.formats.texts(), page=page, clock=recording.meta.clock or "local")
    parts = {s.cpu: [pages(extent, page) for extent in s.extents(1 << 22)] for s in recording.streams}
    begins = np.concatenate([np.frombuffer(part, "<u8")[:: page // 8] for some in parts.values() for part in some])
    later = begins.max() - begins.min() + np.uint64(10**9)
    ranges = {}
    with big.open("wb") as out:
        out.write(head.begin())
        for cpu, some in parts.items():
            out.write(bytes(-out.tell() % page))
            start = out.tell()
            for time in range(times):
                for part in some:
                    words = np.frombuffer(part, "<u8").copy()
                    words[:: page // 8] += np.uint64(time) * later
                    out.write(words.tobytes())
            ranges[cpu] = (start, out.tell() - start)
        end = out.tell()
        out.write(head.end(ranges))
        out.seek(head.first)
        out.write(end.to_bytes(8, "little"))


def run(command: Sequence[str], *, quiet: bool = False) -> Run:
    """Run *command* on one CPU, in one thread; what it used, and what it printed unless *quiet*."""
    environment = {**os.environ, "POLARS_MAX_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": COMPILED}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
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
