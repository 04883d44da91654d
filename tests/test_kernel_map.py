"""docs/kernel-map.md: names, places, classes and the count of duplicates."""

from __future__ import annotations

import importlib
import inspect
import re
from itertools import permutations
from typing import Final

import pytest

from docs import kernel_map
from docs.kernel_calls import ALREADY, BUILT_FROM, CALLERS, ESR_FORM, NEEDS_VCPU, ORDERS, READ_DIRECTLY
from docs.kernel_convert import Conversion, Uses, closure, duplicates, sharing, steps
from docs.kernel_functions import FUNCTIONS
from docs.kernel_map import COLUMN_OF, RAW, Place, class_of, columns, documented, places
from kvmfault.algebra.expr import Pred, Word
from kvmfault.algebra.prove import relate, words_differ
from kvmfault.contract.target import backend
from kvmfault.path.run import PATH, Locked
from tests.conftest import ROOT

PAGE: Final = (ROOT / "docs" / "kernel-map.md").read_text(encoding="utf-8")
NAMES: Final = [name for named in FUNCTIONS.values() for name in named]

THREAD: Final = (
    "kvm_handle_guest_abort",
    "user_mem_abort",
    "kvm_is_exec_fault",
    "kvm_is_write_fault",
    "kvm_get_fault_gpa",
    "io_mem_abort",
    "kvm_handle_mmio_return",
    "kvm_translate_vncr",
)
"""What the discussion of August 2025 names, apart from the accessors."""


# -- functions and places


def test_what_the_discussion_names_is_on_the_page() -> None:
    assert [name for name in (*THREAD, *NAMES, *columns()) if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_a_place_and_a_proof(name: str) -> None:
    proof = next(named[name] for named in FUNCTIONS.values() if name in named)
    assert places(name)
    assert proof
    assert [path for path in proof if not (ROOT / "tests" / path).exists()] == []


@pytest.mark.parametrize("place", sorted({str(p): p for n in NAMES for p in places(n)}.items()), ids=lambda p: p[0])
def test_a_place_exists(place: tuple[str, Place]) -> None:
    _, (file, name, doc) = place
    found: object = importlib.import_module(place[1].module)
    if name.startswith("PATH["):
        flat = [s for e in PATH for s in (e.steps if isinstance(e, Locked) else (e,))]
        assert any(name == f'PATH["{s.name}"]' and s.doc == doc for s in flat)
        return
    *owners, last = name.split(".") if name else [""]
    for owner in owners:
        found = getattr(found, owner)
    if last and not hasattr(found, last):
        assert last in getattr(found, "__annotations__", {})  # a field without a default
    elif last:
        found = getattr(found, last)
        assert not callable(found) or inspect.cleandoc(doc).split() == (inspect.getdoc(found) or "").split()
    assert f"](../{file})" in PAGE


def test_a_place_names_the_function_as_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Place("a.py", "f", "Kernel: mmu_invalidate_retry_gfn."), Place("b.py", "", "as __mmu_invalidate_retry"))
    monkeypatch.setattr(kernel_map, "documented", lambda: (*found, Place("c.py", "C.m", "(mmu_invalidate_retry)")))
    assert [str(p) for p in places("mmu_invalidate_retry")] == ["[`c:C.m`](../c.py)"]


def test_private_names_are_no_places_and_attributes_are() -> None:
    names = {(p.module, p.name) for p in documented()}
    assert not [name for _, name in names if re.search(r"(^|\.)_", name)]
    assert {("kvmfault.contract.accessors", "Accessors.is_write"), ("kvmfault.path.run", 'PATH["screen"]')} <= names
    assert ("kvmfault.path.run", 'PATH["lookup"]') not in names  # the function itself is there


# -- accessors


def test_every_accessor_with_vectors_is_in_the_matrix() -> None:
    with_vectors = {name for name in kernel_map.vector_columns() if name.startswith("kvm_")}
    assert len(with_vectors) > 20
    assert with_vectors <= set(columns())
    assert set(COLUMN_OF.values()) <= kernel_map.vector_columns()


def test_every_accessor_of_the_kernel_that_we_define_is_in_the_matrix() -> None:
    defined = {name for name in backend("arm64@6.12").accessors if name.startswith("kvm_")}
    assert defined | set(NEEDS_VCPU) == set(columns())


def test_every_accessor_called_is_one_we_know() -> None:
    called = {name for row in (*CALLERS, *BUILT_FROM) for name in row.uses}
    assert called <= set(backend("arm64@6.12").accessors) | set(NEEDS_VCPU)
    assert not set(NEEDS_VCPU) & set(backend("arm64@6.12").accessors)


def test_callers_are_listed_once_and_call_something() -> None:
    names = [row.name for row in CALLERS]
    assert len(names) == len(set(names))
    assert [row for row in (*CALLERS, *BUILT_FROM) if not row.uses or len(set(row.uses)) < len(row.uses)] == []
    assert not set(names) & set(columns())
    assert {row.name for row in BUILT_FROM} <= set(columns())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kvm_is_write_fault", "ESR"),
        ("kvm_vcpu_trap_get_perm_fault_granule", "ESR"),
        ("kvm_vcpu_get_hfar", "FAR/HPFAR"),
        ("kvm_vcpu_get_fault_ipa", "FAR/HPFAR"),
        ("kvm_vcpu_get_disr", "DISR"),
        ("kvm_vcpu_is_be", "vCPU"),
    ],
)
def test_class(name: str, kind: str) -> None:
    assert class_of(name) == kind


def test_the_matrix_has_a_row_for_each_caller_and_a_mark_for_each_call() -> None:
    rows = [line.strip("| ").split(" | ") for line in kernel_map.matrix().splitlines()[3:]]
    assert len(rows) == len(CALLERS) + len(BUILT_FROM)
    calls = sum(len(row.uses) for row in (*CALLERS, *BUILT_FROM))
    assert sum(cell.strip() == "x" for row in rows for cell in row) == calls


def test_an_accessor_is_built_from_what_its_definition_reads() -> None:
    accessors = backend("arm64@6.12").accessors
    for row in BUILT_FROM:
        if row.name in accessors:
            whole = accessors[row.name].reads
            for part in row.uses:
                assert all(mask & ~whole.get(reg, 0) == 0 for reg, mask in accessors[part].reads.items()), part


@pytest.mark.parametrize(("vcpu", "esr"), ESR_FORM.items())
def test_both_forms_answer_alike(vcpu: str, esr: str) -> None:
    old, new = backend("arm64@6.12").accessors[vcpu], backend("arm64@7.4").accessors[esr]
    if isinstance(old, Pred) and isinstance(new, Pred):
        assert relate(old, new).equal
    else:
        assert isinstance(old, Word)
        assert isinstance(new, Word)
        assert words_differ(old, new) is None


# -- conversion: two callers of one accessor, and an accessor built from another, counted by hand

TINY: Final[Uses] = {"p": frozenset("a"), "q": frozenset("ab"), "r": frozenset("b")}
BUILT: Final[Uses] = {"w": frozenset("ab")}


@pytest.mark.parametrize(
    ("converted", "twice"), [("", ""), ("p", "a"), ("q", "ab"), ("r", "b"), ("pq", "b"), ("pr", "ab"), ("pqr", "")]
)
def test_duplicates(converted: str, twice: str) -> None:
    assert duplicates(converted, TINY, {}) == set(twice)


@pytest.mark.parametrize(
    ("callers", "converted", "already", "twice"),
    [
        ({"p": "w", "q": "w"}, "p", "", "w"),  # the vCPU form of w is one line around its ESR form
        ({"p": "w", "q": "a"}, "p", "", "a"),  # the ESR form of w needs that of a
        ({"p": "a", "q": "w"}, "p", "", "a"),  # the vCPU form of w needs that of a: w has no ESR form
        ({"p": "c", "q": "w"}, "", "a", "a"),
        ({"p": "c", "q": "w"}, "q", "a", ""),
        ({"p": "c", "q": "d"}, "p", "", ""),
    ],
)
def test_duplicates_of_what_is_built(callers: dict[str, str], converted: str, already: str, twice: str) -> None:
    uses = {name: frozenset(asked) for name, asked in callers.items()}
    assert duplicates(converted, uses, BUILT, already) == set(twice)


def test_closure() -> None:
    assert closure("w", BUILT) == set("wab")
    assert closure("w", BUILT, stop=frozenset("w")) == {"w"}
    assert closure("xw", {**BUILT, "x": frozenset("w"), "a": frozenset("x")}) == set("xwab")


def test_orders_of_the_tiny_example() -> None:
    every = Conversion(TINY, {})
    assert (every.best().after, every.best().total, every.best().peak) == ((1, 1, 0), 2, 1)
    assert (every.worst().total, every.worst().peak) == (3, 2)
    assert every.bound() == 2
    assert every.best("q").steps[0] == ("q",)


@pytest.mark.parametrize(
    ("callers", "already"),
    [
        (TINY, ""),
        ({"p": frozenset("wc"), "q": frozenset("a"), "r": frozenset("bc"), "s": frozenset("w")}, ""),
        ({"p": frozenset("wc"), "q": frozenset("a"), "r": frozenset("bc"), "s": frozenset("w")}, "b"),
        ({"p": frozenset("abc"), "q": frozenset("bcd"), "r": frozenset("cd"), "s": frozenset("ad")}, ""),
    ],
)
def test_the_search_finds_what_all_orders_have(callers: dict[str, frozenset[str]], already: str) -> None:
    every = Conversion(callers, BUILT, already)
    orders = [every.order(chosen) for chosen in permutations(range(len(every.steps)))]
    assert (every.best().total, every.best().peak) == min((o.total, o.peak) for o in orders)
    assert (every.worst().total, every.worst().peak) == max((o.total, o.peak) for o in orders)
    assert (every.lowest().peak, every.lowest().total) == min((o.peak, o.total) for o in orders)
    assert all(o.total >= every.bound() for o in orders)
    begun = [o for o in orders if o.steps[0] == every.steps[1]]
    assert every.best(every.steps[1][:1]).total == min(o.total for o in begun)


def test_callers_that_ask_for_the_same_are_one_step_and_strangers_none() -> None:
    callers = {
        "p": frozenset("a"),
        "q": frozenset("a"),
        "r": frozenset("ab"),
        "s": frozenset("c"),
        "t": frozenset[str](),
    }
    assert list(steps(callers)) == [("p", "q"), ("r",), ("s",)]
    assert set(sharing(callers, {})) == {"p", "q", "r"}
    assert set(sharing({"p": frozenset("w"), "q": frozenset("b"), "r": frozenset("c")}, BUILT)) == {"p", "q"}


# -- what the page says in words


def test_callers_of_one_step_ask_for_one_simple_accessor() -> None:
    many = [uses for names, uses in steps(kernel_map.callers()).items() if len(names) > 1]
    assert many
    assert all(len(uses) == 1 and not uses & set(kernel_map.built_from()) for uses in many)


def test_the_words_about_orders() -> None:
    every = kernel_map.conversion()
    assert len(kernel_map.pure()) == 22
    assert RAW not in kernel_map.pure()
    assert len(every.steps) == 13
    assert every.at_start == len(ALREADY)
    best = every.best()
    proxy = "__vgic_v2_perform_cpuif_access"
    assert {step[0] for step in best.steps[:3]} == {"kvm_handle_mmio_return", proxy, "io_mem_abort"}
    size_and_register = {"kvm_vcpu_dabt_get_as", "kvm_vcpu_dabt_get_rd"}
    askers = {row.name for row in CALLERS if size_and_register & set(row.uses)}
    assert askers == {step[0] for step in best.steps[:3]}
    named = {name: every.best(first) for name, first in ORDERS.items()}
    abort = named["the abort path first"]
    assert all(order.total <= abort.total and order.peak <= abort.peak for order in named.values())
    assert abort.after[0] > max(order.after[0] for name, order in named.items() if order is not abort)


def test_what_upstream_dropped_is_what_the_rule_lets_go() -> None:
    done = ORDERS["the abort path first"]
    uses, built = kernel_map.callers(), kernel_map.built_from()
    both = duplicates(done, uses, built, ALREADY)
    asked = closure((a for c in done for a in uses[c]), built)
    dropped = kernel_map.pure() - set(backend("arm64@7.4").accessors)
    assert asked - both == dropped | {"kvm_vcpu_trap_get_fault"}
    assert {name for name in both if name in ESR_FORM} == both


def test_orders_and_direct_reads_name_callers() -> None:
    known = {name for step in kernel_map.conversion().steps for name in step}
    assert {name for first in ORDERS.values() for name in first} <= known
    assert {"kvm_inject_s2_fault", "__populate_fault_info"} <= set(READ_DIRECTLY)
