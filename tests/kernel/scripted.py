"""Ports that answer from a script and note what they were asked: the surroundings of one scripted fault.

Kernels have been asked situations that no real host produces (a writable page in a read-only slot), so the vectors run
against this and not against a VM. Every answer is the dullest one; an adapter overrides what its vectors script.
"""

from __future__ import annotations

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, Stage2Format
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
    Repair,
    VmFacts,
)
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.invalidate import Invalidation


class ScriptedPorts:
    """Satisfies Ports. ``events``: what the path did to its surroundings, in order, in the vectors' words."""

    def __init__(self, fmt: Stage2Format, facts: VmFacts) -> None:
        self.format = fmt
        self.page_shift = fmt.page_shift
        self.facts = facts
        self.invalidations = Invalidation()
        self.events: list[str] = []

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        return None

    def is_private(self, gfn: Gfn) -> bool:
        return False

    def userfault_wanted(self, slot: Memslot, gfn: Gfn) -> bool | None:
        return False

    def find_leaf(self, gpa: Gpa) -> Leaf | None:
        return None

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        return None

    def is_tracked(self, gfn: Gfn) -> bool:
        return False

    def repair_young(self, gpa: Gpa) -> None:
        pass

    def drop_leaf(self, gpa: Gpa) -> None:
        pass

    def repair_fast(self, gpa: Gpa, *, write: bool, execute: bool) -> Repair | MapResult:
        return Repair.NOT_HERE

    def topup(self) -> int:
        return 0

    def area(self, hva: Hva) -> Area | None:
        return Area(1 << self.page_shift)

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        return Pin(Pfn(gfn), writable=True)

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        return Pin(Pfn(gfn), writable=True)

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        return False

    def mapping_size(self, hva: Hva) -> int:
        return 1 << self.page_shift

    def block_allowed(self, slot: Memslot, gfn: Gfn, size: int) -> bool:
        return True

    def lock(self) -> None:
        pass

    def table_retired(self) -> bool:
        return False

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        pass

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        return MapResult.FIXED

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult | int:
        return MapResult.FIXED

    def grow_for_fetch(self, gpa: Gpa) -> None:
        pass

    def fetched_small(self, gpa: Gpa, size: int) -> bool:
        return False

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        return MapResult.MMIO

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        pass

    def find_mmio(self, gpa: Gpa) -> MmioNote:
        return MmioNote.ABSENT

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        pass

    def release(self, pfn: Pfn) -> None:
        pass

    def signal(self, signal: Signal) -> None:
        pass

    def bus(self, access: MmioAccess) -> int | None:
        return None

    def register(self, number: int) -> int:
        return 0

    def unprotect(self, gfn: Gfn) -> bool:
        return False

    def warn(self, text: str) -> None:
        pass
