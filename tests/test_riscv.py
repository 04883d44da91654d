"""RISC-V: what a guest-page fault says, and what KVM does with it, against the kernel's sequence of tests."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EEXIST, EFAULT, EINTR, EIO, EOPNOTSUPP
from itertools import product
from pathlib import Path
from typing import Final

import pytest

from arch.riscv.encode import transformed
from arch.riscv.facts import REACHABLE
from arch.riscv.gstage import ACCESSED, DIRTY, EXEC, FORMATS, READ, USER, VALID, WRITE
from kvmfault.algebra.expr import NEVER, Pred
from kvmfault.algebra.prove import relate
from kvmfault.contract.access import Access
from kvmfault.contract.format import Kind, Memory, R, W, X
from kvmfault.contract.outcome import Emulate, Error, Exit, Fixed, MmioAccess, Retry, Signal, fixed
from kvmfault.contract.ports import Area, PinError
from kvmfault.contract.target import backend, backends
from kvmfault.decode import one_line
from kvmfault.machine.guest import Ended
from kvmfault.machine.vm import Vm
from kvmfault.trace.assemble import Assembler, assemble
from kvmfault.trace.events import FaultEvent
from kvmfault.trace.opening import open_recording
from kvmfault.types import Gpa, Hpa, Pfn
from kvmfault.vm.caps import AreaRule
from tests.test_trace_faults import same
from tests.worlds import GPA, HVA, fault, leaf, world

RISCV: Final = backend("riscv")
DEFINITION: Final = RISCV.definition
FETCH, LOAD, STORE = 20, 21, 23
DEVICE: Final = 0x0900_0000
LW, LBU, LD, SB, SD = 0x2003, 0x4003, 0x3003, 0x0023, 0x3023
"""Transformed instructions of register x0."""


def registers(code: int, gpa: int, htinst: int = 0) -> dict[str, int]:
    return {"SCAUSE": code, "STVAL": gpa, "HTVAL": gpa >> 2, "HTINST": htinst}


# What a fault says.


@pytest.mark.parametrize(
    ("given", "members"),
    [
        (registers(FETCH, GPA), {"exec": True, "read": False, "write": False, "on_walk": False}),
        (registers(LOAD, GPA + 6), {"read": True, "write": False, "exec": False, "offset": 6, "size": None}),
        (registers(STORE, GPA), {"write": True, "read": False, "exec": False}),
        (registers(FETCH, GPA, 0x3000), {"exec": False, "read": True, "on_walk": True, "offset": None}),
        (registers(STORE, GPA, 0x3000), {"write": True, "read": True, "on_walk": True, "final": False}),
        (registers(STORE, GPA, 0x3020), {"write": True, "read": False, "on_walk": True}),
        (registers(LOAD, GPA, LW | 5 << 7), {"size": 4, "register": 5, "sign_extend": True, "wide": True}),
        (registers(LOAD, GPA, LBU | 31 << 7), {"size": 1, "register": 31, "sign_extend": False}),
        (registers(STORE, GPA, SD | 7 << 20), {"size": 8, "register": 7}),
        (registers(STORE, GPA, LW | 5 << 7), {"size": None}),  # a load's instruction with the code of a store
        (registers(LOAD, GPA, 0x2007), {"size": None}),  # FLW
        (registers(LOAD, GPA, LW & ~2), {"size": 4}),  # was C.LW
        ({"SCAUSE": LOAD}, {"gpa": None, "gva": None, "offset": None}),
        ({"SCAUSE": LOAD, "HTVAL": GPA >> 2}, {"gpa": GPA, "gva": None, "offset": None}),
    ],
)
def test_what_registers_say(given: Mapping[str, int], members: Mapping[str, object]) -> None:
    found = RISCV.access(RISCV.decode(**given))
    assert {name: getattr(found, name) for name in members} == members
    assert found.cause is None  # not told, which is not the same as none of the usual ones


def naive_mmio(code: int, htinst: int) -> tuple[int, bool] | None:
    """Bytes and sign of kvm_riscv_vcpu_mmio_load and _store, by the masks and matches of insn.h."""
    if not htinst & 1 or code == FETCH:
        return None
    word = htinst | 3
    loads = {0x0003: (1, True), 0x1003: (2, True), 0x2003: (4, True), 0x3003: (8, False)}
    loads |= {0x4003: (1, False), 0x5003: (2, False), 0x6003: (4, False)}
    stores = {0x0023: (1, False), 0x1023: (2, False), 0x2023: (4, False), 0x3023: (8, False)}
    return (loads if code == LOAD else stores).get(word & 0x707F)


def test_every_opcode_is_decoded_as_the_kernel_does() -> None:
    decoded = 0
    for code, opcode, funct3 in product((FETCH, LOAD, STORE), range(1 << 7), range(8)):
        htinst = funct3 << 12 | opcode
        told = RISCV.access(RISCV.decode(SCAUSE=code, HTINST=htinst))
        wanted = naive_mmio(code, htinst)
        assert told.size == (wanted[0] if wanted else None), hex(htinst)
        if wanted is not None:
            decoded += 1
            assert told.sign_extend is wanted[1], hex(htinst)
    assert decoded == 2 * (7 + 4)


def truth(name: str) -> Pred:
    found = getattr(DEFINITION, name)
    assert isinstance(found, Pred)
    return found


@pytest.mark.parametrize(
    ("a", "b"),
    [("is_exec", "is_write"), ("is_exec", "is_read"), ("is_exec", "is_table_walk"), ("mmio_valid", "is_table_walk")],
)
def test_never_both(a: str, b: str) -> None:
    assert relate(truth(a), truth(b), REACHABLE).disjoint


def test_every_reachable_fault_tries_something() -> None:
    some = truth("is_read") | truth("is_write") | truth("is_exec")
    assert relate(some, NEVER, REACHABLE).neither == 0
    both = relate(truth("is_read"), truth("is_write"), REACHABLE)
    assert both.both  # only the read of a guest table that a store needs
    assert relate(truth("is_read") & truth("is_write"), truth("is_table_walk"), REACHABLE).a_implies_b


# What KVM does.


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ({"SCAUSE": 1 << 63 | 5}, Retry()),
        ({"SCAUSE": 2}, Error(EFAULT)),
        ({"SCAUSE": 22}, Error(EFAULT)),
        (registers(FETCH, DEVICE), Error(EOPNOTSUPP)),
        (registers(FETCH, DEVICE, 0x3000), Error(EOPNOTSUPP)),  # by the code, so also a walk for a fetch
        (registers(LOAD, DEVICE), Emulate()),
        (registers(LOAD, DEVICE, 0x3000), Emulate()),  # the instruction, at the address of the guest's table
        (registers(LOAD, DEVICE, 0x2007), Error(EOPNOTSUPP)),
        (registers(LOAD, DEVICE + 2, LW | 5 << 7), Error(EIO)),
    ],
)
def test_outside_of_memory(given: Mapping[str, int], outcome: object) -> None:
    assert world("riscv").resolve(RISCV.decode(**given)) == outcome


@pytest.mark.parametrize(
    ("code", "htinst", "access", "answer", "loaded"),
    [
        (LOAD, LW | 5 << 7, MmioAccess(Gpa(DEVICE), 4, False), 0x8000_0000, 0xFFFF_FFFF_8000_0000),
        (LOAD, LBU | 5 << 7, MmioAccess(Gpa(DEVICE), 1, False), 0x80, 0x80),
        (LOAD, LD | 31 << 7, MmioAccess(Gpa(DEVICE), 8, False), 1 << 63, 1 << 63),
        (LOAD, LW, MmioAccess(Gpa(DEVICE), 4, False), 7, None),  # x0
        (STORE, SB | 31 << 20, MmioAccess(Gpa(DEVICE), 1, True, b"\x1f"), 0, None),
        (STORE, SD, MmioAccess(Gpa(DEVICE), 8, True, bytes(8)), 0, None),  # x0
    ],
)
def test_device_accesses(code: int, htinst: int, access: MmioAccess, answer: int, loaded: int | None) -> None:
    vm = world("riscv")
    vm.vcpu.registers = tuple(range(32))
    left = vm.resolve(RISCV.decode(**registers(code, DEVICE, htinst)))
    assert isinstance(left, Exit)
    assert left.detail == access
    assert left.completion is not None
    assert left.completion.finish(answer) == loaded


@pytest.mark.parametrize(
    ("backing", "logged", "kind", "size", "prot"),
    [
        ("anon", False, "read", 1 << 12, "rwx"),
        ("anon", False, "exec", 1 << 12, "rwx"),
        ("thp", False, "write", 1 << 12, "rwx"),  # blocks are those of hugetlb alone
        ("hugetlb-2m", False, "write", 1 << 21, "rwx"),
        ("hugetlb-1g", False, "read", 1 << 30, "rwx"),
        ("hugetlb-2m", True, "read", 1 << 12, "r-x"),
        ("hugetlb-2m", True, "write", 1 << 12, "rwx"),
    ],
)
def test_what_is_mapped(backing: str, logged: bool, kind: str, size: int, prot: str) -> None:
    vm = world("riscv", backing, log_dirty=logged)
    assert isinstance(vm.resolve(fault("riscv", kind, GPA + 0x5000)), Fixed)
    assert leaf(vm, GPA + 0x5000) == ((GPA + 0x5000) & -size, size, prot)


def test_a_block_is_mapped_whatever_the_geometry() -> None:
    # gpa and hva differ modulo 2M: the block is misaligned, which hardware takes for no entry
    vm = Vm.on(RISCV).add_memslot(0, gpa=GPA, size=1 << 24, hva=HVA + 0x3000).back(HVA, 1 << 25, "hugetlb-2m")
    assert vm.fork().resolve(fault("riscv", "read", GPA + 0x20_0000)) == fixed(1 << 21, R | W | X)
    assert vm.access(GPA + 0x20_0000).ended is Ended.STUCK


def test_a_page_of_a_mapped_block_is_refused() -> None:
    vm = world("riscv", "hugetlb-2m", log_dirty=True)
    vm.table.map(Gpa(GPA), 1 << 21, Pfn(0x20_0000), R | X, Memory.NORMAL, host_writable=True, young=True, tag=0)
    assert vm.resolve(fault("riscv", "write", GPA + 0x1000)) == Error(EEXIST)
    assert leaf(vm, GPA) == (GPA, 1 << 21, "r-x")
    assert vm.get_dirty_log(0).pages == (1,)  # marked before the table is changed


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (PinError.FAULT, Error(EFAULT)),
        (PinError.SIGPENDING, Error(EINTR)),
        (PinError.RO_FAULT, Error(EFAULT)),
        (PinError.NO_SLOT, Error(EFAULT)),
    ],
)
def test_error_frames(error: PinError, outcome: object) -> None:
    vm = world("riscv")
    vm.answers["pin"] = error
    assert vm.resolve(fault("riscv", "read")) == outcome


@pytest.mark.parametrize("logged", [False, True])
def test_the_signal_names_the_area_whatever_is_mapped(logged: bool) -> None:
    vm = world("riscv", "hugetlb-2m", log_dirty=logged)
    vm.answers["pin"] = PinError.HWPOISON
    vm.resolve(fault("riscv", "read", GPA + 0x1000))
    assert [signal.lsb for signal in vm.signals] == [21]
    assert isinstance(vm.signals[0], Signal)


def test_an_area_of_another_block_size() -> None:
    # 64K of hugetlb: no level of the table; a logged slot asks for pages, before that
    for logged, outcome in ((False, Error(EFAULT)), (True, fixed(1 << 12, R | W | X))):
        vm = world("riscv", log_dirty=logged)
        vm.answers["area"] = Area(1 << 16)
        assert vm.resolve(fault("riscv", "write")) == outcome


def test_a_fetch_after_aging_faults_and_maps_again() -> None:
    vm = world("riscv")
    vm.access(GPA)
    vm.table.age(Gpa(GPA), Gpa(GPA + 4096), test_only=False)
    vm.vcpu.tlb.flush(Gpa(GPA), Gpa(GPA + 4096))
    again = vm.access(GPA, fetch=True)
    assert len(again.faults) == 1
    assert vm.format.is_young(vm.table.walk(Gpa(GPA)).desc)


def test_a_host() -> None:
    caps = RISCV.backend.host(RISCV.format)
    assert (caps.beyond_errno, caps.end_refused) == (EFAULT, True)
    assert caps.area_rules == (AreaRule.READONLY_AREA, AreaRule.LOGGED_DEVICE)


# The table.


@pytest.mark.parametrize(
    ("name", "bits", "levels"),
    [
        ("sv39x4", 41, [(30, 11, True), (21, 9, True), (12, 9, True)]),
        ("sv48x4", 50, [(39, 11, False), (30, 9, True), (21, 9, True), (12, 9, True)]),
        ("sv57x4", 59, [(48, 11, False), (39, 9, False), (30, 9, True), (21, 9, True), (12, 9, True)]),
    ],
)
def test_geometry(name: str, bits: int, levels: list[tuple[int, int, bool]]) -> None:
    fmt = FORMATS[name]
    assert fmt.gpa_bits == bits == sum(i for _, i, _ in levels) + 12
    assert [(level.shift, level.index_bits, level.leaf) for level in fmt.levels] == levels


MADE: Final = VALID | READ | USER | ACCESSED | DIRTY


@pytest.mark.parametrize(
    ("desc", "shift", "kind", "prot", "notes"),
    [
        (0, 12, Kind.EMPTY, 0, 0),
        (0x10, 12, Kind.EMPTY, 0, 1),
        (VALID | WRITE, 21, Kind.EMPTY, 0, 1),
        (VALID, 12, Kind.EMPTY, 0, 1),
        (VALID | 0x1000 << 10, 21, Kind.TABLE, 0, 0),
        (VALID | USER, 21, Kind.TABLE, 0, 1),
        (MADE | WRITE | EXEC | 0x1000 << 10, 12, Kind.LEAF, R | W | X, 0),
        (MADE | 0x1200 << 10, 21, Kind.LEAF, R, 0),
        (MADE | 0x1201 << 10, 21, Kind.EMPTY, 0, 1),  # misaligned
        (MADE & ~USER, 12, Kind.LEAF, 0, 1),
        (MADE | 3 << 61, 12, Kind.LEAF, R, 1),
    ],
)
def test_entries(desc: int, shift: int, kind: Kind, prot: int, notes: int) -> None:
    fmt = FORMATS["sv48x4"]
    entry = fmt.entry(desc, shift)
    assert (entry.kind, entry.prot, len(entry.notes)) == (kind, prot, notes)


def test_a_leaf_as_kvm_makes_it() -> None:
    fmt = FORMATS["sv39x4"]
    desc = 0x1_2340_0000 >> 2 | MADE | WRITE | EXEC
    for memory in Memory:
        assert fmt.leaf(21, Hpa(0x1_2340_0000), R | W | X, memory, young=True, host_writable=True, tag=0) == desc
    assert fmt.hpa(desc, 21) == 0x1_2340_0000
    assert fmt.hpa(fmt.child_leaf(desc, 21, 12, 3), 12) == 0x1_2340_3000
    assert fmt.fix_write(fmt.write_protect(desc)) is None


# Text.


def test_a_line_of_the_log() -> None:
    line = "[ 12.5] kvm [321]: SCAUSE=0x17 STVAL=0x3fb2008 HTVAL=0x2400002 HTINST=0xa02023"
    assert RISCV.backend.paste is not None
    given = RISCV.backend.paste(line)
    assert given == {"SCAUSE": 23, "STVAL": 0x3FB2008, "HTVAL": 0x240_0002, "HTINST": 0xA0_2023}
    assert one_line(RISCV, given) == "write at gpa 0x9000008: store or AMO guest-page fault, 4 bytes, register 10"
    assert RISCV.backend.paste("SEPC=0xffffffff80012345 SSTATUS=0x200004120 HSTATUS=0x2002001c0") is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (registers(LOAD, GPA), ""),
        (registers(LOAD, GPA, LW | 5 << 7), ""),
        ({"SCAUSE": LOAD}, "without HTVAL"),
        (registers(FETCH, GPA, LW), "HTINST describes loads and stores"),
        (registers(LOAD, GPA, SD), "HTINST is neither"),
        (registers(2, GPA), "no guest-page fault"),
        (registers(1 << 40 | LOAD, GPA), "comparisons of the whole value fail"),
    ],
)
def test_unusual_values_are_told(given: Mapping[str, int], words: str) -> None:
    assert RISCV.backend.unusual is not None
    notes = RISCV.backend.unusual(RISCV.named(RISCV.decode(**given)))
    assert bool(notes) is bool(words)
    assert words in " ".join(notes)


@pytest.mark.parametrize(("size", "signed"), [(1, True), (2, False), (4, True), (4, False), (8, False)])
def test_an_access_becomes_an_instruction(size: int, signed: bool) -> None:
    wanted = Access(
        gpa=Gpa(GPA), offset=0, read=True, write=False, exec=False, on_walk=False, final=True, size=size, register=9,
        sign_extend=signed, wide=True, ordered=False, cache_op=False, protection_key=False, shadow_stack=False,
        private=False, prefetch=False,
    )  # fmt: skip
    made = RISCV.encode(wanted)
    assert made.lost.keys() <= {"gva"}
    assert RISCV.backend.reachable.on(RISCV.named(made.fault))
    assert transformed(0, {1: 0, 2: 1, 4: 2, 8: 3}[size], 9) & 3 == 3


# Recordings.

TRACE: Final = """\
  <...>-321 [001] d..1. 1.000001: kvm_entry: PC: 0x0000000080200000
  <...>-321 [001] d..1. 1.000101: kvm_exit: SEPC:0x10, SCAUSE:0x17, STVAL:0x80400008, HTVAL:0x20100002, HTINST:0xa02023
  <...>-321 [001] d..1. 1.000301: kvm_exit: SEPC:0x14, SCAUSE:0x8000000000000005, STVAL:0x0, HTVAL:0x0, HTINST:0x0
  <...>-321 [001] d..1. 1.000501: kvm_exit: SEPC:0x18, SCAUSE:0x15, STVAL:0x10000005, HTVAL:0x4000001, HTINST:0x503
"""
"""A store, an interrupt and a load, as an exit of RISC-V tells them: there is no event for faults alone."""


def test_exits_that_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(TRACE)
    found = [e for e in assemble(path, Assembler(backends().values())) if isinstance(e, FaultEvent)]
    assert [(e.target, e.registers["SCAUSE"], e.registers["HTVAL"]) for e in found] == [
        ("riscv", 0x17, 0x2010_0002),
        ("riscv", 0x15, 0x400_0001),
    ]
    assert RISCV.access(RISCV.decode(**found[0].registers)).gpa == 0x8040_0000
    assert same(open_recording(str(path))) == 2  # the same out of columns
