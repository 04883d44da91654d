"""The VM that a recording is checked on: the model's own, but what the host answers is what the host answered then."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from kvmfault.contract.format import Memory
from kvmfault.contract.ports import MapResult, Memslot, Pin, PinError
from kvmfault.contract.probes import Said
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.contract.values import SlotFlush
from kvmfault.machine.table import Found
from kvmfault.machine.vm import Vm
from kvmfault.path.run import Run, Walk
from kvmfault.trace.truth import Told
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot_change import ChangeResult, Stage


class Flight:
    """A fault on its way: how far the model is, and what the recording has said of it so far."""

    def __init__(
        self, line: int, pid: int, vm: CheckedVm, vcpu: int, fault: Raw, *, prefetch: bool, epoch: int
    ) -> None:
        self.line = line
        """Where the recording has it: of the fault's own event, or of the probe that showed it."""
        self.pid, self.vm, self.vcpu, self.fault = pid, vm, vcpu, fault
        self.prefetch = prefetch
        self.epoch = epoch
        """Number of the last retirement of any table that the vCPU's entry into the guest came after."""
        self.told: dict[Said, Told] = {}
        """The last of each kind that the recording said."""
        self.installed: list[Told] = []
        self.seq = vm.invalidations.seq
        self.others = False
        """Another task changed the VM since it began."""
        self.run: Run | None = None
        self.failed = ""
        """The model could not go on: why."""
        with vm.speaking_for(self):
            self.walk: Walk = vm.walk(fault)

    def until(self, *names: str) -> None:
        """Let the model go on up to the next step called so, or to its decision."""
        if not self.failed:
            with self.vm.speaking_for(self):
                self.walk.until(*names)

    def end(self) -> Run:
        """Let the model finish."""
        if self.run is None:
            with self.vm.speaking_for(self):
                self.run = self.walk.end()
        return self.run

    def number(self, says: Said, name: str) -> int | None:
        """A value that the recording has told of this fault, or None."""
        told = self.told.get(says)
        value = told.values.get(name) if told is not None else None
        return value if isinstance(value, int) else None


class Known(NamedTuple):
    """What the host was last found to have at a page."""

    pfn: Pfn
    writable: bool


class _Speaking:
    def __init__(self, vm: CheckedVm, flight: Flight) -> None:
        self._vm, self._flight = vm, flight

    def __enter__(self) -> None:
        self._vm.use_vcpu(self._flight.vcpu)
        self._vm.flight = self._flight

    def __exit__(self, *_: object) -> None:
        self._vm.flight = None


class CheckedVm(Vm):
    """Answers of the host come from the recording; ``taken`` counts them by kind."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.flight: Flight | None = None
        self.epoch = 0
        """Number of the last retirement of its tables."""
        self.taken: Counter[str] = Counter()
        self.known: dict[int, Known] = {}
        """By page of user space, as long as nothing was invalidated there."""
        self.shadowed: Counter[Gfn] = Counter()
        """Frames that hold tables of the guest, by the number of table pages that stand for them."""

    def speaking_for(self, flight: Flight) -> _Speaking:
        """The ports speak for this fault."""
        return _Speaking(self, flight)

    def walk(self, fault: Raw) -> Walk:
        """The path, step by step."""
        return self._path.walk(self, fault)

    # What the host answers.

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        """See Ports: the recorded frame and whether the host may write to it, or the recorded error."""
        if slot.readonly and write:
            return Pin(None, PinError.RO_FAULT)
        told = self.flight.told.get(Said.PINNED) if self.flight is not None else None
        if self.flight is not None and nowait and Said.DEFERRED in self.flight.told:
            self.taken["page that needs I/O"] += 1
            return Pin(None, PinError.NEEDS_IO)
        error = told.values.get("error") if told is not None else None
        if isinstance(error, str):
            self.taken[f"host error {error}"] += 1
            return Pin(None, PinError[error])
        if told is None or "pfn" not in told.values:
            self.taken["page that was not recorded"] += 1
            return Pin(Pfn(0), writable=not slot.readonly)
        now = Known(Pfn(told.number("pfn")), bool(told.number("writable")))
        page = told.number("hva", hva) & -(1 << self.page_shift)
        before = self.known.get(page)
        self.taken["page, as known from before" if now == before else "page, anew" if before is None else "page"] += 1
        self.known[page] = now
        return Pin(now.pfn, writable=now.writable and not slot.readonly)

    def mapping_size(self, hva: Hva) -> int:
        """See Ports: only the size that KVM then asked for is recorded, which is the host's or less."""
        size = self.flight.number(Said.MAPPED, "wanted") if self.flight is not None else None
        size = size or (self.flight.number(Said.DECIDED, "wanted") if self.flight is not None else None)
        self.taken["size of the host's mapping" if size else "size of the host's mapping, not recorded"] += 1
        return size or 1 << self.page_shift

    # What other tasks did meanwhile.

    def table_retired(self) -> bool:
        """See Ports."""
        return self.flight is not None and self.flight.epoch < self.epoch

    def block_allowed(self, slot: Memslot, gfn: Gfn, size: int) -> bool:
        """See Ports."""
        pages = size >> self.page_shift
        first = gfn & -pages
        return super().block_allowed(slot, gfn, size) and not any(first <= g < first + pages for g in self.shadowed)

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult:
        """See Ports. A leaf of another frame that the recording did not see go is dropped first."""
        found = self.table.leaf(gpa)
        same_size = found is not None and found.shift == size.bit_length() - 1
        if found is not None and same_size and self.format.hpa(found.desc, found.shift) >> self.page_shift != pfn:
            self.taken["frame that changed without an invalidation"] += 1
            self.table.unmap(gpa, Gpa(gpa + size))
        return super().map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)

    # What the recording shows to happen to the VM.

    def forget(self, span: HvaRange) -> None:
        """What the host had in the range is not known any more."""
        page = 1 << self.page_shift
        if span.end - span.start >> self.page_shift > len(self.known):
            self.known = {at: k for at, k in self.known.items() if not span.start <= at < span.end}
            return
        for at in range(span.start & -page, span.end, page):
            self.known.pop(at, None)

    def change_until_flush(self) -> None:
        """The change of a memslot goes on to the point where the slot's mappings go."""
        while self.slots.next_stage not in (Stage.FLUSH, None):
            self.slots.step()

    def retire(self, number: int) -> None:
        """Every table is thrown away; vCPUs that entered the guest before will find out under the lock."""
        self.epoch = number
        if self.slots.next_stage is Stage.FLUSH:
            self._flush_changing(SlotFlush.TABLE)
            self.slots.step()
        else:
            self.own_table.clear()
            self.flush_stale()

    def finish_change(self) -> ChangeResult | None:
        """The change of a memslot is carried out; None: there was none under way."""
        done: ChangeResult | None = None
        while self.slots.next_stage is not None:
            if self.slots.next_stage is Stage.FLUSH:
                self._flush_changing(SlotFlush.SLOT)
            done = self.slots.step()
        if done is not None and not done.errno:
            self.slot_changed(done.old, done.new)
            self.change_userfault(done.old, done.new)
        return done

    def protect_again(self, number: int, first: int, mask: int) -> None:
        """Pages ``first + n`` of a slot, for every bit n of *mask*, are not marked now; the next write is noticed."""
        slot = self.slots.by_id(number & 0xFFFF, number >> 16)
        if slot is None:
            return
        pages = self.log.bitmap(number)
        for page in (first + n for n in range(mask.bit_length()) if mask >> n & 1):
            if pages is not None:
                pages.discard(page, page + 1)
            if page < slot.npages:
                self._see_writes(slot, range(page, page + 1))
        self.flush_stale()

    def take_entry(self, gpa: Gpa, size: int, desc: int) -> None:
        """Put an entry as the recording shows it, whatever the model has there."""
        self.table.unmap(gpa, Gpa(gpa + size))
        self.table.put(gpa, size, desc)
        self.table.take_stale()

    def entry(self, gpa: Gpa) -> Found:
        """The entry at which translation of *gpa* ends."""
        return self.table.walk(gpa)
