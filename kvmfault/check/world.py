"""The VM that a recording is checked on: the model's own, but what the host answers is what the host answered then."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from errno import ENOENT
from typing import NamedTuple

from kvmfault.check.flight import Flight, Seen
from kvmfault.contract.format import Kind, Memory
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, MapResult, Memslot, Pin, PinError, VmFacts
from kvmfault.contract.probes import Said
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.contract.values import SlotFlush
from kvmfault.machine.stage2 import Stage2
from kvmfault.machine.table import Found
from kvmfault.machine.vm import Vm
from kvmfault.path.run import Walk
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot import HvaHit
from kvmfault.vm.memslot_change import ChangeResult, Stage

__all__ = ["CheckedVm", "Known"]


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
        self._vm.vcpu.as_id = self._flight.as_id
        self._vm.use_table(paging=self._flight.paging)

    def __exit__(self, *_: object) -> None:
        self._vm.flight = None


class CheckedVm(Vm):
    """Answers of the host come from the recording; ``taken`` counts them by kind."""

    facts: VmFacts
    table: Stage2
    own_table: Stage2

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.flight: Flight | None = None
        self.epoch: int = 0
        """Number of the last retirement of its tables."""
        self.taken: Counter[str] = Counter()
        self.known: dict[int, Known] = {}
        """By page of user space, as long as nothing was invalidated there."""
        self.table_frames: Counter[tuple[Gfn, bool]] = Counter()
        """Frames that hold tables of the guest (and whether upper ones), by the number of table pages that stand for
        them."""
        self.mapped: dict[int, set[tuple[Gpa, int]]] = {}
        """Frame -> (address, size) of entries whose addresses the guest's own tables translate."""
        self.slots_made_up = False
        self.unmapped: dict[tuple[int, int, int], bool] = {}
        """(slot, first frame, end) of the ranges that the last invalidation meant -> whether anything was mapped."""
        self.recovered: list[tuple[Gpa, int]] = []
        """(address, size) of the table pages that the end of logging has given up so far."""
        self._tables = {(self._is_virtual, 0): self.own_table}
        """By whether addresses are virtual, and address space."""

    @property
    def virtual(self) -> bool:
        """Faults report virtual addresses."""
        return self._virtual

    @property
    def _is_virtual(self) -> bool:
        return self._virtual and self.facts.guest_paging

    def use_table(self, *, paging: bool | None) -> None:
        """The table of the vCPU that runs now. *paging*: its guest uses its own tables, or does not; where they are
        shadowed, each has a table of its own, as has each address space."""
        if paging is not None and self._virtual and paging is not self.facts.guest_paging:
            self.facts = replace(self.facts, guest_paging=paging)
        key = self._is_virtual, self.vcpu.as_id
        if key not in self._tables:
            own = self.own_table
            self._tables[key] = Stage2(self.format, split_blocks=own.split_blocks, marks_rewritten=own.marks_rewritten)
        self.table = self.own_table = self._tables[key]

    def speaking_for(self, flight: Flight) -> _Speaking:
        """The ports speak for this fault."""
        return _Speaking(self, flight)

    def walk(self, fault: Raw) -> Walk:
        """The path, step by step."""
        return self._path.walk(self, fault, told=False)

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
        found = "first seen" if before is None else "as known from before" if now == before else "not as known"
        self.taken[f"page of the host, {found}"] += 1
        self.known[page] = now
        return Pin(now.pfn, writable=now.writable and not slot.readonly)

    def mapping_size(self, hva: Hva) -> int:
        """See Ports: only the size that KVM then asked for is recorded, which is the host's or less."""
        size = self.flight.number(Said.MAPPED, "wanted") if self.flight is not None else None
        for says, name in ((Said.DECIDED, "wanted"), (Said.REQUESTED, "size")):
            size = size or (self.flight.number(says, name) if self.flight is not None else None)
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
        return super().block_allowed(slot, gfn, size) and not any(
            first <= g < first + pages for g, _ in self.table_frames
        )

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        """See Ports: where the recorded entries lead, or what the kernel found."""
        if self.flight is None or not self._virtual:
            return super().walk_guest(gpa)
        return self.flight.translation() or GuestWalkFault()

    def is_tracked(self, gfn: Gfn) -> bool:
        """See Ports."""
        return (gfn, True) in self.table_frames or super().is_tracked(gfn)

    def _remember(self, gpa: Gpa, size: int) -> None:
        guest = self.flight.walk.progress.gfn if self.flight is not None else None
        if guest is not None:
            self.mapped.setdefault(guest & -(size >> self.page_shift), set()).add((Gpa(gpa & -size), size))

    def tables_over(self, start: int, end: int) -> list[tuple[Stage2, Gpa, Gpa]]:
        """As State has it, by an index: recordings are long."""
        first, last = self.bytes_of(start, end)
        found = [(table, first, last) for (virtual, _), table in self._tables.items() if not virtual]
        virtual = [table for (is_virtual, _), table in self._tables.items() if is_virtual]
        if virtual:
            places = [place for gfn in self._mapped_in(start, end) for place in self.mapped[gfn]]
            found += [(table, at, Gpa(at + size)) for table in virtual for at, size in places]
        return found

    def _mapped_in(self, start: int, end: int) -> list[int]:
        largest = max(self.target.policy.fit_sizes, default=0) >> self.page_shift
        heads = {start & -(size >> self.page_shift) for size in self.target.policy.fit_sizes}
        if end - start + len(heads) < len(self.mapped):
            near = [gfn for gfn in (*sorted(heads - {start}), *range(start, end)) if gfn in self.mapped]
        else:
            near = [gfn for gfn in self.mapped if start - largest < gfn < end]
        page = self.page_shift
        return [g for g in near if g < end and any(g + (size >> page) > start for _, size in self.mapped[g])]

    def drop(self, start: int, end: int) -> None:
        """As State has it."""
        for table, first, last in self.tables_over(start, end):
            table.unmap(first, last)
        for gfn in self._mapped_in(start, end):
            del self.mapped[gfn]

    def flush_stale(self) -> None:
        """No guest runs here, so nothing has cached what is stale."""
        for table in self._tables.values():
            table.stale.clear()

    def _may_be_block(self, slot: Memslot, gfn: Gfn, shift: int) -> bool:
        # which blocks the host maps by then is not recorded, but which table pages were given up
        gpa = gfn << self.page_shift
        return any(at <= gpa < at + size and size > 1 << shift for at, size in self.recovered)

    def shadow(self, gfn: Gfn, *, upper: bool) -> None:
        """A table page stands for the guest's table in a frame from now on. (account_shadowed)"""
        self.table_frames[gfn, upper] += 1
        self.protect(gfn)

    def protect(self, gfn: Gfn) -> None:
        """Writes to a frame that holds a table are noticed."""
        for table, first, last in self.tables_over(gfn, gfn + 1):
            table.write_protect(first, last, for_good=True)
        self.flush_stale()

    def unshadow(self, gfn: Gfn, *, upper: bool) -> None:
        """That table page is gone. (unaccount_shadowed)"""
        self.table_frames[gfn, upper] -= 1
        if self.table_frames[gfn, upper] <= 0:
            del self.table_frames[gfn, upper]

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        """See Ports. A leaf of another frame that the recording did not see go is dropped first."""
        if self.flight is not None and self._lost(self.flight.seen, gpa, size):
            return MapResult.LOST
        found = self.table.leaf(gpa)
        same_size = found is not None and found.shift == size.bit_length() - 1
        if found is not None and same_size and self.format.hpa(found.desc, found.shift) >> self.page_shift != pfn:
            self.taken["frame that changed without an invalidation"] += 1
            self.table.unmap(gpa, Gpa(gpa + size))
        return super().map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)

    def _lost(self, seen: Seen | None, gpa: Gpa, size: int) -> bool:
        # whether somebody else changed the entry between the moment it was read and now
        if seen is None:
            return False
        now = self.table.walk(gpa)
        if seen.shift > size.bit_length() - 1:
            return seen.linking and now.shift < seen.shift
        return now.shift == seen.shift and now.desc != seen.desc

    def look(self, flight: Flight, *, below: int | None = None) -> None:
        """The fault reads the entry that it will replace: where the walk ends, or (*below*: log2 of a size) the empty
        one of the table page that it has just put under an entry of that size."""
        found = self.table.walk(flight.walk.progress.at)
        shift = found.shift
        if below is not None:
            shift = next((level.shift for level in self.format.levels if level.shift < below), shift)
        flight.seen = Seen(shift, found.desc if shift == found.shift else self.format.empty)

    def believe(self, gpa: Gpa, desc: int, covered: int = 0) -> None:
        """The entry over *gpa*, of so many bytes if that is known, was this one before the fault: the model's becomes
        that, if it is another."""
        found = self.table.walk(gpa)
        if covered and covered < 1 << found.shift:
            self.own_table.split(gpa, Gpa(gpa + covered))
            found = self.table.walk(gpa)
        if found.desc == desc:
            return
        page = 1 << self.page_shift
        size = 1 << found.shift if self.format.kind(found.desc, found.shift) is Kind.LEAF else page
        self.taken["entry as it was before the fault"] += 1
        if self.format.kind(desc, size.bit_length() - 1) in (Kind.LEAF, Kind.MMIO):
            self.take_entry(Gpa(gpa & -size), size, desc)
        else:
            self.own_table.unmap(gpa, Gpa(gpa + page))
            self.flush_stale()

    def writable(self, flight: Flight) -> bool:
        """Whether the host's page may be written, as far as its present entry or what was known before tells."""
        at = flight.walk.progress
        found = self.table.leaf(at.at)
        if found is not None:
            return bool(self.format.entry(found.desc, found.shift).host_writable)
        known = self.known.get(at.hva)
        return known is None or known.writable

    # What the recording shows to happen to the VM.

    def invalidation_begins(self, span: HvaRange) -> tuple[HvaHit, ...]:
        """The host begins to invalidate a range. (kvm_mmu_notifier_invalidate_range_start)"""
        self.forget(span)
        hits = self.slots.in_hva_range(span.start, span.end)
        self.unmapped = {(hit.slot.id, hit.start, hit.end): self._maps(hit.start, hit.end) for hit in hits}
        self.invalidations.active += 1
        if hits:
            self.invalidations.begin()
            for hit in hits:
                self.invalidations.add(hit.start, hit.end)
                self.drop(hit.start, hit.end)
            self.flush_stale()
        return hits

    def _maps(self, start: int, end: int) -> bool:
        kind = self.format.kind
        return any(
            kind(entry.desc, entry.shift) is Kind.LEAF
            for table, first, last in self.tables_over(start, end)
            for entry in table.in_range(first, last)
        )

    def log_refused(self, slot: int) -> int:
        """The errno with which KVM_GET_DIRTY_LOG is refused; 0: it is not."""
        refused, found = self._logged_slot(slot)
        return refused if found is None else 0 if self.log.bitmap(slot) is not None else ENOENT

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
            self.clear_tables()
            self.flush_stale()

    def clear_tables(self) -> None:
        """As State has it, for every address space."""
        for table in self._tables.values():
            table.clear()
        self.mapped.clear()

    def finish_change(self, flush: SlotFlush) -> ChangeResult | None:
        """The change of a memslot is carried out; None: there was none under way. *flush*: what goes with a slot, if
        that has not happened yet."""
        done: ChangeResult | None = None
        while self.slots.next_stage is not None:
            if self.slots.next_stage is Stage.FLUSH:
                self._flush_changing(flush)
            done = self.slots.step()
        if done is not None and not done.errno:
            self.slot_published(done.old, done.new)
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

    def written(self, gpa: Gpa) -> None:
        """KVM itself wrote to memory of the guest."""
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.slots.find(gfn)
        if slot is not None:
            self.mark_dirty(slot, gfn, Pfn(0))

    def take_entry(self, gpa: Gpa, size: int, desc: int, gfn: int | None = None) -> None:
        """Put an entry as the recording shows it, whatever the model has there; *gfn*: what it maps, where the address
        is virtual."""
        if self._virtual and self.facts.guest_paging and gfn is not None:
            self.mapped.setdefault(gfn, set()).add((gpa, size))
        self.table.unmap(gpa, Gpa(gpa + size))
        self.table.put(gpa, size, desc)
        self.table.take_stale()

    def entry(self, gpa: Gpa) -> Found:
        """The entry at which translation of *gpa* ends."""
        return self.table.walk(gpa)
