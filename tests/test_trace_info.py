"""``kvmfault trace info``: what a file holds, of every kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmfault.trace.formats import Formats, FormatText
from tests.cli import Cli
from tests.conftest import recording
from tests.perffile import Event, in_file, lost, sample


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


TEXT = """\
CPU:0 [LOST 3 EVENTS]
          vcpu-7     [000] d....     1.000001: kvm_exit: reason EXIT_NPF rip 0x1 info 6 0
          vcpu-7     [000] d....     1.000002: kvm_page_fault: vcpu 0 rip 0x1 address 0x5000 error_code 0x100000006
          vcpu-7     [000] d....     1.000003: kvm_entry: vcpu 0, rip 0x1
         other-8     [001] d....     1.000004: kvm_page_fault: vcpu 1 rip 0x1 address 0x5000 error_code 0x100000006
         other-8     [001] d....     1.500000: sched_switch: a ==> b
"""


def test_of_a_text(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(TEXT)
    said = cli("trace", "info", str(path))
    assert said.status == 0
    assert "1 faults of x86-npt" in said.out
    assert "1 kvm_page_fault of unknown encoding, first at line 5" in said.out
    assert "lost by the kernel on CPU 0: 3 events\n  CPU 0: 3 between ? and 1.000001000" in said.out
    told = cli("trace", "info", str(path), "--json", "--backend", "x86-npt").json
    assert told["faults"] == {"x86-npt": 2}
    assert told["unclaimed"] == {}
    assert told["events"] == {"kvm_page_fault": 2, "kvm_exit": 1, "kvm_entry": 1, "sched_switch": 1}
    assert told["vcpus"] == {"7": {"entries": 1, "task": "vcpu"}}
    assert told["cpus"] == [0, 1]
    assert (told["first"], told["last"]) == (1_000_001_000, 1_000_004_000)
    assert told["lost"]["windows"] == [{"cpu": 0, "events": 3, "after": None, "before": 1_000_001_000}]


def test_a_fault_that_waits_for_its_address_as_the_file_ends(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("v-7 [000] 1.000001: kvm_exit: reason EPT_MISCONFIG rip 0x1 info 0 0\n")
    assert "1 faults whose address was not recorded" in cli("trace", "info", str(path)).out
    told = cli("trace", "summary", str(path), "--json").json["unsaid"]
    assert any(line.startswith("1 faults: no event tells the address") for line in told)
    out = tmp_path / "out.parquet"
    assert cli("trace", "convert", str(path), str(out), "--json").json["faults"]["without_address"] == 1


def test_of_a_perf_data_that_is_cut(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "perf.data"
    one = Event(5_000_000_000, 1, 9, 1)
    data = in_file(sample(one) + lost(one, 2) + b"\x09\0\0\0\0\0\0\0")
    path.write_bytes(data)
    said = cli("trace", "info", str(path))
    assert said.status == 1
    assert "kernel     6.12.0" in said.out
    assert "damaged: at byte" in said.out
    assert "CPU 1: 2 between 5.000000000 and ?" in said.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "No such file"),
        ("words.txt", b"nothing of the kind\n", "not a recording"),
        ("perf.data", b"PERFILE2\0\0\0", "at byte"),
        ("trace.dat", b"\x17\x08\x44tracing7\0", "at byte"),
    ],
)
def test_what_is_no_recording(cli: Cli, name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    said = cli("trace", "info", str(path))
    said.refused(message)


def test_of_a_recording_on_large_pages(cli: Cli) -> None:
    path = recording("arm64/c-16k-dirty_log_dirty/trace.dat")
    told = cli("trace", "info", str(path), "--json").json
    assert told["page_size"] == 16384
    assert told["machine"] == "aarch64"
    assert told["faults"] == {"arm64": 1608}
    replayed = cli("replay", str(path))
    assert "1608 faults of arm64:16k@" in replayed.out  # nobody had to say so


def test_of_a_trace_dat_that_was_cut_before_its_events(cli: Cli, tmp_path: Path) -> None:
    whole = recording("arm64/a-kvm_page_table/trace.dat").read_bytes()
    path = tmp_path / "cut.dat"
    path.write_bytes(whole[:631_573])
    cli("trace", "info", str(path)).refused("at byte 0x9a315: the file was cut short", "after 631,573 bytes")


def test_of_a_perf_data_that_was_cut_before_its_formats(cli: Cli, tmp_path: Path) -> None:
    whole = recording("x86/p1-perf-longmode2-cpl3/perf.data").read_bytes()
    path = tmp_path / "cut.data"
    path.write_bytes(whole[:0x26B10])
    cli("trace", "info", str(path)).refused("at byte 0x26b10: the file was cut short", "formats", "at 0x49198")


@pytest.mark.parametrize("garbled", [b"name: kvm_emulate_insn\n", b"offset:"])
def test_one_garbled_format_leaves_the_others(cli: Cli, tmp_path: Path, garbled: bytes) -> None:
    source = recording("x86/p1-perf-longmode2-cpl3/perf.data")
    content = bytearray(source.read_bytes())
    at = content.index(garbled, content.index(b"name: kvm_emulate_insn\n"))
    content[at : at + 8] = b"\xff\x01zzzzzz"
    path = tmp_path / "perf.data"
    path.write_bytes(content)
    whole, said = cli("trace", "info", str(source), "--json").json, cli("trace", "info", str(path), "--json")
    assert said.status == 1
    assert said.json["damage"].startswith(f"at byte {at:#x}: " if garbled.startswith(b"name") else "at byte 0x")
    assert "emulate_insn" in said.json["damage"]
    assert said.json["faults"] == whole["faults"]
    assert said.json["events"]["kvm_mmu_set_spte"] == whole["events"]["kvm_mmu_set_spte"] > 0


def test_a_pipe_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    cli("trace", "info", str(path)).refused("a pipe, of which a binary recording cannot be read")


def test_a_garbled_field_is_told() -> None:
    head = b"name: kvm_exit\nID: 7\nformat:\n\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n"
    head += b"\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n"
    text = head + b'\tfield:u64 info1;\toffset:8;\tsize:8;\tsigned:0;\n\nprint fmt: "%d", REC->info1\n'
    for garbled, wrong in ((text, 0), (text.replace(b"\tfield:u64", b"\tfiexd:u64"), 1)):
        found, damage = Formats("x", [FormatText("kvm", garbled)]).chosen(None)
        assert list(found) == [7]
        assert len(damage) == wrong
        assert all("expected 'field:...', found" in str(d) for d in damage)
