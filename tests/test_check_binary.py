"""``replay --check`` of binary recordings with the kprobe events in them: as from text, without a second file."""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

from kvmfault.check.run import CheckReport, check
from kvmfault.contract.target import backend
from kvmfault.contract.tracepoints import Role
from kvmfault.errors import TraceError
from kvmfault.replay.run import replay
from kvmfault.trace.opening import open_recording
from kvmfault.trace.pattern import Fields, Pattern
from kvmfault.trace.text import read_text
from kvmfault.trace.truth import probed
from tests.cli import Cli
from tests.ringfile import DatFile, extend, format_text, page, record

CUT = Path(__file__).parent / "data" / "traces"
_FIELD = re.compile(r"(\w+)=(-?\d+|0x[0-9a-f]+)(?!\S)").findall


class Row(NamedTuple):
    """An event to be written; *rank* orders those of one microsecond as they were."""

    time: int
    rank: int
    pid: int
    name: str
    fields: Mapping[str, int]


def traced(path: Path, target: str) -> Iterator[Row]:
    """The trace events of a text, without those whose text tells less than their fields."""
    points = {n: point for n, point in backend(target).backend.tracepoints.items() if point.role is not None}
    points = {n: point for n, point in points.items() if point.tells is None or not point.tells.templates}
    patterns = {name: Pattern.of([point]) for name, point in points.items()}
    ranks = {Role.FAULT: 0, Role.UNMAP: 0, Role.ENTRY: 4}
    for event in read_text(path, wanted=patterns.keys()):
        fields = patterns[event.name].read(event.body)
        assert isinstance(fields, Fields)
        role = points[event.name].role
        rank = 2 if role is None else ranks.get(role, 2)
        yield Row(event.time, rank, event.pid, event.name, fields.numbers)


def probes(path: Path) -> Iterator[Row]:
    """The kprobe events of a text, with addresses in place of functions."""
    for event in read_text(path):
        place = probed(event)
        assert place is not None
        where = {"__probe_func": 1 << 63, "__probe_ret_ip": 1 << 62} if place[1] else {"__probe_ip": 1 << 63}
        fields = {**where, **{name: int(value, 0) for name, value in _FIELD(place[2])}}
        yield Row(event.time, 3 if place[1] else 1, event.pid, event.name, fields)


def written(rows: list[Row]) -> bytes:
    """A trace.dat of these events."""
    fields: dict[str, dict[str, bool]] = {}
    for row in rows:
        signed = fields.setdefault(row.name, {})
        signed |= {name: signed.get(name, False) or value < 0 for name, value in row.fields.items()}
    numbers = {name: 100 + n for n, name in enumerate(fields)}
    formats: dict[str, list[bytes]] = {"kvm": [], "aux": []}
    for name, own in fields.items():
        lines = [f"{'s' if s else 'u'}64 {f};{8 + 8 * n};8;{int(s)}" for n, (f, s) in enumerate(own.items())]
        system = "kvm" if own.keys().isdisjoint({"__probe_ip", "__probe_func"}) else "aux"
        formats[system].append(format_text(name, numbers[name], lines))
    pages, body, first, last = [], b"", 0, 0
    for row in rows:
        own = fields[row.name]
        values = [row.fields.get(f, 0) & (1 << 64) - 1 for f in own]
        data = struct.pack(f"<HBBi{len(own)}Q", numbers[row.name], 0, 0, row.pid, *values)
        if not body or len(body) > 3600:
            pages += [page(first, body)] * bool(body)
            body, first, last = b"", row.time, row.time
        delta, last = row.time - last, row.time
        body += (extend(delta) if delta >> 27 else b"") + record(data, 0 if delta >> 27 else delta)
    pages.append(page(first, body))
    return DatFile({0: pages}, formats=formats).build()


def both(folder: str, target: str, path: Path) -> Path:
    """Trace events and probes of a folder in one trace.dat."""
    trace, aux = (next((CUT / folder).glob(f"{name}.txt*")) for name in ("trace", "aux"))
    rows = list(heapq.merge(traced(trace, target), probes(aux), key=lambda row: (row.time, row.rank)))
    path.write_bytes(written(rows))
    return path


def found(report: CheckReport) -> tuple[object, ...]:
    """What a check says, without the lines."""
    tally = report.tally
    return report.faults, tally.agreed, tally.compared, tally.causes, report.taken, report.unpaired, report.unknown


@pytest.mark.parametrize(
    ("folder", "target"),
    [
        ("arm64_slots", "arm64@6.12"),
        ("arm64_two_vcpus", "arm64@6.12"),
        ("arm64_reclaim", "arm64@6.12"),
        ("x86_npt", "x86-npt@6.12"),
        ("x86_two_vcpus", "x86-npt@6.12"),
    ],
)
def test_probes_in_the_file_say_what_those_beside_it_do(folder: str, target: str, tmp_path: Path) -> None:
    text = next((CUT / folder).glob("trace.txt*"))
    binary = both(folder, target, tmp_path / "trace.dat")
    wanted, report = check(str(text), target), check(str(binary), target)
    assert wanted.aux is not None
    assert report.aux is None
    assert report.target.name == wanted.target.name
    assert 0 < report.probed <= wanted.probed  # a binary one tells only functions that are known
    assert found(report) == found(wanted)
    assert len(report.slots.changes) == len(wanted.slots.changes)


def test_a_kernel_that_is_named_where_the_file_tells_none(tmp_path: Path) -> None:
    path = str(both("x86_npt", "x86-npt", tmp_path / "trace.dat"))
    for kernel in backend("x86-npt").backend.kernels:
        assert replay(path, [f"x86-npt@{kernel}"]).own.kernel == kernel


def test_probes_in_a_binary_file_of_their_own(tmp_path: Path) -> None:
    trace, aux = CUT / "arm64_slots" / "trace.txt", tmp_path / "probes.dat"
    aux.write_bytes(written(list(probes(CUT / "arm64_slots" / "aux.txt"))))
    wanted, report = check(str(trace), "arm64@6.12"), check(str(trace), "arm64@6.12", str(aux))
    assert found(report) == found(wanted)
    assert report.aux == str(aux)


def test_probes_are_columns(tmp_path: Path) -> None:
    path = both("arm64_slots", "arm64", tmp_path / "trace.dat")
    frames = next(iter(open_recording(str(path)).frames(["s2_map", "s2_map_ret"])))
    assert frames["s2_map"].columns[4:] == ["__probe_ip", "addr", "size", "phys", "prot"]
    assert frames["s2_map_ret"].columns[4:] == ["__probe_func", "__probe_ret_ip", "ret"]


@pytest.mark.parametrize(
    ("event", "function"),
    [
        ("kvm_mmu_page_fault", "kvm_mmu_page_fault"),
        ("page_fault_ret", "kvm_mmu_page_fault"),
        ("aux:page_fault", "kvm_mmu_page_fault"),
        ("p_kvm_mmu_page_fault_0", "kvm_mmu_page_fault"),
        ("r_kvm_mmu_page_fault_0", "kvm_mmu_page_fault"),
        ("kvm_mmu_page_fault__return", "kvm_mmu_page_fault"),
        ("paging64_page_fault_ret", "paging64_page_fault"),
        ("memslot_1", "__kvm_set_memory_region"),
        ("vm_ioctl", None),
        ("", None),
    ],
)
def test_names_of_probes(event: str, function: str | None) -> None:
    assert backend("x86-npt").backend.probes.function(event) == function


def test_a_probe_of_memslots_without_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    trace = list(traced(next((CUT / "x86_npt").glob("trace.txt*")), "x86-npt"))
    lacking = Row(trace[0].time, 0, 7, "memslot", {"__probe_ip": 1, "slot": 0, "flags": 0, "gpa": 0, "size": 4096})
    path.write_bytes(written([lacking, *trace]))
    with pytest.raises(TraceError, match="memslot: record 1 has no field hva"):
        check(str(path), "x86-npt@6.12")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_a_summary_takes_memslots_and_wanted_sizes_from_the_same_file(cli: Cli, tmp_path: Path) -> None:
    path = both("x86_npt", "x86-npt", tmp_path / "trace.dat")
    summary = cli("trace", "summary", str(path), "--json").json
    assert summary["notes"]["slots"] == [f"memslots: {path}"]
    assert {row["slot"] for row in summary["slots"]} == {"0", "none"}
    assert not any(line.startswith(("memslots", "large pages")) for line in summary["unsaid"])


def test_the_command_line_says_where_the_probes_are(cli: Cli, tmp_path: Path) -> None:
    path = both("x86_npt", "x86-npt", tmp_path / "trace.dat")
    said = cli("replay", str(path), "--check", "--backend", "x86-npt@6.12")
    assert said.status == 0
    assert "hits of probes in it" in said.out
    assert "tells no function that is known: vm_ioctl, vm_ioctl_ret\n" in said.out
