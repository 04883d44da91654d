"""What the steps of the path ask of a VM (Ports), answered from its state."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EEXIST, ENOENT

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Kind, Memory
from kvmfault.contract.outcome import MmioAccess, Signal
from kvmfault.contract.ports import (
    Area,
    GuestTranslation,
    GuestWalkFault,
    Leaf,
    MapResult,
    Memslot,
    MmioNote,
    Pin,
    PinError,
    Repair,
)
from kvmfault.contract.values import DirtyMark, LoggedSize
from kvmfault.errors import ModelError
from kvmfault.machine.state import MEMFD_MEMORY, ReverseMap, State
from kvmfault.types import EHWPOISON, Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import AreaKind
from kvmfault.vm.dirty import RingEntry
from kvmfault.vm.memslots import UPDATING

__all__ = ["Surroundings"]


class Surroundings(State):
    """The ports speak for the vCPU that runs now."""

    memfds: Mapping[int, Pfn]
    memfd_next: Pfn
    signals: tuple[Signal, ...]
    warnings: tuple[str, ...]

    # Ports: what steps ask.

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        """See Ports."""
        vcpu = self.vcpu
        active = self.slots.active[vcpu.as_id]
        slot = vcpu.slot
        # the vCPU's last slot, as in kvm_vcpu_gfn_to_memslot; good while the set that it came from is the active one
        if slot is None or active is not vcpu.slot_set or not slot.base_gfn <= gfn < slot.end_gfn:
            slot = active.find(gfn)
            vcpu.slot, vcpu.slot_set = slot, active
        return slot

    def is_private(self, gfn: Gfn) -> bool:
        """See Ports."""
        return gfn in self.private

    def userfault_wanted(self, slot: Memslot, gfn: Gfn) -> bool:
        """See Ports."""
        pages = self.userfault.get(slot.number)
        return pages is not None and gfn - slot.base_gfn in pages

    def find_leaf(self, gpa: Gpa) -> Leaf | None:
        """See Ports."""
        leaf, fmt = self.table.leaf(gpa), self.format
        if leaf is None:
            return None
        return Leaf(fmt.prot(leaf.desc), 1 << leaf.shift, Pfn(fmt.hpa(leaf.desc, leaf.shift) >> self.page_shift))

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        """See Ports."""
        return self.guest_tables.walk(gpa) if self.guest_tables is not None else None

    def is_tracked(self, gfn: Gfn) -> bool:
        """See Ports."""
        return gfn in self.tracked

    def topup(self) -> int:
        """See Ports: there is always memory."""
        return 0

    def area(self, hva: Hva) -> Area | None:
        """See Ports."""
        vma = self.host.vma(hva)
        if vma is None:
            return None
        if vma is not self._area_of[0]:  # the facts of the last area: most faults come from the same one
            self._area_of = vma, Area(vma.unit, vma.tags, vma.any_uncached, vma.kind is AreaKind.PFNMAP, vma.cacheable)
        block = vma.block_at(hva) if vma.block != vma.unit else vma.unit
        return self._area_of[1] if block == vma.unit else self._area_of[1]._replace(block=block)

    def mapping_size(self, hva: Hva) -> int:
        """See Ports."""
        return self.host.mapping_size(hva)

    def block_allowed(self, slot: Memslot, gfn: Gfn, size: int) -> bool:
        """See Ports."""
        if not self.private and not self.tracked.items:
            return True
        pages = size >> self.page_shift
        first = gfn & -pages
        mixed = bool(self.private.meeting(first, first + pages)) and not self.private.covers(first, first + pages)
        return not mixed and not any(first <= g < first + pages for g in self.tracked)

    def table_retired(self) -> bool:
        """See Ports: a fault and the retirement of its table do not overlap here."""
        return False

    def find_mmio(self, gpa: Gpa) -> MmioNote:
        """See Ports."""
        facts = self.facts
        virtual = self._virtual and facts.guest_paging
        nested = facts.nested and self.guest_tables is not None
        noted = self.slots.generation(self.mmio_space())
        if self.vcpu.mmio.hits(gpa, noted, self.page_shift, direct=not virtual, nested=nested):
            return MmioNote.CACHED
        generation = self.slots.generation(self.vcpu.as_id)
        found = self.table.walk(gpa)
        entry = self.format.entry(found.desc, found.shift)
        if entry.kind is not Kind.MMIO:
            return MmioNote.ABSENT
        mask = (1 << self.format.mmio_generation_bits()) - 1
        current = entry.generation == generation & mask and not generation & UPDATING
        return MmioNote.CURRENT if current else MmioNote.STALE

    def mmio_space(self) -> int:
        """Address space of whose memslots what the vCPU remembers as MMIO has its generation: the first one.

        Since "KVM: x86: Use active memslots for the per-vCPU MMIO cache" the vCPU's own; no kernel modelled has that.
        """
        return 0

    def register(self, number: int) -> int:
        """See Ports."""
        return 0 if number == self.target.backend.zero_register else self.vcpu.registers[number]

    # Ports: what steps do.

    def repair_young(self, gpa: Gpa) -> None:
        """See Ports."""
        self.table.make_young(gpa)

    def drop_leaf(self, gpa: Gpa) -> None:
        """See Ports."""
        self.table.unmap(gpa, Gpa(gpa + 1))
        self.flush_stale()

    def repair_fast(self, gpa: Gpa, *, write: bool, execute: bool) -> Repair:
        """See Ports."""
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.find_slot(gfn)
        policy = self.target.policy
        logged = slot is not None and slot.logs_dirty and policy.logged_size is not LoggedSize.ANY
        result = self.table.fix_fast(gpa, write=write, execute=execute, logged=logged)
        marks = policy.dirty_mark is not DirtyMark.ON_HARVEST
        if result is Repair.FIXED and write and slot is not None and marks:
            self.mark_dirty(slot, gfn, Pfn(0))
        return result

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        """See Ports. What the pin itself invalidates (a write that breaks copy-on-write) goes through the protocol."""
        if slot.readonly and write:
            return Pin(None, PinError.RO_FAULT)
        page = Hva(slot.hva + (gfn - slot.base_gfn << self.page_shift))  # *gfn* may be a block's first, *hva* never is
        got = self.host.pin(page, write=write, nowait=nowait, interruptible=interruptible)
        if got.invalidated is not None:
            self.invalidate(got.invalidated)
        return got._replace(writable=False) if slot.readonly and got.writable else got

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        """See Ports: the file's pages are frames of their own, one page each; the first use of a page clears it."""
        if slot.gmem is None:
            return Pin(None, PinError.FAULT, errno=ENOENT)
        fd, page = slot.gmem.fd, (slot.gmem.offset >> self.page_shift) + gfn - slot.base_gfn
        file = self.slots.files.get(fd)
        if fd not in self.memfds and file is not None:
            self.memfds = {**self.memfds, fd: self.new_memfd_frames(file.size >> self.page_shift)}
        frame = self.memfd_pages.get((fd, page), Pfn(self.memfds[fd] + page))
        if frame is None:
            return Pin(None, PinError.HWPOISON, errno=EHWPOISON)
        return Pin(frame, writable=not slot.readonly, max_size=1 << self.page_shift)

    def new_memfd_frames(self, pages: int) -> Pfn:
        """The first of *pages* frames that no guest_memfd had so far. ModelError: there are not so many."""
        first = self.memfd_next
        self.memfd_next = Pfn(first + pages)
        if self.memfd_next << self.page_shift > MEMFD_MEMORY.stop:
            raise ModelError(f"the model has {len(MEMFD_MEMORY):#x} bytes for all guest_memfds together")
        return first

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        """See Ports. What arrives is handled by ``Guest.page_ready``."""
        vcpu = self.vcpu
        if queue and vcpu.deferred.find(gfn) is None:
            vcpu.deferred = vcpu.deferred.queue(gfn, fault, shadowed=self.shadowed)
        return vcpu.deferred.find(gfn) is not None

    def grow_for_fetch(self, gpa: Gpa) -> None:
        """See Ports."""
        self.table.grow_for_fetch(gpa)

    def fetched_small(self, gpa: Gpa, size: int) -> bool:
        """See Ports."""
        return self.table.made_for_fetch(gpa, size)

    def lock(self) -> None:
        """See Ports: one vCPU at a time."""

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        """See Ports: pages have no content here."""

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        """See Ports."""
        table = self.table
        if self._refuses_pieces and (block := table.leaf(gpa)) is not None and 1 << block.shift > size:
            return EEXIST
        result = table.map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
        if table.stale:
            self.flush_stale()
        if self._virtual or self.facts.nested:
            self._remember(gpa, size)
        return result

    def _remember(self, gpa: Gpa, size: int) -> None:
        guest = self.walk_guest(Gpa(gpa & -size))
        if isinstance(guest, GuestTranslation):
            own = self.table is self.own_table
            self.reverse.add(ReverseMap(own, Gpa(gpa & -size), size, Gpa(guest.gpa & -(1 << self.page_shift))))

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        """See Ports. Only the own TLB is flushed: others that have the old permissions fault, and come here too."""
        result = self.table.relax(gpa, prot)
        page = gpa & -(1 << self.page_shift)
        self.vcpu.tlb.flush(Gpa(page), Gpa(page + (1 << self.page_shift)))
        return result

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        """See Ports."""
        page = -(1 << self.page_shift)
        desc = self.format.mmio(Gpa(gpa & page), prot, self.slots.generation(self.vcpu.as_id))
        if desc is not None:
            self.table.put(Gpa(at & page), -page, desc)
            self.flush_stale()
        return MapResult.MMIO

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        """See Ports."""
        self.vcpu.mmio = self.vcpu.mmio.noted(gfn, gva, self.slots.generation(self.mmio_space()), self.page_shift)

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        """See Ports. (mark_page_dirty_in_slot)"""
        if slot.logs_dirty:
            number, page = slot.number, gfn - slot.base_gfn
            if self.log.ring_entries:
                self.vcpu.push(RingEntry(number, page), self.log.ring_entries)
            else:
                self.log.mark(number, page)

    def release(self, pfn: Pfn) -> None:
        """See Ports: pages are not counted."""

    def signal(self, signal: Signal) -> None:
        """See Ports."""
        self.signals += (signal,)

    def bus(self, access: MmioAccess) -> int | None:
        """See Ports."""
        for gpa, size, value in self.devices:
            if gpa <= access.gpa and access.gpa + access.size <= gpa + size:
                return 0 if access.is_write else value
        return None

    def unprotect(self, gfn: Gfn) -> bool:
        """See Ports."""
        return self.tracked.discard(gfn)

    def warn(self, text: str) -> None:
        """See Ports."""
        self.warnings += (text,)
