"""What the live view counts of arm64."""

from __future__ import annotations

from typing import Final

from arch.common import WATCHED as COMMON
from kvmfault.contract.tracepoints import recorded
from kvmfault.contract.watched import Sort, Watched, WatchedEvents

WATCHED: Final[WatchedEvents] = {
    **COMMON,
    "kvm_guest_fault": Watched(Sort.FAULT),
    "kvm_access_fault": Watched(Sort.ENTRY, "", recorded("ipa") << 0),
    "kvm_mmio_nisv": Watched(Sort.MMIO, "", recorded("ipa") << 0),
    "kvm_exit": Watched(Sort.EXIT, "ret"),
}
