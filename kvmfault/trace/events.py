"""What a recording says, in neutral terms. A backend makes these from the kernel's fields of its tracepoints.

Everywhere: ``line`` is that of the recording, from 1 (0: not from a recording), ``time`` its stamp
(see `kvmfault.trace.text.TextEvent`), ``vcpu`` the vCPU as the recording names it: its number, or the
task's pid where events carry none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from kvmfault.types import Gpa, Hva

__all__ = [
    "AgeEvent",
    "EntryEvent",
    "Event",
    "ExitEvent",
    "FaultEvent",
    "MmioEvent",
    "SlotEvent",
    "UnmapEvent",
    "UserspaceExitEvent",
]


@dataclass(frozen=True, slots=True)
class FaultEvent:
    """A guest page fault that reached KVM's fault path: its registers, to be decoded by backend ``target``."""

    line: int
    time: int
    vcpu: str
    target: str
    registers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MmioEvent:
    """An emulated access to a GPA without memory. (kernel: kvm_mmio)

    ``size`` in bytes. ``satisfied`` is False for the read that leaves for user space, whose answer
    comes in a second event; ``value`` is None there.
    """

    line: int
    time: int
    vcpu: str
    gpa: Gpa
    size: int
    is_write: bool
    value: int | None
    satisfied: bool


@dataclass(frozen=True, slots=True)
class EntryEvent:
    """The vCPU enters the guest. (kernel: kvm_entry)"""

    line: int
    time: int
    vcpu: str


@dataclass(frozen=True, slots=True)
class ExitEvent:
    """The vCPU left the guest; ``reason`` in the architecture's words. (kernel: kvm_exit)"""

    line: int
    time: int
    vcpu: str
    reason: str


@dataclass(frozen=True, slots=True)
class UnmapEvent:
    """The host unmaps [start, end) of user space, in a task that may be a vCPU. (kernel: kvm_unmap_hva_range)"""

    line: int
    time: int
    start: Hva
    end: Hva
    vcpu: str = ""


@dataclass(frozen=True, slots=True)
class AgeEvent:
    """The host asks whether [start, end) was used; ``test_only`` leaves the access state as it is.

    (kernel: kvm_age_hva, kvm_test_age_hva)
    """

    line: int
    time: int
    start: Hva
    end: Hva
    test_only: bool


@dataclass(frozen=True, slots=True)
class UserspaceExitEvent:
    """KVM_RUN returns. ``errno`` is 0 or positive; with one, ``reason`` says nothing. (kernel: kvm_userspace_exit)"""

    line: int
    time: int
    vcpu: str
    reason: str
    errno: int


@dataclass(frozen=True, slots=True)
class SlotEvent:
    """User space sets a memslot. (kernel: __kvm_set_memory_region)

    ``slot`` is the address space in the high 16 bits and the id in the low ones; ``flags`` are
    KVM_MEM_*; ``size`` 0 deletes. ``ret`` is 0 or a negative errno, None if the recording does not tell.
    ``end`` is the time of the return; between ``time`` and it the change is under way.
    """

    line: int
    time: int
    vm: str
    slot: int
    flags: int
    gpa: Gpa
    size: int
    hva: Hva
    ret: int | None
    end: int | None = None


Event: TypeAlias = (
    FaultEvent | MmioEvent | EntryEvent | ExitEvent | UnmapEvent | AgeEvent | UserspaceExitEvent | SlotEvent
)
