"""What if: the accesses of a recording, made by the guests of other targets and settings.

A recorded fault tells of an access. On another target, or with other settings, the same access may find an entry that
an earlier one left, and no fault is taken; or it may fault more than once. What the recording cannot tell are accesses
that did not fault when it was made: where a variant has smaller entries than the recorded machine, it is flattered.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.outcome import Retry
from kvmfault.contract.target import Target
from kvmfault.machine.guest import AccessRun, Ended
from kvmfault.machine.state import MAX_VCPUS
from kvmfault.replay.machine import Machine
from kvmfault.replay.settings import HostSettings
from kvmfault.trace.events import FaultEvent

__all__ = ["Figures", "Variant"]

_NO_ACCESS: Final = frozenset({Cause.EXTERNAL, Cause.ADDRESS_SIZE, Cause.OTHER})
"""Faults that no entry of the table decides."""


@dataclass(slots=True)
class Figures:
    """What the accesses cost."""

    accesses: int = 0
    faults: int = 0
    avoided: int = 0
    """Accesses that took none."""
    repeated: int = 0
    """Faults after the first of an access."""
    retries: int = 0
    """Faults that ended in a retry."""
    exits: int = 0
    """Returns of KVM_RUN."""


class Variant(Machine):
    """One target with its settings. *own*: what the recorded registers belong to."""

    def __init__(self, target: Target, own: Target, *, host: HostSettings) -> None:
        super().__init__(target, host=host)
        self.own = own
        self.figures: Figures = Figures()
        self.ended: Counter[Ended] = Counter()
        self.skipped: Counter[str] = Counter()
        """Recorded faults that are no access to be made again, by reason."""
        self._vcpus: dict[str, int] = {}

    @property
    def name(self) -> str:
        """Target and what is otherwise for it."""
        return "+".join((self.target.name, *self.host.told()))

    def fault(self, event: FaultEvent) -> None:
        """The access that a recorded fault tells of is made again."""
        access = self.own.access(self.own.decode(**event.registers))
        why = _not_an_access(access)
        vcpu = self._vcpus.setdefault(event.vcpu, len(self._vcpus))
        if vcpu >= MAX_VCPUS:
            why = f"more than {MAX_VCPUS} vCPUs"
        if why or access.gpa is None:
            self.skipped[why or ""] += 1
            return
        run = self.vm.access(
            access.gpa + (access.offset or 0),
            _bytes(access),
            write=bool(access.write),
            fetch=bool(access.exec) and not access.write,
            vcpu=vcpu,
            described=access.size is not None,
            on_walk=access.on_walk,
            final=access.final,
            user=access.user,
            cache_op=access.cache_op,
        )
        self._count(run)

    def _count(self, run: AccessRun) -> None:
        figures = self.figures
        figures.accesses += 1
        figures.faults += len(run.faults)
        figures.avoided += not run.faults
        figures.repeated += max(len(run.faults) - 1, 0)
        figures.retries += sum(isinstance(fault.outcome, Retry) for fault in run.faults)
        figures.exits += len(run.exits)
        self.ended[run.ended] += 1

    def entries(self) -> dict[int, int]:
        """Leaves of the tables by their size in bytes, largest first, as the recording ends."""
        sizes = Counter(1 << entry.shift for vm in self.vms() for entry in vm.table.entries())
        return dict(sorted(sizes.items(), reverse=True))

    def table_bytes(self) -> int:
        """Memory of the tables, bytes, as the recording ends."""
        return sum(vm.table.tables() << vm.page_shift for vm in self.vms())

    def dirty_pages(self) -> int | None:
        """Pages in the dirty logs, never collected; None: no slot has one."""
        logs = [
            vm.log.bitmap(slot.number)
            for vm in self.vms()
            for as_id in range(vm.caps.nr_address_spaces)
            for slot in vm.slots.slots(as_id)
        ]
        pages = [len(log) for log in logs if log is not None]
        return sum(pages) if pages else None


def _not_an_access(access: Access) -> str:
    if access.gpa is None:
        return "no guest-physical address"
    if access.cause in _NO_ACCESS:
        return f"cause: {access.cause.name.lower().replace('_', ' ')}"
    return ""


def _bytes(access: Access) -> int:
    # what is known of the access, within its page: another page would be another access
    offset = access.offset or 0
    return max(min(access.size or 1, 4096 - offset), 1)
