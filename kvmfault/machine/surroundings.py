"""State of a VM, and what the steps of the path ask of it (Ports). What user space, host and guest do is in ``vm``."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from errno import ENOENT
from typing import Final, Self

from kvmfault.contract.format import Kind, Memory, Stage2Format
from kvmfault.contract.outcome import ZERO_REGISTER, MmioAccess, Signal
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
    VmFacts,
)
from kvmfault.contract.target import Target
from kvmfault.contract.values import SmallerOverBlock, Userfault
from kvmfault.errors import ModelError
from kvmfault.machine.stage2 import Stage2
from kvmfault.machine.vcpu import Vcpu
from kvmfault.path.run import bind
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import AreaKind, HvaRange, Vma
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.cowset import CowSet
from kvmfault.vm.dirty import DirtyLog, RingEntry
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.hostmem import HostMemory
from kvmfault.vm.invalidate import Invalidation
from kvmfault.vm.memslots import Memslots

MAX_VCPUS: Final = 64
EHWPOISON: Final = 133
"""Linux's number; Python's errno has no name for it."""
MEMFD_MEMORY: Final = range(1 << 46, 1 << 48)
"""Host-physical addresses of guest_memfds: away from all others of the model, and every format has room for them."""


class Surroundings:
    """Plain values throughout: ``fork`` is cheap and independent, ``key`` hashable. Ports speak for ``vcpu``."""

    def __init__(self, target: Target, *, caps: HostCaps | None = None, facts: VmFacts | None = None) -> None:
        self.target = target
        self.format: Stage2Format = target.format
        self.page_shift = target.format.page_shift
        self.caps = caps or target.backend.host(target.format)
        if target.policy.userfault is not Userfault.ABSENT:
            self.caps = replace(self.caps, userfault=True)
        self.facts = facts or target.facts
        self.slots = Memslots(self.caps)
        self.host = HostMemory(self.page_shift)
        self.invalidations = Invalidation()
        split = target.policy.smaller_over_block is SmallerOverBlock.SPLIT
        self.table = Stage2(target.format, split_blocks=split)
        self.log = DirtyLog()
        """Pages written in logged slots since they were last collected, unless the vCPUs have rings."""
        self.private = FrameSet()
        """Frames with the memory attribute PRIVATE."""
        self.tracked: CowSet[Gfn] = CowSet()
        """Frames whose writes are tracked."""
        self.userfault: Mapping[int, FrameSet] = {}
        """Pages that user space wants to hear of before they are mapped, by slot number with address space."""
        self.memfds: Mapping[int, Pfn] = {}
        """Frame of the first page of each guest_memfd that was used."""
        self.memfd_pages: Mapping[tuple[int, int], Pfn | None] = {}
        """Pages of guest_memfds that differ from their file, (fd, page): another frame since a hole was punched, or
        None: poisoned."""
        self.memfd_next = Pfn(MEMFD_MEMORY.start >> self.page_shift)
        """First frame that no guest_memfd ever had."""
        self.signals: tuple[Signal, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.devices: tuple[tuple[Gpa, int, int], ...] = ()
        """Ranges that devices inside the kernel serve: (gpa, size, value that loads give)."""
        self.vcpus: tuple[Vcpu, ...] = ()
        """Those that were used so far; the ioctl that creates one is not modelled."""
        self.vcpu = Vcpu()
        """The vCPU that runs now: number 0 until ``use_vcpu`` is called."""
        self._area_of: tuple[Vma | None, Area] = (None, Area(0))
        self._path = bind(target)

    def use_vcpu(self, number: int) -> Self:
        """Faults and accesses from here on are those of this vCPU; it is created with those before it."""
        if not 0 <= number < MAX_VCPUS:
            raise ModelError(f"vCPU {number}: the model has 0 to {MAX_VCPUS - 1}")
        if not self.vcpus:
            self.vcpus = (self.vcpu,)
        while len(self.vcpus) <= number:
            self.vcpus += (Vcpu(),)
        self.vcpu = self.vcpus[number]
        return self

    def every_vcpu(self) -> tuple[Vcpu, ...]:
        """All vCPUs, the first one also before it was used."""
        return self.vcpus or (self.vcpu,)

    # Copies.

    def fork(self) -> Self:
        """An independent copy, in time that does not grow with memory, slots or tables."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.slots = self.slots.fork()
        new.host = self.host.fork()
        new.invalidations = self.invalidations.fork()
        new.table = self.table.fork()
        new.log, new.private, new.tracked = self.log.fork(), self.private.fork(), self.tracked.fork()
        new.userfault = {slot: pages.fork() for slot, pages in self.userfault.items()}
        new.vcpus = tuple(vcpu.fork() for vcpu in self.vcpus)
        new.vcpu = new.vcpus[self.vcpus.index(self.vcpu)] if self.vcpus else self.vcpu.fork()
        return new

    def key(self) -> Hashable:
        """All state, hashable; VMs with equal keys behave alike."""
        vcpus = self.every_vcpu()
        return (
            self.target.name,
            self.caps,
            self.facts,
            self.slots.key(),
            self.host.key(),
            self.invalidations.key(),
            self.table.key(),
            self.log.key(),
            self.private.key(),
            self.tracked.key(),
            frozenset((slot, pages.key()) for slot, pages in self.userfault.items()),
            frozenset(self.memfds.items()),
            frozenset(self.memfd_pages.items()),
            self.memfd_next,
            self.signals,
            self.warnings,
            self.devices,
            tuple(vcpu.key() for vcpu in vcpus),
            vcpus.index(self.vcpu),
        )

    # What changes under the guest.

    def invalidate(self, span: HvaRange | None) -> None:
        """The whole of an MMU-notifier call for a host range: begin, unmap, flush, end. None: nothing was mapped there.

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
            self.table.unmap(*self.bytes_of(hit.start, hit.end))
        self.flush_stale()
        self.invalidations.end()

    def track_writes(self, gfn: Gfn) -> None:
        """From now on writes to the frame are emulated, as to one that holds a guest table.

        Kernel: __kvm_write_track_add_gfn.
        """
        self.tracked.add(gfn)
        self.table.write_protect(*self.bytes_of(gfn, gfn + 1), for_good=True)
        self.flush_stale()

    def bytes_of(self, start: int, end: int) -> tuple[Gpa, Gpa]:
        """Addresses of frames ``[start, end)``."""
        return Gpa(start << self.page_shift), Gpa(end << self.page_shift)

    def flush_stale(self) -> None:
        """Flush from every TLB what changes of the table made wrong. (kvm_flush_remote_tlbs_range)"""
        for start, end in self.table.take_stale():
            for vcpu in self.every_vcpu():
                vcpu.tlb.flush(start, end)

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
        pages = self.userfault.get(slot.as_id << 16 | slot.id)
        return pages is not None and gfn - slot.base_gfn in pages

    def find_leaf(self, gpa: Gpa) -> Leaf | None:
        """See Ports."""
        leaf, fmt = self.table.leaf(gpa), self.format
        if leaf is None:
            return None
        return Leaf(fmt.prot(leaf.desc), 1 << leaf.shift, Pfn(fmt.hpa(leaf.desc, leaf.shift) >> self.page_shift))

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
        generation = self.slots.generation(self.vcpu.as_id)
        if self.vcpu.note == (gpa >> self.page_shift, generation):
            return MmioNote.CACHED
        found = self.table.walk(gpa)
        entry = self.format.entry(found.desc, found.shift)
        if entry.kind is not Kind.MMIO:
            return MmioNote.ABSENT
        mask = (1 << self.format.mmio_generation_bits()) - 1
        return MmioNote.CURRENT if entry.generation == generation & mask else MmioNote.STALE

    def register(self, number: int) -> int:
        """See Ports."""
        return 0 if number == ZERO_REGISTER else self.vcpu.registers[number]

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
        table = self.table
        result = table.map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
        if table.stale:
            self.flush_stale()
        return result

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        """See Ports. Only the own TLB is flushed: others that have the old permissions fault, and come here too."""
        result = self.table.relax(gpa, prot)
        page = gpa & -(1 << self.page_shift)
        self.vcpu.tlb.flush(Gpa(page), Gpa(page + (1 << self.page_shift)))
        return result

    def map_mmio(self, gpa: Gpa, prot: int) -> MapResult:
        """See Ports."""
        desc = self.format.mmio(gpa, prot, self.slots.generation(self.vcpu.as_id))
        if desc is not None:
            self.table.put(Gpa(gpa & -(1 << self.page_shift)), 1 << self.page_shift, desc)
            self.flush_stale()
        return MapResult.MMIO

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        """See Ports."""
        self.vcpu.note = (gfn, self.slots.generation(self.vcpu.as_id))

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        """See Ports. (mark_page_dirty_in_slot)"""
        if slot.logs_dirty:
            number, page = slot.as_id << 16 | slot.id, gfn - slot.base_gfn
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
