"""What happens to the VMs of a recording beside faults: memslots, the host's memory, dirty logging, table pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import EFAULT, ENXIO
from typing import Final

from kvmfault.check.flight import Flight
from kvmfault.check.judge import Judge
from kvmfault.check.world import CheckedVm
from kvmfault.contract.accessors import Gap
from kvmfault.contract.format import Kind
from kvmfault.contract.probes import Said
from kvmfault.contract.target import Target
from kvmfault.contract.values import SlotFlush
from kvmfault.trace.events import SlotEvent
from kvmfault.trace.slots import SlotSource, place
from kvmfault.trace.truth import Told
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.dirty import INITIALLY_SET, MANUAL_PROTECT
from kvmfault.vm.memslot import HvaHit, Memslot
from kvmfault.vm.memslot_request import ChangeKind, MemslotRequest

__all__ = ["Change", "Handler", "Happenings"]

Handler = Callable[[Told], None]
_OF_USER: Final = (EFAULT, ENXIO)
"""Errors of a collection that come from user space: its buffer, and that it made rings."""


@dataclass(slots=True)
class Change:
    """A memslot request on its way."""

    event: SlotEvent
    vm: CheckedVm
    begun: bool = False
    watched: bool = False
    split: bool = False
    recovers: bool = False
    errno: int = 0
    """How the model ended it."""

    @property
    def name(self) -> str:
        """For a message."""
        return f"change of slot {self.event.slot:#x}"

    @property
    def request(self) -> MemslotRequest:
        """As the ioctl has it."""
        e = self.event
        return MemslotRequest(slot=e.slot, flags=e.flags, gpa=e.gpa, size=e.size, hva=e.hva)


class Happenings:
    """Keeps the model's VMs in step. Which VM a vCPU belongs to is not recorded: that of the slots which its task, or
    else anybody, changed last."""

    def __init__(self, target: Target, slots: SlotSource, judge: Judge, probed: frozenset[Said]) -> None:
        self.target: Target = target
        self.judge: Judge = judge
        self.probed: frozenset[Said] = probed
        self.vms: dict[str, CheckedVm] = {}
        self.flights: dict[int, Flight] = {}
        """Faults on their way, by task."""
        self.retired: int = 0
        """How often the tables of any VM were thrown away."""
        self.virtual: bool = isinstance(target.definition.gpa_valid, Gap)
        """Faults report virtual addresses."""
        self._recorded_slots = {change.line: change for change in slots.changes if change.line}
        self._given_slots = [change for change in slots.changes if not change.line][::-1]
        self.made_up: bool = slots.made_up
        """Memslots are not recorded."""
        self._changes: dict[int, Change] = {}
        self._last: dict[int | None, str] = {}
        self._born: dict[str, int] = {}
        self._invalidating: dict[int, list[tuple[CheckedVm, bool]]] = {}
        self._spans: dict[int, Told] = {}
        """Invalidations that run, by task."""
        self._unmaps: dict[int, bool] = {}
        """Whether the range that a task takes away had anything mapped."""
        self._logs: dict[int, Told] = {}
        """Collections of dirty logs that run."""

    def handlers(self) -> Mapping[Said, Handler]:
        """What is done with each thing said."""
        return {
            Said.SLOT: self._slot,
            Said.SLOT_CHANGING: self._changing(self._begin),
            Said.SLOT_FLUSH: self._changing(self._flush),
            Said.TABLE_RETIRED: self._retired,
            Said.WRITES_WATCHED: self._changing(self._follows("watched")),
            Said.BLOCKS_SPLIT: self._changing(self._follows("split")),
            Said.BLOCKS_RECOVERED: self._changing(self._follows("recovers")),
            Said.SLOT_CHANGED: self._changing(self._changed_slot),
            Said.SLOT_DONE: self._slot_done,
            Said.INVALIDATE: self._invalidate,
            Said.INVALIDATED: self._invalidated,
            Said.UNMAP: self._unmap,
            Said.UNMAPPED: self._unmapped,
            Said.AGE: self._age,
            Said.GET_LOG: self._ask_log,
            Said.CLEAR_LOG: self._ask_log,
            Said.GOT_LOG: self._got_log,
            Said.CLEARED_LOG: self._got_log,
            Said.LOG_PROTECT: self._on_vm(lambda vm, told: self.judge.log_protect(vm, told, self._logs.get(told.pid))),
            Said.WRITES: self._on_vm(lambda vm, told: vm.written(Gpa(told.number("gpa")))),
            Said.WALK_MARKED: self._marked,
            Said.SHADOWED: self._shadowed,
            Said.UNSHADOWED: self._on_tables(lambda vm, gfn, upper: vm.unshadow(gfn, upper=upper)),
            Said.SYNCED: self._on_tables(lambda vm, gfn, upper: vm.protect(gfn)),
        }

    def make_slot(self, vm: CheckedVm, gfn: Gfn) -> None:
        """Memory where memslots are not recorded, and it turns out that there is some."""
        shift = vm.page_shift
        number = len(vm.slots.slots())
        gpa = Gpa(gfn << shift)
        [hva] = place([(gpa, 1 << shift)])
        request = MemslotRequest(slot=number, flags=0, gpa=gpa, size=1 << shift, hva=Hva(hva + (number << 31)))
        vm.set_region(request)
        vm.taken["memslot"] += 1

    # Which VM.

    def vm(self, label: str) -> CheckedVm:
        """The VM of that name; it is made if it is new."""
        vm = self.vms.get(label)
        if vm is None:
            vm = self.vms[label] = CheckedVm(self.target)
            vm.slots_made_up = self.made_up
            self._born[label] = len(self.vms)
        return vm

    def label(self, pid: int) -> str:
        """Name of the VM that a task works for."""
        return self._last.get(pid, self._last.get(None, ""))

    def newer(self, pid: int, than: int) -> bool:
        """The task has changed a VM that was made after so many others."""
        return pid in self._last and self._born.get(self._last[pid], 0) > than

    def vm_of(self, pid: int) -> CheckedVm:
        """The VM whose fault the task handles, or that it works for."""
        flight = self.flights.get(pid)
        return flight.vm if flight is not None else self.vm(self.label(pid))

    def _on_vm(self, act: Callable[[CheckedVm, Told], None]) -> Handler:
        return lambda told: act(self.vm_of(told.pid), told)

    def _marked(self, told: Told) -> None:
        self.judge.marks_seen = True
        self.vm_of(told.pid).written(Gpa(told.number("gpa")))

    def _on_tables(self, act: Callable[[CheckedVm, Gfn, bool], None]) -> Handler:
        def handle(told: Told) -> None:
            if not told.number("direct"):
                act(self.vm_of(told.pid), Gfn(told.number("gfn")), told.number("level") > 1)

        return handle

    def _shadowed(self, told: Told) -> None:
        flight = self.flights.get(told.pid)
        if flight is not None and flight.seen is not None:
            flight.seen = flight.seen._replace(linking=True)
        root = len(self.target.format.levels)
        if flight is None and self.made_up and told.number("direct") and told.number("level") == root:
            self.vm_of(told.pid).clear_tables()  # a new root: that the old tables went, or the VM, is not recorded
        self._on_tables(lambda vm, gfn, upper: vm.shadow(gfn, upper=upper))(told)

    # Memslots.

    def slots_until(self, time: int) -> None:
        """Apply memslots that are not part of the recording, but given or inferred."""
        while self._given_slots and self._given_slots[-1].time <= time:
            change = self._given_slots.pop()
            self._last[None] = change.vm
            if not change.ret:
                self._carry_out(Change(change, self.vm(change.vm)))

    def _slot(self, told: Told) -> None:
        event = self._recorded_slots.get(told.line)
        if event is None:
            return
        self._last[told.pid] = self._last[None] = event.vm
        self._changes[told.pid] = change = Change(event, self.vm(event.vm))
        if Said.SLOT_CHANGING not in self.probed and not event.ret:
            self._carry_out(change)

    def _carry_out(self, change: Change) -> None:
        self._begin(change)
        if change.begun:
            self._finish(change)

    def _begin(self, change: Change, told: Told | None = None) -> None:
        refused = change.vm.slots.begin(change.request)
        change.begun = refused is None
        self.judge.memslot(change.event, refused.errno if refused is not None else 0, 0)
        if change.begun and told is not None and "kind" in told.values:
            old, new = change.vm.slots.changing
            self.judge.step(told, f"{change.name}: kind", _kind(old, new).value, told.values["kind"])

    def _flush(self, change: Change, told: Told) -> None:
        old, _ = change.vm.slots.changing
        if old is not None:
            for name, mine in (("slot", old.id), ("gfn", old.base_gfn), ("pages", old.npages)):
                if name in told.values:
                    self.judge.step(told, f"{change.name}: flushed {name}", f"{mine:#x}", f"{told.number(name):#x}")
        change.vm.change_until_flush()

    def _follows(self, what: str) -> Callable[[Change, Told], None]:
        def act(change: Change, told: Told) -> None:
            setattr(change, what, True)
            mine = {"slot": change.event.slot & 0xFFFF, "size": 1 << change.vm.page_shift}
            for name, value in told.values.items():
                self.judge.step(told, f"{change.name}: {what} {name}", mine.get(name, value), value)

        return act

    def _changed_slot(self, change: Change, told: Told) -> None:
        self._finish(change)
        self.judge.step(told, f"{change.name}: result", change.errno, -told.number("ret"))

    def _changing(self, act: Callable[[Change, Told], None]) -> Handler:
        def handle(told: Told) -> None:
            change = self._changes.get(told.pid)
            if change is not None and (change.begun or told.says is Said.SLOT_CHANGING):
                act(change, told)

        return handle

    def _retired(self, told: Told) -> None:
        self.retired += 1
        change = self._changes.get(told.pid)
        if change is not None and "vm" in told.values and change.event.vm.startswith("0x"):
            mine = change.event.vm.partition("#")[0]
            self.judge.step(told, f"{change.name}: VM", mine, f"{told.number('vm'):#x}")
        (change.vm if change is not None else self.vm_of(told.pid)).retire(self.retired)

    def _finish(self, change: Change) -> None:
        vm = change.vm
        old, _ = vm.slots.changing
        probed = self.probed if Said.SLOT_CHANGED in self.probed else frozenset()
        if Said.WRITES_WATCHED in probed and old is not None:  # else the bitmap starts as ones
            vm.log.flags = 0 if change.watched else MANUAL_PROTECT | INITIALLY_SET
        if Said.BLOCKS_SPLIT in probed:
            vm.with_facts(eager_split=self.target.facts.eager_split and change.split)
        flush = SlotFlush.SLOT if Said.TABLE_RETIRED in probed or self.made_up else self.target.policy.slot_flush
        done = vm.finish_change(flush)
        change.errno = done.errno if done is not None else 0
        vm.recovered.clear()

    def _slot_done(self, told: Told) -> None:
        change = self._changes.pop(told.pid, None)
        if change is None or change.event.ret is None:
            return
        if change.begun:
            self.judge.step(told, f"{change.name}: answer", change.errno, -told.number("ret"))
            return
        found = change.vm.slots.fork().begin(change.request)
        self.judge.memslot(change.event, found.errno if found is not None else -1, -told.number("ret"))

    # What the host does to its memory.

    def _unmap(self, told: Told) -> None:
        self.judge.unmapped(told)
        key = told.number("slot"), told.number("start"), told.number("end")
        found = [vm.unmapped[key] for vm, _ in self._invalidating.get(told.pid, ()) if key in vm.unmapped]
        if found:
            self._unmaps[told.pid] = any(found)

    def _unmapped(self, told: Told) -> None:
        mapped = self._unmaps.pop(told.pid, None)
        if mapped is not None and "flush" in told.values:
            self.judge.step(told, "an invalidated range was mapped", int(mapped), told.number("flush") & 1)

    def _ask_log(self, told: Told) -> None:
        self._logs[told.pid] = told

    def _got_log(self, told: Told) -> None:
        asked, errno = self._logs.pop(told.pid, None), -told.number("ret")
        if asked is None or errno in _OF_USER:
            return
        slot, first = asked.number("slot"), asked.number("first")
        vm = self.vm_of(told.pid)
        mine = (
            vm.log_refused(slot)
            if asked.says is Said.GET_LOG
            else vm.clear_dirty_log(slot, first, asked.number("pages"), 0)
        )
        self.judge.step(told, "collection of a log: result", mine, errno)

    def _invalidate(self, told: Told) -> None:
        self._spans[told.pid] = told
        self._past_the_walk(told.pid)
        span = HvaRange(Hva(told.number("start")), Hva(told.number("end")))
        hits: list[HvaHit] = []
        for vm in self.vms.values():
            met = vm.invalidation_begins(span)
            self._invalidating.setdefault(told.pid, []).append((vm, bool(met)))
            hits += met
        self.judge.invalidation(hits)

    def _invalidated(self, told: Told) -> None:
        began = self._spans.pop(told.pid, None)
        for name in ("start", "end") if began is not None else ():
            if began is not None and name in told.values:
                mine, theirs = began.number(name), told.number(name)
                self.judge.step(told, f"end of an invalidation: {name}", f"{mine:#x}", f"{theirs:#x}")
        for vm, begun in self._invalidating.pop(told.pid, ()):
            vm.invalidations.active -= 1
            if begun:
                vm.invalidations.end()

    def unmapped(self, pid: int, start: Hva, end: Hva) -> None:
        """The host unmaps a range, and when it is done is not recorded: at once."""
        if Said.INVALIDATE in self.probed or self.made_up:
            return
        self._past_the_walk(pid)
        for vm in self.vms.values():
            vm.invalidation_begins(HvaRange(start, end))
            vm.invalidations.active -= 1
            if vm.invalidations.in_progress:
                vm.invalidations.end()

    def _past_the_walk(self, pid: int) -> None:
        # a task that invalidates inside its own fault is in the middle of its pin
        flight = self.flights.get(pid)
        if flight is not None and not self.leads_nowhere(flight):
            flight.until("pin")

    def leads_nowhere(self, flight: Flight) -> bool:
        """Where the guest's own tables lead is not known yet."""
        return self.virtual and flight.paging is not False and flight.translation() is None

    def _age(self, told: Told) -> None:
        for vm in self.vms.values():
            for table, first, last in vm.tables_over(told.number("start"), told.number("end")):
                table.age(first, last, test_only=False)

    # Entries that change outside of faults.

    def changed_else(self, told: Told, *, follow: bool) -> None:
        """An entry was changed by something that is no fault. *follow*: nothing else tells what it was."""
        change, vm = self._changes.get(told.pid), self.vm_of(told.pid)
        size = told.number("size")
        shift = size.bit_length() - 1
        old, new = vm.format.kind(told.number("old"), shift), vm.format.kind(told.number("new"), shift)
        gpa = Gpa(told.number("gpa"))
        if change is not None and change.recovers and old is Kind.TABLE:
            vm.recovered.append((gpa, size))
        if not follow:
            return
        vm.taken["entry that something else changed"] += 1
        if new is Kind.TABLE:
            vm.own_table.split(gpa, Gpa(gpa + size))
        elif new is Kind.EMPTY:
            vm.own_table.unmap(gpa, Gpa(gpa + size), tables=old is Kind.TABLE)
        else:
            vm.take_entry(gpa, size, told.number("new"))
        vm.flush_stale()


def _kind(old: Memslot | None, new: Memslot | None) -> ChangeKind:
    if old is None:
        return ChangeKind.CREATE
    if new is None:
        return ChangeKind.DELETE
    return ChangeKind.FLAGS_ONLY if old.base_gfn == new.base_gfn else ChangeKind.MOVE
