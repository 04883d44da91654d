"""`kvmfault emit json`: an evaluator that knows only the document gives what the library gives."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np
import pytest

from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.contract.accessors import FACTS, VALUES, Gap
from kvmfault.contract.target import Target, backend, backends
from kvmfault.emit.definitions import definitions
from kvmfault.types import U64
from tests.cli import Cli
from tests.targets import targets

ROWS: Final = 300


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def truth(tree: dict[str, Any], registers: dict[str, int]) -> bool:
    if "all" in tree:
        return all(truth(part, registers) for part in tree["all"])
    if "any" in tree:
        return any(truth(part, registers) for part in tree["any"])
    if "not" in tree:
        return not truth(tree["not"], registers)
    value = registers[tree["register"]] >> tree["lo"] & (1 << tree["width"]) - 1
    return value in {int(number, 16) for number in tree["in"]}


def value(tree: dict[str, Any], registers: dict[str, int]) -> int:
    total = int(tree["const"], 16)
    for term in tree["or"]:
        bits = registers[term["register"]] & int(term["mask"], 16)
        bits = bits >> term["shift"] if term["shift"] >= 0 else bits << -term["shift"]
        total |= int(term["table"][bits], 16) if "table" in term else bits
    return total


def told(made: dict[str, Any], registers: dict[str, int]) -> bool | int | str | None:
    if "gap" in made:
        return str(made["gap"])
    if "truth" in made:
        return truth(made["truth"], registers)
    if "valid" in made and not truth(made["valid"]["truth"], registers):
        return None
    return value(made["value"], registers)


def samples(target: Target) -> list[dict[str, int]]:
    """Random registers; the value of the code register often one that a fact compares with."""
    rng = np.random.default_rng(3)
    rows = [dict.fromkeys(target.order, 0), dict.fromkeys(target.order, U64)]
    for _ in range(ROWS):
        row = {name: int(rng.integers(0, U64, dtype=np.uint64)) for name in target.order}
        rows.append({n: v & int(rng.integers(0, U64, dtype=np.uint64)) for n, v in row.items()})
    return rows


@pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
def test_the_document_says_what_the_library_says(target: Target) -> None:
    document = json.loads(json.dumps(definitions([target])))
    (made,) = document["targets"]
    assert list(made["facts"]) == list(document["facts"]) == list(FACTS)
    assert {name: (of["valid"], of["value"]) for name, of in document["optional"].items()} == VALUES
    for registers in samples(target):
        for name in FACTS:
            of: Pred | Gap | Word = getattr(target.definition, name)
            assert told(made["facts"][name], registers) == (of.reason if isinstance(of, Gap) else of.on(registers)), (
                name
            )
            if isinstance(of, Gap):
                assert truth(made["facts"][name]["assume"], registers) == of.assume.on(registers)
        for name, accessor in target.accessors.items():
            assert isinstance(accessor, (Pred, Word, Maybe))
            assert told(made["accessors"][name], registers) == accessor.on(registers), name
        assert truth(made["reachable"], registers) == target.backend.reachable.on(registers)


def test_registers_are_laid_out_as_declared() -> None:
    for name, source in backends().items():
        (made,) = json.loads(json.dumps(definitions([backend(name)])))["targets"]
        assert [r["name"] for r in made["registers"]] == [r.name for r in source.registers]
        for told_of, register in zip(made["registers"], source.registers, strict=True):
            fields = {f["name"]: (f["hi"], f["lo"]) for f in told_of["fields"]}
            assert fields == {f.name: (f.hi, f.lo) for f in register}
            for f in told_of["fields"]:
                assert {int(k, 16): v for k, v in f["meanings"].items()} == dict(register[f["name"]].meanings)
        blank = {r: int(v, 16) for r, v in made["defaults"].items()}
        assert blank == source.defaults
        for given, marks in made["given"].items():
            registers = backend(name).named(backend(name).decode(**{given: 0}))
            assert all(registers[r] == int(mask, 16) for r, mask in marks.items())


def test_the_command(cli: Cli) -> None:
    assert cli("emit", "json").json == json.loads(json.dumps(definitions([backend(name) for name in backends()])))
    one = cli("emit", "json", "--backend", "arm64:16k@6.12", "--backend", "x86-npt").json
    assert [t["name"] for t in one["targets"]] == ["arm64:16k@6.12", "x86-npt:4k@7.4"]
    cli("emit", "json", "--backend", "nothing").refused("no backend 'nothing'")
