"""Every x86 fact and accessor equals an if/else transcription on all combinations of the bits it reads, in scalar
and column form and in all four shapes; generated mistakes in the definitions are noticed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Final

import numpy as np
import pytest

from arch.x86 import EPT, NPT, SHADOW
from kvmfault.algebra.columns import U64Col, pred_column
from kvmfault.algebra.expr import ALWAYS, Maybe, Pred, Word, union
from kvmfault.algebra.prove import combinations, relate
from kvmfault.contract.accessors import FACTS, Gap, Snapshot
from kvmfault.contract.shapes import Handle, HandleOps, Hybrid, View, snapshot
from kvmfault.contract.target import Target
from tests import oracle_x86
from tests.definitions import Answer, Definition, assert_same, differ, fact_definitions, in_columns, one_by_one, wrong

Source = Callable[[Mapping[str, int], str], oracle_x86.Answers]
KVM: Final = 0x307
"""All bits of the synthetic register that facts read."""
VIOLATION: Final = 48
"""Bits of the exit reason that EPT rows always have, so that bit 0 turns a violation into a misconfiguration."""


@dataclass(frozen=True)
class Case:
    """A target, its transcription, and the bits that are enumerated together (all others being 0)."""

    target: Target
    facts: Source
    accessors: Source
    spaces: tuple[dict[str, int], ...]

    @cached_property
    def columns(self) -> dict[str, U64Col]:
        """Rows: every combination of each space, one-hot values, random ones."""
        order = self.target.order
        parts = [part for space in self.spaces for part in combinations(space)]
        dice = random.Random(1)
        listed = [{name: 1 << b} for name in order for b in range(64)] + [{}]
        listed += [{name: dice.getrandbits(64) for name in order} for _ in range(2000)]
        parts.append({name: np.array([row.get(name, 0) for row in listed], np.uint64) for name in order})
        rows = {
            name: np.concatenate([p.get(name, np.zeros(len(next(iter(p.values()))), np.uint64)) for p in parts])
            for name in order
        }
        if "EXIT_REASON" in rows:
            rows["EXIT_REASON"] = rows["EXIT_REASON"] & np.uint64(0xFFFF_FFFF) | np.uint64(VIOLATION)
            near = np.array([49 ^ 1 << b for b in range(16)] + [50], np.uint64)  # other exits count as violations
            rows["EXIT_REASON"][-1700:] = np.tile(near, 100)
            rows["EXIT_QUALIFICATION"][-1700:-850] &= np.uint64(0x1FFFF)
            rows["KVM"][-1700:] |= np.uint64(0x300)
        return rows

    @cached_property
    def rows(self) -> list[tuple[int, ...]]:
        return list(zip(*(self.columns[name].tolist() for name in self.target.order), strict=True))

    def expected(self, source: Source) -> dict[str, Answer]:
        return _expected(self, source)


@cache
def _answers(name: str, source: Source) -> list[oracle_x86.Answers]:
    case = CASES[name]
    order = case.target.order
    return [source(dict(zip(order, row, strict=True)), case.target.kernel) for row in case.rows]


def _expected(case: Case, source: Source) -> dict[str, Answer]:
    listed = _answers(case.target.name, source)
    made = {}
    for name in listed[0]:
        values = [row[name] for row in listed]
        made[name] = (
            np.array([value or 0 for value in values], np.uint64),
            np.array([value is not None for value in values]),
        )
    return made


_EPT_SPACES: Final = (
    {"EXIT_REASON": 1, "EXIT_QUALIFICATION": 0x3FF, "KVM": 0x300},
    {"EXIT_REASON": 1, "EXIT_QUALIFICATION": 0x1FF80, "KVM": 1},
    {"KVM": KVM, "EXIT_REASON": 1},
)
_NPT_SPACES: Final = (
    {"EXITINFO1": 0x6_0000_001B | 3 << 48, "KVM": 5},
    {"KVM": KVM},
)
_SHADOW_SPACES: Final = (
    {"ERROR_CODE": 0x8000_807F, "KVM": 1},
    {"KVM": KVM},
)


def _case(target: Target) -> Case:
    match target.backend.name:
        case "x86-ept":
            return Case(target, oracle_x86.ept_facts, oracle_x86.ept_accessors, _EPT_SPACES)
        case "x86-npt":
            return Case(target, oracle_x86.npt_facts, oracle_x86.npt_accessors, _NPT_SPACES)
        case _:
            return Case(target, oracle_x86.shadow_facts, oracle_x86.shadow_accessors, _SHADOW_SPACES)


TARGETS: Final = [Target(b, "4k", kernel) for b in (EPT, NPT, SHADOW) for kernel in b.kernels]
CASES: Final = {target.name: _case(target) for target in TARGETS}
GAPS: Final = {
    "x86-ept": {"is_user", "is_protection_key"},
    "x86-npt": {"is_user", "is_protection_key", "gva_valid"},
    "x86-shadow": {"gpa_valid", "gpa_offset_valid", "is_table_walk", "is_final"},
}
NEVER_TOLD: Final = {
    "is_access_flag",
    "is_address_size",
    "is_external_abort",
    "granule_valid",
    "is_cache_op",
    "mmio_valid",
    "mmio_sign_extend",
    "mmio_wide",
    "mmio_ordered",
}


def sources(case: Case) -> Iterator[tuple[Source, dict[str, Definition]]]:
    yield case.facts, fact_definitions(case.target)
    yield case.accessors, dict(case.target.accessors)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gaps_are_the_declared_ones(case: Case) -> None:
    found = {name for name in FACTS if isinstance(getattr(case.target.definition, name), Gap)}
    assert found == NEVER_TOLD | GAPS[case.target.backend.name]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_transcription(case: Case) -> None:
    for source, definitions in sources(case):
        expected = case.expected(source)
        assert definitions.keys() == expected.keys()
        for name, definition in definitions.items():
            assert not differ(in_columns(definition, case.columns), expected[name]), f"{name} in columns"
            assert not differ(one_by_one(definition, case.target.order, case.rows), expected[name]), (
                f"{name} in scalar form"
            )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_hold_every_combination_of_the_bits_read(case: Case) -> None:
    for _, definitions in sources(case):
        for name, definition in definitions.items():
            word = definition.word if isinstance(definition, Maybe) else definition
            terms = word.terms if isinstance(word, Word) else ()
            tables = union(*({t.register: t.mask} for t in terms if t.table is not None))
            valid = definition.valid if isinstance(definition, Maybe) else ALWAYS
            decisive = union(definition.reads if isinstance(definition, Pred) else {}, tables, valid.reads)
            # of the exit reason only "is it 49" counts, which bit 0 of the rows decides; one bit alone needs no space
            decisive = {r: m & 1 if r == "EXIT_REASON" else m for r, m in decisive.items()}
            alone = sum(m.bit_count() for m in decisive.values()) == 1 or decisive.keys() == {"ERROR_CODE"}
            assert alone or any(all(m & ~space.get(r, 0) == 0 for r, m in decisive.items()) for space in case.spaces), (
                name,
                decisive,
            )


def test_only_reason_49_is_a_misconfiguration() -> None:
    reads = {"EXIT_REASON": 0xFFFF}
    (rows,) = combinations(reads)
    for kernel in EPT.kernels:
        misconfig = pred_column(_pred(Target(EPT, "4k", kernel).definition.is_reserved), rows)
        assert np.flatnonzero(misconfig).tolist() == [49]


def _pred(fact: Pred | Gap) -> Pred:
    assert isinstance(fact, Pred)
    return fact


# Mistakes.


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mutants_are_caught(case: Case) -> None:
    caught = 0
    for source, definitions in sources(case):
        expected = case.expected(source)
        for name, definition in definitions.items():
            for what, mutant in wrong(definition):
                if differ(in_columns(mutant, case.columns), expected[name]):
                    caught += 1
                else:
                    assert_same(definition, mutant, f"{name}: {what}")
    assert caught >= 150


# Shapes.


class X86:
    """The architecture that handles of this test belong to."""


TOLD: Final = {
    "gpa_page": "kvm_get_fault_gpa",
    "gpa_offset_bits": "gpa_offset",
    "gva_bits": "gva",
    "granule_bytes": "granule",
    "mmio_bytes": "mmio_size",
    "mmio_register_number": "mmio_register",
}
"""Value of the record -> how a PageFault tells it, or None."""


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_shapes_agree_with_the_transcription(case: Case) -> None:
    target = case.target
    bound: HandleOps[X86] = HandleOps(target.ops)
    for row in random.Random(2).sample(case.rows, 600):
        registers = dict(zip(target.order, row, strict=True))
        given = target.backend.given
        registers["KVM"] |= sum(KVM_REGISTER[mark].mask for mark in given.values())
        want = case.facts(registers, target.kernel)
        raw = target.decode(**registers)
        handle: Handle[X86] = Handle(raw.of)
        for shape in (raw, snapshot(raw), bound.bind(handle), Hybrid(raw.ops, raw.of)):
            _agrees(shape, want)


KVM_REGISTER: Final = EPT.registers[-1]


def _agrees(shape: View[Any] | Snapshot, want: oracle_x86.Answers) -> None:
    for name, value in want.items():
        if name in TOLD:
            told = getattr(shape, TOLD[name])
            assert (told() if callable(told) else told) == value, (type(shape), name)
        elif not name.endswith("_valid"):
            assert getattr(shape, name) == value, (type(shape), name)


# Laws.


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_causes_are_exclusive(target: Target) -> None:
    d = target.definition
    causes = [_pred(fact) for fact in (d.is_reserved, d.is_permission, d.is_translation)]
    for i, a in enumerate(causes):
        for b in causes[:i]:
            assert relate(a, b).disjoint
    assert relate(causes[0] | causes[1] | causes[2], ALWAYS).equal


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_hardware_reports_some_access_and_no_fetch_that_writes(target: Target) -> None:
    d, reachable = target.definition, target.backend.reachable
    fetch, write = _pred(d.is_exec), _pred(d.is_write)
    narrowed = {r: m for r, m in reachable.reads.items() if r != "EXIT_REASON"}
    columns = _some_rows(union(narrowed, fetch.reads, write.reads))
    inside = pred_column(reachable, columns)
    assert inside.any()
    assert not (inside & pred_column(fetch & write, columns)).any()
    assert (inside & pred_column(fetch, columns)).any()
    assert (inside & pred_column(write, columns)).any()


def _some_rows(reads: dict[str, int]) -> dict[str, U64Col]:
    # the bits of reachability are many (reserved ones must be 0): the low ones together are enough
    low = {name: mask & 0x3FF for name, mask in reads.items()}
    columns = next(combinations(low))
    reason = np.full(len(next(iter(columns.values()))), VIOLATION, np.uint64)
    columns = {"EXIT_REASON": reason, **{n: c for n, c in columns.items() if n != "EXIT_REASON"}}
    if "EXITINFO1" in columns:
        columns["EXITINFO1"] = columns["EXITINFO1"] | np.uint64(4)
    return columns
