"""Text recordings: every form gives the same events, exact columns in errors, nothing hostile crashes or hangs."""

from __future__ import annotations

import gzip
import io
import itertools
import re
import tracemalloc
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.errors import KvmfaultError, LayoutError, TraceError, UsageError
from kvmfault.trace import source, text
from kvmfault.trace.pattern import Fields, Misfit, Pattern
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.text import MAX_LINE, TextEvent, read_fields, read_text
from tests.conftest import recordings

DATA = Path(__file__).parent / "data" / "traces"
LINE = "           vcpu0-206     [001] d....    14.194088: fault: ipa 0x180000, hsr 0x82000084\n"
FAULT = Pattern("ipa {ipa:x}, hsr {hsr:x}")

KVM = {
    "kvm_exit": Pattern(
        "vcpu {vcpu_id:d} reason {reason:w} rip {guest_rip:x} info1 {info1:x} info2 {info2:x} "
        "intr_info {intr_info:x} error_code {error_code:x}",
        "reason {reason:w} rip {guest_rip:x} info {info1:x} {info2:x}",
        assigned="exit_reason:d guest_rip:x isa:d? info1:x info2:x intr_info:x error_code:x vcpu_id:d",
    ),
    "kvm_entry": Pattern("vcpu {vcpu_id:d}, rip {rip:x}", "vcpu {vcpu_id:d} rip {rip:x}"),
    "kvm_page_fault": Pattern("vcpu {vcpu_id:d} rip {guest_rip:x} address {fault_address:x} error_code {error_code:x}"),
}


def events(content: str | bytes, *, strict: bool = False) -> list[TextEvent]:
    data = content.encode() if isinstance(content, str) else content
    return list(read_text(io.BytesIO(data), strict=strict))


def number(fields: Fields | Misfit) -> dict[str, int]:
    assert isinstance(fields, Fields)
    return dict(fields.numbers)


# -- one recording in every form ---------------------------------------------------------------------

FORMS = ("trace", "report", "report-R", "report-t", "report-l", "report-raw-ts", "report-ts-diff", "report-two-files")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_events(form: str) -> None:
    path = DATA / f"lost.{form}.txt"
    want = list(read_text(DATA / "lost.report-t.txt"))
    stats = ReadStats()
    got = list(read_text(path, stats=stats, strict=True))
    assert [(e.name, e.pid, e.cpu) for e in got] == [(e.name, e.pid, e.cpu) for e in want]
    assert len(got) == 12
    assert {e.comm for e in got} == {"demand_p" if form == "report-l" else "demand_paging_t"}
    # Six decimals are rounded by the tools; the stamps themselves have nine, and raw ones are ticks.
    assert all(abs(a.time - b.time) <= 500 for a, b in zip(got, want, strict=True))
    assert stats.ticks == (form == "report-raw-ts")
    assert stats.lost == ({} if form == "trace" else {0: 1796})
    lines = path.read_text().splitlines()
    assert all(lines[e.line - 1][e.column - 1 :] == e.body for e in got)
    assert stats.lines == len(lines)


@pytest.mark.parametrize("form", FORMS)
def test_bodies_agree_across_forms(form: str) -> None:
    got = list(read_fields(DATA / f"lost.{form}.txt", KVM))
    assert Counter(e.name for e, _ in got) == {"kvm_exit": 3, "kvm_page_fault": 2, "kvm_entry": 2}
    first = {e.name: f for e, f in reversed(got)}
    assert first["kvm_page_fault"].numbers == {
        "vcpu_id": 0, "guest_rip": 0x40732C, "fault_address": 0xFCFFF15000, "error_code": 0x100000006,
    }  # fmt: skip
    exit_ = {"guest_rip": 0x40732C, "info1": 0x100000006, "info2": 0xFCFFF15000}
    if form != "report":  # the plugin leaves these out
        exit_ |= {"vcpu_id": 0, "intr_info": 0, "error_code": 0}
    if form == "report-R":
        exit_ |= {"exit_reason": 1024, "isa": 2}
    assert first["kvm_exit"].numbers == exit_
    assert dict(first["kvm_exit"].words) == (
        {} if form == "report-R" else {"reason": "EXIT_NPF" if form == "report" else "npf"}
    )


def test_text_and_raw_form_agree_on_another_host() -> None:
    pattern = {"kvm_guest_fault": Pattern("ipa {ipa:x}, hsr {hsr:x}, hxfar {hxfar:x}, pc {vcpu_pc:x}")}
    printed = [number(f) for _, f in read_fields(DATA / "guest_fault.trace.txt", pattern)]
    raw = [number(f) for _, f in read_fields(DATA / "guest_fault.report-R.txt", pattern)]
    assert printed[:4] == raw
    assert raw[0] == {"ipa": 0x180000, "hsr": 0x82000085, "hxfar": 0x401190, "vcpu_pc": 0x401190}


def test_perf_script_and_tick_clocks() -> None:
    got = list(read_text(DATA / "mmio.perf-script.txt", wanted=("kvm_mmio",), strict=True))
    assert [(e.comm, e.pid, e.cpu, e.time, e.name) for e in got] == [(":4468", 4468, 0, 5738906351000, "kvm_mmio")]
    stats = ReadStats()
    times = [e.time for e in read_text(DATA / "ticks.trace.txt", stats=stats)]
    assert times[0] == 432150792701
    assert stats.ticks


@pytest.mark.parametrize("folder", recordings("*/*/"))
def test_every_recording_reads_completely(folder: Path) -> None:
    names = re.compile(r"(trace|report.*|aux|perf-script)\.txt(\.gz)?$")
    mark = {"tracing_mark_write": "print"}  # counts were taken from the kernel's text, which prints its function
    for path in (p for p in folder.iterdir() if names.match(p.name)):
        stats = ReadStats()
        list(read_text(path, wanted=(), stats=stats, strict=True))
        counts = folder / "counts.txt"
        if not path.name.startswith("aux") and counts.exists():
            words = [line.split() for line in counts.read_text().replace(": ", " ").splitlines()]
            want = {w[w[0].isdigit()].split(":")[-1]: int(w[not w[0].isdigit()]) for w in words if len(w) == 2}
            assert stats.events == {mark.get(name, name): n for name, n in want.items()}


# -- lines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "comm", "pid", "cpu", "time", "name", "body"),
    [
        ("           vcpu0-206     [001] d....    14.194088: e: b", "vcpu0", 206, 1, 14194088000, "e", "b"),
        ("     kworker/0:1-22      [000] .....     1.000001: e: b", "kworker/0:1", 22, 0, 1000001000, "e", "b"),
        ("      a-1 [0] 3:-7       [002] dN.1.     2.5: e: b", "a-1 [0] 3:", 7, 2, 2500000000, "e", "b"),
        (" a-1 [0] 1: b: c-9   [003]    14.194088123: e: b-1 [0] 2: c: d", "a-1 [0] 1: b: c", 9, 3, 14194088123, "e",
         "b-1 [0] 2: c: d"),
        ("           <...>-12345678 [000] ..... 431953241357: e: b", "<...>", 12345678, 0, 431953241357, "e", "b"),
        ("     bash-1  2-99      (   98) [010] d..2.  9.000000: e: b", "bash-1  2", 99, 10, 9000000000, "e", "b"),
        ("            init-1       (-------) [000] d..1  9.000000: e: b", "init", 1, 0, 9000000000, "e", "b"),
        ("          vcpü 0-206     [001] d....    14.194088: e: b", "vcpü 0", 206, 1, 14194088000, "e", "b"),
        ("host.dat:  a-1 [0] 1: b: c-9   [003]    14.194088: e: b", "a-1 [0] 1: b: c", 9, 3, 14194088000, "e", "b"),
        (" é-1 [0]1: b: c-9   [003]    14.194088: e: b", "é-1 [0]1: b: c", 9, 3, 14194088000, "e", "b"),
        ("CPU 0/KV-1234   12d.h1.    14.194088: e: b", "CPU 0/KV", 1234, 12, 14194088000, "e", "b"),
        ("host.dat:        CPU 0/KVM-1234  [001]    14.194088: e: b", "CPU 0/KVM", 1234, 1, 14194088000, "e", "b"),
        ("       CPU 0/KVM  1234 [001]    14.194088:      kvm:e: b", "CPU 0/KVM", 1234, 1, 14194088000, "e", "b"),
        ("       CPU 0/KVM  1230/1234 [001]    14.194088123:  kvm:e: b", "CPU 0/KVM", 1234, 1, 14194088123, "e", "b"),
        ("           vcpu0-206   [001]    14.194088: e: ", "vcpu0", 206, 1, 14194088000, "e", ""),
        ("           vcpu0-206   [001]    14.194088: e:", "vcpu0", 206, 1, 14194088000, "e", ""),
        ("           vcpu0-206   [001]    14.194088: e: b\0c\r", "vcpu0", 206, 1, 14194088000, "e", "b\0c"),
    ],
)  # fmt: skip
def test_a_line(line: str, comm: str, pid: int, cpu: int, time: int, name: str, body: str) -> None:
    [event] = events(line + "\n", strict=True)
    assert (event.comm, event.pid, event.cpu, event.time, event.name, event.body) == (comm, pid, cpu, time, name, body)
    assert line[event.column - 1 :].rstrip() == body


@given(
    comm=st.text(st.sampled_from("-[]:./ 0123456789aé"), max_size=15)
    .map(str.strip)
    .filter(lambda comm: len(comm.encode()) < 16),
    pid=st.integers(0, 4_194_304),
    cpu=st.integers(0, 8191),
    ns=st.integers(0, 1 << 62),
    body=st.text(st.sampled_from("-[]:=./ 0123456789ax"), max_size=40).map(str.strip),
    form=st.sampled_from(("trace", "report")),
)
def test_whatever_a_task_is_called_its_line_reads_back(
    comm: str, pid: int, cpu: int, ns: int, body: str, form: str
) -> None:
    ns, stamp = ns // 1000 * 1000, f"{ns // 10**9}.{ns % 10**9 // 1000:06d}"
    padded = " " * (16 - len(comm.encode())) + comm  # the tools count bytes
    flags = "d..1. " if form == "trace" else ""
    [event] = events(f"{padded}-{pid:<7d} [{cpu:03d}] {flags}{stamp:>12s}: kvm_exit: {body}\n")
    assert (event.comm, event.pid, event.cpu, event.time, event.body) == (comm, pid, cpu, ns, body)


HEADERS = (
    "# tracer: nop", "##### CPU 1 buffer started ####", "cpus=2", "CPU 1 is empty", "version = 7", "trace.dat: cpus=2",
    " => do_syscall_64", "",
)  # fmt: skip


def test_headers_are_silent_and_the_rest_is_counted() -> None:
    stats = ReadStats()
    junk = [f"junk {n}" for n in range(7)]
    content = "\n".join([*HEADERS, "CPU:1 [LOST 12 EVENTS]", "CPU:1 [3 EVENTS DROPPED]", "CPU:0 [LOST EVENTS]", *junk])
    got = list(read_text(io.BytesIO((content + "\n" + LINE * 2).encode()), wanted=("other",), stats=stats))
    assert got == []
    assert (stats.events, stats.skipped) == ({"fault": 2}, {"fault": 2})
    assert (stats.lost, stats.lost_unknown) == ({1: 15}, 1)
    assert (stats.unreadable, stats.unreadable_lines) == (7, [12, 13, 14, 15, 16])
    assert stats.lines == len(HEADERS) + 3 + 7 + 2


def test_lines_that_cannot_be_read_are_damage() -> None:
    stats = ReadStats()
    list(read_text(io.BytesIO((LINE + "junk\n" + LINE).encode()), stats=stats))
    assert stats.damage == "1 lines could not be read, first at line 2"
    stats = ReadStats()
    stack = "\tffff8000810a1b2c fault+0x1c ([kernel.kallsyms])\n"  # what `perf script` prints after `record -g`
    list(read_text(io.BytesIO((LINE + stack + "\n" + LINE).encode()), stats=stats))
    assert stats.damage is None


@pytest.mark.parametrize("place", [0, 2, 150])
@pytest.mark.parametrize("ticks", [False, True])
def test_one_garbled_stamp_does_not_make_another_clock(place: int, ticks: bool) -> None:
    good, bad = LINE, LINE.replace("14.194", "14194")
    good, bad = (bad, good) if ticks else (good, bad)
    lines = [good] * 200
    lines[place] = bad
    stats = ReadStats()
    got = list(read_text(io.BytesIO("".join(lines).encode()), stats=stats))
    assert (len(got), stats.ticks, stats.unreadable_lines) == (199, ticks, [place + 1])


def test_a_recording_without_events_is_none_the_less_one() -> None:
    assert events("# tracer: nop\n#\n") == []
    assert events("cpus=2\nCPU 0 is empty\n") == []


# -- bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "body", "numbers", "words"),
    [
        (FAULT, "ipa 0x180000, hsr 0x82000084", {"ipa": 0x180000, "hsr": 0x82000084}, {}),
        (FAULT, "ipa  180000,  hsr 82000084  ", {"ipa": 0x180000, "hsr": 0x82000084}, {}),
        (FAULT, "hsr=0x82000084 other=a,b ipa=180000", {"ipa": 0x180000, "hsr": 0x82000084}, {}),
        (FAULT, "(sym+0x4/0x4f0 [kvm] <- caller) hsr=1 ipa=2 ipa=3", {"ipa": 2, "hsr": 1}, {}),
        (FAULT, "why(hsr=1 hsr=2 ipa=3", {"ipa": 3, "hsr": 2}, {}),
        (FAULT, "ipa 0xffffffffffffffff, hsr 0", {"ipa": 2**64 - 1, "hsr": 0}, {}),
        (Pattern("reason {reason:w} ({code:d})"), "reason restart (4)", {"code": 4}, {"reason": "restart"}),
        (Pattern("a {n:d}", "b {m:d} {k:x}"), "b -7 f", {"m": -7, "k": 15}, {}),
        (Pattern("a {n:d}", "b {n:d} {k:x}"), "n=0x10", {"n": 16}, {}),
        (Pattern(assigned="slot:d kvm:x? why:w?"), "slot=3 why=so", {"slot": 3}, {"why": "so"}),
    ],
)
def test_a_body(pattern: Pattern, body: str, numbers: dict[str, int], words: dict[str, str]) -> None:
    assert pattern.read(body) == Fields(numbers, words)


HEX = "a hexadecimal number of up to 64 bits"


@pytest.mark.parametrize(
    ("pattern", "body", "at", "why"),
    [
        (FAULT, "ipa 0x180000; hsr 1", 12, "expected ',', found '; hsr 1'"),
        (FAULT, "ipa zz, hsr 1", 4, f"expected ipa as {HEX}, found 'zz, hsr 1'"),
        (FAULT, "ipa 0x10000000000000000, hsr 1", 22, "expected ',', found '0, hsr 1'"),
        (FAULT, "ipa 1, hsr", 10, "expected a space, found the end of the line"),
        (FAULT, "ipa 1, hsr 2 and more", 12, "expected the end of the line, found ' and more'"),
        (FAULT, "", 0, "expected 'ipa', found the end of the line"),
        (FAULT, "unknown=1", 0, "expected 'ipa', found 'unknown=1'"),
        (FAULT, "ipa=1 pc=2", 10, "expected hsr=, found the end of the line"),
        (FAULT, "ipa=1 hsr=2g", 10, f"expected hsr as {HEX}, found '2g'"),
        (FAULT, "ipa=1 hsr=" + "f" * 50, 10, f"expected hsr as {HEX}, found '{'f' * 40}'..."),
        (Pattern("a {n:d}", "a b {m:d}"), "a b c", 4, "expected m as a number, found 'c'"),
        (Pattern(assigned="slot:d"), "what", 0, "expected name=value, found 'what'"),
    ],
)
def test_a_body_that_fits_nothing_says_where(pattern: Pattern, body: str, at: int, why: str) -> None:
    misfit = pattern.read(body)
    assert isinstance(misfit, Misfit)
    assert (misfit.at, str(misfit)) == (at, why)


@pytest.mark.parametrize("template", ["no field", "{a}", "{a:q}", "{a:x} {b", "{a:x} {a:d}", "a}{b:x}"])
def test_wrong_templates_are_refused(template: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(repr(template))):
        Pattern(template)


def test_wrong_assigned_fields_are_refused() -> None:
    with pytest.raises(LayoutError, match="field 'a:q': expected name:x"):
        Pattern(assigned="b:x a:q")


@given(st.text())
def test_a_pattern_never_raises(body: str) -> None:
    assert isinstance(KVM["kvm_exit"].read(body), Fields | Misfit)


def test_strict_names_file_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("# tracer: nop\n" + LINE + LINE.replace("0x82", "0y82"))
    with pytest.raises(TraceError) as error:
        list(read_fields(path, {"fault": FAULT}))
    column = LINE.index("0x82") + 2
    assert str(error.value) == f"{path}:3:{column}: fault: expected ',', found 'y82000084'".replace(
        "','", "the end of the line"
    )
    stats = ReadStats()
    assert len(list(read_fields(path, {"fault": FAULT}, stats=stats, strict=False))) == 1
    assert (stats.misfits, stats.misfit_lines) == ({"fault": 1}, [3])


def test_a_strange_line_is_an_error_only_if_asked() -> None:
    with pytest.raises(TraceError, match=r"<stream>:2:1: expected 'task-pid .*, found 'what is this'$"):
        events(LINE + "what is this\n", strict=True)
    assert len(events(LINE + "what is this\n" + LINE)) == 2


# -- what is no recording, or a damaged one ----------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "<stream>:1: not a recording: expected 'task-pid .*, found nothing"),
        (b"hello\nworld\n", "<stream>:1: not a recording: expected 'task-pid .*, found 2 lines that are not"),
        (b"# a shell script\necho\n", "<stream>:1: not a recording"),
        (b"\x17\x08\x44tracing7\0", "<stream>:1: a binary trace.dat: give the output of `trace-cmd report -R` instead"),
        (gzip.compress(b"PERFILE2...", mtime=0), "<stream>:1: a binary perf.data"),
        (b"\0" * 100, "<stream>:1: not a recording"),
        (b"x\n" * 50_000, "found 10000 lines that are not"),
    ],
)
def test_what_is_no_recording_is_said_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message) as error:
        events(content)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.txt: No such file or directory$"):
        list(read_text(tmp_path / "none.txt"))
    with pytest.raises(UsageError, match=r": Is a directory$"):
        list(read_text(str(tmp_path)))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(LINE.encode()))))
    assert [e.name for e in read_text("-")] == ["fault"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"x")))
    with pytest.raises(TraceError, match=r"^<stdin>:1: "):
        list(read_text("-"))


def test_a_pipe_that_gives_single_bytes() -> None:
    class Pipe:
        def __init__(self, content: bytes) -> None:
            self.content = iter(content)

        def read(self, _n: int = -1, /) -> bytes:
            return bytes(itertools.islice(self.content, 1))

    assert [e.name for e in read_text(Pipe(gzip.compress(LINE.encode() * 2)))] == ["fault", "fault"]


def test_bytes_that_are_no_text_stay_inside_their_line() -> None:
    got = events(LINE.encode().replace(b"vcpu0", b"v\xff\xfe\x000") + LINE.encode())
    assert [e.comm for e in got] == ["v\ufffd\ufffd\x000", "vcpu0"]


@pytest.mark.parametrize("size", [MAX_LINE - len(LINE), MAX_LINE, 1 << 18, 3 << 18])
def test_long_lines_are_dropped_and_counted(size: int) -> None:
    stats = ReadStats()
    long = LINE[:-1] + " " * size + "x\n"
    got = list(read_text(io.BytesIO((LINE + long + LINE).encode()), stats=stats))
    fits = len(long) - 1 <= MAX_LINE
    assert [e.line for e in got] == ([1, 2, 3] if fits else [1, 3])
    assert stats.unreadable == (not fits)
    if not fits:
        with pytest.raises(TraceError, match=f"<stream>:2:1: expected .*, found longer than {MAX_LINE} characters"):
            events(LINE + long, strict=True)


@pytest.mark.parametrize("chunk", [64, 1 << 18])
def test_a_compressed_file_cut_anywhere_gives_what_it_holds(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_CHUNK", chunk)
    content = (DATA / "guest_fault.trace.txt").read_bytes() + LINE.encode() * 200
    packed = gzip.compress(content)
    for cut in range(12, len(packed) - 1, 7):
        whole_lines = zlib.decompressobj(31).decompress(packed[:cut]).rpartition(b"\n")[0]
        want = events(b"# tracer:\n" + whole_lines)
        stats = ReadStats()
        got: list[TextEvent] = []
        with suppress(TraceError):  # no line is left of it
            for event in read_text(io.BytesIO(packed[:cut]), stats=stats):
                got.append(event)  # noqa: PERF402 - what came before an error counts
        assert [(e.time, e.body) for e in got] == [(e.time, e.body) for e in want]
        assert stats.damage is not None


def test_a_corrupt_compressed_file_is_reported() -> None:
    packed = bytearray(gzip.compress(LINE.encode() * 10_000, 0))
    packed[-100_000] ^= 0xFF  # not compressed, so only the check at the end notices
    stats = ReadStats()
    assert len(list(read_text(io.BytesIO(bytes(packed)), stats=stats))) > 1000
    assert stats.damage is not None
    assert stats.damage.startswith("the compressed file is corrupt: Error -3")
    with pytest.raises(TraceError, match="found the compressed file is corrupt: Error -3"):
        events(bytes(packed[:10]) + b"\xff" * 100)


def test_compressed_files_joined_are_one() -> None:
    stats = ReadStats()
    packed = gzip.compress(LINE.encode()) + gzip.compress(LINE.encode() * 2) + b"\0" * 9
    assert len(list(read_text(io.BytesIO(packed), stats=stats))) == 3
    assert stats.damage is None
    assert stats.bytes == len(packed)


@pytest.mark.parametrize("unit", [b"\0", LINE.encode()])
def test_a_small_file_that_expands_needs_little_memory(unit: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_HOPELESS_LINE", 1 << 22)
    packed = gzip.compress(unit * ((3 << 21) // len(unit)), 1)
    stats = ReadStats()
    tracemalloc.start()
    try:
        if unit == b"\0":
            with pytest.raises(TraceError, match="not a recording"):
                list(read_text(io.BytesIO(packed), wanted=(), stats=stats))
            assert stats.damage is not None
            assert stats.damage.startswith("no end of line in 4")
        else:
            assert list(read_text(io.BytesIO(packed), wanted=(), stats=stats)) == []
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_end_in_events_or_one_line(content: bytes, packed: bool) -> None:
    source = io.BytesIO(gzip.compress(content) if packed else b"\x1f\x8b" + content)
    error = None
    try:
        list(read_fields(source, KVM))
    except KvmfaultError as e:
        error = str(e)
    assert error is None or "\n" not in error
