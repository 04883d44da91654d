"""What can go wrong with a fault after it was made: each case is run, not described.

A fault holds its registers, or it reads those of the vCPU whenever it is asked, as accessors that take a vCPU do. The
second way is tried for every shape that keeps registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias, cast

from kvmfault.algebra.scalar import Regs
from kvmfault.compare.equality import ASKED, ask
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.accessors import map_accessors
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.shapes import SHAPES, Hybrid, Ops, View
from kvmfault.contract.target import Target
from kvmfault.machine.vm import Vm
from kvmfault.types import Gpa, Gva

__all__ = [
    "HVA",
    "LOAD",
    "PREFAULT",
    "SLOT",
    "STORE",
    "Blind",
    "Changed",
    "Maker",
    "Pair",
    "Registers",
    "blind",
    "makers",
    "outcome_words",
    "prefaulted",
    "replaced",
    "world",
]

SLOT: Final = 0x4000_0000
HVA: Final = 0x7F00_0000_0000
LOAD: Final = Access(
    gpa=Gpa(0x1000_0000), offset=0x10, gva=Gva(0x1000_0010), read=True, write=False, exec=False, final=True,
    cause=Cause.MISSING, size=4, register=3, sign_extend=True, wide=False,
)  # fmt: skip
"""Of a device register, for which user space is asked."""
STORE: Final = Access(
    gpa=Gpa(SLOT), offset=0x88, gva=Gva(SLOT | 0x88), read=False, write=True, exec=False, final=True,
    cause=Cause.MISSING, size=8, register=7, sign_extend=False, wide=True,
)  # fmt: skip
"""To memory."""
PREFAULT: Final = Access(
    gpa=Gpa(SLOT + 0x20_0000), gva=Gva(SLOT + 0x20_0000), offset=0, final=True, cause=Cause.MISSING, prefetch=True
)
"""Nobody made it."""


@dataclass
class Registers:
    """The fault registers of a vCPU: the next exit overwrites them."""

    now: Regs


Maker = Callable[[Registers], MmioFault]


def makers(target: Target) -> dict[str, Maker]:
    """Ways to make a fault of a vCPU's registers: the four shapes, and those that go on reading the vCPU."""

    def later(read: Callable[[Regs], bool]) -> Callable[[Registers], bool]:
        return lambda vcpu: read(vcpu.now)

    def later_word(read: Callable[[Regs], int]) -> Callable[[Registers], int]:
        return lambda vcpu: read(vcpu.now)

    def own(name: str) -> Maker:
        make = SHAPES[name].on(target.ops)
        return lambda vcpu: make(View(target.ops, vcpu.now))

    live: Ops[Registers] = map_accessors(target.ops, later, later_word)
    made: dict[str, Maker] = {}
    for name, shape in SHAPES.items():
        made[name] = own(name)
        if shape.keeps_registers and shape.stored:
            # what a Hybrid keeps is stored when it is made; the rest it asks of whatever it holds
            made[f"{name}, of the vCPU"] = lambda vcpu: Hybrid(cast("Ops[Regs]", live), cast("Regs", vcpu))
        elif shape.keeps_registers:
            made[f"{name}, of the vCPU"] = lambda vcpu: View(live, vcpu)
    return made


@dataclass(frozen=True, slots=True)
class Changed:
    """What a pending fault tells afterwards that it did not tell before."""

    answers: Mapping[str, tuple[object, object]]
    """Before and after, by what was asked."""
    wrote_vcpu: bool
    outcome: Outcome
    """Of the fault that came between."""

    def __str__(self) -> str:
        if not self.answers:
            return "as before"
        order = ("mmio_register", "mmio_size", "kvm_get_fault_gpa", "gva", "is_write")
        name = next((n for n in order if n in self.answers), next(iter(self.answers)))
        before, after = (hex(v) if isinstance(v, int) and v > 9 else str(v) for v in self.answers[name])
        count = f"{len(self.answers)} answers change" if len(self.answers) > 1 else "1 answer changes"
        return f"{count}, {name} from {before} to {after}"


def world(target: Target) -> Vm:
    """A VM with memory at SLOT and nothing at LOAD."""
    return Vm.on(target).add_memslot(0, gpa=SLOT, size=1 << 30, hva=HVA).back(HVA, 1 << 30)


def replaced(target: Target) -> dict[str, Changed]:
    """A load goes to user space; before it is completed, the vCPU's registers are those of another fault."""
    first, second = target.encode(LOAD).fault, target.encode(STORE).fault
    found: dict[str, Changed] = {}
    for name, make in makers(target).items():
        vm, vcpu = world(target), Registers(first.of)
        pending = make(vcpu)
        vm.handle(pending)
        before = _told(pending)
        vcpu.now = second.of
        outcome = vm.handle(make(vcpu)).outcome
        found[name] = Changed(_differing(before, _told(pending)), True, outcome)
    return found


def prefaulted(target: Target) -> dict[str, Changed]:
    """A page is mapped ahead of time while a load is pending. A shape that reads the vCPU has to be lied to."""
    first, ahead = target.encode(LOAD).fault, target.encode(PREFAULT).fault
    found: dict[str, Changed] = {}
    for name, make in makers(target).items():
        vm, vcpu = world(target), Registers(first.of)
        pending = make(vcpu)
        vm.handle(pending)
        before = _told(pending)
        of_vcpu = name not in SHAPES
        if of_vcpu:
            vcpu.now = ahead.of
        outcome = vm.handle(make(vcpu if of_vcpu else Registers(ahead.of))).outcome
        found[name] = Changed(_differing(before, _told(pending)), of_vcpu, outcome)
    return found


def _told(fault: MmioFault) -> dict[str, object]:
    return {name: ask(fault, name) for name in ASKED}


def _differing(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


Pair: TypeAlias = tuple[Mapping[str, int], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Blind:
    """Pairs of register values, one bit apart, that all facts see alike."""

    tried: int
    pairs: int
    witness: Pair | None
    """One of them; of several, one that the kernel's own accessors tell apart."""
    by: tuple[str, ...]
    """The kernel's accessors that tell it apart."""
    hidden: int
    """Pairs that differ in nothing but the opaque word."""
    hidden_witness: Pair | None
    hidden_by: tuple[str, ...]


def blind(target: Target) -> Blind:
    """Bits of the registers that a captured fault has lost: every bit flipped in two faults, each pair compared."""
    lost: list[Pair] = []
    hidden: list[Pair] = []
    tried = 0
    for one, other in _one_bit_apart(target):
        tried += 1
        a, b = (_told(target.snapshot(target.decode(**r))) for r in (one, other))
        differing = set(_differing(a, b))
        if differing <= {"syndrome"}:
            (hidden if differing else lost).append((one, other))
    return Blind(tried, len(lost), *_best(target, lost), len(hidden), *_best(target, hidden))


def _best(target: Target, pairs: Sequence[Pair]) -> tuple[Pair | None, tuple[str, ...]]:
    ranked = [(tuple(_apart(target, *pair)), pair) for pair in pairs]
    by, witness = max(ranked, key=lambda r: len(r[0]), default=((), None))
    return witness, by


def _one_bit_apart(target: Target) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    synthetic = target.backend.registers[-1].name
    for access in (LOAD, STORE):
        base = target.named(target.encode(access).fault)
        for register in target.backend.registers:
            for bit in range(register.width if register.name != synthetic else 0):
                yield base, {**base, register.name: base[register.name] ^ 1 << bit}


def _apart(target: Target, one: Mapping[str, int], other: Mapping[str, int]) -> Iterator[str]:
    for name, accessor in target.accessors.items():
        if accessor.on(one) != accessor.on(other):
            yield name


def outcome_words(outcome: Outcome) -> str:
    """An outcome in words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(outcome).__name__).lower()
