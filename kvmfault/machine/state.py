"""State of a VM: everything that decides how it goes on, and what changes it under the guest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Final, NamedTuple, Self

from kvmfault.contract.accessors import Gap
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.outcome import Signal
from kvmfault.contract.ports import Area, VmFacts
from kvmfault.contract.target import Target
from kvmfault.contract.values import SmallerOverBlock, Userfault
from kvmfault.errors import ModelError
from kvmfault.machine.stage2 import Stage2
from kvmfault.machine.vcpu import Vcpu
from kvmfault.path.run import bind
from kvmfault.types import Gfn, Gpa, Pfn
from kvmfault.vm.area import HvaRange, Vma
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.cowset import CowSet
from kvmfault.vm.dirty import DirtyLog
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.guest_tables import GuestTables
from kvmfault.vm.hostmem import HostMemory
from kvmfault.vm.invalidate import Invalidation
from kvmfault.vm.memslots import Memslots

__all__ = ["MAX_VCPUS", "MEMFD_MEMORY", "ReverseMap", "State"]

MAX_VCPUS: Final = 64
_ALL: Final = Gpa(1 << 64)
MEMFD_MEMORY: Final = range(1 << 46, 1 << 48)
"""Host-physical addresses of guest_memfds: away from all others of the model, and every format has room for them."""


class ReverseMap(NamedTuple):
    """An entry whose address the guest's own tables translate."""

    of_own: bool
    """In the table of the guest itself; else in the shadow of a nested guest's."""
    at: Gpa
    size: int
    gpa: Gpa
    """First address that it maps, as memslots know it."""


class State:
    """Plain values throughout: ``fork`` is cheap and independent, ``key`` hashable. Ports speak for ``vcpu``."""

    def __init__(  # noqa: PLR0915  one line for each part of the state
        self, target: Target, *, caps: HostCaps | None = None, facts: VmFacts | None = None
    ) -> None:
        self.target = target
        self.page_shift: int = target.format.page_shift
        self.caps: HostCaps = caps or target.backend.host(target.format)
        if target.policy.userfault is not Userfault.ABSENT:
            self.caps = replace(self.caps, userfault=True)
        self.facts: VmFacts = facts or target.facts
        self.format: Stage2Format = target.format.with_hardware_ad(self.facts.hardware_access_dirty)
        self.slots: Memslots = Memslots(self.caps)
        self.host: HostMemory = HostMemory(self.page_shift, thp_size=self.caps.thp_size)
        self.invalidations: Invalidation = Invalidation()
        smaller = target.policy.smaller_over_block
        split = smaller is SmallerOverBlock.SPLIT
        self.table: Stage2 = Stage2(self.format, split_blocks=split, marks_rewritten=target.policy.marks_rewritten)
        """The table that the vCPUs run on now: the guest's own, or the shadow of a nested guest's."""
        self.own_table: Stage2 = self.table
        self.shadow_table: Stage2 | None = None
        self.guest_tables: GuestTables | None = None
        """What translates addresses before memslots are looked at: paging of a shadowed guest, or the second stage
        that a nested guest's hypervisor made; None: not given."""
        self.reverse: CowSet[ReverseMap] = CowSet()
        """What guest tables translate: where it is mapped, and what it is."""
        self.log: DirtyLog = DirtyLog()
        """Pages written in logged slots since they were last collected, unless the vCPUs have rings."""
        self.private: FrameSet = FrameSet()
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
        self.memfd_next: Pfn = Pfn(MEMFD_MEMORY.start >> self.page_shift)
        """First frame that no guest_memfd ever had."""
        self.signals: tuple[Signal, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self.devices: tuple[tuple[Gpa, int, int], ...] = ()
        """Ranges that devices inside the kernel serve: (gpa, size, value that loads give)."""
        self.vcpus: tuple[Vcpu, ...] = ()
        """Those that were used so far; the ioctl that creates one is not modelled."""
        self.vcpu: Vcpu = Vcpu()
        """The vCPU that runs now: number 0 until ``use_vcpu`` is called."""
        self._area_of: tuple[Vma | None, Area] = (None, Area(0))
        self._refuses_pieces = smaller is SmallerOverBlock.REFUSE
        self._virtual = isinstance(target.definition.gpa_valid, Gap)
        """Faults report virtual addresses: the guest's paging is shadowed."""
        self._path = bind(target)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_path"}  # it is the target's

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._path = bind(self.target)

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

    @property
    def shadowed(self) -> bool:
        """The vCPUs run on a table that shadows one of the guest's. (not root_role.direct)"""
        return self.table is not self.own_table or (self._virtual and self.facts.guest_paging)

    # Copies.

    def fork(self) -> Self:
        """An independent copy, in time that does not grow with memory, slots or tables."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.slots = self.slots.fork()
        new.host = self.host.fork()
        new.invalidations = self.invalidations.fork()
        new.own_table = self.own_table.fork()
        new.shadow_table = self.shadow_table.fork() if self.shadow_table is not None else None
        new.table = new.own_table if self.table is self.own_table else (new.shadow_table or new.own_table)
        new.reverse = self.reverse.fork()
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
            self.own_table.key(),
            self.shadow_table.key() if self.shadow_table is not None else None,
            self.table is self.own_table,
            self.guest_tables,
            self.reverse.key(),
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
            self.drop(hit.start, hit.end)
        self.flush_stale()
        self.invalidations.end()

    def track_writes(self, gfn: Gfn) -> None:
        """From now on writes to the frame are emulated, as to one that holds a guest table.

        Kernel: __kvm_write_track_add_gfn.
        """
        self.tracked.add(gfn)
        for table, start, end in self.tables_over(gfn, gfn + 1):
            table.write_protect(start, end, for_good=True)
        self.flush_stale()

    def tables_over(self, start: int, end: int) -> list[tuple[Stage2, Gpa, Gpa]]:
        """Tables that may map frames ``[start, end)``, with the addresses concerned. (kvm_handle_gfn_range, rmaps)"""
        first, last = self.bytes_of(start, end)
        virtual = self._virtual and self.facts.guest_paging
        found = [] if virtual else [(self.own_table, first, last)]
        for of_own, at, size, gpa in self.reverse:
            table = self.own_table if of_own else self.shadow_table
            if gpa < last and first < gpa + size and table is not None:
                found.append((table, at, Gpa(at + size)))
        return found

    def drop(self, start: int, end: int) -> None:
        """Take frames ``[start, end)`` out of every table. The caller flushes."""
        for table, first, last in self.tables_over(start, end):
            table.unmap(first, last)
        first, last = self.bytes_of(start, end)
        for entry in [e for e in self.reverse if e.gpa < last and first < e.gpa + e.size]:
            self.reverse.discard(entry)

    def clear_tables(self) -> None:
        """Retire every table with all that it maps. The caller flushes. (kvm_mmu_zap_all_fast)"""
        for table in (self.own_table, self.shadow_table):
            if table is not None:
                table.clear()
        self.reverse.take()

    def run_nested(self, tables: GuestTables) -> Self:
        """The vCPUs run a guest of the guest from here on, whose hypervisor made these second-stage *tables*."""
        if self.shadow_table is None:
            own = self.own_table
            self.shadow_table = Stage2(self.format, split_blocks=own.split_blocks, marks_rewritten=own.marks_rewritten)
        return self._switch(self.shadow_table, tables)

    def run_own(self) -> Self:
        """The vCPUs run the guest itself again; the shadow of the nested guest's tables is kept."""
        return self._switch(self.own_table, None)

    def _switch(self, table: Stage2, tables: GuestTables | None) -> Self:
        self.table, self.guest_tables = table, tables
        self.facts = replace(self.facts, nested=tables is not None)
        for vcpu in self.every_vcpu():  # translations of one are not those of the other: it has another VMID
            vcpu.tlb.flush_all()
        return self

    def bytes_of(self, start: int, end: int) -> tuple[Gpa, Gpa]:
        """Addresses of frames ``[start, end)``."""
        return Gpa(start << self.page_shift), Gpa(end << self.page_shift)

    def take_stale(self) -> list[tuple[Gpa, Gpa]]:
        """Addresses ``[start, end)`` that TLBs translate wrongly since changes of the tables; not told again."""
        shadow = self.shadow_table.take_stale() if self.shadow_table is not None else []
        return self.own_table.take_stale() + shadow

    def flush_stale(self) -> None:
        """Flush from every TLB what changes of the tables made wrong. (kvm_flush_remote_tlbs_range)"""
        for start, end in self.take_stale():
            for vcpu in self.every_vcpu():
                vcpu.tlb.flush(start, end)
