"""`kvmfault compare shapes`: the figures are those of the shapes, and each comparison can fail."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from kvmfault.compare import cost, equality, mistakes, shapes
from kvmfault.compare.cost import asked_by_path, instructions, times
from kvmfault.compare.equality import proven
from kvmfault.compare.hazards import blind, makers, prefaulted, replaced
from kvmfault.compare.mistakes import CAUGHT, IMPOSSIBLE, MISSED, MISTAKES, verdicts
from kvmfault.contract.accessors import FACTS, Accessors
from kvmfault.contract.shapes import SHAPES, STORED, Hybrid
from kvmfault.contract.target import Target, backend
from kvmfault.errors import UsageError
from tests.cli import Cli
from tests.conftest import ROOT
from tests.targets import newest

ARM, NPT = backend("arm64"), backend("x86-npt")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_the_shapes_are_what_they_are_said_to_be() -> None:
    raw = ARM.decode(ESR_EL2=0x9200_0047)
    made = {name: shape.on(ARM.ops)(raw) for name, shape in SHAPES.items()}
    assert isinstance(made["fields"], Accessors)
    assert isinstance(made["hybrid"], Hybrid)
    assert made["raw"] is raw
    assert SHAPES["fields"].stored == FACTS
    assert len(STORED) == len(Hybrid.__slots__) + 1  # the page and its validity are one member
    assert not hasattr(made["opaque"], "_registers")


@pytest.mark.parametrize("target", [t for t in newest() if t is not ARM], ids=lambda t: t.backend.name)
def test_all_shapes_are_proven_equal(target: Target) -> None:
    found = proven(target)
    assert {name: e.differing for name, e in found.items()} == dict.fromkeys(SHAPES, ())
    assert all(e.tried > 200 for e in found.values())


def test_a_shape_that_lies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    flipped = replace(SHAPES["fields"], on=lambda ops: lambda raw: replace(NPT.snapshot(raw), is_exec=False))
    monkeypatch.setattr(equality, "SHAPES", {**SHAPES, "fields": flipped})
    assert proven(NPT)["fields"].differing == ("is_exec",)


@pytest.mark.parametrize("run", [replaced, prefaulted])
@pytest.mark.parametrize("target", newest(), ids=lambda t: t.backend.name)
def test_only_faults_of_the_vcpu_change(target: Target, run: object) -> None:
    assert callable(run)
    found = run(target)
    assert list(found) == list(makers(target))
    for name, changed in found.items():
        assert bool(changed.answers) is (name not in SHAPES), name
    assert set(found["hybrid, of the vCPU"].answers) <= set(found["raw, of the vCPU"].answers)


def test_a_pending_load_ends_in_another_register() -> None:
    changed = replaced(ARM)["raw, of the vCPU"]
    assert changed.answers["mmio_register"] == (3, 7)
    assert changed.answers["mmio_size"] == (4, 8)
    assert changed.answers["is_write"] == (False, True)
    assert "is_write" not in replaced(ARM)["hybrid, of the vCPU"].answers  # it contradicts itself


def test_pairs_that_no_fact_tells_apart() -> None:
    found = blind(ARM)
    assert found.pairs > 100
    assert found.witness is not None
    one, other = (ARM.decode(**registers) for registers in found.witness)
    assert ARM.snapshot(one) == ARM.snapshot(other)
    assert one != other
    assert any(ARM.accessors[name].on(ARM.named(one)) != ARM.accessors[name].on(ARM.named(other)) for name in found.by)
    assert blind(NPT).pairs == 0  # its registers are all captured, one as the opaque word
    assert blind(NPT).hidden > 100


def test_what_the_path_asks_is_what_is_timed() -> None:
    asked = asked_by_path(ARM)
    assert {"is_write", "is_exec", "is_permission", "kvm_get_fault_gpa"} <= set(asked)
    took = times(NPT, SHAPES["raw"])
    assert took.make > 0
    assert 0 < took.access < took.fault


def test_instructions() -> None:
    if cost.missing_tools():
        pytest.skip(f"not installed: {', '.join(cost.missing_tools())}")
    raw, opaque, fields = (instructions(NPT, SHAPES[name]) for name in ("raw", "opaque", "fields"))
    assert list(raw.accesses) == list(FACTS)
    assert all(opaque.accesses[name] > raw.accesses[name] >= 2 for name in FACTS)  # a call and what it calls
    assert fields.make > raw.make
    assert set(fields.accesses.values()) == {2}  # a load and a return
    assert raw.fault > raw.make


def test_without_valgrind_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "valgrind" else "/bin/true")
    assert cost.missing_tools() == ["valgrind"]
    with pytest.raises(UsageError, match="not installed: valgrind"):
        instructions(NPT, SHAPES["raw"])


WORDS = {
    "a misspelt fact": 'has no attribute "is_wirte"',
    "an address used that may be none": 'Unsupported operand types for + ("None" and',
    "bytes where frames are wanted": 'incompatible type "Gpa"; expected "Gfn"',
    "a function not called": "could always be true",
    "a fact overwritten": "is read-only",
    "MMIO asked of any fault": 'has no attribute "mmio_size"',
    "registers read by neutral code": "not indexable",
    "registers given to another architecture's functions": 'incompatible type "Handle[Mine]"; expected "Handle[Other]"',
    "registers that still change": 'incompatible type "list[int]"; expected "tuple[int, ...]"',
    "a fact or register forgotten when a fault is made": "Missing named argument",
}


def test_mypy_catches_each_for_its_reason() -> None:
    found = verdicts()
    assert list(found) == [m.name for m in MISTAKES]
    for name, by_shape in found.items():
        for shape, verdict in by_shape.items():
            assert (verdict.word == IMPOSSIBLE) is (shape not in next(m for m in MISTAKES if m.name == name).programs)
            assert verdict.word != CAUGHT or WORDS[name] in verdict.says, (name, shape, verdict)
    of_registers = found["registers read by neutral code"]
    assert {s: v.word for s, v in of_registers.items()} == {
        "fields": IMPOSSIBLE, "raw": MISSED, "opaque": CAUGHT, "hybrid": MISSED
    }  # fmt: skip


def test_the_command(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {m.name: dict.fromkeys(SHAPES, mistakes.Verdict(MISSED)) for m in MISTAKES}
    monkeypatch.setattr(shapes, "verdicts", lambda: told)  # what mypy says is tested above
    monkeypatch.setattr(shapes, "missing_tools", lambda: ["valgrind"])
    page = tmp_path / "shapes.html"
    done = cli("compare", "shapes", "x86-npt", "x86-shadow", "--json", "--html", str(page))
    assert done.status == 0
    made = done.json
    assert made["equal"] is True
    assert made["missing"] == ["instruction counts: not installed: valgrind"]
    keys = {"equivalence", "definitions", "knowledge", "python", "replaced", "prefault", "blind", "mistakes"}
    assert keys <= made.keys()
    assert [row["shape"] for row in made["definitions"]] == list(SHAPES)
    html = page.read_text()
    assert re.search(r"<title>Shapes of a guest page fault</title>", html)
    assert html.count("<caption>") == len(keys)
    text = cli("compare", "shapes", "x86-npt")
    assert "Hazard: two syndromes that a snapshot cannot tell apart" in text.out
    assert "Not measured here" in text.out
    cli("compare", "shapes", "arm65").refused("no backend 'arm65'")
    monkeypatch.setattr("kvmfault.cli.shapes.compare", None)  # not reached: measuring takes long
    cli("compare", "shapes", "x86-npt", "--html", str(tmp_path)).refused("Is a directory")


COUNTED = [ARM, *(pytest.param(t, marks=pytest.mark.long) for t in newest() if t.name != ARM.name)]


@pytest.mark.parametrize("target", COUNTED, ids=lambda t: t.backend.name)
def test_the_page_has_the_counts_of_this_compiler(target: Target) -> None:
    if cost.missing_tools():
        pytest.skip(f"not installed: {', '.join(cost.missing_tools())}")
    page = (ROOT / "docs" / "shapes.md").read_text()
    counted = [instructions(target, shape) for shape in SHAPES.values()]
    if f"({counted[0].compiler}," not in page.replace(", -O2", " -O2"):
        pytest.skip(f"the page was measured with another compiler than {counted[0].compiler}")
    row = " | ".join(f"{c.make}, {c.access:.1f}, {c.fault}" for c in counted)
    assert f"| `{target.backend.name}` | {row} |" in page


def test_a_difference_is_a_finding(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {name: equality.Equality(1, 1, ("is_write",) if name == "raw" else ()) for name in SHAPES}
    report = shapes.Report((), (), equal=False)
    monkeypatch.setattr("kvmfault.cli.shapes.compare", lambda on, progress: report)
    assert cli("compare", "shapes", "x86-npt").status == 1
    monkeypatch.setattr(shapes, "proven", lambda target: wrong)
    section, equal = shapes._equality([NPT])
    assert not equal
    assert section.rows[0][-1] == "only fields, opaque, hybrid: is_write"
