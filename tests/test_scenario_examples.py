"""The bundled scenarios hold on every target that they name, and each of their expectations can fail."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Final, get_args

import pytest

from kvmfault.contract.target import backend
from kvmfault.scenario.compare import compare
from kvmfault.scenario.events import Event
from kvmfault.scenario.expectation import Expect
from kvmfault.scenario.match import mismatches
from kvmfault.scenario.read import DOES, Source, parse_scenario, read_scenario
from kvmfault.scenario.run import run
from tests.cli import Cli
from tests.conftest import ROOT

FILES: Final = sorted((ROOT / "examples" / "scenarios").glob("*.toml"))
GOLDEN: Final = sorted((ROOT / "tests" / "data" / "scenarios").glob("*.txt"))
"""Named COLUMNS-SCENARIO.txt."""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def of(path: Path) -> Source:
    return read_scenario(path.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_scenario_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source = of(path)
    done = compare(source)
    assert not done.failures
    assert len(done.targets) == len(source.scenario.targets) or not source.scenario.targets
    shown = {d.event for d in done.declared}
    assert shown == {n for n, e in enumerate(source.scenario.event) if e.differs}, (
        "a declared difference that nobody shows"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_scenario_teaches(path: Path) -> None:
    lines = path.read_text().splitlines()
    comment = [line for line in lines[: lines.index("")] if line.startswith("# ")]
    assert len(" ".join(comment)) > 90
    assert all(len(line) <= 140 for line in lines)
    assert any(e.expect.model_fields_set for e in of_path(path).scenario.event)


def of_path(path: Path) -> Source:
    return parse_scenario(path.name, path.read_text())


# What is put in place of an expected value, so that it is wrong.
WRONG: Final[dict[str, Any]] = {
    "outcome": lambda v: "memory" if v == "stuck" else "stuck",
    "errno": lambda v: "EXDEV",
    "rule": lambda v: "no-such-rule",
    "exits": lambda v: [*v, {"kind": "mmio"}],
    "faults": lambda v: v + 1,
    "decided_by": lambda v: "nowhere",
    "mapped": lambda v: not v,
    "size": lambda v: "8M",
    "prot": lambda v: "--x",
    "writable": lambda v: not v,
    "executable": lambda v: not v,
    "frame": lambda v: "same" if v != "same" else "new",
    "loaded": lambda v: v ^ 1,
    "lost": lambda v: "1G",
    "pages": lambda v: [*v, 99999],
    "ring": lambda v: [*v, {"slot": 0, "page": 9}],
    "count": lambda v: v + 1,
    "young": lambda v: not v,
    "left": lambda v: 12345,
    "flushed": lambda v: not v,
    "counters": lambda v: {**v, "pf_taken": 77},
    "violates": lambda v: [],
}


def test_every_key_has_a_wrong_value() -> None:
    assert set(WRONG) == set(Expect.model_fields)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_wrong_expectation_is_noticed(path: Path) -> None:
    done = compare(of_path(path))
    data = tomllib.loads(path.read_text())
    for number, event in enumerate(data["event"]):
        for holder in (event, *event.get("differs", ())):
            expect = holder.get("expect", {})
            held = [r[number] for r in done.results if not mismatches(expectation(expect), r[number], 4096)]
            assert held or not expect
            for key, value in expect.items():
                wrong = expectation(expect | {key: WRONG[key](value)})
                for result in held:
                    assert key in [m.key.partition(".")[0] for m in mismatches(wrong, result, 4096)], (number, key)


def expectation(data: object) -> Expect:
    return Expect.model_validate_json(json.dumps(data))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_failed_expectation_is_status_1_and_one_line(path: Path, cli: Cli, tmp_path: Path) -> None:
    data = tomllib.loads(path.read_text())
    number = len(data["event"]) - 1
    wanted = data["event"][number].get("expect", {}).get("outcome")
    data["event"][number] |= {"expect": {"outcome": WRONG["outcome"](wanted)}, "differs": []}
    mutant = tmp_path / "mutant.json"
    mutant.write_text(json.dumps(data))
    done = cli("run", str(mutant), "--json")
    assert (done.status, done.err) == (1, "")
    assert len(done.json["failures"]) >= len(done.json["targets"])
    assert f"event[{number}]" in done.json["failures"][0]["where"]


def test_examples_use_every_event_and_nearly_every_outcome() -> None:
    events = [e for path in FILES for e in of_path(path).scenario.event]
    acted = [a for path in sorted((ROOT / "examples" / "explore").glob("*.toml")) for a in of_path(path).scenario.actor]
    events += [e for actor in acted for e in actor.event]
    assert {e.do for e in events} | {"zero", "break_cow", "split"} == set(DOES)
    kinds = {r.outcome for path in FILES for t in ("arm64@6.12", "x86-ept") for r in results(path, t)}
    assert len(kinds) >= 12
    assert {type(e) for e in events} == set(get_args(get_args(Event)[0]))


def results(path: Path, target: str) -> list[Any]:
    scenario = of_path(path).scenario
    named = {t.partition("@")[0].partition(":")[0] for t in scenario.targets}
    return list(run(scenario, backend(target))) if target.partition("@")[0] in named or not named else []


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda p: p.stem)
def test_output(golden: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    columns, _, name = golden.stem.partition("-")
    monkeypatch.setenv("COLUMNS", columns)
    done = cli("run", f"examples/scenarios/{name}.toml")
    assert done.status == 0
    assert done.out == golden.read_text()
    assert max(map(len, done.out.splitlines())) <= int(columns)


def test_there_are_golden_outputs() -> None:
    assert len(GOLDEN) >= 3
