"""Vm: slots, host memory, second-stage table and invalidation state of one VM, as the path's Ports."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from errno import ENOENT
from typing import Self

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Kind, Memory, Stage2Format
from kvmfault.contract.outcome import ZERO_REGISTER, MmioAccess, Outcome, Signal
from kvmfault.contract.policy import SlotFlush, SmallerOverBlock
from kvmfault.contract.ports import (
    Area,
    GuestTranslation,
    GuestWalkFault,
    MapResult,
    Memslot,
    MmioNote,
    Pin,
    PinError,
    Repair,
    VmFacts,
)
from kvmfault.contract.target import Target, backend
from kvmfault.errors import ModelError
from kvmfault.machine.stage2 import Stage2
from kvmfault.path.run import Run, bind
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import AreaKind, HvaRange, Vma
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.cowset import CowSet
from kvmfault.vm.hostmem import HostMemory
from kvmfault.vm.invalidate import Invalidation
from kvmfault.vm.memslot import MemslotFlag, SlotSet
from kvmfault.vm.memslot_change import ChangeResult, Stage
from kvmfault.vm.memslot_request import MemslotRequest
from kvmfault.vm.memslots import Memslots


class Vm:
    """One VM with one vCPU's view of it. Plain values throughout: ``fork`` is cheap and independent, ``key`` hashable.

    Methods of three kinds: building and changing the VM (for its user), ``handle``/``resolve`` (a fault), and the
    ports that the steps of the path call.
    """

    def __init__(self, target: Target, *, caps: HostCaps | None = None, facts: VmFacts | None = None) -> None:
        self.target = target
        self.format: Stage2Format = target.format
        self.page_shift = target.format.page_shift
        self.caps = caps or target.backend.host(target.format)
        self.facts = facts or target.backend.vm
        self.slots = Memslots(self.caps)
        self.host = HostMemory(self.page_shift)
        self.invalidations = Invalidation()
        split = target.policy.smaller_over_block is SmallerOverBlock.SPLIT
        self.table = Stage2(target.format, split_blocks=split)
        self.as_id = 0
        self.dirty: CowSet[tuple[int, Gfn]] = CowSet()
        """Frames written in logged slots since they were last collected: (as_id << 16 | slot id, gfn)."""
        self.private: CowSet[Gfn] = CowSet()
        """Frames with the memory attribute PRIVATE."""
        self.tracked: CowSet[Gfn] = CowSet()
        """Frames whose writes are tracked."""
        self.signals: tuple[Signal, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.registers: tuple[int, ...] = (0,) * ZERO_REGISTER
        self.devices: tuple[tuple[Gpa, int, int], ...] = ()
        """Ranges that devices inside the kernel serve: (gpa, size, value that loads give)."""
        self._mmio_note: tuple[Gfn, int] | None = None
        self._area_of: tuple[Vma | None, Area] = (None, Area(0))
        self._slot: Memslot | None = None
        self._slot_set: SlotSet | None = None
        self._path = bind(target)

    # Building and changing.

    @classmethod
    def on(cls, target: str | Target, *, caps: HostCaps | None = None, facts: VmFacts | None = None) -> Self:
        """An empty VM on a TARGET. Raises UsageError for an unknown one."""
        return cls(backend(target) if isinstance(target, str) else target, caps=caps, facts=facts)

    def add_memslot(
        self, slot: int, *, gpa: int, size: int, hva: int, readonly: bool = False, log_dirty: bool = False
    ) -> Self:
        """Create or change a slot (KVM_SET_USER_MEMORY_REGION); sizes in bytes. ModelError if KVM would refuse."""
        flags = (MemslotFlag.READONLY if readonly else 0) | (MemslotFlag.LOG_DIRTY if log_dirty else 0)
        result = self.set_region(MemslotRequest(slot=slot, flags=flags, gpa=Gpa(gpa), size=size, hva=Hva(hva)))
        if result.errno:
            raise ModelError(f"memslot {slot}: {result}")
        return self

    def set_region(self, request: MemslotRequest, *, flush: SlotFlush | None = None) -> ChangeResult:
        """Carry out a memslot request, with what the table loses on the way. Never raises; the result has the errno.

        *flush*: what a deletion or move drops, if not as the target's policy says.
        """
        done = self.slots.begin(request)
        while done is None:
            if self.slots.next_stage is Stage.FLUSH:
                self._flush_changing(flush or self.target.policy.slot_flush)
            done = self.slots.step(self.host)
        if done.kind is not None and not done.errno:
            self._start_logging(done.old, done.new)
        return done

    def _flush_changing(self, flush: SlotFlush) -> None:
        old, _ = self.slots.changing
        if flush is SlotFlush.TABLE:
            self.table.clear()
        elif old is not None:
            self.table.unmap(Gpa(old.base_gfn << self.page_shift), Gpa(old.end_gfn << self.page_shift))

    def _start_logging(self, old: Memslot | None, new: Memslot | None) -> None:
        # from now on the first write to each page has to fault (kvm_mmu_slot_apply_flags; kvm_mmu_wp_memory_region)
        if new is not None and new.logs_dirty and old is not None and not old.logs_dirty:
            self.table.write_protect(Gpa(new.base_gfn << self.page_shift), Gpa(new.end_gfn << self.page_shift))

    def back(self, hva: int, size: int, kind: str = "anon", *, readonly: bool = False) -> Self:
        """Put host memory under a range: anon, thp, hugetlb-2m, hugetlb-1g, pfnmap. Invalidates what was there."""
        try:
            area = AreaKind(kind)
        except ValueError:
            raise ModelError(
                f"no kind of host memory {kind!r}; there is: {', '.join(k.value for k in AreaKind)}"
            ) from None
        self.invalidate(self.host.back(Hva(hva), size, area, readonly=readonly))
        return self

    def invalidate(self, span: HvaRange | None) -> None:
        """The whole of an MMU-notifier call for a host range: begin, unmap, end. None: nothing was mapped there.

        Kernel: kvm_mmu_notifier_invalidate_range_start and _end.
        """
        if span is None:
            return
        hits = self.slots.in_hva_range(span.start, span.end)
        if not hits:
            return
        self.invalidations.begin()
        for hit in hits:
            self.invalidations.add(hit.start, hit.end)
            self.table.unmap(Gpa(hit.start << self.page_shift), Gpa(hit.end << self.page_shift))
        self.invalidations.end()

    def age(self, span: HvaRange, *, test_only: bool = False) -> bool:
        """Whether the guest used pages of a host range; forgets it unless *test_only*. (kvm_age_gfn)"""
        used = False
        for hit in self.slots.in_hva_range(span.start, span.end):
            start, end = Gpa(hit.start << self.page_shift), Gpa(hit.end << self.page_shift)
            used |= self.table.age(start, end, test_only=test_only)
        return used

    # A fault.

    def handle(self, fault: MmioFault) -> Run:
        """Run the path with every step recorded."""
        return self._path.handle(self, fault)

    def resolve(self, fault: MmioFault) -> Outcome:
        """Run the path, nothing recorded: the fast way."""
        return self._path.resolve(self, fault)

    # Copies.

    def fork(self) -> Self:
        """An independent copy in constant time."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.slots = self.slots.fork()
        new.host = self.host.fork()
        new.invalidations = self.invalidations.fork()
        new.table = self.table.fork()
        new.dirty, new.private, new.tracked = self.dirty.fork(), self.private.fork(), self.tracked.fork()
        return new

    def key(self) -> Hashable:
        """All state, hashable; VMs with equal keys behave alike."""
        return (
            self.target.name,
            self.caps,
            self.facts,
            self.as_id,
            self.slots.key(),
            self.host.key(),
            self.invalidations.key(),
            self.table.key(),
            self.dirty.key(),
            self.private.key(),
            self.tracked.key(),
            self.signals,
            self.warnings,
            self.registers,
            self.devices,
            self._mmio_note,
        )

    # Ports: what steps ask.

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        """See Ports."""
        active = self.slots.active[self.as_id]
        slot = self._slot
        # the vCPU's last slot, as in kvm_vcpu_gfn_to_memslot; good while the set that it came from is the active one
        if slot is None or active is not self._slot_set or not slot.base_gfn <= gfn < slot.end_gfn:
            slot = active.find(gfn)
            self._slot, self._slot_set = slot, active
        return slot

    def is_private(self, gfn: Gfn) -> bool:
        """See Ports."""
        return gfn in self.private

    def entry_prot(self, gpa: Gpa) -> tuple[int, int] | None:
        """See Ports."""
        leaf = self.table.leaf(gpa)
        return None if leaf is None else (self.format.prot(leaf.desc), 1 << leaf.shift)

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        """See Ports: this VM has no guest tables."""
        return None

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
        if not self.private.items and not self.tracked.items:
            return True
        pages = size >> self.page_shift
        first = gfn & -pages
        private = sum(first <= g < first + pages for g in self.private)
        return private in (0, pages) and not any(first <= g < first + pages for g in self.tracked)

    def table_retired(self) -> bool:
        """See Ports: a fault and the retirement of its table do not overlap here."""
        return False

    def find_mmio(self, gpa: Gpa) -> MmioNote:
        """See Ports."""
        generation = self.slots.generation(self.as_id)
        if self._mmio_note == (gpa >> self.page_shift, generation):
            return MmioNote.CACHED
        found = self.table.walk(gpa)
        entry = self.format.entry(found.desc, found.shift)
        if entry.kind is not Kind.MMIO:
            return MmioNote.ABSENT
        mask = (1 << self.format.mmio_generation_bits()) - 1
        return MmioNote.CURRENT if entry.generation == generation & mask else MmioNote.STALE

    def register(self, number: int) -> int:
        """See Ports."""
        return 0 if number == ZERO_REGISTER else self.registers[number]

    # Ports: what steps do.

    def repair_young(self, gpa: Gpa) -> None:
        """See Ports."""
        self.table.make_young(gpa)

    def repair_fast(self, gpa: Gpa, *, write: bool, execute: bool) -> Repair:
        """See Ports."""
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.find_slot(gfn)
        logged = slot is not None and slot.logs_dirty
        result = self.table.fix_fast(gpa, write=write, execute=execute, logged=logged)
        if result is Repair.FIXED and write and slot is not None:
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
        """See Ports: the file's pages are frames of their own, one page each, present from the start."""
        if slot.gmem is None:
            return Pin(None, PinError.FAULT, errno=ENOENT)
        base = (1 << 50) + (slot.gmem.fd << 40) + slot.gmem.offset  # beyond all host memory of the model
        frame = (base >> self.page_shift) + gfn - slot.base_gfn
        return Pin(Pfn(frame), writable=not slot.readonly, max_size=1 << self.page_shift)

    def defer(self, gfn: Gfn, *, queue: bool) -> bool:
        """See Ports: nothing is fetched in the background."""
        return False

    def lock(self) -> None:
        """See Ports: one vCPU at a time."""

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        """See Ports: pages have no content here."""

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult:
        """See Ports."""
        return self.table.map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        """See Ports."""
        return self.table.relax(gpa, prot)

    def map_mmio(self, gpa: Gpa, prot: int) -> MapResult:
        """See Ports."""
        desc = self.format.mmio(gpa, prot, self.slots.generation(self.as_id))
        if desc is not None:
            self.table.put(Gpa(gpa & -(1 << self.page_shift)), 1 << self.page_shift, desc)
        return MapResult.MMIO

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        """See Ports."""
        self._mmio_note = (gfn, self.slots.generation(self.as_id))

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        """See Ports."""
        if slot.logs_dirty:
            self.dirty.add((slot.as_id << 16 | slot.id, gfn))

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

    def with_facts(self, **facts: object) -> Self:
        """This VM with some of its facts changed; returns itself. TypeError for an unknown fact."""
        self.facts = replace(self.facts, **facts)  # type: ignore[arg-type]  # names are checked at run time by replace
        return self
