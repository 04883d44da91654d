"""What KVM did for each recorded fault beside what the path does, where neither memslots nor host were recorded.

Those are inputs and not decisions. They are known from what was seen so far; where that does not lead to what was
recorded, the smallest set of assumptions about them that does is looked for (`kvmfault.replay.assume`), counted, and
kept from then on. What no assumption explains is a disagreement.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Final

from kvmfault.contract.format import PROTS, Kind, Memory, block_sizes, size_text
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.probes import FIXED, RETRY, Said
from kvmfault.contract.target import Target, backend
from kvmfault.machine.stage2 import Stage2
from kvmfault.replay.assume import Assumed, Assumption, Seen, assumptions, learn, reach, remember
from kvmfault.replay.handled import Call, Handled, in_order
from kvmfault.replay.inferred import InferredVm, Trial, returned
from kvmfault.replay.invalidations import Invalidations, Reason
from kvmfault.replay.tally import Aspect, Disagreement, Tally
from kvmfault.trace.text import read_text
from kvmfault.trace.truth import ProbeReader, Told, Truth
from kvmfault.types import U64, Gpa, Pfn

_MADE: Final = 1024
"""Calls to map remembered, the latest."""
_AT_ONCE: Final = 3
"""Assumptions made for one fault."""
_NAMES: Final = {
    Said.MAPPING: "map",
    Said.RELAXING: "relax",
    Said.MAKING_YOUNG: "mark young",
    Said.DEVICE: "device access",
    Said.INJECTED: "inject",
}
_NOTHING: Final = "no call"
_ADDRESS_OF: Final = {Said.DEVICE: Aspect.MMIO, Said.INJECTED: Aspect.INJECTION}
# What was not recorded, where that is why the two differ.
_INVALIDATION: Final = "an invalidation of host memory"
_TABLE: Final = "what else changed the entry"
_HOST: Final = "the host's answer to the request for the page"


class CallsCheck:
    """Feeds on a recording in order. ``tally`` and ``taken`` are complete after ``run``."""

    def __init__(self, target: Target) -> None:
        self.tally = Tally()
        self.taken: Counter[str] = Counter()
        """Assumptions by kind."""
        self.faults = 0
        self.predicted = 0
        """Faults that needed no assumption but, at most, the frame."""
        self.cut_short = 0
        """Faults whose return was not recorded."""
        self.vm = InferredVm(target)
        self._target = target
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
            if isinstance(item, Handled):
                self._invalidations.acts(item.pid, item.began, item.effect)
                self._fault(item)
            else:
                self._others(place, item)
        return self.tally

    # What others did.

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
            self._differ(seen, outcome)
            self.vm.table = self.vm.own_table = before
            self._follow(seen)
        else:
            self._agree(seen)
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
        return _alike(self.vm.did, handled.calls)

    # Counting.

    def _agree(self, seen: Seen) -> None:
        call = seen.call
        kind = _NAMES[call.does] if call is not None else _NOTHING
        add = self.tally.add
        add(Aspect.CALL, kind, agrees=True)
        if seen.handled.ret is not None:
            add(Aspect.RETURN, kind, agrees=True)
        for aspect in _aspects(call):
            add(aspect, kind, agrees=True)

    def _differ(self, seen: Seen, outcome: Outcome) -> None:
        call = seen.call
        kind = _NAMES[call.does] if call is not None else _NOTHING
        mine = self.vm.did[-1] if self.vm.did else None
        cause = _cause(seen, mine)
        same = (mine is None) == (call is None) and (mine is None or call is None or mine.does is call.does)
        self._compare(Aspect.CALL, seen, kind, _text(mine), _text(call), cause if not same else "", agrees=same)
        if seen.handled.ret is not None:
            ret = returned(outcome)
            agrees = ret == seen.handled.ret
            self._compare(Aspect.RETURN, seen, kind, str(ret), str(seen.handled.ret), cause, agrees=agrees)
        for aspect, read in _aspects(call).items():
            theirs = read(call) if call is not None else _NOTHING
            ours = read(mine) if same and mine is not None else _NOTHING
            self._compare(aspect, seen, kind, ours, theirs, cause, agrees=ours == theirs)

    def _compare(
        self, aspect: Aspect, seen: Seen, kind: str, model: str, kernel: str, cause: str, *, agrees: bool
    ) -> None:
        self.tally.add(aspect, kind, agrees=agrees)
        if not agrees:
            what = f"fault at {seen.gpa:#x}"
            self.tally.differ(
                Disagreement(aspect=aspect, line=seen.handled.line, what=what, model=model, kernel=kernel, cause=cause)
            )

    def _compare_frame(self, seen: Seen, basis: Trial) -> None:
        call = seen.call
        if call is None or call.does is not Said.MAPPING:
            return
        if basis.frame is not None:
            self.taken[Assumed.FRAME.value] += 1
            return
        known, recorded = self.vm.known.frame(seen.gfn) or 0, seen.frame(self._shift)
        self._compare(Aspect.FRAME, seen, "map", f"{known:#x}", f"{recorded:#x}", _HOST, agrees=known == recorded)

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
            self._compare(Aspect.TABLE, seen, "level", mine, size_text(granule), _TABLE, agrees=agrees)
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


def _alike(mine: Sequence[Call], theirs: Sequence[Call]) -> bool:
    # an injection is told by its address: some kinds of it have no probe of their own
    return [_plain(c) for c in mine] == [_plain(c) for c in theirs]


def _plain(call: Call) -> Call:
    return call._replace(kind="") if call.does is Said.INJECTED else call


def _aspects(call: Call | None) -> Mapping[Aspect, Callable[[Call], str]]:
    if call is None:
        return {}
    found: dict[Aspect, Callable[[Call], str]] = {_ADDRESS_OF.get(call.does, Aspect.ADDRESS): _address}
    if call.does in (Said.MAPPING, Said.RELAXING):
        found[Aspect.PERMISSIONS] = _permissions
    if call.does is Said.MAPPING:
        found |= {Aspect.LEVEL: _size, Aspect.ANSWER: _answer}
    return found


def _address(call: Call) -> str:
    return f"{call.address:#x}"


def _permissions(call: Call) -> str:
    return f"{PROTS[call.prot]} {call.kind.lower()}"


def _size(call: Call) -> str:
    return size_text(call.size)


def _answer(call: Call) -> str:
    return call.answer


def _text(call: Call | None) -> str:
    return _NOTHING if call is None else f"{_NAMES[call.does]} at {call.address:#x}"


def _cause(seen: Seen, mine: Call | None) -> str:
    call = seen.call
    if call is None and mine is not None and seen.handled.ret == 1:
        return _INVALIDATION
    if call is None and (seen.handled.ret or 0) < 0:
        return _HOST
    if call is not None and call.answer == RETRY and mine is not None and mine.answer != RETRY:
        return _TABLE
    return ""


def fitting(target: Target, aux: str | Path) -> tuple[Target, list[str]]:
    """*target* with a format for what was mapped, and a note if it is another one.

    The least that was mapped is a page, and the table reaches the highest address.
    """
    least, highest = _extent(aux, ProbeReader(target.backend))
    shift = least.bit_length() - 1
    formats = {name: f for name, f in target.backend.formats.items() if f.page_shift == shift}
    own = target.format
    if not formats or (own.page_shift == shift and highest >> own.gpa_bits == 0):
        return target, []
    name = next(
        (n for n, f in formats.items() if highest >> f.gpa_bits == 0), max(formats, key=lambda n: formats[n].gpa_bits)
    )
    _, _, settings = target.name.partition("+")
    spelled = f"{target.backend.name}:{name}@{target.kernel}" + (f"+{settings}" if settings else "")
    return backend(spelled), [f"format {name}: the least that was mapped is {size_text(least)}"]


def _extent(aux: str | Path, reader: ProbeReader) -> tuple[int, int]:
    least = highest = 0
    for event in read_text(aux):
        told = reader.read(event, aux=True)
        if told is not None and told.says is Said.MAPPING:
            size = told.number("size")
            least = min(least or size, size)
            highest = max(highest, told.number("gpa"))
    return least, highest
