"""The powerpc backend: what each register says, and each turn of kvmppc_book3s_radix_page_fault, in its order."""

from __future__ import annotations

from errno import EFAULT
from typing import Final

import pytest

from arch.powerpc.instruction import CacheOp, LoadStore, decode, is_store
from arch.powerpc.paste import paste
from arch.powerpc.radix import FORMATS
from arch.powerpc.unusual import unusual
from kvmfault.contract.access import Cause
from kvmfault.contract.format import Kind, Memory, R, W, X
from kvmfault.contract.outcome import Done, Error, Exit, Inject, MmioAccess, Outcome, Reason, Resume, Retry, fixed
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, PinError, WalkEnd
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import backend
from kvmfault.types import Gfn, Gpa, Hpa, Hva
from tests.worlds import HVA, Watched, fault, leaf, world

PPC: Final = "powerpc:4k"
NOHPTE, NOEXEC, PROTFAULT, BADACCESS, ISSTORE = 1 << 30, 1 << 28, 1 << 27, 1 << 26, 1 << 25
UNSUPP_MMU, SET_RC, PRTABLE = 1 << 19, 1 << 18, 1 << 17
GPA, DEVICE, K, M2 = 0x4000_0000, 0x900_0000, 4096, 2 << 20
LWZ, LHA, STD, LMW, DCBF = 32 << 26 | 3 << 21, 42 << 26 | 3 << 21, 62 << 26 | 3 << 21, 46 << 26, 31 << 26 | 86 << 1
LWBRX, STWX, LWZU = 31 << 26 | 3 << 21 | 534 << 1, 31 << 26 | 31 << 21 | 151 << 1, 33 << 26 | 3 << 21 | 4 << 16
EA: Final = 0xC000_0000_0000_0000
"""Effective addresses of the tests begin here."""


def interrupt(dsisr: int, gpa: int = GPA, *, trap: int = 0xE00, **more: int) -> Raw:
    page = gpa & -K
    return backend(PPC).decode(TRAP=trap, HDSISR=dsisr, HDAR=EA | gpa, ASDR=0xF << 60 | page | 0x123, **more)


def ram(**more: object) -> Watched:
    hva = HVA & (1 << 46) - 1  # user space of a host with 4K pages has 64T
    vm = Watched(backend(PPC))
    vm.add_memslot(0, gpa=GPA, size=1 << 26, hva=hva, readonly=bool(more.pop("readonly", False)))
    backing = more.pop("backing", "anon")
    assert not more
    return vm.back(hva, 1 << 26, backing) if isinstance(backing, str) else vm


# What the registers say.

FACTS: Final = {
    "a load": (NOHPTE, 0xE00, {"is_read", "is_translation", "is_final"}),
    "a store": (NOHPTE | ISSTORE, 0xE00, {"is_write", "is_translation", "is_final"}),
    "a fetch": (NOHPTE, 0xE20, {"is_exec", "is_translation", "is_final"}),
    "a fetch that writes": (NOHPTE | ISSTORE, 0xE20, {"is_exec", "is_write", "is_translation", "is_final"}),
    "forbidden": (PROTFAULT | ISSTORE, 0xE00, {"is_write", "is_permission", "is_final"}),
    "set R": (SET_RC, 0xE00, {"is_read", "is_access_flag", "is_final"}),
    "set C": (SET_RC | ISSTORE, 0xE00, {"is_write", "is_access_flag", "is_final"}),
    "the guest's tables": (PRTABLE | NOHPTE, 0xE00, {"is_read", "is_translation", "is_table_walk"}),
    "the guest's tables, for a fetch": (PRTABLE | NOHPTE, 0xE20, {"is_read", "is_translation", "is_table_walk"}),
    "a key": (1 << 21, 0xE00, {"is_read", "is_protection_key", "is_final"}),
    "unsupported": (UNSUPP_MMU, 0xE00, {"is_read", "is_reserved", "is_final"}),
}  # fmt: skip


@pytest.mark.parametrize(("dsisr", "trap", "true"), FACTS.values(), ids=FACTS)
def test_facts(dsisr: int, trap: int, true: set[str]) -> None:
    found = interrupt(dsisr, GPA | 0x18, trap=trap)
    answers = backend(PPC).answers(found)
    given = {"mmio_wide", "gpa_valid", "gva_valid", "gpa_offset_valid"}
    assert {name for name, answer in answers.items() if answer is True} - given == true
    assert found.kvm_get_fault_gpa() == GPA  # the top nibble and the low 12 bits of ASDR are cleared
    assert found.gpa_offset == (None if "is_table_walk" in true else 0x18)
    assert found.gva == EA | GPA | 0x18


def test_every_load_and_store_of_one_register_is_described_or_decoded() -> None:
    target = backend(PPC)
    described = 0
    for opcode in range(64):
        for low in range(4) if opcode != 31 else range(0, 2048, 2):
            word = opcode << 26 | 31 << 21 | 4 << 16 | low
            found = decode(word)
            told = interrupt(NOHPTE, INST=word)
            assert target.answers(told)["is_cache_op"] is isinstance(found, CacheOp)
            if told.mmio_size is not None:
                described += 1
                assert isinstance(found, LoadStore)
                assert (found.size, found.register, found.sign_extend) == (told.mmio_size, 31, told.mmio_sign_extend)
                assert told.mmio_register == 31
                assert (found.update, found.reverse) == (False, False)
            if isinstance(found, LoadStore):
                assert is_store(word) is found.store
    assert described == 7 * 4 + 2  # seven D forms, whose last bits are part of the displacement; ld and std


INSTRUCTIONS: Final = {
    LWZ: LoadStore(4, False, 3),
    LHA: LoadStore(2, False, 3, True),
    STD: LoadStore(8, True, 3),
    58 << 26 | 2: LoadStore(4, False, 0, True),
    58 << 26 | 5 << 21 | 6 << 16 | 1: LoadStore(8, False, 5, update=True),
    LWZU: LoadStore(4, False, 3, update=True),
    LWBRX: LoadStore(4, False, 3, reverse=True),
    STWX: LoadStore(4, True, 31),
    31 << 26 | 341 << 1: LoadStore(4, False, 0, True),
    31 << 26 | 3 << 21 | 4 << 16 | 373 << 1: LoadStore(4, False, 3, True, update=True),
    31 << 26 | 1014 << 1: CacheOp(),
    LMW: None,
    33 << 26 | 4 << 21 | 4 << 16: None,  # lwzu r4, 0(r4)
    37 << 26 | 4 << 21 | 4 << 16: LoadStore(4, True, 4, update=True),
    37 << 26 | 4 << 21: None,  # stwu r4, 0(0)
    62 << 26 | 2: None,  # stq
    0: None,
}


@pytest.mark.parametrize(("word", "found"), INSTRUCTIONS.items(), ids=[hex(word) for word in INSTRUCTIONS])
def test_instructions(word: int, found: LoadStore | CacheOp | None) -> None:
    assert decode(word) == found


# kvmppc_book3s_radix_page_fault, from its head to its end.


def dsi(dsisr: int, gpa: int) -> Inject:
    return Inject("dsi", EA | gpa, dsisr)


DECISIONS: Final[dict[str, tuple[int, int, dict[str, int], Outcome]]] = {
    "the canary": (0x7FFF, GPA, {}, Retry()),
    "unsupported before bad access": (UNSUPP_MMU | BADACCESS, GPA, {}, Error(EFAULT)),
    "bad access": (BADACCESS | NOHPTE, GPA, {}, dsi(BADACCESS | NOHPTE, GPA)),
    "bad access, where no slot is": (BADACCESS, DEVICE, {}, dsi(BADACCESS, DEVICE)),
    "the guest's tables, where no slot is": (PRTABLE | NOHPTE, DEVICE, {}, dsi(PRTABLE | NOHPTE, DEVICE)),
    "set R, where no slot is": (SET_RC, DEVICE, {}, dsi(SET_RC, DEVICE)),
    "the guest's tables in memory": (PRTABLE | NOHPTE, GPA, {}, fixed(K, R | W | X)),
    "a load": (NOHPTE, GPA, {}, fixed(K, R | W | X)),
    "set R without an entry": (SET_RC, GPA, {}, fixed(K, R | W | X)),
    "a device load": (
        NOHPTE, DEVICE | 8, {"INST": LWZ}, Exit(Reason.MMIO, MmioAccess(Gpa(DEVICE | 8), 4, False)),
    ),
    "a device store": (
        NOHPTE | ISSTORE, DEVICE, {"INST": STD}, Exit(Reason.MMIO, MmioAccess(Gpa(DEVICE), 8, True, bytes(8))),
    ),
    "the instruction loads, the fault was a store": (NOHPTE | ISSTORE, DEVICE, {"INST": LWZ}, Retry()),
    "the instruction stores, the fault was a load": (NOHPTE, DEVICE, {"INST": STWX}, Retry()),
    "a cache operation": (NOHPTE, DEVICE, {"INST": DCBF}, Resume(Done.SKIPPED)),
    "a load of two registers": (NOHPTE, DEVICE, {"INST": 56 << 26}, dsi(BADACCESS, DEVICE)),
    "lmw, which the quick test takes for a store": (NOHPTE, DEVICE, {"INST": LMW}, Retry()),
    "not given": (NOHPTE | ISSTORE, DEVICE, {}, dsi(BADACCESS | ISSTORE, DEVICE)),
}  # fmt: skip


@pytest.mark.parametrize(("dsisr", "gpa", "more", "outcome"), DECISIONS.values(), ids=DECISIONS)
def test_decisions(dsisr: int, gpa: int, more: dict[str, int], outcome: Outcome) -> None:
    assert ram().resolve(interrupt(dsisr, gpa, **more)) == outcome


def test_a_fetch_of_what_is_not_there_never_ends() -> None:
    assert ram().resolve(interrupt(NOHPTE, DEVICE, trap=0xE20)) == Retry()
    assert ram().access(DEVICE, 4, fetch=True).ended.name == "STUCK"


def test_a_store_to_a_read_only_slot_is_the_guests_mistake() -> None:
    vm = ram(readonly=True)
    assert vm.resolve(interrupt(NOHPTE | ISSTORE)) == dsi(ISSTORE | PROTFAULT, GPA)
    assert vm.resolve(interrupt(NOHPTE)) == fixed(K, R | X)
    assert vm.resolve(interrupt(SET_RC | ISSTORE)) == dsi(ISSTORE | PROTFAULT, GPA)  # the slot is looked at first


def test_reference_and_change_bits_are_set_for_the_hardware() -> None:
    vm = ram().with_facts(hardware_access_dirty=False)
    vm.resolve(interrupt(NOHPTE))
    fmt, table = vm.format, vm.table
    cleared = fmt.clear_dirty(fmt.with_young(table.walk(Gpa(GPA)).desc, False))
    for dsisr, dirty in ((SET_RC, False), (SET_RC | ISSTORE, True)):
        table.put(Gpa(GPA), K, cleared)
        vm.events.clear()
        assert vm.resolve(interrupt(dsisr)) == fixed(K, R | W | X)
        desc = table.walk(Gpa(GPA)).desc
        assert (fmt.is_young(desc), fmt.is_dirty(desc)) == (True, dirty)
        assert not any(event.startswith("map ") for event in vm.events)
    table.put(Gpa(GPA), K, cleared)
    vm.resolve(interrupt(SET_RC | NOHPTE))  # another cause with it: an entry is made all the same
    assert any(event.startswith("map ") for event in vm.events)


@pytest.mark.parametrize("error", [e for e in PinError if e not in (PinError.WAITS, PinError.NEEDS_IO)])
def test_every_error_of_the_host_is_efault(error: PinError) -> None:
    vm = ram()
    vm.answers["pin"] = error
    assert vm.resolve(interrupt(NOHPTE)) == Error(EFAULT)
    assert vm.signals == ()


@pytest.mark.parametrize(
    ("gpa", "hva", "backing", "fmt", "size"),
    [
        (GPA, HVA, "thp", "64k", M2),
        (GPA, HVA, "hugetlb-1g", "64k", 1 << 30),
        (GPA + M2, HVA, "hugetlb-1g", "64k", 1 << 16),  # not congruent by 1G: a page, and not 2M
        (GPA + (1 << 16), HVA, "thp", "64k", 1 << 16),
        (GPA, HVA & (1 << 46) - 1, "thp", "4k", M2),
    ],
)
def test_the_block_of_the_host_or_a_page(gpa: int, hva: int, backing: str, fmt: str, size: int) -> None:
    vm = world(f"powerpc:{fmt}", backing, gpa=gpa, hva=hva)
    at = gpa + 0x50_0000
    assert vm.resolve(fault(f"powerpc:{fmt}", "write", at)) == fixed(size, R | W | X)
    found = leaf(vm, at)
    assert found is not None
    assert found[:2] == (at & -size, size)
    mapped = vm.table.walk(Gpa(at))
    slot = vm.find_slot(Gfn(at >> vm.page_shift))
    assert slot is not None
    host = vm.host.pin(slot.hva_of(Gfn(at >> vm.page_shift)), write=False).pfn
    assert host is not None
    assert vm.format.hpa(mapped.desc, mapped.shift) >> vm.page_shift == host & -(size >> vm.page_shift)


def test_a_block_may_reach_out_of_its_slot() -> None:
    vm = Watched(backend("powerpc"))
    vm.add_memslot(0, gpa=GPA, size=1 << 16, hva=HVA).back(HVA, M2, "thp")
    assert vm.resolve(fault("powerpc", "read", GPA)) == fixed(M2, R | W | X)


def test_a_fetch_may_write() -> None:
    target = backend(PPC)
    fetch = interrupt(NOHPTE | ISSTORE, trap=0xE20)
    assert target.backend.reachable.on(target.named(fetch) | {"INST": 0})
    assert target.backend.fetch_writes.on(target.named(fetch))
    assert ram().resolve(fetch) == fixed(K, R | W | X)
    assert ram(readonly=True).resolve(fetch) == Inject("dsi", EA | GPA, ISSTORE | PROTFAULT)
    access = target.access(fetch)
    assert (access.write, access.exec, access.read) == (True, True, False)
    again = target.encode(access)
    assert target.access(again.fault) == access


def test_logging_drops_what_is_mapped_at_both_ends_and_collects_change_bits() -> None:
    vm = world("powerpc", "thp")
    hva = HVA
    assert vm.access(GPA, write=True).ended.name == "DONE"
    vm.add_memslot(0, gpa=GPA, size=1 << 30, hva=hva, log_dirty=True)
    assert leaf(vm, GPA) is None
    assert vm.get_dirty_log(0).pages == ()
    vm.access(GPA + (3 << 16))  # a read maps it writable and dirty
    assert leaf(vm, GPA + (3 << 16)) == (GPA + (3 << 16), 1 << 16, "rwx")
    assert vm.get_dirty_log(0).pages == (3,)
    assert vm.get_dirty_log(0).pages == ()
    assert vm.access(GPA + (3 << 16), write=True).faults == ()  # the CPU sets the bit
    assert vm.get_dirty_log(0).pages == (3,)
    vm.add_memslot(0, gpa=GPA, size=1 << 30, hva=hva)
    assert leaf(vm, GPA) is None
    vm.access(GPA)
    assert leaf(vm, GPA) == (GPA, M2, "rwx")


@pytest.mark.parametrize(("target", "told"), [("powerpc", (3,)), ("s390", ())])
def test_what_an_entry_knows_of_writes_is_in_the_log_before_it_goes(target: str, told: tuple[int, ...]) -> None:
    # kvmppc_unmap_pte marks; _gmap_unmap_pte leaves an empty entry, and its soft dirty bit is gone
    vm = world(target, log_dirty=True)
    at = GPA + (3 << vm.page_shift)
    assert vm.access(at, write=True).ended.name == "DONE"
    vm.invalidate(vm.host.migrate(Hva(HVA + (3 << vm.page_shift))))
    assert leaf(vm, at) is None
    assert vm.get_dirty_log(0).pages == told


STORE: Final = NOHPTE | ISSTORE
MISSING: Final = GuestWalkFault(end=WalkEnd.MISSING)
READ_ONLY: Final = GuestTranslation(Gpa(GPA), K, writable=False)
NO_SLOT: Final = GuestTranslation(Gpa(DEVICE), K)
NESTED: Final[dict[str, tuple[int, GuestTranslation | GuestWalkFault, int, Outcome]]] = {
    "not mapped": (NOHPTE, MISSING, 0xE00, Inject("hdsi", EA | GPA, NOHPTE)),
    "a store to what is not mapped": (STORE, MISSING, 0xE00, Inject("hdsi", EA | GPA, STORE)),
    "a fetch of what is not mapped": (NOHPTE, MISSING, 0xE20, Inject("hisi", EA | GPA, NOHPTE)),
    "unreadable": (NOHPTE, GuestWalkFault(end=WalkEnd.UNREADABLE), 0xE00, Inject("hdsi", EA | GPA, PRTABLE)),
    "malformed": (NOHPTE, GuestWalkFault(end=WalkEnd.RESERVED), 0xE00, Inject("hdsi", EA | GPA, UNSUPP_MMU)),
    "read-only": (STORE, READ_ONLY, 0xE00, Inject("hdsi", EA | GPA, ISSTORE | PROTFAULT)),
    "not executable": (
        NOHPTE, GuestTranslation(Gpa(GPA), K, executable=False), 0xE20, Inject("hisi", EA | GPA, NOEXEC),
    ),
    "mapped": (NOHPTE, READ_ONLY, 0xE00, fixed(K, R | X)),
    "hardware found more": (PROTFAULT | ISSTORE, READ_ONLY, 0xE00, Retry()),
    "hardware found an entry that is gone": (PROTFAULT, MISSING, 0xE00, Retry()),
    "hardware found an entry for no fetch": (NOEXEC, MISSING, 0xE20, Retry()),
    "hardware refused the kind of access": (BADACCESS, MISSING, 0xE00, Retry()),
    "no slot": (PRTABLE, NO_SLOT, 0xE00, Inject("dsi", EA | GPA, PRTABLE)),
    "no slot, and never allowed": (BADACCESS, NO_SLOT, 0xE00, Inject("dsi", EA | GPA, BADACCESS)),
    "no slot, and no reference bit": (SET_RC, NO_SLOT, 0xE00, Retry()),
    "malformed, of the hardware": (UNSUPP_MMU, READ_ONLY, 0xE00, fixed(K, R | X)),
}  # fmt: skip


def test_a_nested_guest_gets_the_interrupt_for_a_read_only_slot_itself() -> None:
    vm = ram(readonly=True).with_facts(nested=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), K)
    assert vm.resolve(interrupt(STORE)) == Inject("dsi", EA | GPA, ISSTORE | PROTFAULT)


@pytest.mark.parametrize(("dsisr", "walked", "trap", "outcome"), NESTED.values(), ids=NESTED)
def test_nested(dsisr: int, walked: GuestTranslation | GuestWalkFault, trap: int, outcome: Outcome) -> None:
    vm = ram().with_facts(nested=True)
    vm.answers["walk_guest"] = walked
    assert vm.resolve(interrupt(dsisr, trap=trap)) == outcome


# Device accesses.


@pytest.mark.parametrize(
    ("word", "big", "bus", "loaded"),
    [
        (LWZ, False, 0x8000_0001, 0x8000_0001),
        (LWZ, True, 0x0102_0304, 0x0403_0201),
        (LHA, False, 0x8000, 0xFFFF_FFFF_FFFF_8000),
        (LHA, True, 0x0080, 0xFFFF_FFFF_FFFF_8000),
        (LWBRX, False, 0x0102_0304, 0x0403_0201),
        (LWBRX, True, 0x0102_0304, 0x0102_0304),
        (58 << 26 | 2, False, 0x8000_0000, 0xFFFF_FFFF_8000_0000),
    ],
)
def test_loads(word: int, big: bool, bus: int, loaded: int) -> None:
    left = ram().with_facts(big_endian=big).resolve(interrupt(NOHPTE, DEVICE, INST=word))
    assert isinstance(left, Exit)
    assert left.completion is not None
    assert left.completion.finish(bus) == loaded


@pytest.mark.parametrize(
    ("word", "big", "data"), [(STWX, False, "44332211"), (STWX, True, "11223344"), (STD, True, "0000000011223344")]
)
def test_stores(word: int, big: bool, data: str) -> None:
    vm = ram().with_facts(big_endian=big)
    vm.vcpu.registers = (0x1122_3344,) * 32  # r31 is a register like any other
    left = vm.resolve(interrupt(NOHPTE | ISSTORE, DEVICE, INST=word))
    assert isinstance(left, Exit)
    assert isinstance(left.detail, MmioAccess)
    assert left.detail.data.hex() == data


def test_r31_is_no_zero_register() -> None:
    left = ram().resolve(interrupt(NOHPTE, DEVICE, INST=LWZ | 31 << 21))
    assert isinstance(left, Exit)
    assert left.completion is not None
    assert left.completion.finish(5) == 5


# Entries.


def test_entries_as_linux_has_them() -> None:
    fmt = FORMATS["64k"]
    page = fmt.leaf(16, Hpa(0x1_2345_0000), R | W | X, Memory.NORMAL, young=True, host_writable=True, tag=0)
    assert page == 0xC000_0001_2345_0187
    assert fmt.leaf(21, Hpa(M2), R | X, Memory.DEVICE, young=True, host_writable=False, tag=0) == 0xC000_0000_0020_0125
    assert fmt.table(Hpa(0x8000), 21) == 0x8000_0000_0000_8005
    assert fmt.table(Hpa(0x8000), 30) == 0x8000_0000_0000_8009
    assert fmt.entry(0x8000_0000_0000_8009, 21).notes == ("the next table is indexed by 9 bits; here it has 5",)
    assert fmt.entry(page, 16).dirty
    assert fmt.kind(page, 39) is Kind.EMPTY
    assert fmt.kind(1 << 63, 16) is Kind.EMPTY
    assert [fmt.gpa_bits for fmt in FORMATS.values()] == [52, 52]


def test_only_reads_may_be_refused_by_a_racing_invalidation() -> None:
    vm = ram()
    vm.meanwhile["lock"] = lambda now: now.invalidations.begin()
    assert vm.resolve(interrupt(NOHPTE)) == Retry()


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("KVM: Got radix HV page fault with DSISR=46000000", {"HDSISR": 0x4600_0000}),
        ("fault_dsisr: 0x42000000 fault_dar: 0xc000000000001000 fault_gpa: 0x1000",
         {"HDSISR": 0x4200_0000, "HDAR": EA | 0x1000, "ASDR": 0x1000}),
        ("trap=0xe20 pc=0xc000000000001000 hsrr1=0x0800000048010000",
         {"TRAP": 0xE20, "HDAR": EA | 0x1000, "HDSISR": 0x4A00_0000}),
        ("trap=0x500 dsisr=0x42000000", None),
        ("dsisr=0x142000000", None),
        ("x" * 20_000 + " dsisr=0", None),
        ("", None),
    ],
)  # fmt: skip
def test_paste(line: str, registers: dict[str, int] | None) -> None:
    assert paste(line) == registers


def test_what_is_odd() -> None:
    target = backend(PPC)

    def notes(**registers: int) -> str:
        return "; ".join(unusual(target.named(target.decode(**registers))))

    assert notes(HDSISR=NOHPTE) == ""
    assert "the CPU wrote nothing" in notes(HDSISR=0x7FFF)
    assert "a fetch that writes" in notes(TRAP=0xE20, HDSISR=NOHPTE | ISSTORE)
    assert "none that an instruction storage interrupt has" in notes(TRAP=0xE20, HDSISR=BADACCESS)
    assert "load of 4 bytes, register 3, bytes reversed" in notes(HDSISR=NOHPTE, INST=LWBRX)
    assert "exclude each other" in notes(HDSISR=NOHPTE | PROTFAULT)
    assert "no hypervisor storage interrupt" in notes(TRAP=0x300)


def test_an_old_entry_without_hardware_reference_bits_faults() -> None:
    vm = ram().with_facts(hardware_access_dirty=False)
    vm.access(GPA)
    fmt = vm.format
    vm.table.put(Gpa(GPA), K, fmt.with_young(vm.table.walk(Gpa(GPA)).desc, False))
    vm.vcpu.tlb.flush_all()
    run = vm.access(GPA)
    assert len(run.faults) == 1
    assert fmt.is_young(vm.table.walk(Gpa(GPA)).desc)
    assert backend(PPC).encode(backend(PPC).access(interrupt(SET_RC))).fault.is_access_flag
    assert backend(PPC).access(interrupt(SET_RC)).cause is Cause.ACCESS_FLAG
