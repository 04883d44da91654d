"""The x86 joints and policy values, also where the vectors do not look: on scripted surroundings and on a VM."""

from __future__ import annotations

from dataclasses import replace
from errno import EFAULT, EINVAL
from typing import Final

import pytest

from arch.x86 import EPT, NPT, SHADOW
from arch.x86.joints import APIC_ACCESS_PAGE, can_fast, rmp_handler_runs
from arch.x86.registers import KVM
from kvmfault.contract.format import Memory, Prot, R, W, X
from kvmfault.contract.outcome import (
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Retry,
    Signal,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, Leaf, MapResult, MmioNote, Pin, Repair
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.contract.values import OnRetry, PoisonSpan, PresentLeaf, SignExtension, UnknownArea
from kvmfault.path.run import Run, bind
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import Memslot, MemslotFlag
from tests.kernel.scripted_x86 import GFN, X86Ports

TARGETS: Final = {b.name: Target(b, "4k", kernel) for b in (EPT, NPT, SHADOW) for kernel in b.kernels[:1]}
NPT_612, EPT_612, SHADOW_612 = (TARGETS[name] for name in ("x86-npt", "x86-ept", "x86-shadow"))
HVA: Final = 0x7F00_0000_0000
READ, WRITE, FETCH = 4, 6, 0x14
PRESENT, RESERVED, ON_WALK = 1, 8, 1 << 33


class Surroundings(X86Ports):
    """Scripted ports that keep what was mapped and marked, with a page, a guest walk and MMIO notes of one's own."""

    page: Pin = Pin(Pfn(0x5000), writable=True)
    guest: GuestTranslation | GuestWalkFault | None = None
    note: MmioNote | None = None

    def __init__(self, target: Target, **keys: int) -> None:
        super().__init__(target.format, keys)
        self.mapped: list[tuple[Gpa, int, Pfn, int, Memory]] = []
        self.marked: list[Gfn] = []
        self.repairs: list[tuple[bool, bool]] = []

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        return (
            self.page
            if "pfn" not in self.keys
            else super().pin(slot, gfn, hva, write=write, nowait=nowait, interruptible=interruptible)
        )

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        return self.guest

    def find_mmio(self, gpa: Gpa) -> MmioNote:
        return super().find_mmio(gpa) if self.note is None else self.note

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        self.mapped.append((gpa, size, pfn, prot, memory))
        return super().map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        self.marked.append(gfn)

    def repair_fast(self, gpa: Gpa, *, write: bool, execute: bool) -> Repair | MapResult:
        self.repairs.append((write, execute))
        return super().repair_fast(gpa, write=write, execute=execute)

    def flag(self, flags: MemslotFlag) -> Surroundings:
        assert self.slot is not None
        self.slot = replace(self.slot, flags=flags)
        return self


def npf(code: int, kvm: int = 0) -> Raw:
    return NPT_612.decode(EXITINFO1=code, EXITINFO2=GFN << 12 | 0x678, KVM=kvm)


def run(vm: X86Ports, fault: Raw, target: Target = NPT_612) -> Run:
    return bind(target).handle(vm, fault)


def outcome(vm: X86Ports, fault: Raw, target: Target = NPT_612) -> Outcome:
    done = run(vm, fault, target).outcome
    assert done.why
    return done


# What the policy decides and the vectors do not notice.


@pytest.mark.parametrize("code", [READ, WRITE, FETCH])
def test_every_fault_maps_all_that_the_host_allows(code: int) -> None:
    vm = Surroundings(NPT_612)
    run(vm, npf(code))
    assert vm.mapped == [(GFN << 12, 0x1000, 0x5000, R | W | X, Memory.NORMAL)]
    vm = Surroundings(NPT_612)
    vm.page = Pin(Pfn(0x5000), writable=False)
    run(vm, npf(code))
    assert vm.mapped[0][3] == R | X


def test_a_read_of_a_logged_slot_marks_the_page_with_the_entry() -> None:
    vm = Surroundings(NPT_612, map=1).flag(MemslotFlag.LOG_DIRTY)
    assert isinstance(outcome(vm, npf(READ)), Retry)  # the entry was lost to another vCPU
    assert vm.marked == [GFN]
    assert run(vm.flag(MemslotFlag(0)), npf(WRITE)).machinery is not None
    assert vm.marked == [GFN]


@pytest.mark.parametrize("code", [READ, WRITE])
def test_a_logged_slot_is_mapped_by_pages_also_when_read_only(code: int) -> None:
    for flags in (MemslotFlag.LOG_DIRTY, MemslotFlag.LOG_DIRTY | MemslotFlag.READONLY):
        vm = Surroundings(NPT_612).flag(flags)
        vm.mapping_size = lambda hva: 1 << 30  # type: ignore[method-assign]  # a host that maps all of it
        run(vm, npf(code))
        assert [size for _, size, *_ in vm.mapped] == [1 << 12]
    vm = Surroundings(NPT_612)
    vm.mapping_size = lambda hva: 1 << 30  # type: ignore[method-assign]  # as above
    run(vm, npf(code))
    assert [size for _, size, *_ in vm.mapped] == [1 << 30]


def test_code_runs_from_device_memory() -> None:
    vm = Surroundings(EPT_612)
    vm.page = Pin(Pfn(0x5000), writable=True, device=True)
    fault = EPT_612.decode(EXIT_QUALIFICATION=0x184, GUEST_PHYSICAL_ADDRESS=GFN << 12)
    assert isinstance(run(vm, fault, EPT_612).outcome, Fixed)
    assert vm.mapped[0][3:] == (R | W | X, Memory.DEVICE)


def test_the_signal_of_a_poisoned_page_names_one_page() -> None:
    vm = Surroundings(NPT_612, pfn=4)
    done = outcome(vm, npf(WRITE))
    assert isinstance(done, Retry)
    assert done.signal == Signal(Hva(HVA + (GFN << 12)), 12)
    assert vm.signals == [done.signal]


def test_a_read_only_slot_never_waits_in_the_background() -> None:
    assert isinstance(outcome(Surroundings(NPT_612, pfn=2, apf=1, apfset=1), npf(READ)), Retry)
    vm = Surroundings(NPT_612, pfn=2, apf=1, apfset=1, slot=4)
    assert isinstance(run(vm, npf(READ)).outcome, Fixed)
    assert "apf_setup" not in vm.events


def test_policies_agree_between_kernels_and_backends() -> None:
    policies = {(b.name, k): make(b.formats["4k"]) for b in (EPT, NPT, SHADOW) for k, make in b.policies.items()}
    base = policies["x86-ept", "6.12"]
    keep = {
        ("x86-ept", "7.4"): PresentLeaf.KEEP_IF_ALLOWED,
        ("x86-npt", "7.4"): PresentLeaf.KEEP_IF_ALLOWED,
        ("x86-shadow", "7.4"): PresentLeaf.KEEP_FOR_PREFETCH,
    }
    for name, policy in policies.items():
        wanted = {"present_leaf"} if name in keep else set()
        wanted |= {"marks_rewritten"} if name[1] == "7.4" else set()
        wanted |= {"prefault"} if name[0] == SHADOW.name else set()  # only where addresses are virtual
        assert set(base.differs(policy)) == wanted
        assert policy.present_leaf is keep.get(name, PresentLeaf.REPLACE)


def test_values_that_decide_nothing_without_host_areas_and_granules() -> None:
    policy = NPT_612.policy
    assert (policy.unknown_area, policy.poison_span) == (UnknownArea.USE, PoisonSpan.PAGE)
    assert (policy.check_geometry, policy.relax_in_place) == (True, False)
    assert (policy.on_retry, policy.mmio_sign_extension) == (OnRetry.RESUME, SignExtension.KEPT)


# Screen.


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        (MmioNote.CACHED, Emulate()),
        (MmioNote.CURRENT, Emulate()),
        (MmioNote.STALE, Fixed(1 << 12, Prot.R | Prot.W | Prot.X)),
        (MmioNote.ABSENT, Retry()),
        (MmioNote.BROKEN, Error(EINVAL)),
    ],
)
@pytest.mark.parametrize("target", [EPT_612, NPT_612], ids=lambda t: t.backend.name)
def test_reserved_bit(target: Target, note: MmioNote, expected: Outcome) -> None:
    registers = {"EXIT_REASON": 49, "GUEST_PHYSICAL_ADDRESS": GFN << 12}
    if target is NPT_612:
        registers = {"EXITINFO1": READ | RESERVED | PRESENT, "EXITINFO2": GFN << 12}
    vm = Surroundings(target)
    vm.note = note
    done = run(vm, target.decode(**registers), target)
    assert done.outcome == expected
    assert (done.machinery is None) == (note is not MmioNote.STALE)
    assert bool(vm.warnings) == (note is MmioNote.BROKEN)
    assert ("cache_mmio" in vm.events) == (note is MmioNote.CURRENT)


def test_mmio_while_an_event_is_delivered() -> None:
    misconfig = {"EXIT_REASON": 49, "GUEST_PHYSICAL_ADDRESS": GFN << 12}
    vm = Surroundings(EPT_612, reinj=1)
    vm.note = MmioNote.CURRENT
    assert outcome(vm, EPT_612.decode(**misconfig), EPT_612) == Exit(Reason.INTERNAL_ERROR)
    assert not vm.events
    violation = {"EXIT_QUALIFICATION": 0x182, "GUEST_PHYSICAL_ADDRESS": GFN << 12}
    assert isinstance(run(vm, EPT_612.decode(**violation), EPT_612).outcome, Fixed)
    vm = Surroundings(NPT_612, reinj=1)  # AMD has no such test
    vm.note = MmioNote.CURRENT
    assert outcome(vm, npf(READ | RESERVED | PRESENT)) == Emulate()


def test_a_prefetch_is_not_screened() -> None:
    vm = Surroundings(NPT_612, root=0)
    assert isinstance(run(vm, npf(READ, KVM["PREFETCH"].mask)).outcome, Fixed)
    assert not vm.warnings
    assert outcome(vm, npf(READ)) == Retry()
    assert len(vm.warnings) == 1
    vm = Surroundings(NPT_612)  # an async page fault that completed carries the code of the fault that began it
    assert isinstance(run(vm, npf(READ | RESERVED, KVM["PREFETCH"].mask)).outcome, Fixed)


@pytest.mark.parametrize(("snp", "expected"), [(1, Error(EFAULT)), (0, Retry())])
def test_private_mmio_is_refused(snp: int, expected: Outcome) -> None:
    fault = npf(READ | RESERVED | 1 << 34, KVM["SNP"].mask * snp)
    assert outcome(Surroundings(NPT_612), fault) == expected


# Repair.


@pytest.mark.parametrize(
    ("code", "private", "keys", "expected"),
    [
        (WRITE | PRESENT, False, {}, True),
        (WRITE, False, {}, False),
        (READ | PRESENT, False, {}, False),
        (FETCH | PRESENT, False, {}, False),
        (WRITE, False, {"ad": 0}, True),
        (READ, False, {"ad": 0}, True),
        (READ | PRESENT, False, {"ad": 0}, False),
        (WRITE | PRESENT | RESERVED, False, {}, False),
        (WRITE | PRESENT, True, {"hasprv": 1}, False),
        (WRITE | PRESENT, True, {"hasprv": 1, "attr": 1}, True),
        (WRITE | PRESENT, True, {"attr": 0}, True),  # no private memory: nothing to compare
    ],
)
def test_can_fast(code: int, private: bool, keys: dict[str, int], expected: bool) -> None:
    assert can_fast(npf(code), Surroundings(NPT_612, **keys), private, GFN) is expected


@pytest.mark.parametrize(
    ("code", "asked"), [(WRITE | PRESENT, (True, False)), (READ, (False, False)), (FETCH, (False, True))]
)
def test_a_repair_is_asked_for_the_access(code: int, asked: tuple[bool, bool]) -> None:
    vm = Surroundings(NPT_612, ad=0)
    run(vm, npf(code))
    assert vm.repairs == [asked]


def test_a_repair_says_what_it_left() -> None:
    vm = Surroundings(NPT_612, fast=5)
    vm.find_leaf = lambda gpa: Leaf(R | W, 1 << 21, Pfn(0))  # type: ignore[method-assign]  # what the entry is after it
    assert outcome(vm, npf(WRITE | PRESENT)) == Fixed(1 << 21, Prot.R | Prot.W)


# The APIC page and private memory.


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Fixed(1 << 12, Prot.R | Prot.W | Prot.X)),
        ({"apicv": 0}, Emulate()),
        ({"l2": 1}, Emulate()),
    ],
)
def test_apic_page(keys: dict[str, int], expected: Outcome) -> None:
    vm = Surroundings(NPT_612, slot=3, **keys)
    assert run(vm, npf(READ)).outcome == expected
    assert ("map_mmio" in vm.events) == ("l2" in keys)
    assert vm.slot is not None
    assert vm.slot.id == APIC_ACCESS_PAGE == 32765


def test_emulating_private_memory_is_left_to_the_vmm() -> None:
    vm = Surroundings(NPT_612, slot=3, apicv=0, hasprv=1, attr=1)
    done = run(vm, npf(READ, KVM["PRIVATE"].mask))
    assert isinstance(done.machinery, Emulate)
    assert isinstance(done.outcome, Exit)
    assert (done.outcome.reason, done.outcome.errno) == (Reason.MEMORY_FAULT, EFAULT)


# After a write-protected frame.


@pytest.mark.parametrize(
    ("code", "keys", "expected"),
    [
        (WRITE | PRESENT, {}, Emulate(allow_retry=True)),
        (WRITE | PRESENT | ON_WALK, {"unprot": 1}, Retry()),
        (WRITE | PRESENT | ON_WALK, {}, Emulate(allow_retry=True)),
        (WRITE | PRESENT | ON_WALK, {"unprot": 1, "samerip": 1}, Emulate()),
        (WRITE | PRESENT | ON_WALK, {"unprot": 1, "cachehit": 1}, Emulate()),
        (WRITE | PRESENT, {"l2": 1}, Emulate()),
        (WRITE | PRESENT, {"unprot": 1, "reinj": 1}, Emulate(allow_retry=True)),
    ],
)
def test_write_protected(code: int, keys: dict[str, int], expected: Outcome) -> None:
    vm = Surroundings(NPT_612, wtrack=1, **keys)
    done = run(vm, npf(code))
    assert isinstance(done.machinery, WriteProtected)
    assert done.outcome == expected
    assert bool(vm.warnings) == ("cachehit" in keys)


def test_a_stale_mmio_entry_over_a_guest_table() -> None:
    # the reserved bit does not hide that the CPU walked the guest's tables
    vm = Surroundings(NPT_612, map=3, unprot=1, walk=2)
    assert outcome(vm, npf(WRITE | PRESENT | RESERVED | ON_WALK)) == Retry()


def test_ept_knows_a_write_to_a_guest_table_by_the_qualification() -> None:
    for qualification, expected in (
        (0xAA, Retry()),
        (0x1AA, Emulate(allow_retry=True)),
        (0x2A, Emulate(allow_retry=True)),
    ):
        vm = Surroundings(EPT_612, wtrack=1, unprot=1)
        fault = EPT_612.decode(EXIT_QUALIFICATION=qualification, GUEST_PHYSICAL_ADDRESS=GFN << 12)
        assert run(vm, fault, EPT_612).outcome == expected


@pytest.mark.parametrize(
    ("code", "done", "runs"),
    [
        (1 << 31, Fixed(1 << 12, Prot.R), True),
        (1 << 31, Emulate(), True),
        (1 << 31, Error(EFAULT), False),
        (1 << 31, Exit(Reason.MEMORY_FAULT, errno=EFAULT), False),
        (1 << 30, Spurious(), False),
    ],
)
def test_rmp_handler(code: int, done: Outcome, runs: bool) -> None:
    assert rmp_handler_runs(npf(code), done) is runs


# Shadow paging.


def pf(code: int, cr2: int | None = 0x7FFF_1234_5678) -> Raw:
    return SHADOW_612.decode(ERROR_CODE=code, **({} if cr2 is None else {"CR2": cr2}))


@pytest.mark.parametrize("fault", [pf(4), pf(4, None), pf(0xC)], ids=["read", "no CR2", "reserved bit"])
def test_a_shadow_fault_needs_the_guests_tables(fault: Raw) -> None:
    vm = Surroundings(SHADOW_612)
    done = run(vm, fault, SHADOW_612)
    assert isinstance(done.outcome, NeedsGuestWalk)
    assert done.machinery is None


def test_a_shadow_fault_maps_at_the_virtual_address() -> None:
    vm = Surroundings(SHADOW_612)
    vm.guest = GuestTranslation(Gpa(0x20_0000), 1 << 21, writable=False)
    assert run(vm, pf(4), SHADOW_612).outcome == Fixed(1 << 12, Prot.R | Prot.X)
    assert vm.mapped == [(0x7FFF_1234_5000, 1 << 12, 0x5000, R | X, Memory.NORMAL)]


@pytest.mark.parametrize(
    ("code", "guest", "expected"),
    [
        (6, GuestTranslation(Gpa(0), 4096, writable=False), Inject("#PF", 0x7FFF_1234_5678, 7)),
        (0x14, GuestTranslation(Gpa(0), 4096, executable=False), Inject("#PF", 0x7FFF_1234_5678, 0x15)),
        (4, GuestTranslation(Gpa(0), 4096, readable=False), Inject("#PF", 0x7FFF_1234_5678, 5)),
        (2, GuestWalkFault(0), Inject("#PF", 0x7FFF_1234_5678, 2)),
        (6, GuestWalkFault(9), Inject("#PF", 0x7FFF_1234_5678, 0xF)),
    ],
)
def test_what_the_guests_tables_forbid_is_the_guests_fault(
    code: int, guest: GuestTranslation | GuestWalkFault, expected: Outcome
) -> None:
    vm = Surroundings(SHADOW_612)
    vm.guest = guest
    assert outcome(vm, pf(code), SHADOW_612) == expected
    prefetch = SHADOW_612.decode(ERROR_CODE=code, CR2=0x7FFF_1234_5678, KVM=KVM["PREFETCH"].mask)
    assert outcome(vm, prefetch, SHADOW_612) == Retry()


def test_an_indirect_root_unprotects_only_for_an_event_in_flight() -> None:
    for reinj, expected in ((0, Emulate(allow_retry=True)), (1, Retry())):
        vm = Surroundings(SHADOW_612, wtrack=1, unprot=1, reinj=reinj)
        vm.guest = GuestTranslation(Gpa(GFN << 12), 4096)
        assert outcome(vm, pf(WRITE | PRESENT), SHADOW_612) == expected


def test_an_absent_mmio_entry_is_a_retry_once_the_tables_are_known() -> None:
    vm = Surroundings(SHADOW_612)
    vm.guest = GuestTranslation(Gpa(0), 4096)
    assert outcome(vm, pf(0xC), SHADOW_612) == Retry()
