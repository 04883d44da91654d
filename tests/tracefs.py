"""Recording for real: where it can be done, and a guest to record."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from kvmfault.contract.outcome import Exit, Reason
from kvmfault.errors import LiveError
from kvmfault.live.device import Device, DeviceKvm
from kvmfault.live.script import perform
from kvmfault.live.selfcheck import SelfCheck
from kvmfault.live.sequences import STANDING
from kvmfault.live.tap import Wanted, tap
from kvmfault.live.tracefs import MOUNTS
from tests.conftest import ROOT

SEQUENCES: Final = ("exits: where no slot is", "dirty log: bitmap")


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


def guest(times: int = 1) -> dict[str, int]:
    """Run a small guest in this process; how often KVM_RUN ended by reason, and the accesses to devices."""
    exits: Counter[str] = Counter()
    with Device() as device:
        live = SelfCheck(device).live
        for name in SEQUENCES * times:
            for one in live.guests:
                with DeviceKvm(device, one) as kvm:
                    for operation in STANDING[name]:
                        answer = perform(kvm, operation)
                        exits.update(e.reason.name for e in answer.exits if isinstance(e, Exit))
    return dict(exits)


def guest_command(times: int = 1) -> list[str]:
    """A command that runs ``guest`` and prints what it gives."""
    return [sys.executable, "-c", f"import json; from tests.tracefs import guest; print(json.dumps(guest({times})))"]


def leftovers() -> tuple[list[str], list[list[str]]]:
    """Instances of kvmfault, and mounts of tracefs as /proc/mounts has them."""
    mounts = [line.split(" ") for line in MOUNTS.read_text().splitlines() if line.split(" ")[2] == "tracefs"]
    found = [p.name for mount in mounts for p in Path(mount[1], "instances").glob("kvmfault-*")]
    return found, mounts


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


def last_line(text: str) -> dict[str, int]:
    """What ``guest_command`` printed."""
    found: dict[str, int] = json.loads(text.strip().splitlines()[-1])
    return found


MMIO: Final = Reason.MMIO.name
