"""What the model decided beside what the kernel did, aspect by aspect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from errno import EFAULT, ENOENT, ENOSYS, EOPNOTSUPP, errorcode
from typing import Final

from kvmfault.check.causes import CAUSES, WALKS_MARKS
from kvmfault.check.flight import Flight
from kvmfault.check.repeated import repeated
from kvmfault.check.tally import Aspect, Disagreement, Tally
from kvmfault.check.world import CheckedVm
from kvmfault.contract.access import kind
from kvmfault.contract.accessors import Gap
from kvmfault.contract.format import PROTS, Kind, R, W, X, size_text
from kvmfault.contract.outcome import (
    Done,
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    Outcome,
    Reason,
    Resume,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.probes import (
    DEVICE_ACCESS,
    EMULATE,
    FIXED,
    RETRY,
    SPURIOUS,
    UNDECODED_ACCESS,
    WRITE_PROTECTED,
    Said,
    answer_text,
    error_text,
)
from kvmfault.contract.target import Target
from kvmfault.contract.values import Prefault
from kvmfault.path.run import Run
from kvmfault.trace.events import SlotEvent
from kvmfault.trace.truth import Told
from kvmfault.types import EHWPOISON, Gpa
from kvmfault.vm.memslot import HvaHit

__all__ = ["Judge"]

_ENTRY_BYTES: Final = 8
_NEIGHBOURS: Final = 8
"""Entries of a group that a fault may map together (PTE_PREFETCH_NUM)."""


class Judge:
    """Compares and counts; mends the model's table where it differs, so that one difference is told once."""

    def __init__(self, target: Target, probed: frozenset[Said]) -> None:
        self.target: Target = target
        self.probed: frozenset[Said] = probed
        self.tally: Tally = Tally()
        self.marks_seen: bool = not isinstance(target.definition.gpa_valid, Gap)
        """Marks that KVM sets in the guest's tables are recorded, or there are none."""
        self.changes_seen = False
        """Every change of an entry is recorded."""
        self.mended: int = 0
        """Entries put as recorded after a disagreement."""
        self.unknown: Counter[str] = Counter()
        """Faults by kind for which nothing tells what the host answered."""
        self._hits: Counter[tuple[int, int, int]] = Counter()

    # A fault.

    def fault(self, flight: Flight) -> None:
        """The fault is over on both sides."""
        what = kind(self.target.access(flight.fault))
        if flight.unknown:
            self.unknown[what] += 1
            return
        compare = self._comparer(flight, what)
        if flight.failed:
            compare(Aspect.ANSWER, f"refuses: {flight.failed}", self._kernel_answer(flight) or "goes on")
            return
        run = flight.end()
        for name, mine, theirs in repeated(flight, _answer(flight.walk.outcome, "")):
            compare(Aspect.REPEATED, f"{name} {mine}", f"{name} {theirs}")
        kernel = self._kernel_answer(flight)
        if kernel:
            compare(Aspect.ANSWER, _answer(flight.walk.outcome, kernel), kernel)
        tried = flight.told.get(Said.REPAIR_TRIED)
        if tried is not None:
            compare(Aspect.REPAIR, _repair(flight), str(tried.values["answer"]))
        self._slot(flight, compare)
        self._sizes(flight, compare)
        self._entry(flight, compare)
        if flight.devices and _is_device(flight.walk.outcome):
            page = flight.vm.page_shift
            gfn = flight.walk.progress.gfn if flight.walk.progress.looked_up else None
            pages = {event.gpa >> page for event in flight.devices}
            if gfn is not None:
                compare(Aspect.MMIO, f"{gfn:#x}", f"{gfn if gfn in pages else min(pages):#x}")
        returned = flight.number(Said.RETURNED, "ret")
        model = _returns(run)
        if returned is not None and model is not None:
            compare(Aspect.RETURN, _return_text(model), _return_text(returned))

    def _comparer(self, flight: Flight, what: str) -> Callable[[Aspect, str, str], bool]:
        def compare(aspect: Aspect, model: str, kernel: str) -> bool:
            agrees = model == kernel
            self.tally.add(aspect, what, agrees=agrees)
            if not agrees:
                cause = self._cause(flight, aspect, model, kernel)
                self.tally.differ(
                    Disagreement(aspect=aspect, line=flight.line, what=what, model=model, kernel=kernel, cause=cause)
                )
            return agrees

        return compare

    def _cause(self, flight: Flight, aspect: Aspect, model: str, kernel: str) -> str:
        for rule in CAUSES:
            if rule.applies(flight, aspect, model, kernel):
                return rule.missing
        return ""

    def _kernel_answer(self, flight: Flight) -> str:
        decided = flight.told.get(Said.DECIDED)
        if decided is not None:
            return str(decided.values["answer"])
        returned = flight.number(Said.RETURNED, "ret")
        if Said.DECIDED not in self.probed:
            return self._shown_answer(flight)
        if returned is None:
            return ""
        # the machinery was not reached: the head of the exit handler has answered
        if returned < 0:
            return error_text(-returned)
        return EMULATE if Said.EMULATING in flight.told or returned == 0 else RETRY

    def _shown_answer(self, flight: Flight) -> str:
        # what trace events alone tell; "": they do not
        fmt, fault = flight.vm.format, flight.fault
        wanted = X if fault.is_exec else W if fault.is_write else R
        if flight.installed:
            told = flight.installed[0]
            if self.changes_seen and not flight.changed:
                return SPURIOUS
            return FIXED if fmt.prot(told.number("desc")) & wanted else WRITE_PROTECTED
        repaired = flight.told.get(Said.REPAIRED)
        if repaired is not None and Said.REQUESTED not in flight.told:
            old, new = repaired.number("old"), repaired.number("new")
            return FIXED if old != new else SPURIOUS if fmt.prot(old) & wanted else ""
        if flight.errno in (EFAULT, EHWPOISON):  # not what a signal gives
            return error_text(flight.errno)
        if flight.devices and flight.devices[-1].size:
            return DEVICE_ACCESS
        if flight.devices:  # of a size that nothing tells
            return error_text(flight.errno) if flight.errno else UNDECODED_ACCESS
        return EMULATE if Said.MMIO_INSTALLED in flight.told else ""

    def _slot(self, flight: Flight, compare: Callable[[Aspect, str, str], bool]) -> None:
        pinned = flight.told.get(Said.PINNED)
        if pinned is None or Said.PINNED not in self.probed:
            return
        slot = flight.walk.progress.slot
        compare(Aspect.SLOT, "none" if slot is None else str(slot.id), str(pinned.values.get("slot", "none")))
        if slot is not None and "pfn" in pinned.values and "hva" in pinned.values:
            compare(Aspect.HVA, hex(flight.walk.progress.hva), hex(pinned.number("hva")))

    def _sizes(self, flight: Flight, compare: Callable[[Aspect, str, str], bool]) -> None:
        at = flight.walk.progress
        page = 1 << flight.vm.page_shift
        largest = max(at.policy.fit_sizes, default=page)
        bound = at.guest.size if at.guest is not None else at.max_size
        for aspect, name, size in (
            (Aspect.MAX_SIZE, "max_size", min(bound, largest)),
            (Aspect.WANTED, "wanted", max(at.wanted, page)),
            (Aspect.LEVEL, "size", max(at.size, page)),
        ):
            recorded = flight.number(Said.DECIDED, name)
            if recorded is not None and not (aspect is Aspect.MAX_SIZE and flight.guest_taken):
                compare(aspect, size_text(size), size_text(recorded))
        if Said.DECIDED not in self.probed and flight.installed:
            compare(Aspect.LEVEL, size_text(max(at.size, page)), size_text(flight.installed[0].number("size")))

    def _entry(self, flight: Flight, compare: Callable[[Aspect, str, str], bool]) -> None:
        vm, at = flight.vm, flight.walk.progress
        found = flight.left or vm.entry(at.at)
        fmt = vm.format
        mine = fmt.kind(found.desc, found.shift) is Kind.LEAF
        model_installed = any(step.name == "install" and step.outcome is not None for step in flight.walk.steps)
        place = at.at if at.guest is None else at.gpa
        told = next((t for t in reversed(flight.installed) if t.number("gpa") == place & -t.number("size")), None)
        if told is not None:
            desc, shift = told.number("desc"), told.number("size").bit_length() - 1
            same = mine and found.shift == shift
            compare(
                Aspect.PERMISSIONS, str(PROTS[fmt.prot(found.desc)]) if same else "none", str(PROTS[fmt.prot(desc)])
            )
            if not compare(Aspect.ENTRY, f"{found.desc:#x}" if same else "none", f"{desc:#x}"):
                self._mend(vm, at.at, told.number("size"), desc)
            self._neighbours(flight, told, compare)
        elif model_installed and isinstance(flight.walk.outcome, Fixed) and Said.MAPPED in self.probed:
            compare(Aspect.PERMISSIONS, str(PROTS[fmt.prot(found.desc)]), "none")
            vm.table.unmap(at.at, Gpa(at.at + at.size))
            vm.table.take_stale()
        repaired = flight.told.get(Said.REPAIRED)
        tried = flight.told.get(Said.REPAIR_TRIED)
        if repaired is not None and (
            tried.values["answer"] == FIXED if tried is not None else repaired.number("old") != repaired.number("new")
        ):
            desc = repaired.number("new")
            compare(
                Aspect.PERMISSIONS, str(PROTS[fmt.prot(found.desc)]) if mine else "none", str(PROTS[fmt.prot(desc)])
            )
            if not compare(Aspect.ENTRY, f"{found.desc:#x}" if mine else "none", f"{desc:#x}"):
                self._mend(vm, Gpa(at.at & -(1 << found.shift)), 1 << found.shift, desc)

    def _neighbours(self, flight: Flight, own: Told, compare: Callable[[Aspect, str, str], bool]) -> None:
        # pages around it that the host had at hand, mapped ahead of their faults: no access marks them
        vm, fmt, page = flight.vm, flight.vm.format, 1 << flight.vm.page_shift
        at = flight.walk.progress.at
        for told in flight.installed:
            if told is own or "place" not in told.values or "place" not in own.values:
                continue
            offset = (told.number("place") - own.number("place")) // _ENTRY_BYTES
            gpa, desc, shift = Gpa(at + offset * page), told.number("desc"), vm.page_shift
            entry = fmt.entry(desc, shift)
            old = vm.entry(gpa)
            mine = fmt.with_young(desc, False)
            near = at // page // _NEIGHBOURS == gpa // page // _NEIGHBOURS
            empty = fmt.kind(old.desc, old.shift) is not Kind.LEAF or Said.DECIDED not in self.probed
            if compare(Aspect.AHEAD, f"{mine:#x}" if near and empty else "none", f"{desc:#x}"):
                vm.taken["page mapped ahead"] += entry.kind is Kind.LEAF
            self._take(vm, gpa, page, desc, told.number("gpa") >> vm.page_shift)

    def _take(self, vm: CheckedVm, gpa: Gpa, size: int, desc: int, gfn: int) -> None:
        vm.take_entry(Gpa(gpa & -size), size, desc, gfn)

    def _mend(self, vm: CheckedVm, gpa: Gpa, size: int, desc: int) -> None:
        self.mended += 1
        vm.take_entry(Gpa(gpa & -size), size, desc)

    # Everything else.

    def _plain(self, aspect: Aspect, line: int, what: str, model: str, kernel: str, cause: str = "") -> None:
        self.tally.add(aspect, what, agrees=model == kernel)
        if model != kernel:
            self.tally.differ(
                Disagreement(aspect=aspect, line=line, what=what, model=model, kernel=kernel, cause=cause)
            )

    def memslot(self, event: SlotEvent, model: int, kernel: int) -> None:
        """A memslot request; errnos, -1: the model would carry it out."""
        names = ["accepted" if n in (0, -1) else error_text(n) for n in (model, kernel)]
        self._plain(Aspect.MEMSLOT, event.line, f"slot {event.slot:#x}", *names)

    def step(self, told: Told, what: str, model: object, kernel: object) -> None:
        """A step of a memslot change, or of something else that user space or the host asked for."""
        self._plain(Aspect.STEP, told.line, what, str(model), str(kernel))

    def invalidation(self, hits: Sequence[HvaHit]) -> None:
        """A host range begins to be invalidated; what it means to the model."""
        self._hits = Counter((hit.slot.id, hit.start, hit.end) for hit in hits)

    def unmapped(self, told: Told) -> None:
        """Frames that the kernel takes out of a slot."""
        key = told.number("slot"), told.number("start"), told.number("end")
        text = f"slot {key[0]} frames {key[1]:#x} to {key[2]:#x}"
        model = text if key in self._hits else ", ".join(f"slot {s} frames {a:#x} to {b:#x}" for s, a, b in self._hits)
        self._plain(Aspect.FRAMES, told.line, "invalidation", model or "none", text)

    def log_protect(self, vm: CheckedVm, told: Told, asked: Told | None) -> None:
        """Pages that the kernel found written; they are protected again. *asked*: what user space asked for."""
        number, first, mask = told.number("slot"), told.number("first"), told.number("mask")
        pages = vm.log.bitmap(number)
        if pages is not None:
            mine = sum(1 << n for n in range(64) if first + n in pages)
            cause = "" if self.marks_seen else WALKS_MARKS.missing
            if asked is None or asked.says is not Said.GET_LOG:  # else user space says which of them
                mine &= mask
            self._plain(Aspect.LOG, told.line, "collection", f"{mine:#x}", f"{mask:#x}", cause)
        if asked is not None:
            self.step(told, "slot of the collected log", asked.number("slot") & 0xFFFF, number & 0xFFFF)
        vm.protect_again(number, first, mask)

    def prefault(self, asked: Told, ended: Told, flight: Flight | None) -> None:
        """KVM_PRE_FAULT_MEMORY is done with one address; *flight*: the last fault that it made."""
        ret = ended.number("ret")
        if self.target.policy.prefault is Prefault.REFUSED:
            self._plain(Aspect.PREFAULT, asked.line, "pre-fault", _return_text(-EOPNOTSUPP), _return_text(ret))
        elif flight is not None and not flight.failed:
            gpa, at = asked.number("gpa"), flight.walk.progress
            mine: int | None = None
            match flight.walk.outcome:
                case Fixed() | Spurious() | WriteProtected():
                    size = max(at.size, 1 << flight.vm.page_shift)
                    mine = min(asked.number("size"), (gpa & -size) + size - gpa)
                case Emulate():
                    mine = -ENOENT
                case Error(errno) | Exit(errno=errno) if errno:
                    mine = -errno
                case _:
                    pass
            if mine is not None:
                self._plain(Aspect.PREFAULT, asked.line, "pre-fault", str(mine), str(ret))


def _answer(outcome: Outcome | None, kernel: str) -> str:
    if outcome is None:
        return "none"
    if kernel == DEVICE_ACCESS and _is_device(outcome):
        return kernel
    undecoded = outcome == Error(ENOSYS) or (isinstance(outcome, Exit) and outcome.reason is Reason.UNDECODED_MMIO)
    return kernel if kernel == UNDECODED_ACCESS and undecoded else answer_text(outcome)


def _is_device(outcome: Outcome | None) -> bool:
    # whether it is emulated, decoded for user space or a bus of the kernel takes it is not what the event tells
    match outcome:
        case Emulate() | Exit(reason=Reason.MMIO | Reason.WIDE_MMIO) | Resume(done=Done.BUS):
            return True
        case _:
            return False


def _repair(flight: Flight) -> str:
    steps = [step for step in flight.walk.steps if step.name == "repair"]
    if not steps:
        return "not reached"
    return next((answer_text(s.outcome) for s in steps if s.outcome is not None), "not here")


def _returns(run: Run) -> int | None:
    match run.outcome:
        case Emulate():
            return None  # the emulator's result
        case Exit(errno=0):
            return 0
        case Error(errno) | Exit(errno=errno) | Inject(errno=errno) if errno:
            return -errno
        case _:
            return 1


def _return_text(ret: int) -> str:
    if ret < 0:
        return f"-{errorcode.get(-ret, -ret)}"
    return {0: "exit to user space", 1: "the guest runs on"}.get(ret, str(ret))
