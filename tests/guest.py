"""A small guest on the KVM of this machine: `python -m tests.guest [TIMES]`.

Prints, as JSON, how often KVM_RUN ended by reason: after the first time, and at the end.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Final

from kvmfault.contract.outcome import Exit
from kvmfault.live.device import Device, DeviceKvm
from kvmfault.live.script import perform
from kvmfault.live.selfcheck import SelfCheck
from kvmfault.live.sequences import STANDING

SEQUENCES: Final = ("exits: where no slot is", "dirty log: bitmap")


def run(times: int) -> None:
    """Both sequences by every guest, over and over."""
    exits: Counter[str] = Counter()
    with Device() as device:
        guests = SelfCheck(device).live.guests
        for turn in range(times):
            for one, name in ((one, name) for name in SEQUENCES for one in guests):
                with DeviceKvm(device, one) as kvm:
                    for operation in STANDING[name]:
                        exits.update(e.reason.name for e in perform(kvm, operation).exits if isinstance(e, Exit))
            if turn in (0, times - 1):
                print(json.dumps(exits), flush=True)


if __name__ == "__main__":
    run(int(sys.argv[1]) if sys.argv[1:] else 1)
