"""What ring-buffer pages and trace.dat files may hold that no recording at hand does."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pytest

from kvmfault.errors import KvmfaultError, TraceError, UsageError
from kvmfault.trace.formats import Formats, FormatText
from kvmfault.trace.merge import RingRecording
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import Lost, ReadStats
from kvmfault.trace.rows import events
from kvmfault.trace.tracedat import open_tracedat
from tests.ringfile import (
    DatFile,
    discarded,
    extend,
    fault,
    format_text,
    note,
    page,
    record,
    stamp,
)
from tests.test_trace_ring import whole

Write = Callable[[DatFile], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(dat: DatFile) -> str:
        path = tmp_path / "trace.dat"
        path.write_bytes(dat.build())
        return str(path)

    return to_file


def times(path: str) -> list[tuple[int, int, str]]:
    """Time, CPU and name of each event in order of place."""
    return [(e.time, e.cpu, e.name) for e in events(open_recording(path))]


T = 1_000_000
TOP = 3 << 59  # as the wall clock has it: above what an absolute stamp holds
END = 4 << 59


@pytest.mark.parametrize(
    ("start", "records", "expected"),
    [
        (T, [record(fault(1), 5), record(fault(2), 7)], [T + 5, T + 12]),
        (T, [extend(1 << 40), record(fault(1), 3)], [T + (1 << 40) + 3]),
        (T, [stamp(9 << 30), record(fault(1), 3), record(fault(2), 1)], [(9 << 30) + 3, (9 << 30) + 4]),
        (T, [record(fault(0), 2), stamp(7 << 30), record(fault(1), 3)], [T + 2, (7 << 30) + 3]),
        (T, [stamp(5 << 30), stamp(6 << 30), record(fault(1))], [6 << 30]),
        (TOP + 9, [record(fault(0), 1), stamp(TOP + 99), record(fault(1), 1)], [TOP + 10, TOP + 100]),
        (
            TOP + (1 << 59) - 5,
            [record(fault(0)), stamp(3), record(fault(1), 1)],
            [TOP + (1 << 59) - 5, TOP + (1 << 59) + 4],
        ),
        (T, [discarded(20, 4), record(fault(1), 1)], [T + 5]),
        (T, [record(fault(1), 1), struct.pack("<I", 29), record(fault(2), 1)], [T + 1]),
        (T, [record(note(b"x" * 200), 1), record(fault(1), 1)], [T + 1, T + 2]),
        (T, [record(note(b"x" * 201), 1), record(fault(1), 1)], [T + 1, T + 2]),
        (T, [], []),
    ],
    ids=lambda p: None,
)
def test_times(write: Write, start: int, records: list[bytes], expected: list[int]) -> None:
    path = write(DatFile({0: [page(start, b"".join(records)), page(1 << 62, b"")]}))
    assert [time for time, _, _ in times(path)] == expected


PAGES = {n: [page(T + 100 * k + n, record(fault(k), 1) + record(note(b"cpu"), 50)) for k in range(9)] for n in (0, 3)}
ORDER = sorted(
    (time, n, name)
    for n in PAGES
    for k in range(9)
    for time, name in ((T + 100 * k + n + 1, "fault"), (T + 100 * k + n + 51, "note"))
)


@pytest.mark.parametrize(
    ("codec", "packed"), [("none", False), ("zlib", False), ("zlib", True), ("zstd", False), ("zstd", True)]
)
def test_containers(write: Write, codec: str, packed: bool) -> None:
    path = write(DatFile(PAGES, codec=codec, packed=packed))
    assert times(path) == ORDER
    meta = open_recording(path).meta
    assert (meta.cpus, meta.clock, meta.ticks, meta.comms) == ((0, 3), "mono", False, {42: "vcpu 0"})


@pytest.mark.parametrize("options", [(), ((4, b"local [mono]\0"),)])
def test_version_6(write: Write, options: Sequence[tuple[int, bytes]]) -> None:
    cpus = {n: PAGES[3 * n] for n in (0, 1)}
    path = write(DatFile(cpus, version=6, options=options))
    assert times(path) == [(time, cpu // 3, name) for time, cpu, name in ORDER]


@pytest.mark.parametrize("size", [8192, 65536, 1 << 20])
@pytest.mark.parametrize("version", [6, 7])
def test_page_sizes(write: Write, size: int, version: int) -> None:
    many = b"".join(record(fault(n), 1) for n in range(size // 24 - 8))
    path = write(DatFile({0: [page(T, many, size), page(2 * T, many, size)]}, version=version, page=size))
    frames, stats = whole(open_recording(path))
    n = size // 24 - 8
    assert stats.damage is None
    assert frames["fault"]["gpa"].to_list() == [*range(n), *range(n)]
    assert frames["fault"]["time"].to_list() == [*range(T + 1, T + n + 1), *range(2 * T + 1, 2 * T + n + 1)]


@pytest.mark.parametrize(
    ("options", "expected", "ticks"),
    [
        (((1, b"0x64\0"),), 1000 + 100_000, False),
        (((7, b"-3\0"),), 997, False),
        (((14, struct.pack("<IIQ", 3 << 20, 21, 7)),), 1500, False),
        (((14, struct.pack("<IIQ", 3 << 30, 31, 7)),), 1500, False),
        (((14, struct.pack("<IIQ", 3 << 30, 40, 7)),), 2, False),
        (((1, b"soon\0"),), 1000, True),
    ],
)
def test_clocks(write: Write, options: Sequence[tuple[int, bytes]], expected: int, ticks: bool) -> None:
    clock = "counter" if ticks or options[0][0] == 14 else "local"
    path = write(DatFile({0: [page(1000, record(fault(1)))]}, options=options, clock=clock))
    recording = open_recording(path)
    assert [e.time for e in events(recording)] == [expected]
    assert recording.meta.ticks is ticks
    assert ("time" in recording.meta.notes) is ticks


def test_instances(write: Write) -> None:
    path = write(
        DatFile({}, instances={"aux": {1: [page(T, record(fault(1)))]}, "b": {0: [page(2 * T, record(fault(2)))]}})
    )
    assert times(path) == [(T, 1, "fault")]
    assert "'b'" in open_recording(path).meta.notes["buffers"]
    assert [e.time for e in events(open_tracedat(path, "b"))] == [2 * T]
    with pytest.raises(UsageError, match="no instance 'c'; the file has the top one, 'aux', 'b'"):
        open_tracedat(path, "c")


def test_lost_events(write: Write) -> None:
    one = record(fault(1), 1)
    pages = [
        page(10, one, missed=5, stored=True),
        page(20, one, missed=0),
        page(30, b"", missed=7, stored=True),
        page(40, one),
        page(50, b"", missed=1, stored=True),
    ]
    stats = ReadStats()
    assert len(list(events(open_recording(write(DatFile({2: pages}))), stats=stats))) == 3
    assert stats.gaps == [Lost(2, 5, None, 11), Lost(2, None, 11, 21), Lost(2, 7, 21, 41), Lost(2, 1, 41, None)]
    assert (stats.lost, stats.lost_unknown) == ({2: 13}, 1)


def test_equal_times_and_time_that_goes_back(write: Write) -> None:
    # As a merge by the first of each CPU: the lowest CPU first, and what follows a later record waits for it.
    cpus = {
        0: [page(50, record(fault(0), 0)), page(30, record(fault(1), 0)), page(70, record(fault(2), 0))],
        1: [page(50, record(fault(3), 0)), page(60, record(fault(4), 0))],
    }
    got = [e.fields["gpa"] for e in events(open_recording(write(DatFile(cpus))))]
    assert got == [0, 1, 3, 4, 2]


def test_fields(write: Write) -> None:
    formats = {
        "kvm": [
            format_text(
                "all",
                7,
                [
                    "u8 a;8;1;0", "s8 b;9;1;1", "u16 c;10;2;0", "s16 d;12;2;1", "bool e;14;1;0", "u32 f;16;4;0",
                    "int g;20;4;1", "s64 h;24;8;1", "void * i;32;8;1", "char j[4];40;4;1", "u8 k[3];44;3;0",
                    "__rel_loc char[] l;48;4;0", "__data_loc u32[] m;52;4;0", "int pid;56;4;1", "u64 n;58;8;0",
                ],
            )
        ]
    }  # fmt: skip
    data = struct.pack("<HBBi", 7, 0, 0, -5) + struct.pack(
        "<BbHhBxIiqQ4s3sx", 200, -2, 65535, -3, 1, 0xFFFFFFFF, -4, -(1 << 63), (1 << 64) - 1, b"ab\0c", b"\0\1\2"
    )
    data += (
        struct.pack("<II", 3 << 16 | (68 - 52), 8 << 16 | 72)
        + struct.pack("<HHQ", 9, 0x1111, 0x2222)
        + b"xyz\0"
        + b"12345678"
    )
    path = write(DatFile({0: [page(T, record(data))]}, formats=formats))
    [event] = events(open_recording(path))
    assert event.pid == -5
    assert event.fields == {
        "a": 200, "b": -2, "c": 65535, "d": -3, "e": 1, "f": 0xFFFFFFFF, "g": -4, "h": -(1 << 63), "i": (1 << 64) - 1,
        "j": "ab", "k": b"\0\1\2", "l": "xyz", "m": b"12345678", "pid_": 0x11110009, "n": 0x22221111,
    }  # fmt: skip


def test_an_array_outside_its_record_is_null(write: Write) -> None:
    data = struct.pack("<HBBiI3sx", 9, 0, 0, 42, 500 << 16 | 16, b"abc") + bytes(4)
    path = write(DatFile({0: [page(T, record(data) + record(note(b"good")))]}))
    [frames] = open_recording(path).frames()
    assert frames["note"]["text"].to_list() == [None, "good"]


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        (struct.pack("<II", 0, 2), "a record without a length"),
        (struct.pack("<I", 0), "a record without a length"),
        (struct.pack("<I", 29 | 1 << 5), "a record without a length"),
        (struct.pack("<II", 0, 1 << 31), "no room for a record of"),
        (struct.pack("<II", 28, 7), "no room for a record of 112 bytes"),
        (record(bytes([7, 0, 0, 0])), "no room for a record of 4 bytes"),
    ],
)
def test_damaged_records(write: Write, damaged: bytes, says: str) -> None:
    before, after = page(10, record(fault(1))), page(50, record(fault(3)))
    path = write(DatFile({0: [before, page(30, record(fault(2)) + damaged), after]}))
    frames, stats = whole(open_recording(path))
    assert frames["fault"]["gpa"].to_list() == [1, 2, 3]
    assert stats.damage is not None
    assert says in stats.damage
    at = Path(path).read_bytes().find(record(fault(2)) + damaged) + len(record(fault(2)))
    assert stats.damage.startswith(f"at byte {at:#x}: ")


def test_a_page_that_holds_too_much(write: Write) -> None:
    bad = struct.pack("<QQ", 30, 5000) + record(fault(2)) + bytes(4056)
    path = write(DatFile({0: [page(10, record(fault(1))), bad, page(50, record(fault(3)))]}))
    frames, stats = whole(open_recording(path))
    assert frames["fault"]["gpa"].to_list() == [1, 3]
    at = Path(path).read_bytes().find(bad) + 8
    assert stats.damage == f"at byte {at:#x}: a page says that it holds 5000 bytes"


def test_a_short_record_is_counted(write: Write) -> None:
    path = write(DatFile({0: [page(10, record(fault(1)[:12]) + record(fault(2)))]}))
    frames, stats = whole(open_recording(path))
    assert frames["fault"]["gpa"].to_list() == [2]
    assert stats.misfits == {"fault": 1}


@pytest.mark.parametrize(("version", "codec"), [(6, "none"), (7, "none"), (7, "zlib"), (7, "zstd")])
def test_every_truncation(tmp_path: Path, version: int, codec: str) -> None:
    data = DatFile(PAGES if version == 7 else {0: PAGES[0]}, version=version, codec=codec).build()
    path = tmp_path / "cut.dat"
    told = 0
    for size in [*range(0, len(data), 397), len(data) - 1]:
        path.write_bytes(data[:size])
        try:
            _, stats = whole(open_tracedat(str(path)))
        except TraceError as e:
            told += e.offset is not None
        else:
            told += stats.damage is not None
    assert told == len(range(0, len(data), 397)) + 1


@pytest.mark.parametrize(("codec", "cpus"), [("none", 1), ("none", 2), ("zlib", 2), ("zstd", 2)])
def test_what_a_cut_file_still_holds(tmp_path: Path, codec: str, cpus: int) -> None:
    # Written in the order of trace-cmd: the options that say where pages are come last.
    ring = {n: PAGES[3 * n] for n in range(cpus)}
    dat = DatFile(ring, codec=codec, options=[(8, struct.pack("<I", cpus))], early=True)
    data = dat.build()
    path = tmp_path / "cut.dat"
    expected = [(time, cpu // 3, name) for time, cpu, name in ORDER if cpu // 3 < cpus]
    got = []
    for size in [*range(data.find(b"fault"), len(data), 211), len(data) - 1]:
        path.write_bytes(data[:size])
        try:
            frames, stats = whole(open_tracedat(str(path)))
        except TraceError:
            got.append(0)
            continue
        rows = {(*row, name) for name, f in frames.items() for row in f.select("time", "cpu").iter_rows()}
        assert rows <= set(expected)
        assert stats.damage is not None
        got.append(len(rows))
    assert got[-1] == len(expected)
    assert sum(0 < n < len(expected) for n in got) > 4


def test_formats_that_are_none() -> None:
    with pytest.raises(TraceError, match=r"a.dat: at byte 0x63: expected 'name: EVENT"):
        Formats("a.dat", [FormatText("kvm", b"nome: x", 99)])
    broken = format_text("x", 1, []).replace(b"print fmt", b"\tfield:u64 a;\toffset:x;\nprint fmt")
    formats = Formats("a.dat", [FormatText("kvm", broken, 10)])
    with pytest.raises(TraceError, match=r"at byte .*: x: expected 'field"):
        formats["x"]


def test_words_of_a_print_format() -> None:
    text = format_text(
        "x", 1, ["u32 r;8;4;0"],
        '"%s %s", (REC->isa == 1) ? __print_symbolic(REC->r & 0xffff, { 0, "A, (" }, { 0x10UL, "B" }) : '
        '__print_symbolic(REC->r, {-1, "C"}), __print_flags(REC->f, "|", {(1UL << 3), "D"}, {NAME, "E"})',
    )  # fmt: skip
    tables = Formats("a.dat", [FormatText("kvm", text)])["x"].tables()
    assert [(t.of, t.flags, dict(t.words)) for t in tables] == [
        ("REC->r & 0xffff", False, {0: "A, (", 16: "B"}),
        ("REC->r", False, {-1: "C"}),
        ("REC->f", True, {8: "D"}),
    ]


def test_events_of_interest() -> None:
    probe = format_text("map", 3, ["unsigned long __probe_ip;8;8;0"])
    texts = [
        FormatText("sched", format_text("switch", 1, [])),
        FormatText("kvmmmu", format_text("get_page", 2, [])),
        FormatText("mine", probe),
        FormatText("mine", format_text("other", 4, [])),
        FormatText("sched", format_text("get_page", 5, [])),
    ]
    formats = Formats("a.dat", texts)
    assert formats.of_interest() == {"get_page", "map", "other"}
    assert formats["sched:get_page"].id == 5


def test_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    start = b"\x17\x08\x44tracing"
    for data, says in [
        (start + b"8\0", "trace.dat version '8'; versions 6 and 7 can be read"),
        (start + b"7\0\1\x08" + bytes(4), "of a big-endian host"),
        (start + b"7\0\0\x08" + struct.pack("<I", 1000), "pages of 1000 bytes"),
        (start + b"7\0\0\x08" + struct.pack("<I", 4096) + b"lzma\x001\0" + bytes(8), "compressed with 'lzma'"),
        (start, "a name that does not end"),
    ]:
        path.write_bytes(data)
        with pytest.raises(KvmfaultError) as e:
            open_tracedat(str(path))
        assert says in str(e.value)
        assert "\n" not in str(e.value)


def test_memory_is_asked_for_in_blocks(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same rows however small the blocks are.
    monkeypatch.setattr("kvmfault.trace.merge.AT_ONCE", 8192)
    monkeypatch.setattr("kvmfault.trace.merge._SMALLEST", 4096)
    recording = open_recording(write(DatFile(PAGES)))
    assert isinstance(recording, RingRecording)
    stretches = list(recording.frames())
    assert len(stretches) > 3
    rows = pl.concat([frame.select("place", "time", "cpu") for some in stretches for frame in some.values()])
    assert rows.sort("place").rows() == [(n, time, cpu) for n, (time, cpu, _) in enumerate(ORDER, 1)]
