"""perf.data: every container, every layout of samples, rounds, losses; and what is damaged."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.errors import TraceError
from kvmfault.trace import perforder, perfstream
from kvmfault.trace.convert import convert
from kvmfault.trace.opening import open_recording
from kvmfault.trace.perfdata import PerfRecording
from kvmfault.trace.recording import Lost, ReadStats
from tests import perffile
from tests.perffile import CHAIN_TYPE, RAW_TYPE, READ_TYPE, ROUND, Event, attr, in_file, in_pipe, packed, sample

# two CPUs, each in order; a round brings one and then the other
ROUNDS = [[Event(100 * r + 10 * cpu + n, cpu, 40 + cpu, r) for cpu in (1, 0) for n in range(5)] for r in range(8)]
EVENTS = sorted((e for r in ROUNDS for e in r), key=lambda e: e.time)


def records(sample_type: int = RAW_TYPE, chain: Sequence[int] = (), read: bytes = b"") -> bytes:
    return b"".join(b"".join(sample(e, sample_type, chain, read) for e in r) + ROUND for r in ROUNDS)


def read(path: Path, data: bytes) -> tuple[list[tuple[int, int, int, int]], ReadStats, PerfRecording]:
    path.write_bytes(data)
    recording = open_recording(str(path))
    assert isinstance(recording, PerfRecording)
    stats = ReadStats()
    rows, place = [], 0
    for frames in recording.frames(stats=stats):
        frame = frames["kvm_entry"]
        assert frame.schema["rip"] == pl.UInt64
        assert frame["place"].to_list() == list(range(place + 1, place + 1 + len(frame)))
        place += len(frame)
        rows += frame.select("time", "cpu", "pid", "rip").rows()
    return rows, stats, recording


HALF = len(records()) // 2
CHAIN = (1, 2, 3)
VALUE = struct.pack("<QQ", 5, 11)
GROUP = struct.pack("<QQQQQQ", 2, 9, 5, 11, 6, 12)
TWO = [(attr(RAW_TYPE), (11,)), (attr(CHAIN_TYPE), (12,))]


@pytest.mark.parametrize("at_once", [64, 1 << 17])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(in_file(records()), id="file"),
        pytest.param(in_pipe(records()), id="pipe"),
        pytest.param(in_file(packed(records())), id="compressed"),
        pytest.param(in_file(packed(records(), each=37)), id="compressed and cut inside records"),
        pytest.param(in_pipe(packed(records(), kind=83)), id="compressed, padded"),
        pytest.param(in_file(records()[:HALF] + packed(records()[HALF:])), id="compressed, but for the first half"),
        pytest.param(in_file(records(CHAIN_TYPE, CHAIN), [(attr(CHAIN_TYPE), (11,))]), id="call chains"),
        pytest.param(in_file(records(CHAIN_TYPE), [(attr(CHAIN_TYPE), (11,))]), id="empty call chains"),
        pytest.param(in_file(records(READ_TYPE, (), VALUE), [(attr(READ_TYPE, read_format=4), (11,))]), id="values"),
        pytest.param(in_file(records(READ_TYPE, (), GROUP), [(attr(READ_TYPE, read_format=13), (11,))]), id="groups"),
        pytest.param(in_file(records(), TWO), id="two events"),
    ],
)
def test_samples_come_in_order_of_time(
    data: bytes, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perforder, "AT_ONCE", at_once // 16)
    monkeypatch.setattr(perfstream, "AT_ONCE", 1 << 12)
    rows, stats, recording = read(tmp_path / "perf.data", data)
    assert rows == [(e.time, e.cpu, e.pid, e.rip) for e in EVENTS]
    assert stats.events == {"kvm_entry": len(EVENTS)}
    assert not stats.misfits
    assert stats.damage is None
    assert recording.meta.machine == "x86_64"


def test_events_with_samples_of_their_own(tmp_path: Path) -> None:
    # a tracepoint with call chains, one without, and an event that is no tracepoint
    attrs = [*TWO, (attr(0x10107, 1, 0), (13,))]
    other = perffile.record(9, struct.pack("<QQIIQQ", 13, 1, 4, 4, 105, 1))
    data = b"".join(
        [
            sample(Event(100, 0, 5, 1)),
            sample(Event(101, 0, 5, 2, id=12), CHAIN_TYPE, CHAIN),
            other,
            sample(Event(102, 0, 5, 3)),
            sample(Event(103, 0, 5, 4, id=99)),
        ]
    )
    rows, stats, _ = read(tmp_path / "perf.data", in_file(data, attrs))
    assert [row[3] for row in rows] == [1, 2, 3]
    assert stats.events == {"kvm_entry": 3, "samples that are no tracepoints": 1}
    assert stats.misfits == {"sample": 1}  # an event that the file does not have


def test_losses_and_names(tmp_path: Path) -> None:
    first, second, late = Event(100, 0, 5, 1), Event(300, 0, 5, 2), Event(50, 1, 6, 3)
    data = sample(late) + sample(first) + perffile.lost(first, 17) + sample(second) + perffile.comm(5, "vcpu 0")
    data += perffile.lost(late, 4) + perffile.record(13, struct.pack("<Q", 9))
    _, stats, recording = read(tmp_path / "perf.data", in_file(data))
    assert stats.lost == {0: 17, 1: 4}
    assert stats.overwritten == 9  # without a CPU
    assert stats.gaps == [Lost(0, 17, 100, 300), Lost(1, 4, 50, None)]
    assert recording.meta.comms == {5: "vcpu 0"}
    assert recording.meta.release == "6.12.0"


def test_without_rounds_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perforder, "HELD", 1 << 12)
    monkeypatch.setattr(perfstream, "AT_ONCE", 1 << 11)
    data = b"".join(sample(Event(time, 0, 5, time)) for time in [*range(100, 200), 7])
    rows, stats, _ = read(tmp_path / "perf.data", in_file(data))
    assert sorted(row[0] for row in rows) == [7, *range(100, 200)]
    assert stats.damage == "1 records came too late to be put in order"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PERFILE2", "at byte 0x8: 8 bytes should be here"),
        (b"PERFILE2" + struct.pack("<Q", 17) + bytes(99), "a header of 17 bytes: it has 104"),
        (in_file(records(), [(attr(0x107C3), (11,))]), "no tracepoint with raw data and time"),
        (in_file(records(), [(attr(RAW_TYPE, 1), (11,))]), "no tracepoint with raw data and time"),
    ],
)
def test_what_is_no_recording(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        read(tmp_path / "perf.data", data)


@pytest.mark.parametrize(
    ("data", "damage", "rows"),
    [
        (in_pipe(records())[:-5], "the file ends inside a record", 80),
        (in_pipe(records() + bytes(64)), "a record of 0 bytes", 80),
        (
            in_pipe(packed(records()) + perffile.record(81, b"no zstd!")),
            "compressed records cannot be decompressed",
            80,
        ),
    ],
)
def test_what_is_damaged_is_read_up_to_there(data: bytes, damage: str, rows: int, tmp_path: Path) -> None:
    found, stats, _ = read(tmp_path / "perf.data", data)
    assert len(found) == rows
    assert stats.damage is not None
    assert damage in stats.damage
    assert stats.damage.startswith("at byte 0x")


@pytest.mark.parametrize("more", [b"odd!", b"twelve bytes"])
def test_a_record_need_not_be_whole_words(more: bytes, tmp_path: Path) -> None:
    odd = perffile.record(2, struct.pack("<QQ", 11, 17) + more)
    found, stats, _ = read(tmp_path / "perf.data", in_pipe(packed(odd + records())))
    assert len(found) == 80
    assert stats.damage is None


WHOLE = [
    in_file(records()),
    in_pipe(records()),
    in_file(packed(records(), each=100)),
    in_file(records(CHAIN_TYPE, CHAIN), TWO),
]


@given(st.sampled_from(WHOLE), st.integers(0, 1 << 30), st.booleans())
def test_hostile_files_end_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, seed: int, cut: bool
) -> None:
    dice = random.Random(seed)
    changed = bytearray(data)
    for _ in range(dice.randrange(4)):
        changed[dice.randrange(len(changed))] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    path = tmp_path_factory.getbasetemp() / "hostile.data"
    path.write_bytes(changed[: dice.randrange(len(changed))] if cut else changed)
    try:
        recording = PerfRecording(str(path))
        for _ in recording.frames(stats=ReadStats()):
            pass
    except TraceError as e:
        told = str(e)
        assert "\n" not in told


@pytest.mark.parametrize(("system", "rows"), [(b"kvm", len(EVENTS)), (b"net", 0)])
def test_events_of_interest_are_told_by_their_system(system: bytes, rows: int, tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    data = in_file(records())
    assert data.count(b"kvm\0") == 1
    path.write_bytes(data.replace(b"kvm\0", system + b"\0"))
    made = convert(open_recording(str(path)), tmp_path / "out.parquet")
    assert (made.rows, made.read.skipped.total()) == (rows, len(EVENTS) - rows)


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
@pytest.mark.parametrize("options", [(), ("-z",), ("-g",)])
def test_what_perf_itself_records_and_prints(options: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    record = ["perf", "record", "-q", "-e", "sched:sched_switch", "-e", "sched:sched_waking", "-o", str(path), *options]
    made = subprocess.run([*record, "--", "sh", "-c", "sleep 0.01; true"], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no usable tracefs: perf cannot record: {made.stderr.strip()[:100]}")
    script = ["perf", "script", "--ns", "-i", str(path), "-G", "-F", "comm,tid,cpu,time,event,trace"]
    text = tmp_path / "script.txt"
    text.write_text(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    rows = []
    for source in (path, text):
        frames = [f for frames in open_recording(str(source)).frames() for f in frames.items()]
        rows.append(sorted((t, c, p, name) for name, f in frames for t, c, p in f.select("time", "cpu", "pid").rows()))
    assert rows[0] == rows[1]
    assert rows[0]
