"""`kvmfault trace record`: what it records of a real guest, how it ends, and what it leaves behind: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvmfault.errors import LiveError
from kvmfault.live import record, tasks, tracefs
from kvmfault.live.stopping import stopping
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import ReadStats
from tests.cli import Cli
from tests.tracefs import (
    MMIO,
    counts_of,
    guest_command,
    kvmfault,
    last_line,
    leftovers,
    mmio_exits,
    recordable,
    started,
)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def nothing_left(pid: int) -> None:
    names, mounts = leftovers()
    assert not [name for name in names if name.split("-")[1] == str(pid)]
    ours = [m for m in mounts if m[0] == "kvmfault"]
    assert not ours or names, "a mount stays without a kvmfault that uses it"


@recordable
def test_a_command_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "a.dat"
    run = kvmfault("trace", "record", "-o", str(file), "--", *guest_command())
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    told = out.strip().splitlines()[-1]
    assert told.startswith(f"{file}: ")
    exits = last_line("\n".join(out.splitlines()[:-1]))
    nothing_left(run.pid)
    assert [p.name for p in tmp_path.iterdir()] == ["a.dat"]
    assert f"{counts_of(file).total():,} events" in told
    assert mmio_exits(file) == exits[MMIO] > 0


@recordable
def test_only_the_process_that_was_named(tmp_path: Path) -> None:
    script = f"import sys; sys.stdin.readline(); import subprocess; subprocess.run({guest_command()!r}, check=True)"
    mine, other = (subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) for _ in range(2))
    file = tmp_path / "a.dat"
    run = kvmfault("trace", "record", "--json", "-o", str(file), "--pid", str(mine.pid))
    started(run)
    other.communicate("\n")
    out, _ = mine.communicate("\n")
    told, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert f'"events": {counts_of(file).total()},' in told
    assert mmio_exits(file) == last_line(out)[MMIO]
    nothing_left(run.pid)


@recordable
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_ends_it_and_the_file_is_whole(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "a.dat"
    run = kvmfault("trace", "record", "-o", str(file))
    started(run)
    busy = subprocess.Popen(guest_command(1000), stdout=-1, text=True)
    assert busy.stdout is not None
    busy.stdout.readline()
    run.send_signal(number)
    out, err = run.communicate()
    busy.kill()
    busy.communicate()
    assert (run.returncode, err) == (0, "")
    nothing_left(run.pid)
    counts = counts_of(file)
    assert counts
    assert f"{counts.total():,} events" in out


@recordable
def test_lost_events_are_told(tmp_path: Path) -> None:
    # a reader that never reads: everything but the last of a small buffer is lost
    file = tmp_path / "a.dat"
    run = kvmfault("trace", "record", "--json", "--buffer-size", "8", "-o", str(file))
    started(run)
    run.send_signal(signal.SIGSTOP)
    subprocess.run(guest_command(), check=True, stdout=subprocess.DEVNULL)
    run.send_signal(signal.SIGCONT)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 0
    assert "events were lost (" in err
    assert "--buffer-size" in err
    stats = ReadStats()
    for _ in open_recording(str(file)).frames(stats=stats):
        pass
    # a page says how many were lost before it where that fits, or only that some were
    assert stats.gaps
    assert stats.lost.total() <= sum(json.loads(out)["lost"].values())


@recordable
def test_what_is_killed_is_swept_up_by_the_next(tmp_path: Path) -> None:
    run = kvmfault("trace", "record", "-o", str(tmp_path / "a.dat"))
    started(run)
    run.kill()
    run.communicate()
    after = kvmfault("trace", "record", "-o", str(tmp_path / "b.dat"), "-d", "0.1")
    after.communicate()
    assert after.returncode == 0
    nothing_left(run.pid)


@recordable
def test_a_command_that_fails(cli: Cli, tmp_path: Path) -> None:
    done = cli("trace", "record", "-o", str(tmp_path / "a.dat"), "--", "sh", "-c", "exit 3")
    assert done.status == 1
    assert "sh ended with status 3" in done.err
    assert "none of these events happened" in done.err


@recordable
def test_a_command_that_is_ended(cli: Cli, tmp_path: Path) -> None:
    done = cli("trace", "record", "--json", "-o", str(tmp_path / "a.dat"), "-d", "0.2", "--", "sleep", "60")
    assert (done.status, done.json["status"]) == (0, None)


@recordable
def test_the_disk_fills_up(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_SPARE", 1 << 62)
    file = tmp_path / "a.dat"
    done = cli("trace", "record", "-o", str(file))
    assert done.status == 0
    assert f"kvmfault: {file}: the recording ends here: the disk has no room for more\n" in done.err
    assert counts_of(file) is not None


@recordable
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-e", "kvm_mmi"], ["no event or system 'kvm_mmi'", "kvm_mmio"]),
        (["-e", "kvm:nothing*"], ["'kvm:nothing*'"]),
        (["--pid", "4194305"], ["there is no process 4194305"]),
        (["--buffer-size", "60000000"], ["buffer_size_kb: Cannot allocate memory; a smaller --buffer-size"]),
        (["--", "/no/such/command"], ["/no/such/command: No such file"]),
        (["--", "/"], ["/: Permission denied"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused(cli: Cli, tmp_path: Path, arguments: list[str], says: list[str]) -> None:
    cli("trace", "record", "-d", "1", "-o", str(tmp_path / "a.dat"), *arguments).refused(*says)
    assert not list(tmp_path.iterdir())
    nothing_left(os.getpid())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "0"], ["--duration is a number of seconds above 0"]),
        (["-d", "nan"], ["--duration is a number of seconds above 0"]),
        (["--buffer-size", "1"], ["--buffer-size"]),
        (["--pid", "1", "--", "ls"], ["leave --pid out"]),
        (["-o", "/no/such/folder/a.dat"], ["/no/such/folder/a.dat cannot be written: No such file"]),
        (["-o", "/tmp"], ["/tmp is no file that could be written", "-o"]),
        (["-o", "/dev/full"], ["/dev/full is no file that could be written"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_before_anything_is_done(cli: Cli, arguments: list[str], says: list[str]) -> None:
    cli("trace", "record", *arguments).refused(*says)


def test_a_kernel_without_tracefs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = tmp_path / "empty"
    nothing.write_text("nodev\tproc\n")
    monkeypatch.setattr(tracefs, "FILESYSTEMS", nothing)
    monkeypatch.setattr(tracefs, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    cli("trace", "record", "-o", str(tmp_path / "a.dat")).refused("this kernel has no tracefs", "CONFIG_TRACING")


@recordable
def test_a_folder_of_its_own_where_the_usual_one_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounts").write_text("proc /proc proc rw 0 0\n")
    monkeypatch.setattr(tracefs, "USUAL", tmp_path / "missing")
    real = tracefs.MOUNTS
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(tracefs, "MOUNTS", tmp_path / "mounts")
        mount = tracefs._mount()
    monkeypatch.setattr(tracefs, "MOUNTS", real)
    assert (mount.place / "events" / "kvm").is_dir()
    tracefs._unmount(mount.place, said.append)
    assert not mount.place.exists()
    assert said == []


def test_without_permission(tmp_path: Path) -> None:
    e = PermissionError(13, "Permission denied")
    assert "locked down" in str(tracefs.refused(tmp_path, e)) or "sudo" in str(tracefs.refused(tmp_path, e))


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ((), {"kvm": ("kvm_entry", "kvm_exit"), "kvmmmu": ("fast",)}),
        (("kvm",), {"kvm": ("kvm_entry", "kvm_exit")}),
        (("kvm_e*",), {"kvm": ("kvm_entry", "kvm_exit")}),
        (("kvm*",), {"kvm": ("kvm_entry", "kvm_exit"), "kvmmmu": ("fast",)}),
        (("kvm:kvm_exit", "fast"), {"kvm": ("kvm_exit",), "kvmmmu": ("fast",)}),
        (("*:fast",), {"kvmmmu": ("fast",), "other": ("fast",)}),
        (("other:*",), {"other": ("fast",)}),
    ],
)
def test_which_events(tmp_path: Path, wanted: tuple[str, ...], chosen: dict[str, tuple[str, ...]]) -> None:
    for name in ("kvm/kvm_exit", "kvm/kvm_entry", "kvmmmu/fast", "other/fast"):
        (tmp_path / name).mkdir(parents=True)
    if wanted == ("kvm:kvm_exit", "fast"):
        (tmp_path / "other" / "fast").rmdir()
    assert tracefs.choose(tmp_path, wanted) == chosen


def test_events_of_kvm_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sched" / "sched_switch").mkdir(parents=True)
    with pytest.raises(LiveError, match="the kvm module is not loaded"):
        tracefs.choose(tmp_path, ())
    with pytest.raises(LiveError, match="near: sched"):
        tracefs.choose(tmp_path, ("sched_swich",))


def test_processes() -> None:
    tasks.check([])
    assert tasks.process_of(os.getpid()) == os.getpid()
    assert os.getpid() in tasks.family([os.getppid()])
    assert tasks.process_of(4194305) is None
    child = subprocess.Popen(["sleep", "60"])
    assert child.pid in tasks.family([os.getpid()])
    child.kill()
    child.wait()


def test_a_signal_asks_for_the_end() -> None:
    with stopping() as stop:
        before = stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert (before, stop.asked) == (False, True)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
