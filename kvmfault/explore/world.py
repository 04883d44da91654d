"""The VM that is explored: parts that are loaded when touched, so that what a step reads and writes is known exactly.

A part is whatever can change by itself: the memslots, one vCPU's TLB, who holds mmu_lock. States share parts; a part
that was given out once is never changed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self, cast

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, W
from kvmfault.contract.ports import MapResult, Memslot, PinError
from kvmfault.errors import ModelError
from kvmfault.explore.parts import OF_VCPU, OF_VM, Buffers, Part, Written, part
from kvmfault.machine.vcpu import Vcpu
from kvmfault.scenario.world import World
from kvmfault.types import Gfn, Gpa, Pfn
from kvmfault.vm.area import HvaRange

__all__ = ["Blocked", "Broken", "Explored", "SeenVcpu"]


class Blocked(Exception):
    """The action cannot happen in this state; its actor waits until it can."""


class Broken(Exception):
    """The action itself is what no kernel may do. *name*: the invariant's."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(what)
        self.name = name


class SeenVcpu(Vcpu):
    """A vCPU whose parts are the explored VM's."""

    __slots__ = ("number", "vm")

    def __init__(self, vm: Explored, number: int) -> None:
        self.vm: Explored = vm
        self.number: int = number


class Explored(World):
    """A World in parts. ``load`` puts it into a state; what was touched since is in ``live``."""

    writer: str | None
    """Who holds mmu_lock for write."""
    slots_lock: str | None
    """Who holds slots_lock."""
    mixing: tuple[tuple[Gfn, Gfn], ...]
    """Frames whose attributes are being changed: no block may reach out of such a range."""
    spare: int
    """How often the kernel may yet be short of table pages: see ``retire``."""
    written: Written
    buffers: Buffers
    late: bool
    """Flushes are put off: what is stale stays noted in the table until ``flush_late``."""
    watched: tuple[Gpa, ...]
    """Pages that the scenario names; of blocks only these, the first and the last are compared with memory."""
    names: tuple[str, ...]
    """The parts, in the order of a state."""
    kinds: tuple[Part, ...]

    @classmethod
    def of(cls, world: World, vcpus: int) -> tuple[Self, list[object]]:
        """*world* in parts, with so many vCPUs; and the parts as they are now."""
        world.use_vcpu(vcpus - 1)
        if world.shadow_table is not None:
            raise ModelError("a nested guest's tables are not explored")
        parts = list(OF_VM)
        new = object.__new__(cls)
        new.__dict__.update({name: value for name, value in vars(world).items() if name not in OF_VM})
        values: list[object] = [vars(world).get(name) for name in OF_VM]
        logging = frozenset(s.number for space in world.slots.active for s in space.slots() if s.logs_dirty)
        values[parts.index("written")], values[parts.index("buffers")] = Written(logging=logging), Buffers()
        values[parts.index("mixing")], values[parts.index("spare")] = (), 1
        kinds = list(OF_VM.values())
        for number, vcpu in enumerate(world.vcpus):
            own = vcpu.fork()
            tlb, ring, own.tlb, own.ring = own.tlb, own.ring, type(own.tlb)(), ()
            parts += [part(name, number) for name in OF_VCPU]
            kinds += OF_VCPU.values()
            values += [own, tlb, ring, False, 0, frozenset(), False, False, None]
        new.names, new.kinds = tuple(parts), tuple(kinds)
        new.index = {name: i for i, name in enumerate(new.names)}
        new.vcpus = tuple(SeenVcpu(new, number) for number in range(vcpus))
        new.vcpu = new.vcpus[0]
        new.late, new.watched = False, ()
        return new, values

    index: dict[str, int]
    live: dict[int, object]
    _loaded: tuple[object, ...]

    def load(self, values: tuple[object, ...]) -> None:
        """Be in the state of these parts, none of which is changed."""
        self._loaded = values
        self.live = {}
        self.late = False

    def get(self, index: int) -> object:
        """A part, a copy of its own from the first use on."""
        live = self.live
        if index not in live:
            live[index] = self.kinds[index].copy(self._loaded[index])
        return live[index]

    # mmu_lock and SRCU.

    def block_allowed(self, slot: Memslot, gfn: Gfn, size: int) -> bool:
        """See Ports. A block over an end of a range that is being converted counts as mixed before anything is stored.

        Kernel: kvm_arch_pre_set_memory_attributes.
        """
        first = gfn & -(size >> self.page_shift)
        last = first + (size >> self.page_shift)
        inside = all(start <= first and last <= stop for start, stop in self.mixing if start < last and first < stop)
        return inside and super().block_allowed(slot, gfn, size)

    def lock(self) -> None:
        """See Ports. Held until the fault leaves the part of the path under it: for read, or for write where the
        guest's paging is shadowed. (FNAME(page_fault))"""
        if self._virtual:
            self.need_lock()
        elif self.writer is not None:
            raise Blocked
        self.vcpu_part("reads", True)

    def unlock(self) -> None:
        """The vCPU drops mmu_lock."""
        self.vcpu_part("reads", False)

    def vcpu_part(self, name: str, value: object) -> None:
        """Set a part of the vCPU that runs."""
        self.live[self.index[part(name, self._number)]] = value

    @property
    def _number(self) -> int:
        return cast(SeenVcpu, self.vcpu).number

    def of_vcpu(self, name: str, vcpu: int) -> object:
        """A part of a vCPU."""
        return self.get(self.index[part(name, vcpu)])

    def lock_for_write(self, who: str) -> None:
        """Take mmu_lock for write, or wait."""
        self.need_lock()
        self.writer = who

    def need_lock(self) -> None:
        """Wait until mmu_lock could be taken for write: an action that takes and drops it is one action."""
        if self.writer is not None or any(self.of_vcpu("reads", n) for n in range(len(self.vcpus))):
            raise Blocked

    def enter_section(self) -> None:
        """The vCPU begins an SRCU read-side section."""
        self.vcpu_part("inside", 1)

    def leave_section(self) -> None:
        """It ends."""
        self.vcpu_part("inside", 0)

    def begin_grace(self) -> None:
        """Somebody will wait for all sections of now."""
        for n in range(len(self.vcpus)):
            if self.of_vcpu("inside", n):
                self.live[self.index[part("inside", n)]] = 2

    def end_grace(self) -> None:
        """Wait for them. (synchronize_srcu)"""
        if any(self.of_vcpu("inside", n) == 2 for n in range(len(self.vcpus))):
            raise Blocked

    @property
    def shadows(self) -> bool:
        """Faults report virtual addresses: the guest's paging is shadowed."""
        return self._virtual

    def table_retired(self) -> bool:
        """See Ports."""
        return bool(self.of_vcpu("retired", self._number))

    def retire(self) -> None:
        """Every table goes, the one of the vCPU that asks, too; each vCPU takes a new one before it runs again."""
        self.clear_tables()
        self.flush_stale()
        for n in range(len(self.vcpus)):
            self.live[self.index[part("retired", n)]] = True

    def mmio_space(self) -> int:
        """The vCPU's own: a fix of the kernel that the targets do not have yet, and without which a vCPU in another
        address space takes memory for a device."""
        return self.vcpu.as_id

    # What a kernel does in several steps, and the model elsewhere in one.

    def flush_stale(self) -> None:
        """See State."""
        if not self.late:
            super().flush_stale()

    def invalidate(self, span: HvaRange | None) -> None:
        """See State: a page whose pin breaks copy-on-write, with a whole notifier call."""
        if span is not None and self.slots.in_hva_range(span.start, span.end):
            self.need_lock()
        super().invalidate(span)

    # What nobody in the kernel knows, but the invariants need.

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        """See Ports."""
        if self.table_retired():
            raise Broken("refused", f"an entry for {gpa:#x} goes into a table that was retired")
        result = super().map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
        self._to_mark(gpa, prot)
        return result

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        """See Ports."""
        result = super().relax(gpa, prot, memory)
        self._to_mark(gpa, prot)
        return result

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        """See Ports. Whatever was mapped there has to be gone, and flushed, before."""
        if not self._virtual and self.table.leaf(at) is not None:
            raise Broken("refused", f"an entry of MMIO takes the place of a present one at {at:#x}")
        return super().map_mmio(at, gpa, prot)

    def _to_mark(self, gpa: Gpa, prot: int) -> None:
        leaf = self.table.leaf(gpa)
        if not prot & W or leaf is None:
            return
        first = Gfn(leaf.gpa >> self.page_shift)
        stop = Gfn(first + (1 << leaf.shift - self.page_shift))
        pages = frozenset(
            (slot.number, gfn - slot.base_gfn)
            for slot in self.slots.active[self.vcpu.as_id].overlapping(first, stop)
            if slot.logs_dirty
            for gfn in range(max(first, slot.base_gfn), min(stop, slot.end_gfn))
        )
        if pages:
            self.vcpu_part("marks", self.marks(self._number) | pages)

    def marks(self, vcpu: int) -> frozenset[tuple[int, int]]:
        """Pages that a vCPU made writable and is yet to mark dirty: (slot number, page)."""
        return cast(frozenset[tuple[int, int]], self.of_vcpu("marks", vcpu))

    def _in_memory(self, gpa: Gpa, write: bool) -> PinError | None:
        error = super()._in_memory(gpa, write)
        if write and error is None:
            self.guest_wrote(gpa)
        return error

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        """See Ports: every fault waits for its page itself."""
        return False

    def comes_from_file(self, gfn: Gfn) -> bool:
        """Whether the memory of a frame, in a slot with guest_memfd, is the file's now."""
        return self._is_file(gfn)

    def guest_wrote(self, gpa: Gpa) -> None:
        """The guest, or the emulator in its place, has written here."""
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.slots.find(gfn, self.vcpu.as_id)
        if slot is not None and slot.number in self.written.logging:
            page = (slot.number, gfn - slot.base_gfn)
            if page not in self.written.unreported:
                self.written = self.written._replace(unreported=self.written.unreported | {page})

    def telling(self, pages: Iterable[tuple[int, int]]) -> None:
        """The log gives these away: (slot number, page)."""
        self.written = self.written._replace(telling=self.written.telling | frozenset(pages))

    def told(self, pages: Iterable[tuple[int, int]]) -> None:
        """User space knows, and reads these pages from now on."""
        known, written = frozenset(pages), self.written
        self.written = written._replace(unreported=written.unreported - known, telling=written.telling - known)

    def warn(self, text: str) -> None:
        """See Ports: each warning once, or the states would never meet again."""
        if text not in self.warnings:
            super().warn(text)


def _vm_part(name: str) -> property:
    def get(self: Explored) -> object:
        return self.get(self.index[name])

    def put(self: Explored, value: object) -> None:
        self.live[self.index[name]] = value

    return property(get, put)


def _vcpu_part(name: str) -> property:
    def get(self: SeenVcpu) -> object:
        return self.vm.of_vcpu(name, self.number)

    def put(self: SeenVcpu, value: object) -> None:
        self.vm.live[self.vm.index[part(name, self.number)]] = value

    return property(get, put)


def _member(name: str) -> property:
    def get(self: SeenVcpu) -> object:
        return getattr(self.vm.of_vcpu("vcpu", self.number), name)

    def put(self: SeenVcpu, value: object) -> None:
        setattr(self.vm.of_vcpu("vcpu", self.number), name, value)

    return property(get, put)


for _name in OF_VM:
    setattr(Explored, _name, _vm_part(_name))
Explored.table = property(lambda self: self.own_table)  # type: ignore[assignment]
for _name in ("tlb", "ring"):
    setattr(SeenVcpu, _name, _vcpu_part(_name))
for _name in ("as_id", "registers", "mmio", "deferred", "slot", "slot_set", "counters"):
    setattr(SeenVcpu, _name, _member(_name))
