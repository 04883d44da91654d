"""A VM beside naive models of what its features promise, driven in random steps by tests/test_vm_machine.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from arch.x86 import EPT
from arch.x86.spte import EPT_4K_NO_AD
from kvmfault.contract.format import Kind, R, W, X, block_sizes
from kvmfault.contract.outcome import Exit, MemoryFault, Reason
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, MmioNote, PinError, Repair
from kvmfault.contract.target import Target, backend, resolve
from kvmfault.contract.values import MemfdSource, Userfault
from kvmfault.errors import ModelError
from kvmfault.machine.guest import AccessRun, Ended
from kvmfault.machine.vm import Vm
from kvmfault.path.lookup import PRIVATE_FLAG, USERFAULT_FLAG
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.dirty import INITIALLY_SET, MANUAL_PROTECT, RING_ENTRY_BYTES

GPA: Final = 1 << 32
HVA: Final = 0x7F00_0000_0000
BLOCKS: Final = 3
"""Blocks of host memory. Guest addresses have twice as many, so that slots can move."""
VCPUS: Final = 3
MEMFD: Final = 5
OTHERWISE: Final = {
    "riscv": {"no fetch": "FAILED"},
    "loongarch": {"SIGNALLED": "device", "FAILED": "device"},
    "powerpc": {"SIGNALLED": "FAILED"},
}
"""Where KVM does another thing with an access that cannot be had: what a word of ``expected`` becomes."""
NEED: Final = {"read": R, "write": W, "exec": X}


class Mode(Enum):
    """How writes are logged."""

    BITMAP = 0
    MANUAL = MANUAL_PROTECT
    ALL_SET = MANUAL_PROTECT | INITIALLY_SET
    RING = -1


class OneToOne(Vm):
    """Where the guest's own tables are shadowed, they map everything to itself."""

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        return GuestTranslation(gpa, 1 << 30)


def with_userfault(name: str, *, hardware_ad: bool) -> Target:
    """The target, with a kernel that has the proposed slot flag."""
    target = backend(name)
    if name == "x86-ept" and not hardware_ad:
        target = resolve({name: replace(EPT, formats={"4k": EPT_4K_NO_AD})}, name, "", "", name)
    return target.with_policy(userfault=Userfault.V3)


@dataclass
class Slot:
    """What a slot was made of; pages count from the window's first."""

    base: int
    npages: int
    hva: int
    readonly: bool = False
    logged: bool = False
    userfault: bool = False
    memfd: bool = False
    wanted: set[int] = field(default_factory=set)
    """Pages of the slot that user space wants to hear of."""
    written: set[int] = field(default_factory=set)
    """Pages of the slot written since they were last handed to user space."""


class NaiveVm:
    """The VM, and what must be true of it."""

    def __init__(self, name: str, mode: Mode, kind: str, *, eager: bool, small_exec: bool, hardware_ad: bool) -> None:
        target = with_userfault(name, hardware_ad=hardware_ad)
        self.vm: Vm = (OneToOne if name.startswith("x86-shadow") else Vm).on(target)
        self.by_attribute = target.policy.memfd_source is MemfdSource.PRIVATE_ACCESS
        self.has_memfd = target.policy.memfd_source is not MemfdSource.NONE
        self.vm.with_caps(
            userfault=True, guest_memfd=self.has_memfd, memory_attributes=self.by_attribute
        )  # on these kernels by the VM's type
        self.vm.with_facts(
            eager_split=eager,
            small_exec=small_exec and self.by_attribute,
            hardware_access_dirty=hardware_ad,
            private_memory=self.by_attribute,
            private_by_attribute=self.by_attribute,
        )
        self.page_shift = self.vm.page_shift
        self.page = 1 << self.page_shift
        self.block = block_sizes(target.format)[1]
        self.in_block = self.block >> self.page_shift
        self.mode = mode
        if mode is Mode.RING:
            assert self.vm.enable_dirty_ring(max(self.page, 128 * RING_ENTRY_BYTES)) == 0
        else:
            assert self.vm.enable_manual_protect(mode.value) == 0
        self.vm.back(HVA, BLOCKS * self.block, kind)
        if self.has_memfd:
            assert self.vm.create_guest_memfd(MEMFD, BLOCKS * self.block) == 0
        self.slots: dict[int, Slot] = {}
        self.private: set[int] = set()
        self.tracked: set[int] = set()
        self.poisoned: set[int] = set()
        for vcpu in range(VCPUS):
            self.vm.use_vcpu(vcpu)

    # Places: pages count from the window's first.

    def places(self) -> tuple[int, ...]:
        """Few pages, at the ends of blocks and inside."""
        n = self.in_block
        return tuple(b * n + at for b in range(2 * BLOCKS) for at in (0, 1, 70, n - 1))

    def gpa(self, page: int) -> int:
        return GPA + (page << self.page_shift)

    def hva(self, page: int) -> Hva:
        return Hva(HVA + (page << self.page_shift))

    def slot_of(self, page: int) -> tuple[int, Slot] | None:
        return next(((i, s) for i, s in self.slots.items() if s.base <= page < s.base + s.npages), None)

    # Slots.

    def set_slot(self, number: int, slot: Slot) -> bool:
        """Ask for it; whether KVM agreed."""
        try:
            self.vm.add_memslot(
                number,
                gpa=self.gpa(slot.base),
                size=slot.npages << self.page_shift,
                hva=self.hva(slot.hva),
                readonly=slot.readonly,
                log_dirty=slot.logged,
                userfault=slot.userfault,
                memfd=MEMFD if slot.memfd else None,
                memfd_offset=slot.hva << self.page_shift if slot.memfd else 0,
            )
        except ModelError as error:
            if not any(rule in str(error) for rule in ("(overlap)", "(memfd-bound)", "(memfd-immutable)")):
                raise
            return False
        old = self.slots.get(number)
        if old is not None:
            slot.wanted = old.wanted if slot.userfault else set()
            slot.written = old.written if slot.logged else set()
        self.slots[number] = slot
        return True

    def remove_slot(self, number: int) -> None:
        self.vm.remove_memslot(number)
        del self.slots[number]

    # The guest.

    def access(self, vcpu: int, page: int, kind: str) -> None:
        """One access to one page, compared with what has to come of it."""
        vm, gpa = self.vm, self.gpa(page)
        want = self.expected(vcpu, page, kind)
        want = OTHERWISE.get(self.vm.target.backend.name, {}).get(want, want)
        if want == "device" and kind == "exec":
            want = "no fetch"
        found = self.slot_of(page)
        before = vm.key()
        copied = vm.fork()
        assert copied.key() == before
        got = vm.access(gpa + 0x10, 4, write=kind == "write", fetch=kind == "exec", vcpu=vcpu, data=1)
        again = copied.access(gpa + 0x10, 4, write=kind == "write", fetch=kind == "exec", vcpu=vcpu, data=1)
        assert (again.ended, again.pfns, copied.key()) == (got.ended, got.pfns, vm.key())
        assert self.told(got) == want, (kind, page, want, got.ended, got.exits, [r.outcome for r in got.faults])
        if kind == "write" and found is not None and want in ("memory", "emulated"):
            found[1].written |= {page - found[1].base} if found[1].logged else set()
        if want == "memory":
            assert len(got.faults) <= 4, [r.outcome for r in got.faults]

    def told(self, got: AccessRun) -> str:
        """What came of an access, in a word."""
        last = got.exits[-1] if got.exits else None
        if got.ended is Ended.SIGNALLED:
            assert isinstance(last, Exit)
            assert last.reason is Reason.INTR
            return "SIGNALLED"
        detail = last.detail if isinstance(last, Exit) else None
        if isinstance(detail, MemoryFault):
            assert got.ended is Ended.FAILED
            return (
                "userfault" if detail.flags & USERFAULT_FLAG else "private" if detail.flags & PRIVATE_FLAG else "shared"
            )
        if isinstance(last, Exit) and last.reason is Reason.DIRTY_RING_FULL:
            return "full"
        if isinstance(last, Exit) and last.reason is Reason.MMIO:
            return "device"
        if got.ended is Ended.DONE:
            return "memory" if got.pfns else "emulated"
        return {Ended.INJECTED: "no fetch", Ended.EXITED: "no fetch", Ended.WAITS: "waits"}.get(
            got.ended, got.ended.name
        )

    def ring_full(self, vcpu: int) -> bool:
        return self.mode is Mode.RING and len(self.vm.vcpus[vcpu].ring) >= self.vm.log.soft_limit

    def expected(self, vcpu: int, page: int, kind: str) -> str:
        """In a word, from the naive models alone; the table only says whether there is a fault at all."""
        if self.ring_full(vcpu):
            return "full"
        leaf = self.vm.table.leaf(Gpa(self.gpa(page)))
        if leaf is not None and self.vm.format.prot(leaf.desc) & NEED[kind]:
            return "memory"
        found = self.slot_of(page)
        private = self.by_attribute and page in self.private
        # an entry that remembers MMIO outlives a conversion, which goes by slots; its faults are shared
        walked = self.vm.table.walk(Gpa(self.gpa(page)))
        remembered = self.vm.format.kind(walked.desc, walked.shift) is Kind.MMIO
        if private and remembered and self.vm.find_mmio(Gpa(self.gpa(page))) is MmioNote.STALE:
            return "shared"
        if found is None:
            return "private" if private and not remembered else "no fetch" if kind == "exec" else "device"
        slot = found[1]
        write = kind == "write"
        leaves = not self.by_attribute  # such kernels turn to the device before they look at anything else
        if slot.readonly and write and leaves:
            return "device"
        tracked = write and page in self.tracked and not private
        if tracked and leaf is not None:
            if slot.readonly:
                return "device"
            error = self.vm.host.fork().pin(self.hva(slot.hva + page - slot.base), write=True).error
            return "emulated" if error is None else "waits" if error is PinError.WAITS else "device"
        if page - slot.base in slot.wanted and slot.userfault:
            return "memory" if leaf is not None and self.gives_back(page, kind, leaf.desc) else "userfault"
        if private if self.by_attribute else slot.memfd:
            return "memory" if slot.memfd else "private"
        if slot.readonly and write:
            return "device"
        got = self.vm.host.fork().pin(self.hva(slot.hva + page - slot.base), write=write)
        match got.error:
            case None:
                return "emulated" if tracked else "memory"
            case PinError.HWPOISON:
                return "SIGNALLED"
            case PinError.WAITS:
                return "waits"
            case _:
                return "FAILED"

    def gives_back(self, page: int, kind: str, desc: int) -> bool:
        """Whether a mapped page gets what the log or aging took without the lock, so that user space is not asked."""
        present = bool(self.vm.format.prot(desc))
        if not self.by_attribute or not (kind == "write" if present else not self.vm.facts.hardware_access_dirty):
            return False
        fork, write = self.vm.fork(), kind == "write"
        return fork.repair_fast(Gpa(self.gpa(page)), write=write, execute=kind == "exec") is Repair.FIXED

    # Logs.

    def recorded(self, number: int) -> set[int]:
        """Pages of a slot that user space will hear of."""
        if self.mode is not Mode.RING:
            return set(self.vm.log.pages(number))
        return {e.offset for vcpu in self.vm.every_vcpu() for e in vcpu.ring if e.slot == number}

    # What must be true after every step.

    def check(self) -> None:
        assert not self.vm.table.stale
        recorded = {number: self.recorded(number) for number, slot in self.slots.items() if slot.logged}
        for number, slot in self.slots.items():
            if slot.logged:
                assert slot.written <= recorded[number], f"slot {number} lost {slot.written - recorded[number]}"
        for leaf in self.vm.table.entries():
            if self.vm.format.kind(leaf.desc, leaf.shift) is Kind.LEAF:
                self.check_leaf(leaf.gpa, leaf.shift, leaf.desc, recorded)
        for vcpu in self.vm.every_vcpu():
            for cached in vcpu.tlb.entries():
                self.check_cached(cached.gpa, cached.shift, cached.pfn, cached.prot)

    def check_leaf(self, gpa: int, shift: int, desc: int, recorded: dict[int, set[int]]) -> None:
        fmt, vm = self.vm.format, self.vm
        page, pages = gpa - GPA >> self.page_shift, 1 << shift - self.page_shift
        found = self.slot_of(page)
        assert found is not None, f"page {page} is mapped without a slot"
        number, slot = found
        assert page + pages <= slot.base + slot.npages, "a leaf that leaves its slot"
        inside = range(page - slot.base, page - slot.base + pages)
        writable = bool(fmt.prot(desc) & W)
        assert not (writable and slot.readonly), "a writable leaf in a read-only slot"
        assert not (writable and self.tracked & set(range(page, page + pages))), "a writable leaf of a tracked page"
        if writable and slot.logged:
            assert recorded[number].issuperset(inside), "a writable leaf of a page that is not marked"
        pfn = fmt.hpa(desc, shift) >> self.page_shift
        if pages > 1:
            self.check_block(slot, page, pages, writable)
        if self.page_is_private(slot, page):
            assert pages == 1
            assert slot.memfd, "private memory without a guest_memfd"
            assert pfn >= 1 << 46 - self.page_shift, "shared memory mapped as private"
            return
        assert pfn < 1 << 46 - self.page_shift, "private memory mapped as shared"
        hva = self.hva(slot.hva + page - slot.base)
        got = vm.host.fork().pin(hva, write=False)
        assert got.pfn == pfn, f"page {page} is mapped to {pfn:#x}, the host has {got}"
        assert got.writable or not writable, "a writable leaf of memory that the host may not write"

    def page_is_private(self, slot: Slot, page: int) -> bool:
        return page in self.private if self.by_attribute else slot.memfd

    def check_block(self, slot: Slot, page: int, pages: int, writable: bool) -> None:
        assert not slot.userfault, "a block in a slot with userfaults"
        assert (slot.base - slot.hva) % pages == 0, "a block where gfn and hva are not congruent"
        assert not (slot.logged and not slot.readonly and writable and self.mode is not Mode.ALL_SET)
        mixed = self.private & set(range(page, page + pages))
        assert not mixed, "a block with private pages"
        hva = self.hva(slot.hva + page - slot.base)
        assert self.vm.host.mapping_size(hva) >= pages << self.page_shift, "a block that the host maps by pages"

    def check_cached(self, gpa: int, shift: int, pfn: int, prot: int) -> None:
        """A cached leaf allows nothing that the table does not; aged entries may be away for a while.

        Where permissions stand for the accessed bit, what ageing took stays cached until something flushes.
        """
        fmt, at, end = self.vm.format, gpa, gpa + (1 << shift)
        while at < end:
            leaf = self.vm.table.leaf(Gpa(at))
            assert leaf is not None, f"{at:#x} is cached and not mapped"
            assert fmt.hpa(leaf.desc, leaf.shift) + (at - leaf.gpa) == (pfn << self.page_shift) + at - gpa
            if fmt.is_young(leaf.desc) and (self.vm.facts.hardware_access_dirty or fmt.old_faults):
                assert not prot & ~fmt.prot(leaf.desc), "cached with more than the table allows"
            at = leaf.gpa + (1 << leaf.shift)

    def gfn(self, page: int) -> Gfn:
        return Gfn(self.gpa(page) >> self.page_shift)
