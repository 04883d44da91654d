"""Faults as the recording shows them, in step with the model: what happened between two steps happens there too.

With probes of the fault's functions a fault is the task's next one between call and return of its handler. Without, it
lasts from its trace event to the vCPU's next entry, and what the host answered is read from what was installed.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from errno import EFAULT
from typing import Final

from kvmfault.check.flight import Flight
from kvmfault.check.happenings import Happenings
from kvmfault.check.judge import Judge
from kvmfault.check.world import CheckedVm
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Kind, X
from kvmfault.contract.probes import Said
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.errors import ModelError
from kvmfault.trace.events import EntryEvent, Event, FaultEvent, MmioEvent, UnmapEvent, UserspaceExitEvent
from kvmfault.trace.slots import SlotSource
from kvmfault.trace.truth import Told, Truth
from kvmfault.types import Gfn, Gpa, Gva

__all__ = ["Episodes"]

_MAX_VCPUS: Final = 64


@dataclass(slots=True)
class _Vcpu:
    vm: CheckedVm
    number: int
    born: int
    """How many VMs there were when it was first seen."""


class Episodes(Happenings):
    """Feeds on everything that a recording says, in order of time."""

    def __init__(self, target: Target, slots: SlotSource, judge: Judge, probed: frozenset[Said]) -> None:
        super().__init__(target, slots, judge, probed)
        self.faults: int = 0
        self.unpaired: Counter[str] = Counter()
        """Faults of the recording that no probe showed, and the other way round."""
        self.by_probes: bool = {Said.FAULT, Said.RETURNED} <= probed
        """Probes tell where a fault's handling begins and ends."""
        self._vcpus: dict[tuple[int, int], _Vcpu] = {}
        self._waiting: dict[int, deque[FaultEvent]] = {}
        self._prefaults: dict[int, tuple[Told, Flight | None]] = {}
        self._entered: dict[int, int] = {}
        self._paging: dict[int, bool] = {}
        self._handlers = {
            **self.handlers(),
            Said.FAULT: self._fault,
            Said.REPAIR_TRIED: self._repair_tried,
            Said.REPAIRED: self._repaired,
            Said.PINNED: self._pinned,
            Said.REQUESTED: self._requested,
            Said.CHANGED: self._changed,
            Said.INSTALLED: self._installed,
            Said.SETTING: self._setting,
            Said.SET: self._set,
            Said.UNSYNC: self._unsync,
            Said.UNSYNCED: self._unsynced,
            Said.MAPPED: self._mapped,
            Said.DECIDED: self._decided,
            Said.RETURNED: self._returned,
            Said.WALK: self._walk,
            Said.WALK_ENTRY: self._walk_entry,
            Said.PREFAULT: self._prefault,
            Said.PREFAULTED: self._prefaulted,
        }

    def feed(self, event: Truth) -> None:
        """One thing that the recording says."""
        self.slots_until(event.time)
        if not isinstance(event, Told):
            self._event(event)
            return
        handler = self._handlers.get(event.says)
        if handler is not None:
            try:
                handler(event)
            except ModelError:  # such as a memslot that nobody could ask for
                self.unpaired["events that the model refuses"] += 1
        elif (flight := self.flights.get(event.pid)) is not None:
            flight.told[event.says] = event

    def finish(self) -> None:
        """The recording is over."""
        if not self.by_probes:
            for pid in list(self.flights):
                self._over(pid)
        elif self.flights:
            self.unpaired["faults that had not ended"] += len(self.flights)
        if left := sum(map(len, self._waiting.values())):
            self.unpaired["faults that no probe shows"] += left

    def _event(self, event: Event) -> None:
        match event:
            case FaultEvent() if event.target == self.target.backend.name:
                pid = int(event.vcpu)
                if self.by_probes:
                    self._waiting.setdefault(pid, deque()).append(event)
                else:
                    self._over(pid)
                    self._take_on(event, self._vcpu(0, pid))
            case EntryEvent():
                pid = int(event.vcpu)
                if not self.by_probes:
                    self._over(pid)
                self._entered[pid] = self.retired
            case MmioEvent():
                if (flight := self.flights.get(int(event.vcpu))) is not None:
                    flight.devices.append(event)
            case UserspaceExitEvent():
                if (flight := self.flights.get(int(event.vcpu))) is not None:
                    flight.errno = event.errno
                    if not self.by_probes:
                        self._over(flight.pid)
            case UnmapEvent():
                self.unmapped(int(event.vcpu or 0), event.start, event.end)
            case _:
                pass

    # Which vCPU.

    def _vcpu(self, pointer: int, pid: int) -> _Vcpu:
        found = self._vcpus.get((pointer, pid))
        if found is None or self.newer(pid, found.born):
            vm = self.vm(self.label(pid))
            number = sum(v.vm is vm for v in self._vcpus.values()) % _MAX_VCPUS
            found = self._vcpus[pointer, pid] = _Vcpu(vm, number, len(self.vms))
        return found

    # A fault begins.

    def _fault(self, told: Told) -> None:
        waiting = self._waiting.get(told.pid)
        if not waiting:
            self.unpaired["faults that only the probes show"] += 1
        elif self.by_probes:
            self._take_on(waiting.popleft(), self._vcpu(told.number("vcpu"), told.pid)).told[told.says] = told

    def _take_on(self, event: FaultEvent, vcpu: _Vcpu) -> Flight:
        fault = self.target.decode(**event.registers)
        flight = self._begin_fault(event.line, int(event.vcpu), vcpu, fault, prefetch=False)
        flight.paging = self._paging.get(flight.pid) if self.virtual else None
        flight.until("translate", "repair")
        return flight

    def _begin_fault(self, line: int, pid: int, vcpu: _Vcpu, fault: Raw, *, prefetch: bool) -> Flight:
        self.faults += 1
        epoch = self.retired if prefetch else self._entered.get(pid, self.retired)
        flight = Flight(line, pid, vcpu.vm, vcpu.number, fault, prefetch=prefetch, epoch=epoch)
        self.flights[pid] = flight
        return flight

    def _prefetched(self, told: Told) -> Flight:
        # no fault of the guest: user space asked for the page, or one fetched in the background has arrived
        gpa = Gpa(told.number("gfn") << self.target.format.page_shift)
        vcpu = self._vcpu(told.number("vcpu"), told.pid)
        private = Gfn(told.number("gfn")) in vcpu.vm.private
        access = Access(
            gpa=gpa, gva=Gva(gpa), offset=0, final=True, cause=Cause.MISSING, prefetch=True, private=private or None
        )
        return self._begin_fault(told.line, told.pid, vcpu, self.target.encode(access).fault, prefetch=True)

    # It goes on.

    def _repair_tried(self, told: Told) -> None:
        flight = self.flights.get(told.pid) or self._prefetched(told)
        flight.told[told.says] = told
        if self.virtual:
            self._set_paging(flight, on=False)  # only tables that translate physical addresses are repaired so
        flight.until("pin")

    def _repaired(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is None:
            return
        flight.told[told.says] = told
        if not self.by_probes:
            if self.virtual and flight.paging is not False:
                self._set_paging(flight, on=False)
                flight.restart(flight.as_id, "repair")
            flight.until("repair")
            flight.vm.believe(flight.walk.progress.at, told.number("old"))
            flight.until("pin")

    def _set_paging(self, flight: Flight, *, on: bool) -> None:
        self._paging[flight.pid] = flight.paging = on

    def _walk(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is not None and Said.PINNED not in flight.told and flight.walk.outcome is None:
            self._set_paging(flight, on=True)
            flight.told[told.says] = told
            flight.walked = []

    def _walk_entry(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is None or Said.WALK not in flight.told or Said.PINNED in flight.told or flight.walk.outcome:
            return
        flight.walked.append((told.number("desc"), told.number("level")))
        if flight.translation() is not None:
            flight.until("pin")

    def _pinned(self, told: Told) -> None:
        flight = self.flights.get(told.pid) or self._prefetched(told)
        if self.virtual and Said.REPAIR_TRIED not in flight.told:
            self._set_paging(flight, on=True)
        late = self.leads_nowhere(flight)
        if not late:
            flight.until("pin")
        flight.told[told.says] = told
        flight.until("pin")
        if late:  # only now it is known where the guest's tables lead; the sequence was sampled before
            flight.walk.progress.seq = flight.seq
        flight.until("lock")

    def _requested(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is None:
            return
        flight.told[told.says] = told
        if "pfn" in told.values:
            self._memory_after_all(flight, told.number("gfn"))
        if not (self.by_probes or self.judge.changes_seen) and flight.fault.is_translation:
            flight.until("repair")
            flight.vm.believe(flight.walk.progress.at, flight.vm.format.empty)  # the CPU found none
        if self.by_probes and {Said.PINNED, Said.MAPPED} <= self.probed and not flight.vm.facts.small_exec:
            flight.until("install")
            flight.vm.look(flight)

    def _memory_after_all(self, flight: Flight, gfn: int) -> None:
        # without probes: no walk of the guest's tables and the frame is the address, so they are not in use; and where
        # memslots are not recorded, there is one
        if self.by_probes or Said.PINNED in flight.told:
            return
        if self.virtual and Said.WALK not in flight.told and (flight.fault.gva or 0) >> flight.vm.page_shift == gfn:
            self._set_paging(flight, on=False)
        missing = self.made_up and flight.vm.slots.find(Gfn(gfn)) is None
        if missing:
            self.make_slot(flight.vm, Gfn(gfn))
        if missing or (self.virtual and flight.walk.outcome is not None):
            flight.restart(flight.as_id, "pin")

    def _changed(self, told: Told) -> None:
        self.judge.changes_seen = True
        flight = self.flights.get(told.pid)
        if flight is None or Said.REQUESTED not in flight.told or (flight.prefetch and not self.by_probes):
            self.changed_else(told, follow=not self.by_probes)
            return
        if told.number("as_id") != flight.as_id and flight.walk.outcome is None:
            flight.restart(told.number("as_id"))
        size = told.number("size")
        if not self.by_probes:
            flight.until("repair")
        if not self.by_probes and told.number("gpa") != flight.walk.progress.at & -size:
            self.changed_else(told, follow=True)
            return
        fmt, shift = flight.vm.format, size.bit_length() - 1
        new = fmt.kind(told.number("new"), shift)
        if not self.by_probes:
            if new is Kind.LEAF:
                flight.changed = True
                flight.vm.believe(flight.walk.progress.at, told.number("old"), size)
                self._installed_as(flight, size, told.number("new"))
        elif flight.seen is not None and new is Kind.TABLE:
            flight.vm.look(flight, below=shift)
        elif flight.seen is not None:
            flight.until()

    def _installed(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is None:
            return
        flight.installed.append(told)
        if flight.leaves.setting is not None:
            flight.leaves.made.append((flight.leaves.setting, told))
        if Said.PINNED not in self.probed:
            if Said.REQUESTED not in flight.told:
                self._memory_after_all(flight, told.number("gpa") >> flight.vm.page_shift)
            self._installed_as(flight, told.number("size"), told.number("desc"))

    def _setting(self, told: Told) -> None:
        if (flight := self.flights.get(told.pid)) is not None:
            flight.leaves.setting = told

    def _set(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is not None and flight.leaves.setting is not None:
            flight.leaves.sets.append((flight.leaves.setting, told))
            flight.leaves.setting = None

    def _unsync(self, told: Told) -> None:
        if (flight := self.flights.get(told.pid)) is not None:
            setting = flight.leaves.setting
            flight.leaves.unsynced.append((told.number("gfn"), None if setting is None else setting.number("gfn")))

    def _unsynced(self, told: Told) -> None:
        if (flight := self.flights.get(told.pid)) is not None:
            flight.leaves.withheld.append(told.number("ret"))

    def _installed_as(self, flight: Flight, size: int, desc: int) -> None:
        """Nothing but the entry tells what the host answered."""
        flight.until("pin")
        if Said.PINNED in flight.told or flight.walk.outcome is not None:
            return
        vm, page = flight.vm, 1 << flight.vm.page_shift
        shift = size.bit_length() - 1
        desc_prot = vm.format.prot(desc)
        if size > page and desc_prot and vm.facts.small_exec is bool(desc_prot & X):
            vm.taken["whether code may run in blocks"] += 1
            vm.with_facts(small_exec=not desc_prot & X)
        within = flight.walk.progress.gpa & size - page
        values = {
            "gfn": flight.walk.progress.gfn,
            "pfn": vm.format.hpa(desc, shift) + within >> vm.page_shift,
            "writable": int(bool(vm.format.entry(desc, shift).host_writable)),
        }
        flight.told[Said.PINNED] = Told(Said.PINNED, flight.line, 0, flight.pid, values, False)
        flight.until()

    # It ends.

    def _mapped(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is not None:
            flight.told[told.says] = told
            flight.until()

    def _decided(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is None:
            return
        if told.says in flight.told:
            flight.leaves.again.append(told)
            return
        flight.told[told.says] = told
        flight.bound_by_guest(told.number("max_size"))
        flight.until()
        if flight.prefetch:
            del self.flights[told.pid]
            self.judge.fault(flight)
            asked, _ = self._prefaults.get(told.pid, (None, None))
            if asked is not None:
                self._prefaults[told.pid] = asked, flight
                shift = flight.vm.page_shift
                self.judge.step(told, "frame of a pre-fault", asked.number("gpa") >> shift, told.number("gfn"))

    def _returned(self, told: Told) -> None:
        flight = self.flights.pop(told.pid, None)
        if flight is not None:
            flight.told[told.says] = told
            flight.until()
            self.judge.fault(flight)

    def _over(self, pid: int) -> None:
        # no probe says what became of it
        flight = self.flights.pop(pid, None)
        if flight is None:
            return
        flight.until("pin")
        if flight.walk.outcome is None and not flight.failed:
            values: dict[str, int | str] | None = None
            requested = flight.told.get(Said.REQUESTED)
            if requested is not None:
                values = {**requested.values, "writable": int(flight.vm.writable(flight))}
            elif flight.errno == EFAULT:
                values = {"error": "FAULT"}
            if values is None:
                flight.unknown = True
            else:
                flight.told[Said.PINNED] = Told(Said.PINNED, flight.line, 0, pid, values, False)
        self.judge.fault(flight)

    # KVM_PRE_FAULT_MEMORY.

    def _prefault(self, told: Told) -> None:
        self._prefaults[told.pid] = told, None

    def _prefaulted(self, told: Told) -> None:
        asked, flight = self._prefaults.pop(told.pid, (None, None))
        if asked is not None:
            self.judge.prefault(asked, told, flight)
