"""The guest's own tables on x86: shadow paging, nested EPT and nested NPT, on a VM that is given them."""

from __future__ import annotations

from itertools import product
from typing import Any, Final, Self

import pytest

from arch.x86 import EPT, NPT, SHADOW
from arch.x86.guest import ept_qualification, forbidden
from arch.x86.pferr import FETCH, USER, WRITE
from arch.x86.registers import KVM
from kvmfault.contract.format import Kind, R, W, X
from kvmfault.contract.outcome import Emulate, Fixed, Inject, Outcome, Retry, Spurious
from kvmfault.contract.ports import MmioNote, VmFacts
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa
from kvmfault.vm.guest_tables import GuestEntry, GuestTables, GuestTranslation, GuestWalkFault, WalkEnd

GPA: Final = 0x4000_0000
HVA: Final = 0x7F00_0000_0000
AT: Final = 0x10_0000_0000
"""First address that the guest's tables map, to GPA."""
M, G = 1 << 20, 1 << 30
TARGETS: Final = {(b.name, k): Target(b, "4k", k) for b in (EPT, NPT, SHADOW) for k in ("6.12", "7.4")}
SHADOWS: Final = [TARGETS["x86-shadow", k] for k in ("6.12", "7.4")]
NESTED: Final = [TARGETS[b, k] for b in ("x86-ept", "x86-npt") for k in ("6.12", "7.4")]
READ, PRESENT, RSVD = 0, 1, 8
PREFETCH: Final = KVM["PREFETCH"].mask


class Guest(Vm):
    """A VM with tables of its guest's, and a change of them just before the lock is taken."""

    tables: GuestTables | None = None
    change: GuestTables | None = None
    notes: tuple[tuple[Gfn, int | None], ...] = ()

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        return self.tables.walk(gpa) if self.tables is not None else None

    def lock(self) -> None:
        if self.change is not None:
            self.tables, self.change = self.change, None

    def note_mmio(self, gfn: Gfn, gva: int | None) -> None:
        self.notes += ((gfn, gva),)
        super().note_mmio(gfn, gva)

    def mapping(self, *entries: GuestEntry) -> Self:
        self.tables = GuestTables(entries)
        return self


def guest(target: Target, backing: str = "anon", *, log_dirty: bool = False, **facts: object) -> Guest:
    vm = Guest.on(target).add_memslot(0, gpa=GPA, size=G, hva=HVA, log_dirty=log_dirty).back(HVA, G, backing)
    return vm.with_facts(nested=target.backend is not SHADOW, **facts)


def run_of(size: int = 2 * M, **members: object) -> GuestEntry:
    return GuestEntry(address=AT, size=size, **{"gpa": Gpa(GPA), **members})  # type: ignore[arg-type]  # checked there


def fault(target: Target, code: int, address: int = AT, kvm: int = 0) -> Raw:
    """*code*: PFERR bits of the access; a hardware exit for the final address."""
    if target.backend is EPT:
        access = 2 if code & WRITE else 4 if code & FETCH else 1
        registers = {"EXIT_QUALIFICATION": access | (8 if code & PRESENT else 0) | 0x180}
        if code & RSVD:
            registers = {"EXIT_REASON": 49}
        return target.decode(**registers, GUEST_PHYSICAL_ADDRESS=address, KVM=kvm)
    if target.backend is NPT:
        return target.decode(EXITINFO1=1 << 32 | code | USER, EXITINFO2=address, KVM=kvm)
    return target.decode(ERROR_CODE=code, CR2=address, KVM=kvm)


def rights(vm: Vm, address: int = AT) -> tuple[int, str, bool] | None:
    """(size, rwx, user) of the leaf over an address."""
    leaf = vm.table.leaf(Gpa(address))
    if leaf is None:
        return None
    entry = vm.format.entry(leaf.desc, leaf.shift)
    return 1 << leaf.shift, str(entry.prot), "supervisor only" not in entry.notes


# Shadow paging: what the guest is told.


def _refused_by_masks(code: int, rights: int, facts: VmFacts, *, write_protect: bool) -> bool:
    # as the kernel precomputes it: for each kind of access a set of the eight rights (x 1, w 2, u 4) that fault
    every = 0xFF
    x, w, u = (sum(1 << r for r in range(8) if r & bit) for bit in (1, 2, 4))
    wf = every & ~w if code & WRITE else 0
    uf = every & ~u if code & USER else 0
    ff = every & ~x if code & FETCH else 0
    kernel_on_user = 0 if code & USER else u
    if not facts.guest_no_execute:
        ff = 0
    if not write_protect and not code & USER:
        wf = 0
    if facts.guest_smep and code & FETCH:
        ff |= kernel_on_user
    smapf = kernel_on_user if facts.guest_smap and not code & FETCH else 0
    return bool((wf | uf | ff | smapf) >> rights & 1)


def test_permissions_of_guest_paging() -> None:
    both = (False, True)
    for code in (a | b | c for a, b, c in product((0, WRITE), (0, USER), (0, FETCH))):
        for nx, smep, smap, wp, x, w, u in product(both, repeat=7):
            facts = VmFacts(guest_no_execute=nx, guest_smep=smep, guest_smap=smap)
            found = GuestTranslation(Gpa(0), 4096, writable=w, executable=x, user=u)
            expected = _refused_by_masks(code, x | w << 1 | u << 2, facts, write_protect=wp)
            assert forbidden(code, found, facts, write_protect=wp) is expected, (code, facts, found, wp)


@pytest.mark.parametrize("target", SHADOWS, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("entry", "facts", "code", "told"),
    [
        (None, {}, READ, 0),
        (None, {}, USER | WRITE, USER | WRITE),
        (None, {}, FETCH, FETCH),
        (None, {"guest_no_execute": False}, FETCH, 0),
        (None, {"guest_no_execute": False, "guest_smep": True}, FETCH, FETCH),
        (None, {}, PRESENT | USER, USER),  # what the hardware found in the shadow table does not count
        ({"end": WalkEnd.RESERVED}, {}, WRITE, PRESENT | RSVD | WRITE),
        ({"end": WalkEnd.ADDRESS_SIZE}, {}, USER, PRESENT | RSVD | USER),
        ({"end": WalkEnd.UNREADABLE, "errno": 14}, {}, WRITE, WRITE),
        ({"writable": False}, {}, WRITE, PRESENT | WRITE),
        ({"writable": False}, {"guest_write_protect": False}, USER | WRITE, PRESENT | USER | WRITE),
        ({"user": False}, {}, USER, PRESENT | USER),
        ({"executable": False}, {}, USER | FETCH, PRESENT | USER | FETCH),
        ({}, {"guest_smep": True}, FETCH, PRESENT | FETCH),
        ({}, {"guest_smap": True}, READ, PRESENT),
        ({}, {"guest_smap": True}, WRITE | RSVD, PRESENT | WRITE),  # the walk is made without the reserved bit
    ],
)
def test_the_guest_gets_its_page_fault(
    target: Target, entry: dict[str, Any] | None, facts: dict[str, Any], code: int, told: int
) -> None:
    vm = guest(target, **facts).mapping(*([] if entry is None else [run_of(**entry)]))
    vm.find_mmio = lambda gpa: MmioNote.STALE  # type: ignore[method-assign]  # an MMIO entry that is out of date
    before = vm.key()
    assert vm.resolve(fault(target, code, AT + 0x1234)) == Inject("#PF", AT + 0x1234, told)
    assert isinstance(vm.resolve(fault(target, code, AT + 0x1234, PREFETCH)), Retry)
    assert vm.key() == before


# Shadow paging: what is mapped.


@pytest.mark.parametrize("target", SHADOWS, ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("entry", "facts", "code", "mapped"),
    [
        ({}, {}, READ, "rwx"),
        ({"writable": False}, {}, READ, "r-x"),
        ({"executable": False}, {}, WRITE, "rw-"),
        ({"user": False}, {}, FETCH, "rwx supervisor"),
        ({"writable": False}, {"guest_write_protect": False}, READ, "r-x"),
        ({"writable": False}, {"guest_write_protect": False}, WRITE, "rwx supervisor"),
        ({"writable": False}, {"guest_write_protect": False, "guest_smep": True}, WRITE, "rw- supervisor"),
        ({"writable": False, "user": False}, {"guest_write_protect": False}, WRITE, "rwx supervisor"),
    ],
)
def test_the_guests_rights_bound_the_entry(
    target: Target, entry: dict[str, Any], facts: dict[str, Any], code: int, mapped: str
) -> None:
    vm = guest(target, **facts).mapping(run_of(**entry))
    outcome = vm.resolve(fault(target, code, AT + 0x5678))
    prot, _, who = mapped.partition(" ")
    assert isinstance(outcome, Fixed)
    assert (outcome.size, str(outcome.prot)) == (4096, prot)
    assert rights(vm, AT + 0x5678) == (4096, prot, who != "supervisor")


def test_write_protection_that_is_off_gives_no_more_than_the_host_allows() -> None:
    target = SHADOWS[0]
    vm = guest(target, guest_write_protect=False).mapping(run_of(writable=False))
    vm.tracked.add(Gfn(GPA >> 12))
    assert isinstance(vm.resolve(fault(target, WRITE)), Emulate)
    assert rights(vm) == (4096, "r-x", False)
    vm = guest(target, guest_write_protect=False).mapping(run_of(gpa=Gpa(0), writable=False, user=False))
    assert isinstance(vm.resolve(fault(target, WRITE)), Emulate)  # no slot: the entry remembers the guest's own rights
    found = vm.table.walk(Gpa(AT))
    entry = vm.format.entry(found.desc, found.shift)
    assert (entry.kind, entry.prot) == (Kind.MMIO, 0)


@pytest.mark.parametrize("target", SHADOWS + NESTED, ids=lambda t: t.name)
@pytest.mark.parametrize(("block", "size"), [(4096, 4096), (2 * M, 2 * M), (G, G)])
def test_no_block_is_larger_than_the_guests_own(target: Target, block: int, size: int) -> None:
    vm = guest(target, "hugetlb-1g").mapping(run_of(G, block=block))
    assert isinstance(vm.resolve(fault(target, READ, AT + 0x345_6789)), Fixed)
    found = rights(vm, AT + 0x345_6789)
    assert found is not None
    assert found[0] == size
    leaf = vm.table.leaf(Gpa(AT + 0x345_6789))
    assert leaf is not None
    assert vm.format.hpa(leaf.desc, leaf.shift) % size == 0


@pytest.mark.parametrize("target", SHADOWS, ids=lambda t: t.name)
def test_without_paging_addresses_are_physical(target: Target) -> None:
    vm = guest(target, "hugetlb-1g", guest_paging=False)
    assert isinstance(vm.resolve(fault(target, READ, GPA + 0x345_6789)), Fixed)
    assert rights(vm, GPA + 0x345_6789) == (2 * M, "rwx", True)
    assert isinstance(vm.resolve(fault(target, READ, 0x1000)), Emulate)
    assert vm.notes == ((1, 0x1000),)
    assert isinstance(vm.resolve(fault(target, PRESENT | RSVD, 0x2000)), Retry)  # no entry that remembers MMIO


@pytest.mark.parametrize("paging", [True, False])
def test_only_a_direct_table_is_repaired_without_the_lock(paging: bool) -> None:
    target = SHADOWS[0]
    vm = guest(target, log_dirty=True, guest_paging=paging).mapping(
        GuestEntry(address=GPA, size=2 * M, gpa=Gpa(GPA), block=4096)
    )
    vm.resolve(fault(target, READ, GPA))
    vm.table.write_protect(Gpa(GPA), Gpa(GPA + 4096))
    run = vm.handle(fault(target, WRITE | PRESENT, GPA))
    assert isinstance(run.outcome, Fixed)
    assert [s.name for s in run.steps][-1] == ("install" if paging else "repair")


@pytest.mark.parametrize("target", SHADOWS + NESTED, ids=lambda t: t.name)
@pytest.mark.parametrize("change", [{"writable": False}, {"gpa": Gpa(GPA + 2 * M)}, {"end": WalkEnd.MISSING}])
def test_a_change_of_the_guests_tables_is_seen_under_the_lock(target: Target, change: dict[str, Any]) -> None:
    vm = guest(target, "thp").mapping(run_of())
    vm.change = GuestTables((run_of(**change),))
    run = vm.handle(fault(target, READ, AT + 0x5000))
    assert run.outcome == Retry()
    assert [s.name for s in run.steps][-1] == "prepare_page"
    assert rights(vm, AT + 0x5000) is None
    again = vm.resolve(fault(target, READ, AT + 0x5000))
    assert isinstance(again, Inject if "end" in change else Fixed)


def test_mmio_of_a_shadowed_guest_is_remembered_by_its_virtual_address() -> None:
    target = SHADOWS[0]
    vm = guest(target).mapping(run_of(gpa=Gpa(0x20_0000)))
    assert isinstance(vm.resolve(fault(target, WRITE, AT + 0x1234)), Emulate)
    vm.find_mmio = lambda gpa: MmioNote.CURRENT  # type: ignore[method-assign]  # another access came in between
    assert vm.resolve(fault(target, PRESENT | RSVD, AT + 0x1234)) == Emulate()
    assert vm.notes == ((0x201, AT + 0x1234),) * 2


# Nested paging.


@pytest.mark.parametrize("target", NESTED, ids=lambda t: t.name)
def test_without_tables_of_its_hypervisor_a_nested_guest_is_direct(target: Target) -> None:
    for vm in (guest(target, log_dirty=True), guest(target, log_dirty=True).with_facts(nested=False).mapping()):
        assert isinstance(vm.resolve(fault(target, WRITE, GPA)), Fixed)
        vm.table.write_protect(Gpa(GPA), Gpa(GPA + 4096))
        run = vm.handle(fault(target, WRITE | PRESENT, GPA))
        assert [s.name for s in run.steps][-1] == "repair"


@pytest.mark.parametrize("target", NESTED, ids=lambda t: t.name)
def test_a_nested_guest_runs_on_a_shadow(target: Target) -> None:
    vm = guest(target, "thp").mapping(run_of(writable=False, executable=False))
    assert isinstance(vm.resolve(fault(target, READ, AT + 0x1234)), Fixed)
    assert rights(vm) == (2 * M, "r--", True)
    assert isinstance(vm.resolve(fault(target, READ, AT + 0x1234)), Spurious)
    assert isinstance(vm.resolve(fault(target, WRITE | PRESENT, AT + 0x1234)), Inject)
    mmio = guest(target).mapping(run_of(gpa=Gpa(0x20_0000), writable=False))
    assert isinstance(mmio.resolve(fault(target, READ, AT + 0x1234)), Emulate)
    found = mmio.table.walk(Gpa(AT + 0x1000))
    entry = mmio.format.entry(found.desc, found.shift)
    assert entry.kind is Kind.MMIO
    assert entry.prot == (R if target.backend is NPT else 0)
    assert mmio.notes == ((0x201, None),)


def test_memory_that_only_runs() -> None:
    target = TARGETS["x86-ept", "6.12"]
    vm = guest(target).mapping(run_of(readable=False, writable=False))
    assert isinstance(vm.resolve(fault(target, FETCH)), Fixed)
    assert rights(vm) == (4096, "--x", True)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("target", NESTED, ids=lambda t: t.name)
def test_a_page_modification_log_is_not_for_nested_guests(target: Target, log: bool) -> None:
    vm = guest(target, page_modification_log=log).mapping(run_of())
    vm.resolve(fault(target, WRITE))
    leaf = vm.table.leaf(Gpa(AT))
    assert leaf is not None
    assert vm.format.entry(leaf.desc, 12).notes.count(
        "write-protected for dirty logging even with PML (maps memory for a nested guest)"
    ) == int(log)
    assert bool(vm.format.prot(vm.format.clear_dirty(leaf.desc)) & W) is not log


@pytest.mark.parametrize("target", NESTED, ids=lambda t: t.name)
@pytest.mark.parametrize(("reinjected", "expected"), [(False, Emulate()), (True, Retry())])
def test_a_write_to_a_tracked_frame(target: Target, reinjected: bool, expected: Outcome) -> None:
    vm = guest(target, event_reinjected=reinjected).mapping(run_of())
    vm.tracked.add(Gfn(GPA >> 12))
    assert vm.resolve(fault(target, WRITE | PRESENT)) == expected


VIOLATION: Final = [
    # registers, the hypervisor's entry, qualification on 6.12 and on 7.4
    (0x181, None, 0x181, 0x181),
    (0x182, None, 0x182, 0x182),
    (0x184, None, 0x184, 0x184),
    (0x183, None, 0x183, 0x182),  # a read-modify-write
    (0x081, None, 0x081, 0x081),  # made for a walk of the nested guest's tables
    (0x082, None, 0x082, 0x083),
    (0x001, None, 0x001, 0x001),  # no linear address
    (0xF9A, {"writable": False}, 0x1AA, 0xFAA),
    (0x1A2, {"writable": False, "executable": False}, 0x18A, 0x18A),
    (0x18C, {"executable": False}, 0x19C, 0x19C),
    (0x181, {"readable": False, "writable": False}, 0x1A1, 0x1A1),
    (0x181, {"end": WalkEnd.MISSING, "readable": False, "writable": False, "executable": False}, 0x181, 0x181),
    (0x181, {"end": WalkEnd.UNREADABLE, "writable": False}, 0x1A9, 0x1A9),
]


@pytest.mark.parametrize(("qualification", "entry", "old", "new"), VIOLATION)
def test_a_nested_ept_violation(qualification: int, entry: dict[str, Any] | None, old: int, new: int) -> None:
    for kernel, expected in (("6.12", old), ("7.4", new)):
        target = TARGETS["x86-ept", kernel]
        vm = guest(target).mapping(*([] if entry is None else [run_of(**entry)]))
        registers = {"EXIT_QUALIFICATION": qualification, "GUEST_PHYSICAL_ADDRESS": AT + 0x678}
        assert vm.resolve(target.decode(**registers)) == Inject("ept_violation", AT + 0x678, expected)
        assert isinstance(vm.resolve(target.decode(**registers, KVM=PREFETCH)), Retry)


@pytest.mark.parametrize("end", [WalkEnd.RESERVED, WalkEnd.ADDRESS_SIZE])
@pytest.mark.parametrize("kernel", ["6.12", "7.4"])
def test_a_nested_ept_misconfiguration(end: WalkEnd, kernel: str) -> None:
    target = TARGETS["x86-ept", kernel]
    vm = guest(target).mapping(run_of(end=end))
    assert vm.resolve(fault(target, WRITE, AT + 8)) == Inject("ept_misconfig", AT + 8, 0)
    assert isinstance(vm.resolve(fault(target, WRITE, AT + 8, PREFETCH)), Retry)


def test_a_stale_mmio_entry_whose_nested_tables_changed() -> None:
    # a misconfiguration exit tells no access; the newer kernel calls it a read
    for kernel, expected in (("6.12", 0), ("7.4", 1)):
        target = TARGETS["x86-ept", kernel]
        vm = guest(target).mapping()
        vm.find_mmio = lambda gpa: MmioNote.STALE  # type: ignore[method-assign]  # slots changed since
        assert vm.resolve(fault(target, RSVD)) == Inject("ept_violation", AT, expected)
        assert ept_qualification(fault(target, RSVD), R | W | X, later=False) == 0x38


FINAL, WALK, ENC = 1 << 32, 1 << 33, 1 << 34
NPF: Final = [
    # EXITINFO1, the hypervisor's entry and its modes, what it gets on 6.12 and on 7.4
    (FINAL | 4, None, {}, FINAL | 4, FINAL | 4),
    (WALK | 7, None, {}, WALK | 6, WALK | 6),
    (FINAL | 0x14, None, {}, FINAL | 0x14, FINAL | 0x14),
    (FINAL | 0x14, None, {"guest_no_execute": False}, FINAL | 4, FINAL | 4),
    (FINAL | 6, {"writable": False}, {}, FINAL | 7, FINAL | 7),
    (FINAL | 0x15, {"executable": False}, {}, FINAL | 0x15, FINAL | 0x15),
    (FINAL | 4, {"user": False}, {}, FINAL | 5, FINAL | 5),
    (FINAL | 6, {"end": WalkEnd.RESERVED}, {}, FINAL | 0xF, FINAL | 0xF),
    (FINAL | ENC | 0x8000_0044, None, {}, FINAL | ENC | 4, FINAL | 4),
]


@pytest.mark.parametrize(("code", "entry", "facts", "old", "new"), NPF)
def test_a_nested_npf(code: int, entry: dict[str, Any] | None, facts: dict[str, Any], old: int, new: int) -> None:
    for kernel, expected in (("6.12", old), ("7.4", new)):
        target = TARGETS["x86-npt", kernel]
        vm = guest(target, **facts).mapping(*([] if entry is None else [run_of(**entry)]))
        assert vm.resolve(target.decode(EXITINFO1=code, EXITINFO2=AT + 0x678)) == Inject("npf", AT + 0x678, expected)
        prefetch = target.decode(EXITINFO1=code, EXITINFO2=AT + 0x678, KVM=PREFETCH)
        assert isinstance(vm.resolve(prefetch), Retry)
        assert not vm.warnings


def test_an_npf_of_no_stage_is_called_final() -> None:
    for code in (4, FINAL | WALK | 4):
        target = TARGETS["x86-npt", "7.4"]
        vm = guest(target).mapping()
        assert vm.resolve(target.decode(EXITINFO1=code, EXITINFO2=AT)) == Inject("npf", AT, FINAL | 4)
        assert len(vm.warnings) == 1
        old = TARGETS["x86-npt", "6.12"]
        vm = guest(old).mapping()
        assert vm.resolve(old.decode(EXITINFO1=code, EXITINFO2=AT)) == Inject("npf", AT, code)
