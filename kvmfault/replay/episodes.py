"""Faults as the probes show them, in step with the model: what happened between two steps happens there too."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.accessors import Gap
from kvmfault.contract.format import Kind
from kvmfault.contract.probes import Said
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.replay.judge import Judge
from kvmfault.replay.world import CheckedVm, Flight
from kvmfault.trace.events import EntryEvent, Event, FaultEvent, MmioEvent, SlotEvent, UserspaceExitEvent
from kvmfault.trace.truth import Told, Truth
from kvmfault.types import Gfn, Gpa, Gva, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.dirty import INITIALLY_SET, MANUAL_PROTECT
from kvmfault.vm.memslot_request import MemslotRequest

_MAX_VCPUS: Final = 64
_DONE: Final = "nothing called so"


@dataclass(slots=True)
class _Change:
    """A memslot request on its way."""

    event: SlotEvent
    vm: CheckedVm
    begun: bool = False
    watched: bool = False
    split: bool = False
    recovers: bool = False


@dataclass(slots=True)
class _Vcpu:
    vm: CheckedVm
    number: int
    born: int
    """How many VMs there were when it was first seen."""


class Episodes:
    """Feeds on everything that a recording says, in order of time, and keeps the model's VMs in step with it."""

    def __init__(self, target: Target, slots: Iterable[SlotEvent], judge: Judge, functions: frozenset[str]) -> None:
        self.target, self.judge = target, judge
        self.faults = 0
        self.unpaired: Counter[str] = Counter()
        """Faults of the recording that no probe showed, and the other way round."""
        probes = target.backend.probes
        probed = {probes.entries[f].says for f in functions if f in probes.entries}
        probed |= {probes.returns[f].says for f in functions if f in probes.returns}
        self.probed = probed
        """What the probes of this recording can say."""
        self.vms: dict[str, CheckedVm] = {}
        self._slots = {change.line: change for change in slots}
        self._vcpus: dict[tuple[int, int], _Vcpu] = {}
        self._last: dict[int | None, str] = {}
        self._born: dict[str, int] = {}
        self._waiting: dict[int, deque[FaultEvent]] = {}
        self._flights: dict[int, Flight] = {}
        self._changes: dict[int, _Change] = {}
        self._prefaults: dict[int, Told] = {}
        self._retired = 0
        self._entered: dict[int, int] = {}
        self._virtual = isinstance(target.definition.gpa_valid, Gap)
        self._paging: dict[int, bool] = {}
        self._invalidating: dict[int, list[tuple[CheckedVm, bool]]] = {}
        self._handlers: dict[Said, Callable[[Told], None]] = {
            Said.FAULT: self._fault,
            Said.REPAIR_TRIED: self._repair_tried,
            Said.PINNED: self._pinned,
            Said.MAPPED: self._mapped,
            Said.DECIDED: self._decided,
            Said.RETURNED: self._returned,
            Said.INSTALLED: self._installed,
            Said.REQUESTED: self._requested,
            Said.CHANGED: self._changed,
            Said.WALK: self._walk,
            Said.WALK_ENTRY: self._walk_entry,
            Said.WALK_MARKED: self._walk_marked,
            Said.SHADOWED: self._shadowed,
            Said.UNSHADOWED: self._unshadowed,
            Said.SYNCED: self._synced,
            Said.SLOT: self._slot,
            Said.SLOT_CHANGING: self._slot_changing,
            Said.SLOT_FLUSH: self._slot_flush,
            Said.TABLE_RETIRED: self._table_retired,
            Said.WRITES_WATCHED: self._watched,
            Said.BLOCKS_SPLIT: self._split,
            Said.BLOCKS_RECOVERED: self._recovered,
            Said.SLOT_CHANGED: self._slot_changed,
            Said.SLOT_DONE: self._slot_done,
            Said.INVALIDATE: self._invalidate,
            Said.INVALIDATED: self._invalidated,
            Said.UNMAP: self._unmap,
            Said.AGE: self._age,
            Said.LOG_PROTECT: self._log_protect,
            Said.PREFAULT: self._prefault,
            Said.PREFAULTED: self._prefaulted,
            Said.WRITES: self._writes,
        }
        self._change_of_own: dict[CheckedVm, bool] = {}

    def feed(self, event: Truth) -> None:
        """One thing that the recording says."""
        if isinstance(event, Told):
            handler = self._handlers.get(event.says)
            if handler is not None:
                handler(event)
            elif (flight := self._flights.get(event.pid)) is not None:
                flight.told[event.says] = event
            return
        self._event(event)

    def _event(self, event: Event) -> None:
        match event:
            case FaultEvent() if event.target == self.target.backend.name:
                self._waiting.setdefault(int(event.vcpu), deque()).append(event)
            case EntryEvent():
                self._entered[int(event.vcpu)] = self._retired
            case MmioEvent() | UserspaceExitEvent():
                flight = self._flights.get(int(event.vcpu))
                if flight is not None:
                    self.judge.device(flight, event)
            case _:
                pass

    # Which VM.

    def _vm(self, label: str) -> CheckedVm:
        vm = self.vms.get(label)
        if vm is None:
            vm = self.vms[label] = CheckedVm(self.target)
            self._born[label] = len(self.vms)
        return vm

    def _label(self, pid: int) -> str:
        return self._last.get(pid, self._last.get(None, ""))

    def _vcpu(self, told: Told) -> _Vcpu:
        key = told.number("vcpu"), told.pid
        found = self._vcpus.get(key)
        label = self._label(told.pid)
        if found is None or (told.pid in self._last and self._born.get(label, 0) > found.born):
            vm = self._vm(label)
            number = sum(v.vm is vm for v in self._vcpus.values()) % _MAX_VCPUS
            found = self._vcpus[key] = _Vcpu(vm, number, len(self.vms))
        return found

    # A fault.

    def _fault(self, told: Told) -> None:
        waiting = self._waiting.get(told.pid)
        if not waiting:
            self.unpaired["faults that only the probes show"] += 1
            return
        event = waiting.popleft()
        vcpu = self._vcpu(told)
        flight = self._begin(event.line, told, vcpu, self.target.decode(**event.registers), prefetch=False)
        flight.paging = self._paging.get(told.pid) if self._virtual else None
        flight.until("translate", "repair")

    def _begin(self, line: int, told: Told, vcpu: _Vcpu, fault: Raw, *, prefetch: bool) -> Flight:
        self.faults += 1
        epoch = self._retired if prefetch else self._entered.get(told.pid, self._retired)
        flight = Flight(line, told.pid, vcpu.vm, vcpu.number, fault, prefetch=prefetch, epoch=epoch)
        self._flights[told.pid] = flight
        return flight

    def _repair_tried(self, told: Told) -> None:
        flight = self._flights.get(told.pid) or self._prefetched(told)
        flight.told[told.says] = told
        if self._virtual:
            self._set_paging(flight, on=False)  # only tables that translate physical addresses are repaired so
        flight.until("pin")

    def _set_paging(self, flight: Flight, *, on: bool) -> None:
        self._paging[flight.pid] = flight.paging = on

    def _walk(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is not None and Said.PINNED not in flight.told and flight.walk.outcome is None:
            self._set_paging(flight, on=True)
            flight.told[told.says] = told
            flight.walked = []

    def _walk_entry(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is None or Said.WALK not in flight.told or Said.PINNED in flight.told or flight.walk.outcome:
            return
        flight.walked.append((told.number("desc"), told.number("level")))
        if flight.translation() is not None:
            flight.until("pin")

    def _requested(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is not None and not flight.vm.facts.small_exec and Said.MAPPED in self.probed:
            flight.told[told.says] = told
            flight.until("install")
            flight.vm.look(flight)

    def _changed(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is None or flight.seen is None:
            self._changed_else(told)
            return
        if told.number("as_id") != flight.as_id:
            flight.restart(told.number("as_id"))
        fmt, shift = flight.vm.format, told.number("size").bit_length() - 1
        if fmt.kind(told.number("new"), shift) is Kind.TABLE:
            flight.vm.look(flight, below=shift)
        else:
            flight.until()

    def _changed_else(self, told: Told) -> None:
        change = self._changes.get(told.pid)
        if change is not None and change.recovers:
            shift = told.number("size").bit_length() - 1
            if change.vm.format.kind(told.number("old"), shift) is Kind.TABLE:
                change.vm.recovered.append((Gpa(told.number("gpa")), told.number("size")))

    def _walk_marked(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        vm = flight.vm if flight is not None else self.vms.get(self._label(told.pid))
        if vm is not None:
            vm.written(Gpa(told.number("gpa")))

    def _shadowed(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is not None and flight.seen is not None:
            flight.seen = flight.seen._replace(linking=True)
        vm = flight.vm if flight is not None else self.vms.get(self._label(told.pid))
        if vm is not None and not told.number("direct"):
            vm.shadow(Gfn(told.number("gfn")), upper=told.number("level") > 1)

    def _unshadowed(self, told: Told) -> None:
        vm = self.vms.get(self._label(told.pid))
        if vm is not None and not told.number("direct"):
            vm.unshadow(Gfn(told.number("gfn")), upper=told.number("level") > 1)

    def _synced(self, told: Told) -> None:
        vm = self.vms.get(self._label(told.pid))
        if vm is not None:
            vm.protect(Gfn(told.number("gfn")))

    def _prefetched(self, told: Told) -> Flight:
        # no fault of the guest: user space asked for the page, or one fetched in the background has arrived
        gpa = Gpa(told.number("gfn") << self.target.format.page_shift)
        access = Access(gpa=gpa, gva=Gva(gpa), offset=0, final=True, cause=Cause.MISSING, prefetch=True)
        vcpu = self._vcpu(told)
        private = Gfn(told.number("gfn")) in vcpu.vm.private
        fault = self.target.encode(access.with_(private=private) if private else access).fault
        return self._begin(told.line, told, vcpu, fault, prefetch=True)

    def _pinned(self, told: Told) -> None:
        flight = self._flights.get(told.pid) or self._prefetched(told)
        if self._virtual and Said.REPAIR_TRIED not in flight.told:
            self._set_paging(flight, on=True)
        late = not any(step.name == "snapshot" for step in flight.walk.steps)
        if not late:
            flight.until("pin")
        flight.told[told.says] = told
        flight.until("pin")
        if late:  # only now it is known where the guest's tables lead; the sequence was sampled before
            flight.walk.progress.seq = flight.seq
        flight.until("lock")

    def _mapped(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is not None:
            flight.told[told.says] = told
            flight.until()

    def _installed(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is not None:
            flight.installed.append(told)

    def _decided(self, told: Told) -> None:
        flight = self._flights.get(told.pid)
        if flight is None or told.says in flight.told:
            return
        flight.told[told.says] = told
        flight.until()
        if flight.prefetch:
            del self._flights[told.pid]
            self.judge.fault(flight)

    def _returned(self, told: Told) -> None:
        flight = self._flights.pop(told.pid, None)
        if flight is not None:
            flight.told[told.says] = told
            flight.until()
            self.judge.fault(flight)

    # KVM_PRE_FAULT_MEMORY.

    def _prefault(self, told: Told) -> None:
        self._prefaults[told.pid] = told

    def _prefaulted(self, told: Told) -> None:
        asked = self._prefaults.pop(told.pid, None)
        if asked is not None:
            self.judge.prefault(asked, told, self.target)

    # Memslots.

    def _slot(self, told: Told) -> None:
        change = self._slots.get(told.line)
        if change is None:
            return
        vm = self._vm(change.vm)
        self._last[told.pid] = self._last[None] = change.vm
        self._changes[told.pid] = now = _Change(change, vm)
        if Said.SLOT_CHANGING not in self.probed and not change.ret:
            self._carry_out(now)

    def _carry_out(self, change: _Change) -> None:
        self._begin_change(change)
        change.vm.finish_change()

    def _begin_change(self, change: _Change) -> None:
        event = change.event
        request = MemslotRequest(slot=event.slot, flags=event.flags, gpa=event.gpa, size=event.size, hva=event.hva)
        refused = change.vm.slots.begin(request)
        change.begun = refused is None
        self.judge.memslot(event, refused.errno if refused is not None else 0, 0)

    def _slot_changing(self, told: Told) -> None:
        change = self._changes.get(told.pid)
        if change is not None:
            self._begin_change(change)

    def _slot_flush(self, told: Told) -> None:
        change = self._changes.get(told.pid)
        if change is not None and change.begun:
            change.vm.change_until_flush()

    def _table_retired(self, told: Told) -> None:
        change = self._changes.get(told.pid)
        if change is not None:
            self._retired += 1
            change.vm.retire(self._retired)

    def _watched(self, told: Told) -> None:
        if (change := self._changes.get(told.pid)) is not None:
            change.watched = True

    def _split(self, told: Told) -> None:
        if (change := self._changes.get(told.pid)) is not None:
            change.split = True

    def _recovered(self, told: Told) -> None:
        if (change := self._changes.get(told.pid)) is not None:
            change.recovers = True

    def _slot_changed(self, told: Told) -> None:
        change = self._changes.get(told.pid)
        if change is None or not change.begun:
            return
        vm = change.vm
        old, _ = vm.slots.changing
        if Said.WRITES_WATCHED in self.probed and old is not None:  # else the bitmap starts as ones
            vm.log.flags = 0 if change.watched else MANUAL_PROTECT | INITIALLY_SET
        if Said.BLOCKS_SPLIT in self.probed:
            vm.with_facts(eager_split=self.target.facts.eager_split and change.split)
        vm.finish_change()
        vm.recovered.clear()

    def _slot_done(self, told: Told) -> None:
        change = self._changes.pop(told.pid, None)
        if change is None or change.begun or Said.SLOT_CHANGING not in self.probed:
            return
        event = change.event
        request = MemslotRequest(slot=event.slot, flags=event.flags, gpa=event.gpa, size=event.size, hva=event.hva)
        found = change.vm.slots.fork().begin(request)
        self.judge.memslot(event, found.errno if found is not None else -1, -told.number("ret"))

    # What the host does to its memory.

    def _invalidate(self, told: Told) -> None:
        self._past_the_walk(told.pid)
        span = HvaRange(Hva(told.number("start")), Hva(told.number("end")))
        begun = []
        for vm in self.vms.values():
            vm.forget(span)
            hits = vm.slots.in_hva_range(span.start, span.end)
            vm.invalidations.active += 1
            if hits:
                vm.invalidations.begin()
                for hit in hits:
                    vm.invalidations.add(hit.start, hit.end)
                    vm.drop(hit.start, hit.end)
                vm.flush_stale()
            begun.append((vm, bool(hits)))
        self._invalidating.setdefault(told.pid, []).extend(begun)
        self.judge.invalidation(
            told, [h for vm in self.vms.values() for h in vm.slots.in_hva_range(span.start, span.end)]
        )

    def _invalidated(self, told: Told) -> None:
        for vm, begun in self._invalidating.pop(told.pid, ()):
            vm.invalidations.active -= 1
            if begun:
                vm.invalidations.end()

    def _past_the_walk(self, pid: int) -> None:
        # a task that invalidates inside its own fault is in the middle of its pin
        flight = self._flights.get(pid)
        if flight is not None and not (self._virtual and flight.paging is None):
            flight.until("pin")

    def _unmap(self, told: Told) -> None:
        self.judge.unmapped(told)

    def _age(self, told: Told) -> None:
        start, end = told.number("start"), told.number("end")
        for vm in self.vms.values():
            for table, first, last in vm.tables_over(start, end):
                table.age(first, last, test_only=False)

    # What user space collects, and what the emulator does.

    def _log_protect(self, told: Told) -> None:
        vm = self.vms.get(self._label(told.pid))
        if vm is not None:
            self.judge.log_protect(vm, told)

    def _writes(self, told: Told) -> None:
        vm = self.vms.get(self._label(told.pid))
        if vm is not None:
            vm.written(Gpa(told.number("gpa")))
