"""`kvmfault path`, `backend list`, `annotate`, `replay` where it is refused, and what every command has in common."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kvmfault.contract.target import backend, backends
from kvmfault.path.run import PATH, Locked, bind
from kvmfault.replay import kept
from tests.cli import Cli
from tests.conftest import ROOT

RECORDING: Final = str(ROOT / "tests" / "data" / "traces" / "guest_fault.trace.txt")
PACKED: Final = next((ROOT / "examples" / "recordings").glob("x86-ept*.gz"))
STEPS: Final = [s.name for entry in PATH for s in (entry.steps if isinstance(entry, Locked) else (entry,))]
LOCKED: Final = ["stale", "fit_size", "prepare_page", "keep_present", "protect_tracked", "install"]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


# path


@pytest.mark.parametrize("target", ["arm64", "arm64@6.12", "x86-ept", "x86-npt", "x86-shadow"])
def test_the_path_of_a_target(cli: Cli, target: str) -> None:
    done = cli("path", target)
    assert (done.status, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    on = backend(target)
    have = {step.name for step, _ in bind(on).named} - {"lock"}
    assert head.startswith(f"{on.name}: {len(have)} of {len(STEPS)} steps")
    assert len(lines) == len(STEPS)
    for number, (line, name) in enumerate(zip(lines, STEPS, strict=True), 1):
        assert line.split()[0] == str(number)
        assert (f" {name} " in line and "not on this target" not in line) if name in have else f"({name})" in line
    locked = [line.split()[2] for line in lines if line.split()[1] == "L"]
    assert {name.strip("()") for name in locked} == set(LOCKED)


def test_the_path_in_full(cli: Cli) -> None:
    done = cli("path", "x86-ept", "--long")
    for place in ("kvm_faultin_pfn", "is_page_fault_stale", "fast_page_fault", "kvm_tdp_mmu_map", "mmu_lock"):
        assert place in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines()[1:])
    data = cli("path", "x86-ept", "--json").json
    assert [step["name"] for step in data["steps"]] == STEPS
    assert all(step["doc"] for step in data["steps"])
    assert [s["name"] for s in data["steps"] if s["locked"]] == LOCKED
    assert "joint known_mmio_ept" in next(s for s in data["steps"] if s["name"] == "screen")["functions"]
    assert "joint apic_page" in next(s for s in data["steps"] if s["name"] == "settle_slot")["functions"]


# backend list


def test_backends(cli: Cli) -> None:
    done = cli("backend", "list")
    assert (done.status, done.err) == (0, "")
    head, *lines = done.out.splitlines()
    assert head.split() == ["backend", "formats", "kernels"]
    assert [line.split()[0] for line in lines] == list(backends())
    data = cli("backend", "list", "--json").json
    for entry in data:
        known = backends()[entry["name"]]
        assert entry == {
            "name": known.name, "formats": list(known.formats), "kernels": list(known.kernels), "about": known.about,
        }  # fmt: skip
    for name in (f"{e['name']}:{f}@{k}" for e in data for f in e["formats"] for k in e["kernels"]):
        assert backend(name).name == name


# annotate

LOG: Final = (
    "[   12.3] systemd[1]: Started something.\n"
    "[   12.5] kvm [1234]: Unsupported FSC: EC=0x24 xFSC=0x21 ESR_EL2=0x92000061\n"
    "\n"
    "KVM internal error. Suberror: 3, extra data 80000b0e 31 182 bfefc\n"
    "the end"
)


def test_a_log_is_copied_with_words_behind_faults(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text(LOG)
    for done in (cli("annotate", str(file)), cli("annotate", stdin=LOG), cli("annotate", "-", stdin=LOG)):
        assert (done.status, done.err) == (0, "")
        was, now = LOG.split("\n"), done.out.rstrip("\n").split("\n")
        assert len(now) == len(was)
        assert all(new.startswith(old) for old, new in zip(was, now, strict=True))
        said = [new[len(old) :] for old, new in zip(was, now, strict=True)]
        assert said[0] == said[2] == said[4] == ""
        assert said[1].startswith("  # arm64: write")
        assert said[3] == (
            "  # x86-ept: access at gpa 0xbfefc: the entry has reserved bits set"
            " (a misconfiguration has no qualification: the value is stale or reserved)"
        )


def test_every_byte_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "log"
    data = b"\xff\xfe binary \x00\x1b[31m caf\xc3\xa9\nESR_EL2=0x92000047 \xe9\n" + b"x" * 100_000 + b"\n"
    file.write_bytes(data)
    for words, given in (([str(file)], b""), ([], data)):
        done = subprocess.run(
            [sys.executable, "-m", "kvmfault.cli.main", "annotate", *words],
            input=given, cwd=ROOT, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == data.replace(b" \xe9\n", b" \xe9  # arm64: write: no entry maps the page\n")


def test_the_target_can_be_told(cli: Cli) -> None:
    line = "error_code=0x7 cr2=0x7fff12345678"
    assert "# x86-shadow: write at gva 0x7fff12345678" in cli("annotate", "--backend", "x86-shadow", stdin=line).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/nonexistent"], ["/nonexistent: no such file"]),
        (["/"], ["/: a directory"]),
        (["--backend", "nope"], ["no backend 'nope'"]),
        (["a", "b"], ["unexpected extra argument"]),
    ],
)
def test_annotate_refuses(cli: Cli, words: list[str], says: list[str]) -> None:
    cli("annotate", *words).refused(*says)


# replay


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], ["Missing argument"]),
        (["/nonexistent"], ["/nonexistent: no such file"]),
        (["/"], ["/: no file of raw pages"]),
        ([RECORDING, "--backend", "nope"], ["no backend 'nope' in target 'nope'"]),
        ([RECORDING, "--backend", "arm64:5k"], ["arm64 has no format '5k'"]),
        ([RECORDING, "--slots", "/nonexistent"], ["/nonexistent"]),
        (["{text}"], ["not a recording"]),
        (["{empty}"], ["{empty}"]),
        (["{noise_gz}"], ["{noise_gz}", "not a recording", "the compressed file is corrupt"]),
        ([RECORDING, "--slots", "{toml}"], ["{toml}: not TOML"]),
        ([RECORDING, "--slots", "{json}"], ["{json}"]),
        ([RECORDING, "--slots", "{text}"], ["{text}"]),
        ([RECORDING, "--frob"], ["No such option: --frob"]),
    ],
)
def test_replay_refuses(cli: Cli, tmp_path: Path, words: list[str], says: list[str]) -> None:
    contents = {
        "text": b"hello\nworld\n",
        "empty": b"",
        "noise_gz": b"\x1f\x8b\x08\x00" + b"noise" * 50,
        "toml": b"[slots",
        "json": b'{"slots": 3',
    }
    names = {name: str(tmp_path / f"a.{name.replace('noise_', 'txt.')}") for name in contents}
    for name, data in contents.items():
        Path(names[name]).write_bytes(data)
    filled = [[text.format(**names) if "{" in text else text for text in some] for some in (words, says)]
    cli("replay", *filled[0]).refused(*filled[1])


def test_a_list_of_slots_that_kvm_refuses_is_a_mistake_in_it(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "slots.toml"
    file.write_text("[[slot]]\nid = 0\ngpa = 0\nsize = 0x200000\n[[slot]]\nid = 7\ngpa = 0x1000\nsize = 0x1000\n")
    cli("replay", RECORDING, "--slots", str(file)).refused(str(file), "slot 7 at gpa 0x1000: EEXIST (overlap)")
    file.write_text(f"[[slot]]\nid = {'9' * 5000}\n")
    cli("replay", RECORDING, "--slots", str(file)).refused(str(file))


def test_a_damaged_recording_is_a_finding(cli: Cli, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gz"
    whole = PACKED.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    done = cli("replay", str(cut))
    assert (done.status, done.err) == (1, "")
    assert "the file is damaged: the compressed file ends early" in done.out


@pytest.mark.parametrize("command", [("trace", "info"), ("trace", "summary"), ("replay",)])
def test_garbled_lines_are_a_finding(cli: Cli, tmp_path: Path, command: tuple[str, ...]) -> None:
    file = tmp_path / "garbled.txt"
    lines = gzip.decompress(PACKED.read_bytes()).splitlines(keepends=True)
    lines[19:22] = [b"\x80#\x00garbled\n"] * 3
    file.write_bytes(b"".join(lines))
    for options in ((), ("--json",)):
        done = cli(*command, str(file), *options)
        assert done.status == 1
        assert done.out.count("3 lines could not be read, first at line 20") == 1


def test_annotate_reads_what_is_compressed(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "log.gz"
    file.write_bytes(gzip.compress(LOG.encode()))
    assert cli("annotate", str(file)) == cli("annotate", stdin=LOG)
    file.write_bytes(gzip.compress(LOG.encode())[:-12])
    assert cli("annotate", str(file)).status == 2


def test_a_line_that_names_no_encoding_is_left_alone(cli: Cli) -> None:
    line = "error_code=0x7 cr2=0x7fff12345678\n"
    assert cli("annotate", stdin=line).out == line
    assert "x86-shadow: " in cli("annotate", "--backend", "x86-shadow", stdin=line).out


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_streams_are_bad_input(closed: str) -> None:
    command = f"exec '{sys.executable}' -m kvmfault.cli.main decode arm64 - {closed}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, capture_output=True, check=False, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kvmfault: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/urandom", "/dev/tty"])
@pytest.mark.parametrize("command", [("trace", "info"), ("trace", "summary"), ("replay",), ("replay", "--check")])
def test_a_device_is_no_recording(cli: Cli, command: tuple[str, ...], device: str) -> None:
    cli(*command, device).refused(f"{device}: a device")
    if command == ("replay",):
        cli("replay", RECORDING, "--slots", device).refused(f"{device}: a device")


@pytest.mark.parametrize("first", [b"", b"\0" * 300])
def test_a_pipe_without_end_is_given_up(cli: Cli, first: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_HOPELESS", 1 << 20)
    cli("replay", "-", stdin=(first + b"no event\n") * 300_000).refused("<stdin>: not a recording", "does not end")


def test_replay_of_nothing_on_standard_input(cli: Cli) -> None:
    cli("replay", "-").refused()
    cli("replay", "-", stdin=b"\xff\xfe\x00garbage").refused()


def test_replay_of_a_file_that_was_cut(cli: Cli, tmp_path: Path) -> None:
    whole = gzip.compress(Path(RECORDING).read_bytes())
    file = tmp_path / "cut.txt.gz"
    file.write_bytes(whole[:-20])
    done = cli("replay", str(file))
    assert done.status in (0, 1)
    assert "note: the file is damaged: the compressed file ends early" in done.out
    shorter = tmp_path / "shorter.txt.gz"
    shorter.write_bytes(whole[:150])
    cli("replay", str(shorter)).refused("shorter.txt.gz", "no guest fault in this recording")


def test_replay_ends_with_a_report(cli: Cli) -> None:
    done = cli("replay", RECORDING, "--backend", "x86-ept")
    assert done.status in (0, 1)
    assert "outcome" in done.out
    assert "x86-ept:4k@7.4" in done.out
    data = cli("replay", RECORDING, "--json").json
    assert data["own"].startswith("arm64")
    assert (done.status == 0) == (sum(r["unexplained"] for r in data["results"] if r["own"]) == 0)


# In common.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["frob"], ["No such command 'frob'"]),
        (["decod", "arm64", "1"], ["No such command 'decod'"]),
        (["backend", "lst"], ["No such command 'lst'"]),
        (["path"], ["Missing argument 'TARGET'"]),
        (["path", "arm64", "x86-ept"], ["unexpected extra argument"]),
        (["path", "arm64:"], None),
        (["path", "@"], ["no backend ''"]),
        (["--frob"], ["No such option: --frob"]),
        (["path", "\udcff\udcfe"], ["no backend"]),
        (["path", "a" * 100_000], ["no backend"]),
    ],
)
def test_usage(cli: Cli, words: list[str], says: list[str] | None) -> None:
    done = cli(*words)
    if says is None:
        assert done.status == 0
    else:
        done.refused(*says)


@pytest.mark.parametrize("words", [[], ["backend"]])
def test_without_a_command_there_is_help(cli: Cli, words: list[str]) -> None:
    done = cli(*words)
    assert done.status == 2
    assert "Usage: " in done.out + done.err
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize("command", ["decode", "annotate", "path", "prove", "replay", "backend", "backend list"])
def test_every_command_has_help(cli: Cli, command: str) -> None:
    for flag in ("-h", "--help"):
        done = cli(*command.split(), flag)
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith("Usage: ")


@pytest.mark.parametrize("command", ["path x86-ept --long </dev/null", "decode arm64 - -b"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    # before everything is printed, and when the rest is flushed
    lines = "for i in {1..20000}; do echo 0x92000047; done 2>/dev/null"
    command = f"{lines} | {sys.executable} -m kvmfault.cli.main {command} | head -1; exit ${{PIPESTATUS[1]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1


def test_an_error_inside_is_not_hidden(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    # a bug must look like one: only errors of input become one line
    monkeypatch.setattr("kvmfault.cli.path.run", lambda *a, **k: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli("path", "arm64")


def test_an_interrupt_ends_quietly(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kvmfault.cli.path.run", interrupt)
    done = cli("path", "arm64")
    assert (done.status, done.out, done.err) == (130, "", "")
