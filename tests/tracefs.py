"""Recording for real: where it can be done, and a guest to record."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from kvmfault.contract.outcome import Reason
from kvmfault.errors import LiveError
from kvmfault.live.device import Device
from kvmfault.live.selfcheck import SelfCheck
from kvmfault.live.tap import Wanted, tap
from kvmfault.live.tracefs import MOUNTS
from kvmfault.trace.opening import open_recording
from tests.conftest import ROOT


def _why_not() -> str | None:
    try:
        SelfCheck(Device()).device.close()
    except LiveError as e:
        return f"no usable KVM: {e}"
    try:
        with tap(Wanted(), print):
            return None
    except LiveError as e:
        return f"no usable tracefs: {e}"


WHY_NOT: Final = _why_not()
recordable = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
"""For tests that record what this machine's KVM does."""


def guest_command(times: int = 1) -> list[str]:
    """A command that runs the small guest of tests/guest.py."""
    return [sys.executable, "-m", "tests.guest", str(times)]


def leftovers() -> tuple[list[str], list[list[str]]]:
    """Instances of kvmfault, and mounts of tracefs as /proc/mounts has them."""
    mounts = [line.split(" ") for line in MOUNTS.read_text().splitlines() if line.split(" ")[2] == "tracefs"]
    found = [p.name for mount in mounts for p in Path(mount[1], "instances").glob("kvmfault-*")]
    return found, mounts


def started(run: subprocess.Popen[str]) -> None:
    """Wait until the kvmfault *run* records."""
    end = time.monotonic() + 60
    while True:
        found, mounts = leftovers()
        paths = [Path(m[1], "instances", name) for m in mounts for name in found if name.endswith(f"-{run.pid}")]
        with suppress(OSError):
            # it is switched off before its events are on
            switches = ("events/kvm/enable", "tracing_on")
            if paths and all((paths[0] / name).read_text().strip() == "1" for name in switches):
                return
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end, "it does not begin"
        time.sleep(0.02)


def kvmfault(*arguments: str) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "kvmfault.cli.main", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=ROOT, env=environment)


def report(file: Path) -> str | None:
    """``trace-cmd report``; None where that is not installed."""
    tool = shutil.which("trace-cmd")
    if tool is None:
        return None
    return subprocess.run([tool, "report", "-i", str(file)], capture_output=True, text=True, check=True).stdout


def reported(text: str) -> Counter[str]:
    """Events by name in the output of ``trace-cmd report``."""
    return Counter(re.findall(r"^ .*? \[\d+\] +[\d.]+: (\w+):", text, re.MULTILINE))


def counts_of(file: Path) -> Counter[str]:
    """Events by name as our reader has them; where trace-cmd is installed, it has to agree."""
    counts: Counter[str] = Counter()
    for frames in open_recording(str(file)).frames():
        counts.update({name: len(frame) for name, frame in frames.items()})
    text = report(file)
    assert text is None or reported(text) == counts
    return counts


def mmio_exits(file: Path) -> int:
    """How often KVM_RUN returned for an access to a device."""
    every = open_recording(str(file)).frames(["kvm_userspace_exit"])
    exits = (frames["kvm_userspace_exit"] for frames in every if frames)
    return sum(int(((frame["reason"] == Reason.MMIO.value) & (frame["errno"] == 0)).sum()) for frame in exits)


def last_line(text: str) -> dict[str, int]:
    """What the guest printed last."""
    found: dict[str, int] = json.loads(text.strip().splitlines()[-1])
    return found


MMIO: Final = Reason.MMIO.name
