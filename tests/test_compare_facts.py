"""`kvmfault compare facts`: the matrix is complete; every law's verdict survives an evaluation that proves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import pytest

from kvmfault.algebra.columns import pred_column
from kvmfault.algebra.expr import ALWAYS, Pred
from kvmfault.algebra.prove import relate
from kvmfault.compare.facts import SORTS, Law, Verdict, laws, matrix, told
from kvmfault.contract.accessors import FACTS, Gap
from kvmfault.contract.target import Target, backend
from kvmfault.types import U64
from tests.cli import Cli
from tests.targets import newest


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@cache
def found() -> tuple[Law, ...]:
    return tuple(laws(newest()))


def law(name: str) -> Mapping[str, Verdict]:
    (one,) = (law for law in found() if law.name == name)
    return {t.backend.name: v for t, v in zip(newest(), one.verdicts, strict=True)}


def holds(name: str, facts: tuple[str, ...], answers: Mapping[str, bool]) -> bool:
    """The law on one fault, written out."""
    values = [answers[fact] for fact in facts if fact in answers]
    if name.endswith("never both"):
        return not all(values)
    if " only with " in name:
        return not answers[name.split(" ")[0]] or answers[name.split(" ")[-1]]
    return any(values)


def answers(target: Target, registers: Mapping[str, int]) -> dict[str, bool]:
    filled = {**dict.fromkeys(target.order, 0), **registers}
    facts = {name: getattr(target.definition, name) for name in SORTS}
    return {name: fact.on(filled) for name, fact in facts.items() if isinstance(fact, Pred)}


@pytest.mark.parametrize("target", newest(), ids=lambda t: t.backend.name)
def test_every_exception_breaks_its_law(target: Target) -> None:
    place, seen = newest().index(target), 0
    for one in found():
        verdict = one.verdicts[place]
        if verdict.witness is None:
            continue
        seen += 1
        assert not holds(one.name, one.facts, answers(target, verdict.witness)), one.name
        reachable = target.backend.reachable.on(dict.fromkeys(target.order, 0) | verdict.witness)
        assert reachable is (not verdict.holds), one.name
    assert seen


@pytest.mark.parametrize("target", newest(), ids=lambda t: t.backend.name)
def test_nothing_breaks_a_law_that_holds(target: Target) -> None:
    rng = np.random.default_rng(5)
    columns = {name: rng.integers(0, U64, 200_000, np.uint64, endpoint=True) for name in target.order}
    for one, verdict in ((one, one.verdicts[newest().index(target)]) for one in found()):
        if verdict.holds is not True or len(one.facts) != 2:
            continue
        a, b = (getattr(target.definition, name) for name in one.facts)
        within = pred_column(target.backend.reachable if verdict.witness else ALWAYS, columns)
        va, vb = pred_column(a, columns), pred_column(b, columns)
        if one.name.endswith("never both"):
            broken = va & vb
        elif one.name.endswith("always"):
            broken = ~va & ~vb
        else:
            broken = va & ~vb if one.name.startswith(one.facts[0]) else vb & ~va
        assert not (broken & within).any(), one.name


def test_what_is_known_of_the_architectures() -> None:
    both = law("is_write and is_exec never both")
    assert str(both["arm64"]) == "holds"
    assert both["powerpc"].state == "no"  # a fetch may have to set the reference bit of an entry
    assert both["x86-ept"].state == "reachable"
    assert both["x86-ept"].witness == {"EXIT_REASON": 0, "EXIT_QUALIFICATION": 6}
    read_write = law("is_read and is_write never both")
    assert read_write["arm64"].state == "always"
    assert read_write["x86-ept"].state == "no"  # one violation reports a read-modify-write
    assert law("is_reserved and is_table_walk never both")["arm64"].why == "not told: is_reserved"


def test_by_kinds_finds_what_enumeration_finds() -> None:
    target = backend("x86-npt")
    preds = {n: p for n in SORTS if isinstance(p := getattr(target.definition, n), Pred)}
    for a in preds.values():
        for b in preds.values():
            full, kinds = relate(a, b), relate(a, b, by_kinds=True)
            assert full.witnesses == kinds.witnesses
    ept = backend("x86-ept").definition
    assert isinstance(ept.is_write, Pred)
    assert isinstance(ept.is_exec, Pred)
    assert relate(ept.is_write, ept.is_exec).witnesses == relate(ept.is_write, ept.is_exec, by_kinds=True).witnesses


def test_the_matrix_has_every_fact_and_every_gap() -> None:
    made = matrix(newest())
    assert list(made) == list(FACTS)
    gaps = {(n, t.name) for n in FACTS for t in newest() if isinstance(getattr(t.definition, n), Gap)}
    assert {(n, t.name) for n, cells in made.items() for t, c in zip(newest(), cells, strict=True) if c.gap} == gaps
    assert str(told(backend("x86-npt"), "is_write")) == "W (1 bit: EXITINFO1 1)"
    assert str(told(backend("x86-npt"), "gva_bits")) == "-"
    assert str(told(backend("arm64"), "gpa_page")) == "HPFAR_EL2.FIPA << 12 (44 bits: HPFAR_EL2 47:4)"
    assert str(told(backend("x86-shadow"), "granule_valid")).startswith("not told: the shadow level is not reported")


def test_every_backend_is_compared_where_none_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmfault.compare.facts.laws", lambda *_, **__: iter(()))  # proved above
    assert cli("compare", "facts", "--json").json["targets"] == [t.name for t in newest()]


def test_the_command(cli: Cli) -> None:
    made = cli("compare", "facts", "arm64", "x86-ept", "--json").json
    assert made["targets"] == ["arm64:4k@7.4", "x86-ept:4k@7.4"]
    assert list(made["facts"]) == list(FACTS)
    write = made["facts"]["is_write"]["targets"]["arm64:4k@7.4"]
    assert write["reads"] == {"ESR_EL2": "0xfc0000ff"}
    assert made["facts"]["is_user"]["targets"]["x86-ept:4k@7.4"]["assumed"] != "NEVER"
    (both,) = (one for one in made["laws"] if one["law"] == "is_write and is_exec never both")
    assert both["targets"]["arm64:4k@7.4"] == {"state": "always", "why": "", "witness": None}
    text = cli("compare", "facts", "arm64", "x86-ept").out
    assert "laws that hold on one and not on another" in text
    assert max(map(len, text.splitlines())) <= 100
    alone = cli("compare", "facts", "x86-npt")
    assert "laws" not in alone.out
    cli("compare", "facts", "arm65").refused("no backend 'arm65'")
