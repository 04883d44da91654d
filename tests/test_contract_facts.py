"""The facts are listed once; whatever repeats the list for types' sake says exactly the same."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_type_hints

import pytest

import kvmfault
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred
from kvmfault.contract import accessors, fault, shapes
from kvmfault.contract.access import Access
from kvmfault.contract.accessors import FACTS, TRUTHS, VALUES, Accessors, Gap, map_accessors, stand_in
from kvmfault.contract.fault import MmioFault, PageFault
from kvmfault.contract.shapes import Hybrid, View
from kvmfault.contract.target import _gaps_by_member, backend
from tests.conftest import ROOT

OPTIONAL: Final = {
    "kvm_get_fault_gpa": ("gpa_valid", "gpa_page"),
    "gpa_offset": ("gpa_offset_valid", "gpa_offset_bits"),
    "gva": ("gva_valid", "gva_bits"),
    "granule": ("granule_valid", "granule_bytes"),
    "mmio_size": ("mmio_valid", "mmio_bytes"),
    "mmio_register": ("mmio_valid", "mmio_register_number"),
}
"""What a PageFault tells as a value or None, and the pair of facts it is made of."""
RAW: Final = {fact for pair in OPTIONAL.values() for fact in pair}


def public(cls: type) -> set[str]:
    """What the class itself declares."""
    return {name for name in vars(cls) if not name.startswith("_")}


def sorts() -> dict[str, str]:
    """Fact -> "B" or "U", as annotated."""
    return {f.name: str(f.type) for f in dataclasses.fields(Accessors)}


MEMBERS: Final = public(PageFault) | public(MmioFault)


def test_the_facts_are_the_members_of_a_page_fault() -> None:
    assert set(FACTS) - RAW == MEMBERS - OPTIONAL.keys()
    assert OPTIONAL.keys() <= MEMBERS
    assert public(PageFault).isdisjoint(public(MmioFault))
    assert {name for name in MEMBERS if name.startswith("mmio_")} == public(MmioFault)


def test_values_and_truths_say_the_same() -> None:
    assert VALUES == OPTIONAL
    assert set(TRUTHS) == {name for name, sort in sorts().items() if sort == "B"} - RAW
    assert set(TRUTHS) | VALUES.keys() | {"syndrome"} == MEMBERS


def test_a_record_offers_what_a_page_fault_wants() -> None:
    assert public(Accessors) - set(FACTS) == OPTIONAL.keys()


def test_a_view_offers_what_a_page_fault_wants() -> None:
    assert public(View) - {"ops", "of"} == MEMBERS
    assert public(Hybrid) == {"kvm_get_fault_gpa", "is_write", "is_exec", "is_permission"}


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_the_types_of_a_member_are_the_same_everywhere(name: str) -> None:
    protocol = PageFault if name in public(PageFault) else MmioFault
    wanted = _returns(protocol, name)
    assert _returns(View, name) == wanted
    if name in OPTIONAL:
        assert _returns(Accessors, name) == wanted
    else:
        assert {"B": bool, "U": int}[sorts()[name]] is wanted


def _returns(cls: type, name: str) -> object:
    member = inspect.getattr_static(cls, name)
    function = member.fget if isinstance(member, property) else member
    module = {Accessors: accessors, View: shapes, PageFault: fault, MmioFault: fault}[cls]
    return get_type_hints(function, vars(module))["return"]


def test_map_accessors_maps_every_member_to_itself_by_its_sort() -> None:
    names: Accessors[str, str] = Accessors(**{name: name for name in FACTS})
    mapped = map_accessors(names, lambda b: ("B", b), lambda u: ("U", u))
    assert {name: getattr(mapped, name) for name in FACTS} == {n: (sort, n) for n, sort in sorts().items()}


def test_every_fact_says_what_it_means() -> None:
    tree = ast.parse(Path(accessors.__file__).read_text())
    (record,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Accessors")
    documented = {
        before.target.id
        for before, after in zip(record.body, record.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) and isinstance(after, ast.Expr)
    }
    assert documented == set(FACTS)


def test_an_access_has_a_gap_for_every_member_that_can_be_unknown() -> None:
    def silent(fact: Pred | Gap) -> Pred | Gap:
        return Gap("not told")

    definition = map_accessors(backend("arm64").definition, silent, lambda u: u)
    assert _gaps_by_member(definition).keys() == {f.name for f in dataclasses.fields(Access)} - {"cause"}


def test_a_gap_stands_in_with_what_it_assumes() -> None:
    assert stand_in(Gap("unknown")) is NEVER
    assert stand_in(Gap("unknown", assume=ALWAYS)) is ALWAYS
    assert stand_in(ALWAYS) is ALWAYS


# The package's names.


def _imported_for_types() -> Iterator[tuple[str, str]]:
    tree = ast.parse((ROOT / "kvmfault" / "__init__.py").read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not exported: write it as 'as {alias.name}'"
            yield alias.name, str(node.module)


def test_the_names_of_the_package_are_those_that_mypy_sees() -> None:
    typed = dict(_imported_for_types())
    assert sorted(typed) == kvmfault.__all__
    assert typed == kvmfault._MODULES


@pytest.mark.parametrize("name", kvmfault.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(kvmfault, name) is not None
    assert name in dir(kvmfault)


def test_an_unknown_name_is_refused_as_python_does() -> None:
    with pytest.raises(AttributeError, match="module 'kvmfault' has no attribute 'Fault'"):
        kvmfault.Fault  # type: ignore[attr-defined]  # noqa: B018  # the point
