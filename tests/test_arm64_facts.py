"""Every arm64 fact and accessor equals an if/else transcription on all combinations of the bits it reads, in scalar
and column form and in all four shapes; generated mistakes in the definitions are noticed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Final

import numpy as np
import pytest

from arch.arm64 import BACKEND
from arch.arm64.facts import REACHABLE
from arch.arm64.registers import ORDER
from kvmfault.algebra.columns import U64Col, pred_column
from kvmfault.algebra.expr import ALWAYS, Maybe, Pred, Word, union
from kvmfault.algebra.prove import combinations, relate
from kvmfault.contract.accessors import FACTS, Accessors, Gap, map_accessors
from kvmfault.contract.shapes import Handle, HandleOps, Hybrid, Ops, View, snapshot
from kvmfault.contract.target import Target
from kvmfault.testing import shapes
from tests.definitions import VALID_BY, Answer, assert_same, differ, fact_definitions, in_columns, one_by_one, wrong
from tests.oracle_arm64 import Inputs, accessors, facts

TARGETS: Final = {
    (kernel, fmt): Target(BACKEND, fmt, kernel) for kernel in BACKEND.kernels for fmt in ("4k", "16k", "64k")
}
FULL: Final = [TARGETS["6.12", "4k"], TARGETS["7.4", "4k"]]
EC, FNV, S1PTW, WNR, FSC = 0x3F << 26, 1 << 10, 1 << 7, 1 << 6, 0x3F
SPACES: Final = (
    {"ESR_EL2": EC | S1PTW | WNR | FSC},
    {"ESR_EL2": FNV | S1PTW | FSC, "KVM": 0xC},
    {"ESR_EL2": 0x7FF << 14 | 1 << 8},
    {"ESR_EL2": 1 << 38 | 1 << 40, "HPFAR_EL2": 1 << 63, "KVM": 0x3},
)
"""Bits that are enumerated together, all others being 0: kind of access, its addresses, the instruction, the rest."""
Rows = dict[str, U64Col]


@cache
def rows() -> Rows:
    """Registers by name, one column each: the spaces, one-hot values with and without HPFAR bit 63, random ones."""
    parts = [part for space in SPACES for part in combinations(space)]
    one_hot = [{name: 1 << bit} for name in ORDER for bit in range(64)] + [{}]
    marked = [{**row, "HPFAR_EL2": row.get("HPFAR_EL2", 0) | 1 << 63} for row in one_hot]
    dice = random.Random(1)
    wild = [{name: dice.getrandbits(64) for name in ORDER} for _ in range(3000)]
    listed = [*one_hot, *marked, *wild]
    parts.append({name: np.array([row.get(name, 0) for row in listed], np.uint64) for name in ORDER})

    def column(name: str) -> U64Col:
        return np.concatenate([part.get(name, np.zeros(len(part["ESR_EL2"]), np.uint64)) for part in parts])

    return {name: column(name) for name in ORDER}


@cache
def tuples() -> list[tuple[int, ...]]:
    return list(zip(*(rows()[name].tolist() for name in ORDER), strict=True))


def inputs() -> Iterator[Inputs]:
    for esr, far, hpfar, disr, kvm in tuples():
        yield Inputs(esr, far, hpfar, bool(kvm & 4), bool(kvm & 8), bool(kvm & 1), bool(kvm & 2), disr)


@cache
def oracle(source: Callable[[Inputs, int, bool], dict[str, int | None]], kernel: str) -> dict[str, Answer]:
    """The transcription's answers on all rows, by name: values, and where there is one."""
    listed = [source(fault, 12, kernel == "7.4") for fault in inputs()]
    answers = {}
    for name in listed[0]:
        values = [row[name] for row in listed]
        valid = np.array([value is not None for value in values])
        answers[name] = np.array([value or 0 for value in values], np.uint64), valid
    return answers


@pytest.mark.parametrize("target", FULL, ids=lambda t: t.kernel)
@pytest.mark.parametrize("source", [facts, accessors], ids=["facts", "accessors"])
def test_equals_the_transcription(target: Target, source: Callable[[Inputs, int, bool], dict[str, int | None]]) -> None:
    definitions = fact_definitions(target) if source is facts else dict(target.accessors)
    expected = oracle(source, target.kernel)
    gaps = {name for name in expected if source is facts and isinstance(getattr(target.definition, name), Gap)}
    assert definitions.keys() == expected.keys() - gaps
    assert gaps == ({"is_user", "is_reserved"} if source is facts else set())
    columns = rows()
    wrong = {
        (name, form): count
        for name, definition in definitions.items()
        for form, got in (
            ("columns", in_columns(definition, columns)),
            ("scalar", one_by_one(definition, ORDER, tuples())),
        )
        if (count := differ(got, expected[name]))
    }
    assert not wrong


@pytest.mark.parametrize("target", FULL, ids=lambda t: t.kernel)
def test_rows_hold_every_combination_of_the_bits_read(target: Target) -> None:
    for name, definition in {**fact_definitions(target), **target.accessors}.items():
        tables = {} if isinstance(definition, Pred) else _table_bits(definition)
        valid = definition.valid if isinstance(definition, Maybe) else ALWAYS
        decisive = union(definition.reads if isinstance(definition, Pred) else {}, tables, valid.reads)
        assert any(
            all(mask & ~space.get(register, 0) == 0 for register, mask in decisive.items()) for space in SPACES
        ), (name, decisive)


def _table_bits(definition: Word | Maybe) -> dict[str, int]:
    # the rest of a word is linear: zero and the one-hot values, which are among the rows, decide it
    word = definition.word if isinstance(definition, Maybe) else definition
    return union(*({t.register: t.mask} for t in word.terms if t.table is not None))


@pytest.mark.parametrize("page_shift", [12, 14, 16])
@pytest.mark.parametrize("kernel", BACKEND.kernels)
def test_granules_of_every_page_size(kernel: str, page_shift: int) -> None:
    target = TARGETS[kernel, {12: "4k", 14: "16k", 16: "64k"}[page_shift]]
    for esr in range(64):
        fault = Inputs(esr)
        assert target.decode(ESR_EL2=esr).granule == facts(fault, page_shift, kernel == "7.4")["granule_bytes"]
        named = dict.fromkeys(ORDER, 0) | {"ESR_EL2": esr}
        expected = accessors(fault, page_shift, kernel == "7.4")
        for name in expected.keys() & {"kvm_vcpu_trap_get_perm_fault_granule", "kvm_s2_perm_fault_granule"}:
            assert target.accessors[name].on(named) == expected[name]


# Mistakes.


def test_mutants_are_caught() -> None:
    columns = rows()
    caught, same = 0, []
    seen: set[int] = set()
    for target in FULL:
        for source, definitions in ((facts, fact_definitions(target)), (accessors, dict(target.accessors))):
            expected = oracle(source, target.kernel)
            for name, definition in definitions.items():
                if id(definition) in seen:
                    continue
                seen.add(id(definition))
                for what, mutant in wrong(definition):
                    if differ(in_columns(mutant, columns), expected[name]):
                        caught += 1
                    else:
                        same.append((target.kernel, name, what, definition, mutant))
    assert caught >= 1000
    for kernel, name, what, definition, mutant in same:
        assert_same(definition, mutant, f"{kernel}: {name}: {what}")


# Shapes.


class Arm64:
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
PLAIN: Final = [name for name in FACTS if name not in TOLD and not name.endswith("_valid")]


def told(fault: object) -> dict[str, object]:
    answers: dict[str, object] = {name: getattr(fault, name) for name in PLAIN}
    for how in TOLD.values():
        member = getattr(fault, how)
        answers[how] = member() if callable(member) else member
    return answers


@pytest.mark.parametrize("target", FULL, ids=lambda t: t.kernel)
def test_shapes_agree_with_the_transcription(target: Target) -> None:
    dice = random.Random(2)
    expected = oracle(facts, target.kernel)
    for i in dice.sample(range(len(tuples())), 1500):
        registers = dict(zip(ORDER, tuples()[i], strict=True))
        given = {n: v for n, v in registers.items() if n in ("ESR_EL2", "DISR_EL1")}
        kvm = registers["KVM"] & 0xF
        given |= {n: registers[n] for n, bit in (("FAR_EL2", 4), ("HPFAR_EL2", 8)) if kvm & bit}
        want: dict[str, object] = {
            name: bool(expected[name][0][i]) if name != "syndrome" else int(expected[name][0][i]) for name in PLAIN
        }
        for name, how in TOLD.items():
            want[how] = int(expected[name][0][i]) if expected[name][1][i] else None
        for shape, fault in shapes(target, target.decode(**{**given, "KVM": kvm & 3})).items():
            assert told(fault) == want, shape


BOOLS: Final = [name for name in FACTS if name not in TOLD and name != "syndrome"]


@pytest.mark.parametrize("only", BOOLS)
def test_shapes_only_forward(only: str) -> None:
    values = {name: number for number, name in enumerate(("syndrome", *TOLD), 100)}
    named = map_accessors(NAMES, lambda name: lambda _: name == only, lambda name: lambda _: values[name])
    ops: Ops[tuple[int, ...]] = named
    none: tuple[int, ...] = ()
    handle: Handle[Arm64] = Handle(none)
    bound: HandleOps[Arm64] = HandleOps(ops)
    views = (View(ops, none), bound.bind(handle), Hybrid(ops, none), snapshot(View(ops, none)))
    for view in views:
        want: dict[str, object] = {name: name == only for name in PLAIN}
        want["syndrome"] = values["syndrome"]
        for value, how in TOLD.items():
            want[how] = values[value] if VALID_BY[value] == only else None
        assert told(view) == want


NAMES: Final[Accessors[str, str]] = Accessors(**{name: name for name in FACTS})


# Laws of what hardware gives.


def test_write_and_fetch_exclude_each_other() -> None:
    d = FULL[0].definition
    assert isinstance(d.is_write, Pred)
    assert isinstance(d.is_exec, Pred)
    assert relate(d.is_write, d.is_exec).disjoint


def test_reachable_is_a_small_part_with_every_kind() -> None:
    space = next(combinations(REACHABLE.reads))
    inside = pred_column(REACHABLE, space)
    assert 0 < inside.mean() < 0.05
    for name in ("is_write", "is_exec", "is_read", "is_translation", "is_external_abort", "mmio_valid", "is_cache_op"):
        fact = getattr(FULL[0].definition, name)
        both = pred_column(fact & REACHABLE, next(combinations((fact & REACHABLE).reads)))
        assert both.any(), name


@pytest.mark.parametrize(
    ("esr", "possible"),
    [
        (0x9200004F, True),
        (0x93C08047, True),
        (0x82000007, True),
        (0x82000047, False),  # WnR is reserved in an instruction abort
        (0x92000407, False),  # FnV without an external abort
        (0x92000410, True),
        (0x92000107, False),  # a cache operation without WnR
        (0x920000A1, False),  # alignment on a table walk
        (0x93C08087, False),  # an instruction described although its walk failed
        (0x9200003F, False),
        (0x5A00BEEF, False),
    ],
)
def test_reachable(esr: int, possible: bool) -> None:
    assert REACHABLE.on(dict.fromkeys(ORDER, 0) | {"ESR_EL2": esr}) is possible
