"""trace.dat as it is written, read back by our reader and by trace-cmd."""

from __future__ import annotations

import os
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Final

import pytest

from kvmfault.trace import datwriter
from kvmfault.trace.datwriter import PLAIN, ZLIB, Compression, Spool, write, zstd
from kvmfault.trace.opening import open_recording
from tests.ringpages import Event, described, pages

EVENT: Final = Event("kvm", "made_up", 901, ("number", "other"))
OTHER: Final = Event("kvmmmu", "made_up_too", 902, ("number",))
KINDS: Final = [kind for kind in (PLAIN, ZLIB, zstd()) if kind is not None]
COMMS: Final = {7: "a name with spaces", 8: "b"}


def written(path: Path, compression: Compression, per_cpu: dict[int, int], page_size: int = 4096) -> None:
    spools = {}
    for cpu, count in per_cpu.items():
        spools[cpu] = Spool(BytesIO(), compression, page_size)
        if count:
            records = [EVENT(7 + cpu % 2, number=n, other=cpu) for n in range(count)] + [OTHER(8, number=cpu)]
            whole = pages(records, start=1000 + cpu, size=page_size)
            for at in range(0, len(whole), page_size):
                spools[cpu].add(whole[at : at + page_size])
    with path.open("wb") as out:
        write(out, described([EVENT, OTHER], comms=COMMS, page_size=page_size), spools, compression)


@pytest.mark.parametrize("compression", KINDS, ids=lambda c: c.name)
@pytest.mark.parametrize("page_size", [4096, 65536])
@pytest.mark.parametrize("per_cpu", [{0: 5}, {0: 0, 1: 30_000, 3: 1}, {0: 0}, {}], ids=str)
def test_written_and_read(tmp_path: Path, compression: Compression, page_size: int, per_cpu: dict[int, int]) -> None:
    path = tmp_path / "a.dat"
    written(path, compression, per_cpu, page_size)
    read = open_recording(str(path))
    meta = read.meta
    assert meta.kind.startswith("trace.dat version 7")
    assert (meta.clock, meta.release, meta.machine, dict(meta.comms)) == ("mono", "6.18.0", "x86_64", COMMS)
    found = {
        (cpu, number, other, pid)
        for frames in read.frames()
        if "made_up" in frames
        for cpu, number, other, pid in frames["made_up"].select("cpu", "number", "other", "pid").iter_rows()
    }
    assert found == {(cpu, n, cpu, 7 + cpu % 2) for cpu, count in per_cpu.items() for n in range(count)}
    # trace-cmd 3.1 knows no pages larger than the host's, and may have been built without zlib
    usual = compression.name != "zlib" and page_size == os.sysconf("SC_PAGESIZE")
    if (tool := shutil.which("trace-cmd")) and usual and any(per_cpu.values()):
        done = subprocess.run([tool, "report", "-i", str(path)], capture_output=True, text=True, check=True)
        assert done.stdout.count(" made_up: ") == sum(per_cpu.values())
        assert done.stdout.count(" made_up_too: ") == sum(1 for count in per_cpu.values() if count)


def test_without_zstandard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datwriter, "find_spec", lambda name: None)
    assert datwriter.zstd() is None
