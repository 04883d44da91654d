"""Every shape of a fault tells what the definitions say, on register values that stand for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final

from kvmfault.algebra.domain import cases, every_value, with_representatives
from kvmfault.algebra.expr import ALWAYS, Maybe, Pred, Word
from kvmfault.contract.accessors import TRUTHS, VALUES, Gap, stand_in
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.shapes import SHAPES, View
from kvmfault.contract.target import Target

__all__ = ["ASKED", "EVERY_BITS", "Equality", "ask", "definition", "proven", "samples"]

ASKED: Final = ("syndrome", *TRUTHS, *VALUES)
"""Everything that a fault may be asked."""
EVERY_BITS: Final = 14
"""Up to so many bits that decide a truth, every combination is tried."""


@dataclass(frozen=True, slots=True)
class Equality:
    """How one shape compares with the definitions on one target."""

    tried: int
    """Register values, each for one thing that is asked."""
    combinations: int
    """Combinations of the bits that truths read; those tried stand for all of them."""
    differing: tuple[str, ...]


def ask(fault: MmioFault, name: str) -> object:
    """The answer to one of ASKED."""
    answer: object = getattr(fault, name)
    return fault.kvm_get_fault_gpa() if name == "kvm_get_fault_gpa" else answer


def definition(target: Target, name: str) -> Pred | Word | Maybe:
    """What decides one of ASKED; a gap as what it assumes."""
    if name in VALUES:
        valid, value = (getattr(target.definition, part) for part in VALUES[name])
        assert isinstance(value, Word)
        return value.when(stand_in(valid))
    fact: Pred | Gap | Word = getattr(target.definition, name)
    return fact if isinstance(fact, Word) else stand_in(fact)


def proven(target: Target) -> dict[str, Equality]:
    """Each shape, by name. A truth: every combination of the bits it reads, or of many one value of each kind that its
    comparisons tell apart. A value: for each of those, nothing and each bit that it copies alone, which decides it."""
    makers = {name: shape.on(target.ops) for name, shape in SHAPES.items()}
    tried = combinations = 0
    differing: dict[str, list[str]] = {name: [] for name in makers}
    for name in ASKED:
        of = definition(target, name)
        combinations += isinstance(of, Pred) << sum(mask.bit_count() for mask in of.reads.values())
        for registers in samples(of, target):
            tried += 1
            wanted = of.on(registers)
            raw = View(target.ops, tuple(registers.values()))
            for shape, make in makers.items():
                if ask(make(raw), name) != wanted and name not in differing[shape]:
                    differing[shape].append(name)
    return {shape: Equality(tried, combinations, tuple(names)) for shape, names in differing.items()}


def samples(of: Pred | Word | Maybe, target: Target) -> Iterator[Mapping[str, int]]:
    """Register values that decide whether something else equals *of*, see `proven`."""
    valid = ALWAYS if isinstance(of, Word) else of.valid if isinstance(of, Maybe) else of
    word = of if isinstance(of, Word) else of.word if isinstance(of, Maybe) else Word(())
    reads = valid.reads
    for term in word.terms:
        if term.table is not None:
            reads[term.register] = reads.get(term.register, 0) | term.mask
    few = isinstance(of, Pred) and sum(mask.bit_count() for mask in reads.values()) <= EVERY_BITS
    few = few or not valid.reads  # only tables
    digits = every_value(reads) if few else with_representatives({}, valid)
    copied = [(r, 1 << i) for r, m in word.reads.items() for i in range(64) if m >> i & ~(reads.get(r, 0) >> i) & 1]
    blank = dict.fromkeys(target.order, 0)
    for columns in cases(digits):
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        for row, (register, bit) in product(rows, [("", 0), *copied]):
            registers = {**blank, **{name: v for name, v in zip(columns, row, strict=True) if name in blank}}
            if bit:
                registers[register] |= bit
            yield registers
