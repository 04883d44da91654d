"""LoongArch: what an exit says, and what KVM does with it, against the kernel's sequence of tests."""

from __future__ import annotations

from collections.abc import Mapping
from errno import ENOMEM
from itertools import product
from typing import Final

import pytest

from arch.loongarch.facts import REACHABLE
from arch.loongarch.gpt import DIRTY, FORMATS, HUGE, PRESENT, VALID, WRITE, WRITEABLE
from arch.loongarch.instructions import Decoded, decode, instruction
from kvmfault.algebra.expr import NEVER, Pred
from kvmfault.algebra.prove import relate
from kvmfault.contract.format import Kind, Memory, R, W, X
from kvmfault.contract.outcome import Emulate, Exit, Fixed, Inject, MmioAccess, Spurious, fixed
from kvmfault.contract.ports import PinError
from kvmfault.contract.target import backend
from kvmfault.decode import one_line
from kvmfault.machine.vm import Vm
from kvmfault.types import Gpa, Hpa, Hva
from tests.worlds import GPA, HVA, fault, leaf, world

LOONG: Final = backend("loongarch:4k")
PIL, PIS, PIF, PME, PNR, PNX, PPI = range(1, 8)
DEVICE: Final = 0x0900_0000
LD_W, LD_BU, LD_D, ST_B, ST_D = 0x2880_0000, 0x2A00_0000, 0x28C0_0000, 0x2900_0000, 0x29C0_0000
LDX_W, LDX_HU, STX_D, LDPTR_W, LDPTR_D, STPTR_W = (
    0x3808_0000, 0x3824_0000, 0x381C_0000, 0x2400_0000, 0x2600_0000, 0x2500_0000,
)  # fmt: skip
VLD, AMSWAP_W = 0x2C00_0000, 0x3860_0000


def registers(code: int, gpa: int, badi: int = 0, **more: int) -> dict[str, int]:
    return {"ESTAT": code << 16, "BADV": gpa, "BADI": badi, **more}


# What an exit says.


@pytest.mark.parametrize(
    ("code", "kinds", "cause"),
    [
        (PIL, "read", "MISSING"),
        (PIS, "write", "MISSING"),
        (PIF, "exec", "MISSING"),
        (PME, "write", "PERMISSION"),
        (PNR, "read", "PERMISSION"),
        (PNX, "exec", "PERMISSION"),
        (PPI, "", "PERMISSION"),
        (0xB, "", "OTHER"),
    ],
)
def test_what_codes_say(code: int, kinds: str, cause: str) -> None:
    found = LOONG.access(LOONG.decode(**registers(code, GPA + 6)))
    assert " ".join(name for name in ("read", "write", "exec") if getattr(found, name)) == kinds
    assert found.cause is not None
    assert (found.cause.name, found.gpa, found.offset, found.gva) == (cause, GPA, 6, None)


def test_the_virtual_address_is_known_of_a_fetch_alone() -> None:
    for code in range(1, 8):
        found = LOONG.access(LOONG.decode(**registers(code, GPA, PC=0x1_2000_0000)))
        assert (found.gva is not None) is bool(found.exec), code


def truth(name: str) -> Pred:
    found = getattr(LOONG.definition, name)
    assert isinstance(found, Pred)
    return found


def test_laws() -> None:
    kinds = [truth(name) for name in ("is_read", "is_write", "is_exec")]
    for a, b in product(kinds, kinds):
        assert a is b or relate(a, b).disjoint
    assert relate(kinds[0] | kinds[1] | kinds[2], NEVER, REACHABLE).neither == 0
    assert relate(truth("is_translation"), ~truth("is_permission"), REACHABLE).equal


# Instructions.


@pytest.mark.parametrize(
    ("word", "write", "found"),
    [
        (LD_W | 5, False, Decoded(4, True, 5)),
        (LD_BU | 31, False, Decoded(1, False, 31)),
        (LD_D | 0xFFF << 10 | 9, False, Decoded(8, True, 9)),
        (LDX_W | 7, False, Decoded(4, True, 7)),
        (LDX_HU | 7, False, Decoded(2, False, 7)),
        (LDPTR_W | 0x3FFF << 10 | 1, False, Decoded(4, True, 1)),
        (LDPTR_D, False, Decoded(8, True, 0)),
        (ST_B | 3, True, Decoded(1, True, 3)),
        (STX_D | 3, True, Decoded(8, True, 3)),
        (STPTR_W | 3, True, Decoded(4, True, 3)),
        (ST_B, False, None),
        (LD_W, True, None),
        (VLD, False, None),
        (AMSWAP_W, True, None),
        (0x2AC0_0000, False, None),  # preld: ld.du does not exist
        (0, False, None),
    ],
)
def test_instructions(word: int, write: bool, found: Decoded | None) -> None:
    assert decode(word, write=write) == found


def naive(word: int) -> tuple[int, bool, bool] | None:
    """(bytes, load extends, store) by the three switches of kvm_emu_mmio_read and _write, over opcodes of inst.h."""
    op8, op10, op17 = word >> 24, word >> 22, word >> 15
    if 0x24 <= op8 <= 0x27:
        return {0x24: (4, True, False), 0x25: (4, True, True), 0x26: (8, True, False), 0x27: (8, True, True)}[op8]
    if 0x28 <= op8 <= 0x2E:
        size = 1 << (op10 & 3)
        group = {0x28: (size, True, False), 0x29: (size, True, True), 0x2A: (size, False, False)}.get(op8)
        return None if group == (8, False, False) else group
    if op8 == 0x38 and op17 & 7 == 0:
        number = op17 - 0x7000 >> 3
        size = 1 << (number & 3)
        group = {0: (size, True, False), 1: (size, True, True), 2: (size, False, False)}.get(number >> 2)
        return None if group == (8, False, False) else group
    return None


def test_every_opcode_is_decoded_as_the_kernel_does() -> None:
    known = 0
    for opcode in range(1 << 17):
        wanted = naive(opcode << 15)
        for write in (False, True):
            got = decode(opcode << 15, write=write)
            if wanted is None or wanted[2] is not write:
                assert got is None, hex(opcode)
            else:
                known += 1
                assert got == (wanted[0], wanted[1], 0), hex(opcode)
    assert known == 4 * 512 + 11 * 128 + 11


@pytest.mark.parametrize(("size", "signed", "write"), [*product((1, 2, 4, 8), (False, True), (False, True))])
def test_made_instructions_are_decoded_again(size: int, signed: bool, write: bool) -> None:
    found = decode(instruction(size, 17, write=write, signed=signed), write=write)
    assert found is not None
    assert (found.size, found.register) == (size, 17)
    assert write or size == 8 or found.signed is signed


# What KVM does.


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        (registers(PNR, GPA), Inject("ine", 0, 0xD)),
        (registers(PNX, GPA), Inject("ine", 0, 0xD)),
        (registers(PPI, GPA), Inject("ine", 0, 0xD)),
        (registers(PIL, 1 << 47), Inject("adem", 1 << 47, 8)),
        (registers(PIF, 1 << 50, PC=1 << 50), Inject("adem", 1 << 50, 8)),  # before anyone asks what it was
        (registers(PIF, DEVICE, PC=DEVICE), Inject("adef", DEVICE, 8)),
        (registers(PIF, DEVICE, LD_W, PC=0x1_2000_0000), Exit),  # PC differs: decoded as a load
        (registers(PIF, DEVICE, 0, PC=0x1_2000_0000), Inject("adem", DEVICE, 8)),
        (registers(PIF, DEVICE, LD_W), Emulate),  # PC not captured: either may be
        (registers(PIL, DEVICE, VLD), Inject("adem", DEVICE, 8)),
        (registers(PIL, DEVICE, ST_B), Inject("adem", DEVICE, 8)),
        (registers(PIS, DEVICE, LD_W), Inject("adem", DEVICE, 8)),
        (registers(PME, DEVICE, ST_B), Exit),
        (registers(PIL, DEVICE + 1, LD_W), Exit),  # nobody looks at the alignment
    ],
)
def test_outside_of_memory(given: Mapping[str, int], outcome: object) -> None:
    got = world("loongarch:4k").resolve(LOONG.decode(**given))
    assert got == outcome or type(got) is outcome


@pytest.mark.parametrize(
    ("code", "badi", "access", "answer", "loaded"),
    [
        (PIL, LD_W | 5, MmioAccess(Gpa(DEVICE), 4, False), 0x8000_0000, 0xFFFF_FFFF_8000_0000),
        (PIL, LD_BU | 5, MmioAccess(Gpa(DEVICE), 1, False), 0x80, 0x80),
        (PIL, LD_D | 31, MmioAccess(Gpa(DEVICE), 8, False), 1 << 63, 1 << 63),
        (PIL, LD_W, MmioAccess(Gpa(DEVICE), 4, False), 7, None),  # r0
        (PIS, ST_B | 31, MmioAccess(Gpa(DEVICE), 1, True, b"\x1f"), 0, None),
        (PIS, ST_D, MmioAccess(Gpa(DEVICE), 8, True, bytes(8)), 0, None),  # r0
    ],
)
def test_device_accesses(code: int, badi: int, access: MmioAccess, answer: int, loaded: int | None) -> None:
    vm = world("loongarch:4k")
    vm.vcpu.registers = tuple(range(32))
    left = vm.resolve(LOONG.decode(**registers(code, DEVICE, badi)))
    assert isinstance(left, Exit)
    assert left.detail == access
    assert left.completion is not None
    assert left.completion.finish(answer) == loaded


@pytest.mark.parametrize("port", ["topup", "pin"])
@pytest.mark.parametrize("error", [error for error in PinError if error not in (PinError.NEEDS_IO, PinError.WAITS)])
def test_whatever_fails_is_a_device_access(port: str, error: PinError) -> None:
    vm = world("loongarch:4k")
    vm.answers[port] = error if port == "pin" else ENOMEM
    got = vm.resolve(LOONG.decode(**registers(PIS, GPA, ST_D | 3)))
    assert isinstance(got, Exit)
    assert got.detail == MmioAccess(Gpa(GPA), 8, True, bytes(8))
    assert vm.signals == ()


def test_a_device_inside_the_kernel_is_not_asked() -> None:
    vm = world("loongarch:4k")  # 6.12 offers device accesses to nobody but the VMM
    vm.devices = ((Gpa(DEVICE), 8, 0x5A),)
    assert isinstance(vm.resolve(LOONG.decode(**registers(PIL, DEVICE, LD_W | 5))), Exit)


@pytest.mark.parametrize(
    ("target", "backing", "logged", "kind", "size", "prot"),
    [
        ("loongarch:4k", "anon", False, "read", 1 << 12, "r-x"),  # writes fault once more
        ("loongarch:4k", "anon", False, "write", 1 << 12, "rwx"),
        ("loongarch:4k", "thp", False, "exec", 1 << 21, "r-x"),
        ("loongarch:4k", "hugetlb-1g", False, "write", 1 << 21, "rwx"),  # one size of blocks
        ("loongarch:16k", "thp", False, "write", 1 << 25, "rwx"),
        ("loongarch:64k", "thp", False, "write", 1 << 29, "rwx"),
        ("loongarch:4k", "thp", True, "read", 1 << 21, "r-x"),
        ("loongarch:4k", "thp", True, "write", 1 << 12, "rwx"),
    ],
)
def test_what_is_mapped(target: str, backing: str, logged: bool, kind: str, size: int, prot: str) -> None:
    vm = world(target, backing, log_dirty=logged)
    assert isinstance(vm.resolve(fault(target, kind, GPA + 0x1_0000)), Fixed)
    assert leaf(vm, GPA + 0x1_0000) == ((GPA + 0x1_0000) & -size, size, prot)


def test_the_fast_path_asks_no_slot() -> None:
    vm = world("loongarch:4k")
    for kind, wanted, ports in (
        ("read", Fixed, {"find_slot", "pin", "map"}),
        ("write", Fixed, {"find_slot", "mark_dirty"}),  # the slot is looked up for the log alone
        ("write", Spurious, {"find_slot"}),
    ):
        vm.events.clear()
        assert isinstance(vm.resolve(fault("loongarch:4k", kind)), wanted)
        used = {event.split()[0] for event in vm.events} - {"topup", "lock", "table_retired", "mapping_size", "release"}
        assert used == ports
    assert leaf(vm, GPA) == (GPA, 4096, "rwx")


def test_an_old_entry_is_made_young_without_the_slow_path() -> None:
    vm = world("loongarch:4k")
    vm.resolve(fault("loongarch:4k", "write"))
    vm.table.age(Gpa(GPA), Gpa(GPA + 4096), test_only=False)
    assert leaf(vm, GPA) == (GPA, 4096, "---")
    vm.events.clear()
    assert vm.resolve(fault("loongarch:4k", "read")) == fixed(4096, R | W | X)
    assert not [event for event in vm.events if event.startswith(("pin", "map"))]


def test_a_clean_block_of_a_logged_slot_is_split_by_a_write() -> None:
    vm = world("loongarch:4k", "thp", log_dirty=True)
    vm.resolve(fault("loongarch:4k", "read"))
    assert leaf(vm, GPA) == (GPA, 1 << 21, "r-x")
    vm.resolve(fault("loongarch:4k", "write", GPA + 0x3000))
    assert leaf(vm, GPA + 0x3000) == (GPA + 0x3000, 4096, "rwx")
    assert leaf(vm, GPA) == (GPA, 4096, "r-x")
    assert vm.get_dirty_log(0).pages == (3,)


class Collapsing(Vm):
    """A host that maps pages, and at some time blocks."""

    size = 4096

    def mapping_size(self, hva: Hva) -> int:
        return self.size


def test_a_table_of_pages_stays() -> None:
    vm = Collapsing.on(LOONG).add_memslot(0, gpa=GPA, size=1 << 24, hva=HVA).back(HVA, 1 << 24)
    vm.resolve(fault("loongarch:4k", "read"))
    vm.drop(GPA >> 12, (GPA >> 12) + 512)
    vm.size = 1 << 21
    vm.resolve(fault("loongarch:4k", "read", GPA + 0x5000))
    assert leaf(vm, GPA + 0x5000) == (GPA + 0x5000, 4096, "r-x")
    vm.resolve(fault("loongarch:4k", "read", GPA + (1 << 21)))  # where no table was
    assert leaf(vm, GPA + (1 << 21)) == (GPA + (1 << 21), 1 << 21, "r-x")


def test_a_host() -> None:
    assert LOONG.backend.host(LOONG.format).beyond_errno == ENOMEM


# The table.


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("4k", [("pgd", 39, 8, False), ("pud", 30, 9, False), ("pmd", 21, 9, True), ("pte", 12, 9, True)]),
        ("16k", [("pud", 36, 11, False), ("pmd", 25, 11, True), ("pte", 14, 11, True)]),
        ("64k", [("pud", 42, 5, False), ("pmd", 29, 13, True), ("pte", 16, 13, True)]),
    ],
)
def test_geometry(name: str, levels: list[tuple[str, int, int, bool]]) -> None:
    fmt = FORMATS[name]
    assert [(level.name, level.shift, level.index_bits, level.leaf) for level in fmt.levels] == levels
    assert fmt.gpa_bits == 47 == levels[0][1] + levels[0][2]


MADE: Final = PRESENT | VALID | 1 << 4


@pytest.mark.parametrize(
    ("desc", "shift", "kind", "prot", "notes"),
    [
        (0, 12, Kind.EMPTY, 0, 0),
        (VALID, 12, Kind.EMPTY, 0, 1),
        (0x4000_0000, 21, Kind.TABLE, 0, 0),
        (0x9000_0000_0123_4000, 21, Kind.TABLE, 0, 1),  # the kernel's empty table
        (MADE | DIRTY | WRITE | WRITEABLE | 0x1000, 12, Kind.LEAF, R | W | X, 0),
        (MADE | DIRTY, 12, Kind.LEAF, R | W | X, 1),
        (MADE & ~VALID, 12, Kind.LEAF, 0, 0),
        (MADE | HUGE | 0x20_0000, 21, Kind.LEAF, R | X, 0),
        (MADE | HUGE | 0x20_1000, 21, Kind.LEAF, R | X, 1),
        (MADE | HUGE, 12, Kind.LEAF, R | X, 1),
    ],
)
def test_entries(desc: int, shift: int, kind: Kind, prot: int, notes: int) -> None:
    entry = FORMATS["4k"].entry(desc, shift)
    assert (entry.kind, entry.prot, len(entry.notes)) == (kind, prot, notes)


@pytest.mark.parametrize(("memory", "mat"), [(Memory.NORMAL, 1), (Memory.DEVICE, 0), (Memory.NONCACHEABLE, 2)])
def test_a_leaf_as_kvm_makes_it(memory: Memory, mat: int) -> None:
    fmt = FORMATS["16k"]
    read = fmt.leaf(25, Hpa(0x1_0200_0000), R | X, memory, young=True, host_writable=True, tag=0)
    assert read == 0x1_0200_0000 | PRESENT | VALID | HUGE | WRITEABLE | mat << 4
    written = fmt.fix_write(read)
    assert written == read | DIRTY | WRITE
    assert fmt.write_protect(written) == read
    assert fmt.fix_write(fmt.write_protect(written, for_good=True)) is None
    assert fmt.child_leaf(read, 25, 14, 3) == (read & ~HUGE) + 3 * 0x4000


# Text.


@pytest.mark.parametrize(
    ("line", "given"),
    [
        (
            "ECode: 5 PC=0x120000000 Inst=0x28800085 BadVaddr=0x8001008 ESTAT=0x10000",
            {"ESTAT": 5 << 16, "PC": 0x1_2000_0000, "BADI": 0x2880_0085, "BADV": 0x800_1008},
        ),
        ("CSR_ESTAT 0x20000 BADV 0x8001008", {"ESTAT": 2 << 16, "BADV": 0x800_1008}),
        ("Read not supported Inst=0x2c000000 @120000000 BadVaddr:0x8001008", None),
    ],
)
def test_lines_of_the_log(line: str, given: Mapping[str, int] | None) -> None:
    assert LOONG.backend.paste is not None
    assert LOONG.backend.paste(line) == given


def test_one_line() -> None:
    assert one_line(LOONG, registers(PIS, 0x800_1008, ST_B)) == "write at gpa 0x8001008: no entry maps the page"
    assert "INE" in one_line(LOONG, registers(PPI, GPA))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (registers(PIL, GPA), ""),
        (registers(PIL, GPA, LD_W | 5), "BADI: 4 bytes, register 5"),
        (registers(PIL, GPA, VLD), "BADI: nothing that KVM emulates"),
        ({"ESTAT": 1 << 16}, "without BADV"),
        (registers(0xB, GPA), "no page exception"),
        (registers(PNX, GPA), "no handler"),
        ({"ESTAT": 1 << 22 | 1 << 16, "BADV": 0}, "no subcode"),
    ],
)
def test_unusual_values_are_told(given: Mapping[str, int], words: str) -> None:
    assert LOONG.backend.unusual is not None
    notes = LOONG.backend.unusual(LOONG.named(LOONG.decode(**given)))
    assert bool(notes) is bool(words)
    assert words in " ".join(notes)
