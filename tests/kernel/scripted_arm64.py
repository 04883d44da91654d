"""Surroundings of one scripted fault on arm64: a slot of 1G or none, and what host and guest tables answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from arch.arm64 import BACKEND
from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import Signal
from kvmfault.contract.ports import Area, GuestTranslation, GuestWalkFault, MapResult, Memslot, Pin
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import GmemBinding, MemslotFlag
from tests.kernel.scripted import ScriptedPorts

PAGE, M = 1 << 12, 1 << 20
IPA: Final = 0x4001_2000
FAR: Final = 0xFFFF_0000_1234_5678
LOAD, STORE, FETCH = 0x9200_0007, 0x9200_0047, 0x8200_0007
PERMISSION = 0x08
S1PTW, CM, ISV, IL = 1 << 7, 1 << 8, 1 << 24, 1 << 25
POISONED: Final = 133
NO_FLAGS: Final = MemslotFlag(0)
ONE_PAGE: Final = Area(PAGE)
MEMORY: Final = Pin(Pfn(0x8_0000), writable=True)


@dataclass
class Case:
    """One fault and what is around it. *slot*: None for none, or flags of the one that there is."""

    esr: int
    slot: MemslotFlag | None = NO_FLAGS
    facts: Mapping[str, object] = field(default_factory=dict)
    area: Area | None = ONE_PAGE
    pin: Pin = MEMORY
    block: int = PAGE
    """Bytes of the leaf in the host's table."""
    walk: GuestTranslation | GuestWalkFault | None = None
    raced: bool = False
    far: int = FAR
    ipa: int = IPA
    prefetch: bool = False
    memfd: Pin | None = None
    """What guest_memfd gives; None: the slot has none."""


class World(ScriptedPorts):
    """A case's surroundings."""

    def __init__(self, case: Case) -> None:
        facts = replace(BACKEND.vm, ipa_limit_bits=48, table_bits=40, **case.facts)  # type: ignore[arg-type]  # by name
        super().__init__(BACKEND.formats["4k"], facts)
        self.case = case

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        if self.case.slot is None:
            return None
        gmem = None if self.case.memfd is None else GmemBinding(5, 0)
        return Memslot(
            id=0, as_id=0, base_gfn=Gfn(0x4_0000), npages=0x4_0000, hva=Hva(0x7F00_0000_0000), flags=self.case.slot,
            page_shift=12, gmem=gmem,
        )  # fmt: skip

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        return self.case.walk

    def topup(self) -> int:
        self.events.append("topup")
        return 0

    def area(self, hva: Hva) -> Area | None:
        self.events.append("area")
        return self.case.area

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        self._race()
        return self.case.pin

    def _race(self) -> None:
        if self.case.raced:
            self.invalidations.begin()
            self.invalidations.end()

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        self.events.append(f"memfd {gfn:#x}")
        assert self.case.memfd is not None
        self._race()
        return self.case.memfd

    def mapping_size(self, hva: Hva) -> int:
        return self.case.block

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        self.events.append("tags")

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        self.events.append(f"map {gpa:#x} {size:#x} {prot} {memory.value}")
        return MapResult.FIXED

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult | int:
        self.events.append(f"relax {prot}")
        return MapResult.FIXED

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        self.events.append(f"dirty {gfn:#x}")

    def signal(self, signal: Signal) -> None:
        self.events.append("signal")

    def warn(self, text: str) -> None:
        self.events.append("warn")
