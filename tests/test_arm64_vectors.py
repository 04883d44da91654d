"""What the real accessors of 6.12 and 7.4 answered, row by row, consumed in every way there is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import cache
from typing import Any, Final

import numpy as np
import pytest

import arch.arm64.accessors
from arch.arm64 import BACKEND
from arch.arm64.registers import ORDER
from kvmfault.algebra.columns import Columns, pred_column, word_column
from kvmfault.algebra.expr import ALWAYS, NEVER, Maybe, Pred, Word
from tests.conftest import ROOT, VECTORS
from tests.kernel import arm64_accessors
from tests.kernel.arm64_accessors import COLUMNS, NEW_COLUMNS, WEIGHTS, answers

ROWS: Final[list[dict[str, Any]]] = json.loads((VECTORS / "arm64_vectors.json").read_text())["vectors"]


def line(row: dict[str, Any]) -> str:
    return f"{row['esr']} {row['far']} {row['hpfar']}"


def expected(row: dict[str, Any], *, new: bool) -> dict[str, str | None]:
    return {**row["v612"], **(row["new_differs"] if new else {})}


def test_the_vectors_are_there() -> None:
    assert len(ROWS) == 117
    assert len({row["name"] for row in ROWS}) == 117
    assert set(COLUMNS) == ROWS[0]["v612"].keys()
    assert len(COLUMNS) == 61
    assert set(NEW_COLUMNS) == {name for row in ROWS for name in row["new_differs"]} - set(COLUMNS)


@pytest.mark.parametrize("new", [False, True], ids=["6.12", "7.4"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["name"]))
def test_scalar(row: dict[str, Any], new: bool) -> None:
    (answer,) = answers([line(row)], new=new)
    assert answer == expected(row, new=new)


@cache
def named(new: bool) -> dict[str, Pred | Word | Maybe]:
    fmt = BACKEND.formats["4k"]
    older = dict(BACKEND.accessors["6.12"](fmt))
    return {**older, **BACKEND.accessors["7.4"](fmt)} if new else older


def in_columns(name: str, columns: Columns, *, new: bool) -> list[str | None]:
    """A column of the vectors from the column form."""
    if name not in WEIGHTS:
        return _column(named(new)[name], columns)
    parts = [(_column(named(new)[part], columns), weight) for part, weight in WEIGHTS[name].items()]
    sums = zip(*([int(v or "0", 16) * weight for v in column] for column, weight in parts), strict=True)
    return [hex(sum(row)) for row in sums]


def _column(accessor: Pred | Word | Maybe, columns: Columns) -> list[str | None]:
    if isinstance(accessor, Pred):
        return [hex(int(v)) for v in pred_column(accessor, columns)]
    word, valid = (accessor.word, accessor.valid) if isinstance(accessor, Maybe) else (accessor, ALWAYS)
    values = word_column(word, columns)
    return [hex(v) if ok else None for v, ok in zip(values, pred_column(valid, columns), strict=True)]


def registers(rows: list[dict[str, Any]]) -> Columns:
    keys = {"ESR_EL2": "esr", "FAR_EL2": "far", "HPFAR_EL2": "hpfar"}
    return {
        name: np.array([int(row[keys[name]], 16) if name in keys else 0 for row in rows], np.uint64) for name in ORDER
    }


@pytest.mark.parametrize("new", [False, True], ids=["6.12", "7.4"])
@pytest.mark.parametrize("name", [*COLUMNS, *NEW_COLUMNS])
def test_columns_of_one_and_in_a_block(name: str, new: bool) -> None:
    if name in NEW_COLUMNS and not new:
        assert name not in named(new)
        return
    want = [expected(row, new=new)[name] for row in ROWS]
    assert [in_columns(name, registers([row]), new=new)[0] for row in ROWS] == want
    padded = [*ROWS[:50], *ROWS, *reversed(ROWS)]
    assert in_columns(name, registers(padded), new=new)[50 : 50 + len(ROWS)] == want


# The adapter.


@pytest.mark.parametrize("name", [*COLUMNS, *NEW_COLUMNS])
def test_adapter_holds_no_decision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "0x43fff9249ffff 0x123456789abcdef0 0x8000000000400120"
    (before,) = answers([words], new=True)
    backend = dict(named(True))
    for part in WEIGHTS.get(name, {name: 1}):
        backend[part] = _other(backend[part])
    monkeypatch.setattr(arm64_accessors, "BACKEND", _Backend(backend))
    (after,) = answers([words], new=True)
    assert {n for n in before if before[n] != after[n]} == {name}


class _Backend:
    formats = BACKEND.formats

    def __init__(self, accessors: dict[str, Pred | Word | Maybe]) -> None:
        self.accessors = dict.fromkeys(BACKEND.kernels, lambda _: accessors)


def _other(accessor: Pred | Word | Maybe) -> Pred | Word | Maybe:
    match accessor:
        case Maybe(word, valid):
            return Maybe(word, ~valid)
        case Word():
            return Word((), 0x5A5A5A5A5A5A)
        case Pred():
            return ~accessor


def test_a_fact_removed_from_the_library_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arch.arm64.accessors._BOTH, "kvm_is_write_fault", NEVER)
    rows = {row["name"]: row for row in ROWS}
    (answer,) = answers([line(rows["dabt store translation L3"])], new=False)
    assert answer["kvm_is_write_fault"] == "0x0"


def run(monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return arm64_accessors.main(list(arguments))


def test_main_prints_a_line_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "92000047 0 0\n\n0X9200004F 0xfff 0x10\n") == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [answer["esr_fsc_is_permission_fault"] for answer in lines] == ["0x0", "0x1"]
    assert run(monkeypatch, "92000047 0 0\n", "--new") == 0
    assert json.loads(capsys.readouterr().out)["kvm_vcpu_get_fault_ipa"] == hex((1 << 64) - 1)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1 2\n", 1),
        ("1 2 3 4\n", 1),
        ("1 2 3\n1 2 xyz\n", 2),
        ("-1 2 33\n", 1),
        ("1 2 1_0\n", 1),
        ("1 2 0x10000000000000000\n", 1),
        ("\n\n1 2 \u0663\n", 3),
    ],
)
def test_main_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, number: int
) -> None:
    assert run(monkeypatch, text) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"line {number}: ")
    assert said.err.count("\n") == 1
    assert len(said.out.splitlines()) == text.count("1 2 3\n")


def test_runs_by_hand() -> None:
    command = [sys.executable, "-m", "tests.kernel.arm64_accessors", "--old"]
    done = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: ")
