"""VMs whose surroundings can be watched and interfered with, and faults for any target.

``Watched`` is the real Vm: it notes which ports the path used, can run something just before one of them (what another
CPU does meanwhile), and can give an answer that no state of the model gives (no memory for tables, a lost race).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Self

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, block_sizes
from kvmfault.contract.outcome import Signal
from kvmfault.contract.ports import (
    Area,
    GuestTranslation,
    GuestWalkFault,
    MapResult,
    Memslot,
    Pin,
    PinError,
    VmFacts,
)
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backend
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Gva, Hva, Pfn
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.memslot import MemslotFlag
from kvmfault.vm.memslot_request import MemslotRequest, Via

GPA: Final = 0x4000_0000
HVA: Final = 0x7F00_0000_0000
SIZE: Final = 1 << 30
APIC: Final = 0xFEE0_0000
ARM: Final = ("arm64@6.12", "arm64@7.4")
X86: Final = ("x86-ept", "x86-npt")
"""Nested paging only."""
ONE_OF_EACH: Final = ("arm64", "x86-ept", "x86-npt", "x86-shadow")
ALL: Final = tuple(f"{name}@{kernel}" for name in ONE_OF_EACH for kernel in ("6.12", "7.4"))
"""Every backend with both kernels."""


class Watched(Vm):
    """The real VM, watched."""

    def __init__(self, target: Target, *, caps: HostCaps | None = None, facts: VmFacts | None = None) -> None:
        super().__init__(target, caps=caps, facts=facts)
        self.events: list[str] = []
        """Ports used, with what matters of their arguments."""
        self.meanwhile: dict[str, Callable[[Watched], None]] = {}
        """Port -> what happens just before it answers for the first time."""
        self.answers: dict[str, object] = {}
        """Port -> an answer in place of the state's."""

    def fork(self) -> Self:
        new = super().fork()
        new.events, new.meanwhile = [], dict(self.meanwhile)
        return new

    def _at(self, port: str, *what: object) -> object:
        self.events.append(" ".join((port, *map(str, what))))
        happens = self.meanwhile.pop(port, None)
        if happens is not None:
            happens(self)
        return self.answers.get(port)

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        self._at("find_slot")
        return super().find_slot(gfn)

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        answer = self._at("walk_guest")
        if answer is None and self.target.backend.name == "x86-shadow":
            return GuestTranslation(gpa, 1 << 30)  # the guest maps everything one to one
        assert answer is None or isinstance(answer, (GuestTranslation, GuestWalkFault))
        return answer

    def topup(self) -> int:
        answer = self._at("topup")
        return answer if isinstance(answer, int) else super().topup()

    def area(self, hva: Hva) -> Area | None:
        answer = self._at("area")
        return answer if isinstance(answer, Area) else super().area(hva)

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        answer = self._at("pin", "nowait" if nowait else "waits")
        if isinstance(answer, Pin):
            return answer
        if isinstance(answer, PinError):
            return Pin(None, answer)
        return super().pin(slot, gfn, hva, write=write, nowait=nowait, interruptible=interruptible)

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        answer = self._at("defer")  # "known": it is being fetched already
        return answer == "known" or (queue and answer is True)

    def fetched_small(self, gpa: Gpa, size: int) -> bool:
        answer = self.answers.get("fetched_small")  # sizes of blocks that gave way to a fetch
        return isinstance(answer, tuple) and size in answer

    def mapping_size(self, hva: Hva) -> int:
        answer = self._at("mapping_size")
        return answer if isinstance(answer, int) else super().mapping_size(hva)

    def lock(self) -> None:
        self._at("lock")

    def table_retired(self) -> bool:
        return self._at("table_retired") is True

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        self._at("prepare_page", hex(size))

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        answer = self._at("map", hex(gpa), hex(size), prot, memory.value, "young" if young else "old", tag)
        if size in block_sizes(self.format)[1:]:  # address and frame of a block are aligned to it
            assert not gpa % size, hex(gpa)
            assert not (pfn << self.page_shift) % size, hex(pfn)
        if isinstance(answer, MapResult):
            return answer
        return super().map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        self._at("relax", hex(gpa), prot)
        return super().relax(gpa, prot, memory)

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        self._at("map_mmio", hex(at))
        return super().map_mmio(at, gpa, prot)

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        self._at("note_mmio", hex(gfn))
        super().note_mmio(gfn, gva)

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        self._at("mark_dirty", hex(gfn))
        super().mark_dirty(slot, gfn, pfn)

    def release(self, pfn: Pfn) -> None:
        self._at("release")

    def signal(self, signal: Signal) -> None:
        self._at("signal", signal.lsb)
        super().signal(signal)


def world(
    target: str | Target,
    backing: str | None = "anon",
    *,
    gpa: int = GPA,
    size: int = SIZE,
    hva: int = HVA,
    readonly: bool = False,
    log_dirty: bool = False,
    host_readonly: bool = False,
    **facts: object,
) -> Watched:
    """One slot, with host memory of one kind under all of it (None: without)."""
    vm = Watched(backend(target) if isinstance(target, str) else target)
    vm.add_memslot(0, gpa=gpa, size=size, hva=hva, readonly=readonly, log_dirty=log_dirty)
    if backing is not None:
        vm.back(hva & -SIZE, size + SIZE, backing, readonly=host_readonly)
    return vm.with_facts(**facts) if facts else vm


def with_memfd(target: str) -> Watched:
    """As ``world``, on a host with guest_memfd, the slot bound to one."""
    on = backend(target)
    vm = Watched(on, caps=replace(on.backend.host(on.format), guest_memfd=True))
    vm.with_facts(private_memory=True).back(HVA, SIZE)
    assert vm.slots.create_guest_memfd(5, SIZE) == 0
    request = MemslotRequest(
        slot=0, flags=MemslotFlag.GUEST_MEMFD, gpa=Gpa(GPA), size=SIZE, hva=Hva(HVA), memfd=5, via=Via.REGION2
    )
    result = vm.set_region(request)
    assert not result.errno, result
    return vm


def with_apic_page(target: str, **facts: object) -> Watched:
    """As ``world``, with the page that KVM itself puts behind the APIC of x86."""
    vm = world(target).with_facts(**facts)
    request = MemslotRequest(slot=32765, flags=0, gpa=Gpa(APIC), size=4096, hva=Hva(HVA), via=Via.KERNEL)
    assert not vm.set_region(request).errno
    return vm


def access(
    kind: str, gpa: int = GPA, cause: Cause = Cause.MISSING, *, granule: int | None = None, **members: object
) -> Access:
    """A read, write or fetch of the guest's own at *gpa*, as any architecture knows it."""
    page, offset = gpa & -4096, gpa & 0xFFF
    return Access(
        gpa=Gpa(page), offset=offset, gva=Gva(gpa), read=kind == "read", write=kind == "write", exec=kind == "exec",
        cause=cause, on_walk=False, final=True, granule=granule,
    ).with_(**members)  # fmt: skip


def fault(
    target: str | Target,
    kind: str,
    gpa: int = GPA,
    cause: Cause = Cause.MISSING,
    *,
    granule: int | None = None,
    **members: object,
) -> Raw:
    """The same as registers of *target*; under shadow paging the virtual address is the physical one."""
    on = backend(target) if isinstance(target, str) else target
    return on.encode(access(kind, gpa, cause, granule=granule, **members)).fault


def permission(target: str | Target, kind: str, gpa: int = GPA, granule: int | None = None) -> Raw:
    """A permission fault; *granule*: bytes that the entry maps, for architectures that tell."""
    return fault(target, kind, gpa, Cause.PERMISSION, granule=granule)


def leaf(vm: Vm, gpa: int) -> tuple[int, int, str] | None:
    """(first address, size, rwx) of the leaf over *gpa*."""
    found = vm.table.leaf(Gpa(gpa))
    if found is None:
        return None
    prot = vm.format.prot(found.desc)
    return found.gpa, 1 << found.shift, "".join(c if prot & bit else "-" for c, bit in (("r", 4), ("w", 2), ("x", 1)))
