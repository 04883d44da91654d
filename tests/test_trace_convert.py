"""`trace convert`: the Parquet file holds what the recording does."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import polars as pl
import pytest

from kvmfault.trace.convert import FAULTS, METADATA, convert
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.opening import open_recording
from kvmfault.trace.parquet import ParquetWriter
from tests.cli import Cli
from tests.conftest import recordings
from tests.ringfile import DatFile, fault, format_text, note, page, record
from tests.test_trace_faults import by_rows, check_facts
from tests.test_trace_ring import whole


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


TYPES = {"a": pl.Int64, "b": pl.Int64, "c": pl.UInt64}


def table(frames: dict[str, pl.DataFrame], path: Path, **metadata: str) -> pl.DataFrame:
    """Written and read again."""
    with path.open("wb") as file:
        writer = ParquetWriter(file)
        for name, frame in frames.items():
            writer.write(name, frame)
        writer.close(metadata)
    return pl.read_parquet(path)


def test_types_and_nulls(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "place": pl.Series([1, 2, 5], dtype=pl.UInt64),
            "time": pl.Series([-5, 0, 1 << 62], dtype=pl.Int64),
            "cpu": pl.Series([0, 9, 65535], dtype=pl.UInt16),
            "pid": pl.Series([-1, 0, 1 << 30], dtype=pl.Int32),
            "u": pl.Series([None, (1 << 64) - 1, 0], dtype=pl.UInt64),
            "s": pl.Series(["a", None, "é" * 300], dtype=pl.String),
            "b": pl.Series([b"\0\0", b"", None], dtype=pl.Binary),
            "f": pl.Series([True, None, False], dtype=pl.Boolean),
            "none": pl.Series([None, None, None], dtype=pl.Int64),
            "r": pl.Series([0.5, None, -1.0], dtype=pl.Float64),
            "w": pl.Series([1, 2, 3], dtype=pl.UInt32),
            "y": pl.Series([1, 2, 255], dtype=pl.UInt8),
        }
    )
    got = table({"e": frame}, tmp_path / "a.parquet", k="v")
    assert got.drop("event").equals(frame)
    assert got.drop("event").schema == frame.schema
    assert got["event"].to_list() == ["e"] * 3
    assert pl.read_parquet_metadata(tmp_path / "a.parquet") == {"k": "v"}


def test_columns_of_one_name_and_two_types(tmp_path: Path) -> None:
    one = pl.DataFrame({"place": [1, 2], "x": [3, 4]}, schema={"place": pl.UInt64, "x": pl.UInt64})
    two = pl.DataFrame({"place": [3], "x": [-1]}, schema={"place": pl.UInt64, "x": pl.Int64})
    three = pl.DataFrame({"place": [4], "x": [5]}, schema={"place": pl.UInt64, "x": pl.UInt64})
    got = table({"a": one, "b": two, "c": three}, tmp_path / "a.parquet")
    assert got.columns == ["event", "place", "x", "x_signed"]
    assert got.rows() == [("a", 1, 3, None), ("a", 2, 4, None), ("b", 3, None, -1), ("c", 4, 5, None)]


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 70_000, 600_000])
def test_many_rows(tmp_path: Path, rows: int) -> None:
    place = pl.Series("place", range(rows), dtype=pl.UInt64)
    text = pl.Series("text", [str(n % 70_001) for n in range(rows)])
    frame = pl.DataFrame([place, text]).with_columns(
        odd=pl.when(place % 3 > 0).then(place),
        small=place % 200 + (1 << 63),
        below=-(place % 7).cast(pl.Int64),
        time=place.cast(pl.Int64) * 300 - 1000,
        later=place * 70_000,
        falls=1 - place.cast(pl.Int64) * 1000,
        far=place * (1 << 33),
    )
    got = table({"e": frame}, tmp_path / "a.parquet")
    assert got.drop("event").equals(frame)


def test_columns_of_unsigned_numbers_beside_signed_ones_of_that_name(tmp_path: Path) -> None:
    frames = {name: pl.DataFrame({"x": [1]}, schema={"x": dtype}) for name, dtype in TYPES.items()}
    assert table(frames, tmp_path / "a.parquet").columns == ["event", "x", "x_unsigned"]


def test_an_event_whose_columns_change(tmp_path: Path) -> None:
    with (tmp_path / "a.parquet").open("wb") as file:
        writer = ParquetWriter(file, first="b")
        for event, columns in (("a", {"x": 1}), ("a", {"x": 2, "y": 3}), ("b", {"x": True}), ("a", {"y": 4})):
            writer.write(event, pl.DataFrame({name: [value] for name, value in columns.items()}))
        assert writer.columns() == {"a": ["event", "x_signed", "y"], "b": ["event", "x"]}
        writer.close({})
    got = pl.read_parquet(tmp_path / "a.parquet").sort("event", "x_signed", "y")
    assert got.rows() == [("a", None, 4, None), ("a", 1, None, None), ("a", 2, 3, None), ("b", None, None, True)]


def test_no_rows(tmp_path: Path) -> None:
    assert table({}, tmp_path / "a.parquet").shape == (0, 1)


def test_an_event_reads_only_its_row_groups(tmp_path: Path) -> None:
    frames = {name: pl.DataFrame({"place": pl.Series([n], dtype=pl.UInt64)}) for n, name in enumerate("abc")}
    table(frames, tmp_path / "a.parquet")
    lazy = pl.scan_parquet(tmp_path / "a.parquet").filter(pl.col("event") == "b")
    assert lazy.collect().rows() == [("b", 1)]


@pytest.mark.parametrize("path", recordings("*/*demand_paging*/trace.dat"))
def test_a_recording_comes_back(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.parquet"
    recording = open_recording(str(path))
    made = convert(recording, out)
    got = pl.read_parquet(out)
    assert len(got) == made.rows
    told = json.loads(pl.read_parquet_metadata(out)[METADATA])
    frames, stats = whole(recording)
    for name, columns in told["columns"].items():
        rows = got.filter(pl.col("event") == name).select(columns[1:])
        assert rows.rename(dict(zip(columns[1:], frames[name].columns, strict=True))).equals(frames[name])
    assert told["events"] == stats.events


@pytest.mark.parametrize(
    "path", [*recordings("*/[aber]*/trace.dat")[::3], *recordings("x86/e3-behaviours/report.txt.gz")]
)
def test_faults_are_what_the_target_decodes(path: Path, tmp_path: Path) -> None:
    faults, out = FaultColumns.of(), tmp_path / "a.parquet"
    recording = open_recording(str(path))
    made = convert(recording, out, faults=faults)
    got = pl.read_parquet(out).filter(pl.col("event") == FAULTS).sort("place")
    rows, assembler = by_rows(recording, None)
    assert got.select("place", "time", "target", "kind").rows() == [(r[0], r[1], r[3], r[4]) for r in rows]
    assert got["pid"].cast(pl.String).to_list() == [r[2] for r in rows]
    assert made.written[FAULTS] == len(rows) == assembler.stats.faults.total()
    check_facts(got)


def test_what_no_exit_tells_is_counted_or_of_the_target_that_the_user_names(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "text", tmp_path / "out.parquet"
    source.write_text("v-1 [000] 1.000000: kvm_page_fault: vcpu 2 rip 0x1 address 0x5000 error_code 0x182\n" * 3)
    done = cli("trace", "convert", str(source), str(out))
    assert "3 kvm_page_fault of unknown encoding, first at line 1" in done.out
    assert set(pl.read_parquet(out)["event"]) == {"kvm_page_fault"}
    told = cli("trace", "convert", str(source), str(out), "--backend", "x86-ept", "--json").json
    assert told["written"] == {"kvm_page_fault": 3, FAULTS: 3}
    assert told["faults"] == {"decoded": {"x86-ept": 3}, "unclaimed": {}, "without_address": 0}
    rows = pl.read_parquet(out).filter(pl.col("event") == FAULTS)
    assert rows.select("vcpu", "pid", "kvm_get_fault_gpa", "is_write").unique().rows() == [(2, 1, 0x5000, True)]
    cli("trace", "convert", str(source), str(out), "--backend", "x86-ep").refused("x86-ep")


def test_the_command(cli: Cli, tmp_path: Path) -> None:
    other = format_text("sched", 11, [])
    source, out = tmp_path / "trace.dat", tmp_path / "out.parquet"
    data = record(fault(1)) + record(note(b"x")) + record(struct.pack("<HBBi", 11, 0, 0, 1)) + record(fault(2)[:12])
    pages = [page(10, data, missed=3, stored=True)]
    formats = {"kvm": DatFile({}).formats["kvm"], "sched": [other]}
    source.write_bytes(DatFile({4: pages}, formats=formats).build())
    done = cli("trace", "convert", str(source), str(out))
    assert done.status == 0
    assert "2 rows" in done.out
    assert "grouped by event: sort by place" in done.out
    assert "not of interest: 1 events" in done.out
    assert "not readable by their format: 1 events (fault)" in done.out
    assert "lost by the kernel: 3 on CPU 4" in done.out
    assert pl.read_parquet(out)["event"].to_list() == ["fault", "note"]
    told = cli("trace", "convert", str(source), str(out), "--json").json
    assert told["rows"] == 2
    assert told["events"] == {"fault": 2, "note": 1, "sched": 1}
    assert told["columns"]["fault"][5:] == ["gpa", "level"]
    assert told["lost"]["windows"] == [{"cpu": 4, "events": 3, "after": None, "before": 10}]
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_one(cli: Cli, tmp_path: Path) -> None:
    source, out = tmp_path / "trace.dat", tmp_path / "out.parquet"
    source.write_bytes(DatFile({0: [page(10, record(fault(1)) + bytes(4))]}).build())
    done = cli("trace", "convert", str(source), str(out))
    assert done.status == 1
    assert "damaged: at byte 0x" in done.out
    assert len(pl.read_parquet(out)) == 1
    source.write_bytes(source.read_bytes()[:60])
    done = cli("trace", "convert", str(source), str(tmp_path / "no.parquet"))
    done.refused(f"{source}: at byte 0x")
    assert not (tmp_path / "no.parquet").exists()
    cli("trace", "convert", str(source), str(source)).refused("another file")
    cli("trace", "convert", str(source), str(tmp_path / "no" / "no")).refused()
    cli("trace", "convert", str(tmp_path / "absent"), str(out)).refused("absent")
