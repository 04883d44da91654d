"""What KVM did for each recorded fault beside what the path does, where neither memslots nor host were recorded.

Those are inputs and not decisions. They are known from what was seen so far; where that does not lead to what was
recorded, the smallest set of assumptions about them that does is looked for (`kvmfault.check.assume`), counted, and
kept from then on. What no assumption explains is a disagreement.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import combinations
from typing import Final

from kvmfault.check.assume import Assumed, Assumption, Seen, assumptions, learn, reach, remember
from kvmfault.check.compared import agree, alike, compare, differ
from kvmfault.check.handled import Handled, in_order
from kvmfault.check.inferred import InferredVm, Trial, returned
from kvmfault.check.invalidations import Invalidations, Reason
from kvmfault.check.tally import Aspect, Tally
from kvmfault.contract.format import Kind, Memory, block_sizes, size_text
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.probes import FIXED, Said
from kvmfault.contract.target import Target
from kvmfault.machine.stage2 import Stage2
from kvmfault.trace.events import SlotEvent
from kvmfault.trace.truth import Told, Truth
from kvmfault.types import U64, Gfn, Gpa, Pfn
from kvmfault.vm.memslot import Memslot, MemslotFlag, SlotSet

__all__ = ["CallsCheck"]

_MADE: Final = 1024
"""Calls to map remembered, the latest."""
_AT_ONCE: Final = 3
"""Assumptions made for one fault."""


class CallsCheck:
    """Feeds on a recording in order. ``tally`` and ``taken`` are complete after ``run``."""

    def __init__(self, target: Target, slots: Iterable[SlotEvent] = ()) -> None:
        self.tally: Tally = Tally()
        self.taken: Counter[str] = Counter()
        """Assumptions by kind."""
        self.faults: int = 0
        self.predicted: int = 0
        """Faults that needed no assumption but, at most, the frame."""
        self.cut_short: int = 0
        """Faults whose return was not recorded."""
        self.vm: InferredVm = InferredVm(target)
        self._target = target
        self._changes = deque(sorted((c for c in slots if not c.ret), key=_answered))
        self._given: dict[str, SlotSet] = {}
        self._label: str | None = None
        self._shift = target.format.page_shift
        self._page = 1 << self._shift
        self._invalidations = Invalidations(self._page)
        self._root = 0
        """Bytes of the largest entry at which a fault found nothing: one of the root table, sooner or later."""
        self._made: deque[tuple[int, int, int]] = deque(maxlen=_MADE)
        """Calls to map: where they ended, and addresses."""

    def run(self, events: Iterable[Truth]) -> Tally:
        """Compare everything."""
        registers = [register.name for register in self._target.backend.registers]
        for place, item in in_order(events, registers):
            while self._changes and _answered(self._changes[0]) <= item.time:
                self._change(self._changes.popleft())
            if isinstance(item, Handled):
                self._invalidations.acts(item.pid, item.began, item.effect)
                self._fault(item)
            else:
                self._others(place, item)
        return self.tally

    # What others did.

    def _change(self, change: SlotEvent) -> None:
        if change.vm != self._label:
            self._label = change.vm
            self.vm.forget()
            self.vm.known.given = self._given.get(change.vm, SlotSet())
        number, given = change.slot & 0xFFFF, self.vm.known.given or SlotSet()
        old, new = given.by_id(number), None
        if change.size:
            new = Memslot(
                id=number,
                as_id=0,
                base_gfn=Gfn(change.gpa >> self._shift),
                npages=change.size >> self._shift,
                hva=change.hva,
                flags=MemslotFlag(change.flags),
                page_shift=self._shift,
            )
            if any(other is not old for other in given.overlapping(new.base_gfn, new.end_gfn)):
                return  # of another VM, which nothing tells
        self.vm.known.given = self._given[change.vm] = given.replace(old, new)

    def _others(self, place: int, told: Told) -> None:
        if told.says is Said.INVALIDATE:
            self._invalidations.begins(place, told.pid, told.number("start"), told.number("end"))
            return
        start = told.number("gpa") & U64
        end = start + (told.number("size") & U64)
        first, last = start >> self._shift, -(-end >> self._shift)
        known, table = self.vm.known, self.vm.table
        if told.says is Said.RANGE_UNMAPPED:
            self._take_away(start, end)
            reason = self._invalidations.unmaps(place, told.pid, start, end)
            if reason is not Reason.HOST:
                known.forget_slot(first, last, whole=reason is Reason.SLOT)
            return
        self._invalidations.acts(told.pid, place)
        if told.says is Said.RANGE_PROTECTED:
            table.write_protect(Gpa(start), Gpa(end))
            known.logged.add(first, last)
        elif told.says is Said.RANGE_AGED:
            table.age(Gpa(start), Gpa(end), test_only=not told.number("clear", 1))
        table.stale.clear()

    def _take_away(self, start: int, end: int) -> None:
        self.vm.table.unmap(Gpa(start), Gpa(end))
        self.vm.table.stale.clear()
        self.vm.known.forget_pages(start >> self._shift, -(-end >> self._shift))

    # A fault.

    def _fault(self, handled: Handled) -> None:
        if handled.ret is None:
            self.cut_short += 1
            if not handled.calls:
                return  # what KVM did is not known
        self.faults += 1
        fault = self._target.decode(**handled.registers)
        gpa = fault.kvm_get_fault_gpa() or 0
        running = self._invalidations
        seen = Seen(handled, fault, gpa, gpa >> self._shift, self._page, running.met(handled), running.runs(handled))
        self._compare_level(seen)
        basis = self._basis(seen)
        before = self.vm.table
        if handled.mapping is not None:
            handled.reach = reach(self.vm, handled)
        chosen, outcome = self._explain(seen, basis)
        if chosen is None:
            differ(self.tally, seen, self.vm.did[-1] if self.vm.did else None, returned(outcome))
            self.vm.table = self.vm.own_table = before
            self._follow(seen)
        else:
            agree(self.tally, seen)
            self.predicted += not chosen
            for assumption in chosen:
                self.taken[assumption.what.value] += 1
                learn(self.vm, assumption.what, seen)
        if seen.call is None:
            running.started_over(handled)
        elif seen.call.does in (Said.MAPPING, Said.RELAXING):
            running.ended_before(handled)
        self._compare_frame(seen, basis)
        remember(self.vm, seen, self._shift)
        if handled.mapping is not None:
            call = handled.calls[-1]
            self._made.append((handled.effect, call.address, call.address + call.size))

    def _basis(self, seen: Seen) -> Trial:
        # the frame that was mapped, if the page's is not known; and what the fault itself did to the host
        handled = seen.handled
        trial = Trial(invalidated=handled.unmapped or seen.starts_over)
        if handled.hpa is not None and self.vm.known.frame(seen.gfn) is None:
            trial.frame = seen.frame(self._shift)
        return trial

    def _explain(self, seen: Seen, basis: Trial) -> tuple[tuple[Assumption, ...] | None, Outcome]:
        # the smallest set of assumptions; None: there is none
        before = self.vm.table
        outcome = self._try(seen, before, basis)
        if self._matches(seen, outcome):
            return (), outcome
        possible = assumptions(self.vm, seen)
        for count in range(1, _AT_ONCE + 1):
            for chosen in combinations(possible, count):
                names = [name for a in chosen for name in a.answers]
                if len(names) != len(set(names)):
                    continue
                answers = {name: value for a in chosen for name, value in a.answers.items()}
                outcome = self._try(seen, before, basis.answering(answers))
                if self._matches(seen, outcome):
                    return chosen, outcome
        return None, self._try(seen, before, basis)

    def _try(self, seen: Seen, table: Stage2, trial: Trial) -> Outcome:
        self.vm.table = self.vm.own_table = table.fork()
        return self.vm.run(seen.fault, trial)

    def _matches(self, seen: Seen, outcome: Outcome) -> bool:
        handled = seen.handled
        if handled.ret is not None and returned(outcome) != handled.ret:
            return False
        return alike(self.vm.did, handled.calls)

    def _compare_frame(self, seen: Seen, basis: Trial) -> None:
        call = seen.call
        if call is None or call.does is not Said.MAPPING:
            return
        if basis.frame is not None:
            self.taken[Assumed.FRAME.value] += 1
            return
        known, recorded = self.vm.known.frame(seen.gfn) or 0, seen.frame(self._shift)
        compare(self.tally, Aspect.FRAME, seen, f"{known:#x}", f"{recorded:#x}", agrees=known == recorded)

    def _follow(self, seen: Seen) -> None:
        """Go on with the table as the kernel has it."""
        call, table = seen.call, self.vm.table
        if call is None:
            return
        if call.does is Said.MAPPING and call.answer == FIXED and call.size in block_sizes(table.format):
            hpa, memory = seen.handled.hpa or 0, Memory[call.kind]
            frame = Pfn(hpa >> self._shift)
            gpa = Gpa(call.address)
            table.map(gpa, call.size, frame, call.prot, memory, host_writable=True, young=True, tag=0)
        elif call.does is Said.RELAXING:
            table.relax(Gpa(call.address), call.prot)
        elif call.does is Said.MAKING_YOUNG:
            table.make_young(Gpa(call.address))
        table.stale.clear()

    # The table beside the level that the hardware reported.

    def _compare_level(self, seen: Seen) -> None:
        fault = seen.fault
        granule = fault.granule
        if granule is None or not (fault.is_translation or fault.is_permission or fault.is_access_flag):
            return
        size, leaf = self._level(seen.gpa)
        if fault.is_translation:
            if (leaf or size < granule) and granule >= self._root and not self._raced(seen, granule):
                self.taken[Assumed.NEW_VM.value] += 1  # nothing at the root, where something was
                self.vm.forget()
                size, leaf = self._level(seen.gpa)
            if next(self.vm.table.entries(), None) is None:
                self._root = 0
            self._root = max(self._root, granule)
            # the model's table may have levels above the root of this VM's
            agrees = not leaf and (size == granule or size > granule == self._root)
        else:
            agrees = (leaf and size == granule) or seen.handled.unmapped
        # between the fault and its handling another vCPU may have changed the entry
        if agrees or not self._raced(seen, granule):
            mine = f"{size_text(size)} {'leaf' if leaf else 'empty'}"
            compare(self.tally, Aspect.TABLE, seen, mine, size_text(granule), agrees=agrees)
            if fault.is_translation and not agrees:  # what the model has there is gone
                first = seen.gpa & -granule
                self._take_away(first, first + granule)

    def _level(self, gpa: int) -> tuple[int, bool]:
        table = self.vm.table
        found = table.walk(Gpa(gpa))
        return 1 << found.shift, table.format.kind(found.desc, found.shift) is Kind.LEAF

    def _raced(self, seen: Seen, granule: int) -> bool:
        """An entry in the faulting one's range was made after the vCPU last entered the guest, as far as is known."""
        first = seen.gpa & -granule
        if any(first <= rival.calls[-1].address < first + granule for rival in seen.handled.rivals):
            return True
        met = [place for place, start, end in self._made if start < first + granule and first < end]
        return not met or met[-1] >= seen.handled.entered


def _answered(change: SlotEvent) -> int:
    return change.time if change.end is None else change.end
