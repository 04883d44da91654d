"""Ports scripted by the keys of the x86 path vectors: what KVM's surroundings answered in one scripted fault."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from errno import EIO
from typing import Final

from arch.x86.joints import APIC_ACCESS_PAGE
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, Stage2Format, W
from kvmfault.contract.outcome import Signal
from kvmfault.contract.ports import (
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
from kvmfault.types import U64, Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import GmemBinding, MemslotFlag
from tests.kernel.scripted import ScriptedPorts

GFN: Final = Gfn(0x1234)
_HVA: Final = Hva(0x7F00_0000_0000)
_APIC, _MEMFD = 3, 5
_FLAGS: Final = {2: MemslotFlag.INVALID, 4: MemslotFlag.READONLY, _MEMFD: MemslotFlag.GUEST_MEMFD}
_NO_PAGE: Final = {
    3: PinError.RO_FAULT,
    4: PinError.HWPOISON,
    5: PinError.FAULT,
    6: PinError.SIGPENDING,
    7: PinError.NO_SLOT,
}
_AFTER_WAIT: Final = {2: None, 8: PinError.FAULT, 9: PinError.SIGPENDING}
_MAPPED: Final[Mapping[int, MapResult | int]] = {
    1: MapResult.LOST,
    2: MapResult.MMIO,
    3: MapResult.WRITE_PROTECTED,
    4: EIO,
    5: MapResult.FIXED,
    6: MapResult.UNCHANGED,
}
"""By RET_PF_*. INVALID is no result of the slow path: the kernel calls it a bug and fails with EIO."""
_PROTECTED, _INVALID = 3, 4
_REPAIRED: Final[Mapping[int, Repair | MapResult]] = {
    1: MapResult.LOST,
    2: MapResult.MMIO,
    3: MapResult.WRITE_PROTECTED,
    4: Repair.NOT_HERE,
    5: Repair.FIXED,
    6: Repair.SPURIOUS,
}
_NOTE: Final = {0: MmioNote.ABSENT, 1: MmioNote.CURRENT, 2: MmioNote.STALE, 3: MmioNote.BROKEN}


def size(level: int) -> int:
    """Bytes of a PG_LEVEL_* (1 is 4K, 2 is 2M, 3 is 1G)."""
    return 1 << 12 + 9 * (level - 1)


def level(size: int) -> int:
    """PG_LEVEL_* of a size in bytes."""
    return (size.bit_length() - 13) // 9 + 1


def slot(kind: int) -> Memslot | None:
    """The slot that the key ``slot`` names; it covers everything."""
    if kind == 0:
        return None
    return Memslot(
        id=APIC_ACCESS_PAGE if kind == _APIC else 0,
        as_id=0,
        base_gfn=Gfn(0),
        npages=1 << 52,
        hva=_HVA,
        flags=_FLAGS.get(kind, MemslotFlag(0)),
        page_shift=12,
        gmem=GmemBinding(3, 0) if kind == _MEMFD else None,
    )


def facts(keys: Mapping[str, int]) -> VmFacts:
    """What the keys say of VM and vCPU."""
    return VmFacts(
        private_memory=bool(keys.get("hasprv", 0)),
        private_by_attribute=bool(keys.get("swp", 0)),
        hardware_access_dirty=bool(keys.get("ad", 1)),
        mmio_caching=bool(keys.get("mmiocache", 1)),
        max_gfn=keys.get("maxgfn", VmFacts().max_gfn),
        nested=bool(keys.get("l2", 0)),
        apic_virtualised=bool(keys.get("apicv", 1)),
        root_valid=bool(keys.get("root", 1)),
        repeats_unprotect=bool(keys.get("samerip", 0)),
        # ``apf`` is the answer of kvm_can_do_async_pf as a whole, which asks for this too
        event_reinjected=bool(keys.get("reinj", 0)) and not keys.get("apf", 0),
    )


class X86Ports(ScriptedPorts):
    """One scripted fault. ``warnings``: what the kernel would print; ``bug``: a result that it has no way to handle."""

    def __init__(self, fmt: Stage2Format, keys: Mapping[str, int], *, small_exec: bool = False) -> None:
        super().__init__(fmt, replace(facts(keys), small_exec=small_exec))
        self.keys = keys
        self.slot = slot(keys.get("slot", 1))
        self.warnings: list[str] = []
        self.bug = ""
        self.signals: list[Signal] = []
        running = self.invalidations
        if keys.get("inprog"):
            running.begin()
            if "rs" in keys:
                running.add(Gfn(keys["rs"]), Gfn(keys.get("re", U64)))

    def _invalidate(self) -> None:
        self.invalidations.begin()
        self.invalidations.add(GFN, Gfn(GFN + 1))
        self.invalidations.end()

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        return self.slot

    def is_private(self, gfn: Gfn) -> bool:
        return bool(self.keys.get("attr", 0))

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        # the scripted nested guest has no second stage of its own hypervisor's
        return None if self.facts.nested else GuestTranslation(Gpa(0), 1 << 12)

    def is_tracked(self, gfn: Gfn) -> bool:
        # under the lock it is the result of mapping that tells of a tracked frame
        if "lock" in self.events:
            return self.keys.get("map") == _PROTECTED
        return bool(self.keys.get("wtrack", 0))

    def repair_fast(self, gpa: Gpa, *, write: bool, execute: bool) -> Repair | MapResult:
        self.events.append("fast")
        return _REPAIRED[self.keys.get("fast", 4)]

    def topup(self) -> int:
        if self.events != ["fast"]:
            self.events.append("fast:n/a")  # the vectors note that the lockless repair was not even tried
        self.events.append("topup")
        return -self.keys.get("topup", 0)

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        self.events.append("gup_nowait" if nowait else "gup_wait_intr" if interruptible else "gup_wait")
        kind = self.keys.get("pfn", 0)
        if kind in _AFTER_WAIT and nowait:
            return Pin(None, PinError.NEEDS_IO)
        if self.keys.get("invpfn"):
            self._invalidate()
        error = _AFTER_WAIT.get(kind, _NO_PAGE.get(kind))
        if error is PinError.SIGPENDING:
            self.events.append("signal_exit")
        if error is not None:
            return Pin(None, error)
        return Pin(Pfn(gfn + 0x100000), writable=kind != 1)

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        self.events.append("gmem")
        if self.keys.get("invpfn"):
            self._invalidate()
        if errno := -self.keys.get("gmem", 0):
            return Pin(None, PinError.FAULT, errno=errno)
        return Pin(Pfn(gfn + 0x100000), writable=True, max_size=1 << 12)

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        if not self.keys.get("apf"):
            return False
        if self.keys.get("apfdup"):
            self.events.append("req")
            return True
        if queue and self.keys.get("apfset"):
            self.events.append("apf_setup")
            return True
        return False

    def lock(self) -> None:
        self.events.append("lock")
        if self.keys.get("invlock"):
            self._invalidate()

    def table_retired(self) -> bool:
        return bool(self.keys.get("obsolete", 0))

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        self.events.append("map")
        result = self.keys.get("map", 5)
        if result == _INVALID:
            self.bug = "INVALID"
            self.warn("KVM_BUG_ON: the slow path has no result")
        if result == _PROTECTED and prot & W:
            return MapResult.FIXED  # what comes in writable was not protected
        return _MAPPED[result]

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        self.events.append("map_mmio")
        return MapResult.MMIO

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        self.events.append("cache_mmio")

    def find_mmio(self, gpa: Gpa) -> MmioNote:
        return MmioNote.CACHED if self.keys.get("cachehit") else _NOTE[self.keys.get("walk", 0)]

    def release(self, pfn: Pfn) -> None:
        self.events.append("release")

    def signal(self, signal: Signal) -> None:
        self.events.append("sigbus")
        self.signals.append(signal)

    def unprotect(self, gfn: Gfn) -> bool:
        self.events.append("unprotect")
        return bool(self.keys.get("unprot", 0))

    def warn(self, text: str) -> None:
        self.warnings.append(text)
