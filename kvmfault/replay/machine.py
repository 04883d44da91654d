"""One target that a recording is replayed on: its VMs, their slots and memory, and what came of each fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from errno import errorcode
from functools import lru_cache

from kvmfault.contract.outcome import Outcome
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.contract.values import SlotFlush
from kvmfault.errors import ModelError
from kvmfault.machine.vm import Vm
from kvmfault.replay.settings import AS_RECORDED, HostSettings
from kvmfault.replay.verdict import Evidence, Unexplained, judge, outcome_text
from kvmfault.trace.events import AgeEvent, Event, FaultEvent, SlotEvent, UnmapEvent
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot_request import MemslotRequest

__all__ = ["KEPT", "Machine", "ReplayTarget"]

KEPT = 20
"""Unexplained outcomes kept with their lines; all are counted."""


class Machine:
    """The VMs of a recording on one target: their slots, the host memory under them, and what the host does to it."""

    def __init__(self, target: Target, *, host: HostSettings = AS_RECORDED) -> None:
        self.target = target
        self.host = host
        self.vm: Vm = Vm.on(target)
        self.refused_slots: Counter[str] = Counter()
        self.first_refused: str = ""
        self._label: str | None = None
        self._vms: dict[str, Vm] = {}

    def vms(self) -> tuple[Vm, ...]:
        """All VMs of the recording, each as it is now."""
        return tuple(self._vms.values()) or (self.vm,)

    # What user space and the host did.

    def set_slot(self, event: SlotEvent, *, made_up: bool) -> None:
        """Apply a memslot change, and put anonymous memory under it. Faults go to the VM that was changed last.

        *made_up*: when the change really was is not known, so nothing but the slot itself leaves the table.
        """
        if event.vm != self._label:
            self._label = event.vm
            self.vm = self._vms.setdefault(event.vm, Vm.on(self.target))
        page = 1 << self.vm.page_shift
        start, end = event.gpa & -page, -(-(event.gpa + event.size) // page) * page
        hva = event.hva - (event.gpa - start)
        if event.size and hva & (page - 1):
            hva &= -page  # recorded on smaller pages: keep the order, give up congruence
        try:
            request = MemslotRequest(
                slot=event.slot,
                flags=self.host.flags(event.flags),
                gpa=Gpa(start),
                size=end - start if event.size else 0,
                hva=Hva(hva),
            )
        except ModelError:
            self._refuse(event, "out of range")
            return
        result = self.vm.set_region(request, flush=SlotFlush.SLOT if made_up else None)
        if result.errno:
            self._refuse(event, f"{errorcode.get(result.errno, result.errno)} ({result.rule})")
        elif event.size:
            self._back(hva, end - start)

    def _refuse(self, event: SlotEvent, why: str) -> None:
        self.refused_slots[why] += 1
        self.first_refused = self.first_refused or f"slot {event.slot} at gpa {event.gpa:#x}: {why}"

    def _back(self, start: int, size: int) -> None:
        at = start
        for area in self.vm.host.areas(Hva(start), Hva(start + size)):
            if area.start > at:
                self.vm.host.back(Hva(at), area.start - at, self.host.pages)
            at = area.end
        if at < start + size:
            self.vm.host.back(Hva(at), start + size - at, self.host.pages)

    def host_did(self, event: Event) -> None:
        """What the host did to its memory: a range unmapped, or its access flags looked at. Others are ignored."""
        match event:
            case UnmapEvent():
                self.vm.invalidate(self._span(event.start, event.end))
            case AgeEvent():
                self.vm.age(self._span(event.start, event.end), test_only=event.test_only)
            case _:
                pass

    def _span(self, start: int, end: int) -> HvaRange:
        page = 1 << self.vm.page_shift
        return HvaRange(Hva(start & -page), Hva(-(-end // page) * page))


class ReplayTarget(Machine):
    """A target under replay. *own*: the backend whose faults the recording holds; None for that target itself."""

    def __init__(self, target: Target, own: Target) -> None:
        super().__init__(target)
        self.is_own: bool = target.backend is own.backend
        self.faults: int = 0
        self.outcomes: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.unexplained: list[Unexplained] = []
        self.unexplained_count: int = 0
        self._pending: dict[str, tuple[FaultEvent, Outcome, Gpa | None, Evidence]] = {}
        self._own = own
        self._translate = _translator(own, target)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_translate"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._translate = _translator(self._own, self.target)

    # A fault and what followed it.

    def fault(self, event: FaultEvent, *, no_memory: bool) -> None:
        """Run the path on one recorded fault. *no_memory*: the recording shows that the host had none there."""
        self.settle(event.vcpu)
        fault, lost = self._translate(tuple(event.registers.items()))
        outcome = (self._without_memory(fault) if no_memory else self.vm).resolve(fault)
        self.faults += 1
        self.outcomes[outcome_text(outcome)] += 1
        for member in lost:
            self.lost[member] += 1
        self._pending[event.vcpu] = event, outcome, fault.kvm_get_fault_gpa(), Evidence()

    def _without_memory(self, fault: Raw) -> Vm:
        # as the VM is, but for the one page of the host; what the fault does to it is lost, and it does nothing
        gpa = fault.kvm_get_fault_gpa()
        vm = self.vm.fork()
        gfn = Gfn((gpa or 0) >> vm.page_shift)
        slot = vm.find_slot(gfn)
        if slot is not None and vm.host.vma(slot.hva_of(gfn)) is not None:
            vm.invalidate(vm.host.unback(slot.hva_of(gfn), 1 << vm.page_shift))
        return vm

    def device(self, vcpu: str, gpa: int, *, undecoded: bool) -> None:
        """The recording shows a device access; it counts if it is to the page that faulted."""
        pending = self._pending.get(vcpu)
        if pending is not None:
            page = pending[2]
            if page is None or gpa >> 12 == page >> 12:
                pending[3].device = True
                pending[3].undecoded |= undecoded

    def returned(self, vcpu: str, errno: int, reason: str) -> None:
        """The recording shows that KVM_RUN returned."""
        pending = self._pending.get(vcpu)
        if pending is not None:
            pending[3].errno = errno or pending[3].errno
            pending[3].gave_up |= not errno and "INTERNAL_ERROR" in reason

    def settle(self, vcpu: str, *, ended: bool = True) -> None:
        """The vCPU runs again, or nothing follows: judge its last fault."""
        pending = self._pending.pop(vcpu, None)
        if pending is None or not self.is_own:
            return
        event, outcome, _, seen = pending
        seen.ended = ended
        finding = judge(event.line, outcome, seen)
        if finding is not None:
            self.unexplained_count += 1
            if len(self.unexplained) < KEPT:
                self.unexplained.append(finding)

    def finish(self) -> None:
        """The recording is over."""
        for vcpu in list(self._pending):
            self.settle(vcpu, ended=False)


_Translate = Callable[[tuple[tuple[str, int], ...]], tuple[Raw, tuple[str, ...]]]


def _translator(own: Target, target: Target) -> _Translate:
    # equal faults in a row are common: a small cache saves most of the work
    @lru_cache(maxsize=4096)
    def translate(registers: tuple[tuple[str, int], ...]) -> tuple[Raw, tuple[str, ...]]:
        if own.backend is target.backend:
            return target.decode(**dict(registers)), ()
        moved = target.encode(own.access(own.decode(**dict(registers))))
        return moved.fault, tuple(moved.lost)

    return translate
