"""Replay on recordings of real kernels: every fault decoded and run, nothing unexplained, counts as recorded."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from kvmfault.contract.outcome import Emulate, Error, Exit, Fixed, MmioAccess, Outcome, Reason, Retry
from kvmfault.contract.target import backend, backends
from kvmfault.errors import TraceError, UsageError
from kvmfault.replay import kept
from kvmfault.replay.run import replay
from kvmfault.replay.verdict import Evidence, judge
from kvmfault.trace.assemble import Assembler, assemble
from kvmfault.trace.events import FaultEvent
from kvmfault.trace.slotfile import read_slots
from kvmfault.types import Gpa
from tests.conftest import ROOT, TRACES, recordings

BUNDLED = ROOT / "examples" / "recordings"
FAULT_EVENTS = ("kvm_guest_fault", "kvm_page_fault")
PAGES_OF_16K = "c-16k"


def counted(folder: Path) -> Counter[str]:
    """Events by name as the recording's own counts file has them."""
    rows = (line.split() for line in (folder / "counts.txt").read_text().splitlines())
    return Counter({name: int(count) for count, name in rows})


def targets(folder: Path) -> list[str]:
    return ["arm64:16k"] if PAGES_OF_16K in folder.name else []


def faults(path: Path) -> list[tuple[str, dict[str, int]]]:
    made = assemble(str(path), Assembler(backends().values()))
    return [(e.target, dict(e.registers)) for e in made if isinstance(e, FaultEvent)]


@pytest.mark.parametrize("path", recordings("*/*/trace.txt*", largest=False))
def test_every_fault_of_a_recording_is_explained(path: Path) -> None:
    report = replay(str(path), targets(path.parent))
    own = report.results[0]
    assert own.is_own
    assert own.unexplained == []
    assert own.unexplained_count == 0
    assert own.faults == sum(report.assembled.faults.values()) > 0
    assert report.foreign == report.assembled.unclaimed == Counter()
    assert report.assembled.without_address == report.read.unreadable == 0
    assert report.read.misfits == Counter()
    if (path.parent / "counts.txt").exists():
        expected = counted(path.parent)
        if "tracing_mark_write" in expected:  # as the kernel's text names it
            expected["print"] = expected.pop("tracing_mark_write")
        assert report.read.events == expected
        recorded = sum(expected[name] for name in FAULT_EVENTS)
        assert own.faults >= recorded  # exits that are faults without an event of their own come on top
        if report.own.backend.name != "x86-ept":
            assert own.faults == recorded
    if report.own.backend.name == "x86-shadow":
        assert own.outcomes == Counter({"needs guest walk": own.faults})
    else:
        assert own.outcomes["needs guest walk"] == 0


@pytest.mark.parametrize("path", recordings("arm64/*/meta.json", largest=False))
def test_syndromes_agree_with_the_meta_file(path: Path) -> None:
    found = Counter(hex(registers["ESR_EL2"]) for _, registers in faults(path.parent / "trace.txt.gz"))
    assert found == Counter(json.loads(path.read_text())["esr"])


@pytest.mark.parametrize("path", recordings("*/*/report*.txt.gz", largest=False))
def test_other_text_forms_hold_the_same_faults(path: Path) -> None:
    found = faults(path)
    original = next((p for p in (path.parent / "trace.txt.gz", path.parent / "trace.txt") if p.exists()), None)
    if original is not None:
        assert found == faults(original)
    else:
        assert found


@pytest.mark.parametrize("path", recordings("x86aux/*/aux.txt*"))
def test_with_recorded_slots_nothing_is_unexplained(path: Path) -> None:
    trace = next(p for p in (path.parent / "trace.txt.gz", path.parent / "trace.txt") if p.exists())
    report = replay(str(trace), [], read_slots(path))
    assert report.unexplained == 0
    assert report.inference is not None
    assert (report.inference.matched > 0) is (report.own.backend.name != "x86-shadow")  # which reports no gpa
    assert report.results[0].refused_slots == Counter()


# -- the bundled recordings, always there --------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.trace.txt.gz")), ids=lambda p: p.name)
def test_a_bundled_recording_runs_on_every_backend(path: Path) -> None:
    report = replay(str(path), list(backends()))
    assert report.unexplained == 0
    assert {r.target.backend.name for r in report.results} == set(backends())
    assert len({r.faults for r in report.results}) == 1
    for result in report.results:
        assert sum(result.outcomes.values()) == result.faults > 0


def test_the_bundled_recordings_are_there() -> None:
    assert len(list(BUNDLED.glob("*.trace.txt.gz"))) >= 2


def test_recorded_slots_change_what_the_model_does(tmp_path: Path) -> None:
    trace = next(BUNDLED.glob("*longmode2.trace.txt.gz"))
    slots = read_slots(next(BUNDLED.glob("*longmode2.aux.txt.gz")))
    alone = tmp_path / trace.name
    alone.write_bytes(trace.read_bytes())
    given, inferred = replay(str(trace), [], slots), replay(str(alone))
    assert replay(str(trace)).slots.changes == slots.changes  # they lie beside it
    assert given.slots.timed
    seqs = [r.results[0].vm.invalidations.seq for r in (given, inferred)]
    assert seqs[0] > 0 == seqs[1]
    assert given.results[0].outcomes != inferred.results[0].outcomes


# -- bad input -----------------------------------------------------------------------------------------


def test_what_is_no_recording(tmp_path: Path) -> None:
    file = tmp_path / "no.txt"
    file.write_text("hello\nworld\n")
    with pytest.raises(TraceError, match="not a recording"):
        replay(str(file))
    with pytest.raises(UsageError, match="no such file"):
        replay(str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="no file of raw pages"):
        replay(str(tmp_path))
    file.write_text("  a-1  [000] .....  1.0: sched_switch: x\n")
    with pytest.raises(TraceError, match="no guest fault in this recording; events: sched_switch"):
        replay(str(file))


def test_an_error_code_without_its_exit_is_refused_unless_told(tmp_path: Path) -> None:
    line = "  q-7  [000] .....  1.5: kvm_page_fault: vcpu 0 rip 0x1000 address 0x2000 error_code 0x182\n"
    file = tmp_path / "alone.txt"
    file.write_text(line)
    with pytest.raises(TraceError, match="say what they are with --backend"):
        replay(str(file))
    report = replay(str(file), ["x86-ept"])
    assert report.results[0].outcomes == Counter({"fixed 4K rwx": 1})
    assert report.kinds == Counter({"write, missing": 1})


def test_what_nobody_named_does_not_claim_unknown_encodings(tmp_path: Path) -> None:
    # the first pass finds the own backend; that is no word from the user on the faults that tell of none
    file = tmp_path / "mixed.txt"
    known = gzip.decompress(next(BUNDLED.glob("x86-ept*.gz")).read_bytes()).decode()
    line = "  q-7  [000] .....  1.5: kvm_page_fault: vcpu 5 rip 0x1000 address 0x2000 error_code 0x182\n"
    file.write_text(known + line)
    found, told = replay(str(file)), replay(str(file), ["x86-ept"])
    assert found.assembled.unclaimed == Counter({"kvm_page_fault": 1})
    assert any("1 faults of unknown encoding were not replayed" in note for note in found.notes)
    assert found.notes[0].startswith("assumed: kernel ")
    assert told.results[0].faults == found.results[0].faults + 1
    assert not any(note.startswith("assumed: kernel") for note in told.notes)


def test_a_pipe_is_read_twice_and_keeps_its_name(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    recording = next(BUNDLED.glob("x86-ept*.gz"))
    for content, fails in ((recording.read_bytes(), False), (b"hello\n", True)):
        os.mkfifo(pipe)
        writer = Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        if fails:
            with pytest.raises(TraceError, match=rf"^{pipe}:1: not a recording"):
                replay(str(pipe))
        else:
            assert replay(str(pipe)).results[0].faults == replay(str(recording)).results[0].faults
        writer.join()
        pipe.unlink()


def test_a_pipe_is_kept_only_where_it_leaves_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gzip.decompress(next(BUNDLED.glob("x86-ept*.gz")).read_bytes())
    monkeypatch.setattr(kept, "_HOPELESS", len(content) // 4)
    monkeypatch.setattr(kept, "_PIECE", len(content) // 16)
    for free, fits in ((kept._ROOM, True), (kept._ROOM - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=BytesIO(content)))
        fails = nullcontext() if fits else pytest.raises(UsageError, match=r"^<stdin>: no room in .* give a file$")
        with fails, kept.seekable("-") as path:
            assert Path(path).read_bytes() == content


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_pipe_that_never_ends_is_given_up(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    squeeze = zlib.compressobj(wbits=31)

    class Endless(BytesIO):
        given = 0

        def read(self, n: int | None = -1) -> bytes:
            assert self.given < 1 << 25, "it is read for ever"
            while not (piece := squeeze.compress(b"y\n" * (n or 0) * 8) if packed else b"y\n" * ((n or 0) // 2)):
                pass
            self.given += len(piece)
            return piece

    monkeypatch.setattr(kept, "_HOPELESS", 1 << 22)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=Endless()))
    with pytest.raises(TraceError, match=r"^<stdin>: not a recording.* does not end in"):
        replay("-")


# -- verdicts ------------------------------------------------------------------------------------------

MMIO = Exit(Reason.MMIO, MmioAccess(Gpa(0), 4, is_write=False))
MAPPED = Fixed(4096, backend("arm64").format.entry(0, 12).prot)


@pytest.mark.parametrize(
    ("outcome", "seen", "explained"),
    [
        (MMIO, Evidence(device=True), True),
        (MMIO, Evidence(), False),
        (MMIO, Evidence(ended=False), True),  # the recording stops before it could tell
        (Emulate(), Evidence(gave_up=True), True),
        (Emulate(), Evidence(), False),
        (MAPPED, Evidence(), True),
        (MAPPED, Evidence(device=True), False),
        (MAPPED, Evidence(errno=14), False),
        (MAPPED, Evidence(errno=4), True),  # a signal, after the fault
        (Error(14), Evidence(), False),
        (Error(14), Evidence(errno=14), True),
        (Error(38), Evidence(undecoded=True), True),
        (Retry(), Evidence(device=True), False),
        (Retry(), Evidence(), True),
        (Exit(Reason.MEMORY_FAULT, errno=14), Evidence(), False),
    ],
)
def test_verdicts(outcome: Outcome, seen: Evidence, *, explained: bool) -> None:
    assert (judge(1, outcome, seen) is None) is explained


def test_the_recordings_are_looked_for_next_to_the_checkout() -> None:
    assert TRACES.parent.parent == ROOT.parent
