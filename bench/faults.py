"""One fault: decoded, asked, and taken through the path; and whether that grows with slots or with the guest."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter

from bench.measure import Each, Row, seconds_each
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.accessors import Snapshot
from kvmfault.contract.outcome import Fixed
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backend
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Gva
from kvmfault.vm.memslots import Memslots

BASE = 1 << 32
HVA = 0x7F00_0000_0000
GIB = 1 << 30
MANY = 32_000
"""Slots: near the most that any architecture has (32767)."""
TARGETS = ("arm64:4k@6.12", "arm64:4k@7.4", "x86-ept:4k@7.4", "x86-npt:4k@7.4")
"""x86-shadow is not among them: without guest tables its faults end in NeedsGuestWalk."""


@dataclass(frozen=True, slots=True)
class Faults:
    """The same faults in three forms."""

    registers: list[dict[str, int]]
    raw: list[Raw]
    captured: list[Snapshot]


def missing_pages(target: Target, size: int, count: int) -> Faults:
    """Reads and writes of *count* frames that nothing maps: runs of 64 neighbours, spread evenly over a guest of *size*
    bytes from BASE on, in random order."""
    page = 1 << target.format.page_shift
    runs = max(1, count // 64)
    gpas = [BASE + run * (size // runs) + i * page for run in range(runs) for i in range(count // runs)]
    random.Random(1).shuffle(gpas)
    raw = [target.encode(_access(gpa, write=number % 2 == 1)).fault for number, gpa in enumerate(gpas)]
    return Faults([target.named(f) for f in raw], raw, [target.snapshot(f) for f in raw])


def _access(gpa: int, *, write: bool) -> Access:
    return Access(
        gpa=Gpa(gpa & -4096),
        offset=0x10,
        gva=Gva(0xFFFF_8000_0000_0010 + (gpa & -4096)),
        read=not write,
        write=write,
        exec=False,
        cause=Cause.MISSING,
        on_walk=False,
        final=True,
    )


@cache
def guest(target: Target, size: int = GIB, slots: int = 1) -> Vm:
    """A VM with *slots* neighbouring slots over *size* bytes of anonymous memory. Not to be changed."""
    each = size // slots & -(1 << target.format.page_shift)
    vm = Vm.on(target).back(HVA, each * slots)
    for slot in range(slots):
        vm.add_memslot(slot, gpa=BASE + slot * each, size=each, hva=HVA + slot * each)
    return vm


def captured(vm: Vm, faults: Faults) -> Each[Snapshot]:
    """Captured facts through the path of a new copy of *vm* in each round, so that every fault installs an entry."""
    return Each(faults.captured, lambda: vm.fork().resolve)


def undecoded(vm: Vm, faults: Faults) -> Each[dict[str, int]]:
    """The same from registers: each fault is decoded first."""

    def begin() -> Callable[[dict[str, int]], object]:
        resolve, decode = vm.fork().resolve, vm.target.decode
        return lambda registers: resolve(decode(**registers))

    return Each(faults.registers, begin)


def is_write_by_hand(syndrome: int) -> bool:
    """What one would write for arm64 without the library."""
    status = syndrome & 0x3F
    if syndrome >> 7 & 1:
        return 0xC <= status <= 0xF
    if syndrome >> 26 & 0x3F == 0x20:
        return False
    return bool(syndrome >> 6 & 1)


def decode_rows(count: int = 4096, rounds: int = 9) -> list[Row]:
    """Registers to a fault, a fault to a snapshot, one fact of a fault."""
    target = backend("arm64:4k@6.12")
    faults = missing_pages(target, GIB, count)
    made, captured, asked, by_hand = seconds_each(
        Each(faults.registers, lambda: lambda registers: target.decode(**registers)),
        Each(faults.raw, lambda: target.snapshot),
        Each(faults.raw, lambda: attrgetter("is_write")),
        Each([fault.syndrome for fault in faults.raw], lambda: is_write_by_hand),
        rounds=rounds,
    )
    return [
        Row("decode: registers by name -> fault", made * 1e6, "us"),
        Row("decode: fault -> snapshot, every fact", captured * 1e6, "us"),
        Row("decode: is_write of a fault", asked * 1e6, "us", "if and else by hand:", by_hand * 1e6),
    ]


def path_rows(targets: Sequence[str] = TARGETS, count: int = 4096, rounds: int = 9) -> list[Row]:
    """One missing page through the path, nothing recorded, an entry installed each time."""
    rows = []
    for name in targets:
        target = backend(name)
        vm, faults = guest(target), missing_pages(target, GIB, count)
        _expect_fixed(vm, faults)
        facts, registers = seconds_each(captured(vm, faults), undecoded(vm, faults), rounds=rounds)
        rows.append(Row(f"path, {name}: captured facts", facts * 1e6, "us", limit=7))
        rows.append(Row(f"path, {name}: from registers", registers * 1e6, "us", limit=12))
    return rows


def scale_rows(count: int = 4096, rounds: int = 9, many: int = MANY, large: int = 1 << 40) -> list[Row]:
    """The path with many slots, and in a large guest, each beside the small case."""
    target = backend("arm64:4k@6.12")
    rows = []
    log = math.log2(many) / math.log2(8)
    for (work, size, slots), (beside, small, few), limit in (
        ((f"path, {many:,} slots", 32 * GIB, many), ("8 slots:", 32 * GIB, 8), round(log, 1)),
        ((f"path, guest of {large // GIB:,} GiB", large, 1), ("1 GiB:", GIB, 1), 1.2),
    ):
        cases = [(guest(target, s, n), missing_pages(target, s, count)) for s, n in ((size, slots), (small, few))]
        _expect_fixed(*cases[0])
        slow, fast = seconds_each(*(captured(*case) for case in cases), rounds=rounds)
        rows.append(Row(work, slow * 1e6, "us", beside, fast * 1e6, limit=limit))
    return rows


def slot_rows(lookups: int = 20_000, rounds: int = 9, many: int = MANY) -> list[Row]:
    """The slot of a frame anywhere in the guest, with many slots and with 8."""
    target = backend("arm64:4k@6.12")
    size = 32 * GIB
    rng = random.Random(1)
    gfns = [Gfn(rng.randrange(BASE >> 12, BASE + size >> 12)) for _ in range(lookups)]
    tables = [guest(target, size, slots).slots for slots in (many, 8)]
    rows = []
    for order, asked in (("at random", gfns), ("in rising order", sorted(gfns))):
        slow, fast = seconds_each(*(Each(asked, _finder(table)) for table in tables), rounds=rounds)
        work = f"memslot look-up {order}, {many:,} slots"
        rows.append(Row(work, slow * 1e9, "ns", "8 slots:", fast * 1e9, limit=2))
    return rows


def _finder(table: Memslots) -> Callable[[], Callable[[Gfn], object]]:
    return lambda: table.find


def _expect_fixed(vm: Vm, faults: Faults) -> None:
    # outside the measurement: that what is measured is what it says
    copy = vm.fork()
    outcomes = {type(copy.resolve(fault)) for fault in faults.captured}
    assert outcomes == {Fixed}, outcomes
    assert sum(1 for _ in copy.table.entries()) == len(faults.captured)
