"""Every backend conforms: a test for each check of kvmfault.testing, through its plugin; and how that is asked for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

import pytest
from kvmfault_toy import BACKEND as TOY_BACKEND

from arch.x86 import EPT
from arch.x86.spte import EPT_4K_5LEVEL, NPT_4K_5LEVEL
from kvmfault.contract.backend import Backend, Behaviour
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.target import backends
from kvmfault.errors import UsageError
from kvmfault.testing import CHECKS, Case, Check, State, Step, check_backend, load_backend
from tests.cli import Cli
from tests.conftest import ROOT

TOY: Final = "kvmfault_toy:BACKEND"


@pytest.mark.kvmfault_backend(*backends(), TOY)
def test_conforms(conformance: Case) -> None:
    conformance()


@pytest.mark.parametrize("fmt", [EPT_4K_5LEVEL, NPT_4K_5LEVEL], ids=["ept", "npt"])
@pytest.mark.parametrize("check", [check for check in CHECKS if check.step is Step.FORMATS], ids=lambda c: c.name)
def test_formats_that_no_target_names(fmt: Stage2Format, check: Check) -> None:
    for case in check.cases(replace(EPT, formats={"4k": fmt})):
        case()


def test_checks_are_in_the_order_of_their_needs_and_say_what_they_hold() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert [check.step.value for check in CHECKS] == sorted(check.step.value for check in CHECKS)
    for check in CHECKS:
        assert set(check.needs) <= set(names)
        assert len(check.about.partition(". ")[0]) < 90, check.name


# Reports.


def test_a_backend_in_the_making() -> None:
    begun = Backend(name="begun", about="registers, and nothing else", registers=TOY_BACKEND.registers, code="CAUSE")
    report = check_backend(begun)
    assert not report.conforms
    assert not report.findings
    assert {r.check.name for r in report.results if r.state is State.HOLDS} == {"layout", "text"}
    assert [(m.what, m.step) for m in report.missing if m.required] == [
        ("formats", Step.FORMATS),
        ("facts", Step.FACTS),
        ("behaviour", Step.ENCODE),
    ]
    with pytest.raises(UsageError, match="has no behaviour yet"):
        begun.encode  # noqa: B018  the point


def test_a_behaviour_that_cannot_be_loaded() -> None:
    def broken() -> Behaviour:
        raise ImportError("no module behaviour")

    report = check_backend(replace(TOY_BACKEND, behaviour=broken))
    (missing,) = (m for m in report.missing if m.required)
    assert missing.what == "behaviour"
    assert "no module behaviour" in missing.costs
    assert "raises ImportError: no module behaviour" in report.findings[0].what


@pytest.mark.parametrize(
    ("spelled", "says"),
    [
        ("gone", "no backend 'gone' is installed (there is: arm64, "),
        ("gone:B", "gone:B cannot be loaded: ModuleNotFoundError: No module named 'gone'"),
        ("kvmfault_toy:B", "kvmfault_toy:B cannot be loaded: AttributeError"),
        ("kvmfault_toy:Backend.name", "is of type member_descriptor, not a Backend"),
        ("kvmfault_toy:", "kvmfault_toy: cannot be loaded"),
        (":B", "cannot be loaded: ValueError: Empty module name"),
    ],
)
def test_what_is_no_backend(spelled: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_backend(spelled)
    assert says in str(refused.value)


def test_a_module_that_ends_the_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="leaves:B cannot be loaded: SystemExit: 0"):
        load_backend("leaves:B")


# The command.


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_the_command_says_that_one_conforms(cli: Cli) -> None:
    done = cli("backend", "check", TOY)
    assert done.status == 0
    assert done.out.startswith("toy: a made-up architecture\n")
    assert done.out.endswith(f"\nconforms: {len(CHECKS)} cases\n")
    assert all(f"  {check.name} " in done.out for check in CHECKS)
    assert max(map(len, done.out.splitlines())) <= 120


def test_the_command_says_what_was_found(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom kvmfault_toy import *\nB = replace(BACKEND, code='NO', paste=None)\n"
    )
    monkeypatch.chdir(tmp_path)
    done = cli("backend", "check", "mine:B")
    assert done.status == 1
    assert "  layout, toy: code='NO' is none of CAUSE, ADDR\n    recipe: step 1 (registers)\n" in done.out
    assert "waits for layout" in done.out
    assert done.out.endswith("\ndoes not conform: 1 finding\n")
    told = cli("backend", "check", "mine:B", "--json")
    assert told.status == 1
    assert told.json["findings"] == [
        {"check": "layout", "on": "toy", "what": "code='NO' is none of CAUSE, ADDR", "step": 1}
    ]
    states = {check["name"]: check["state"] for check in told.json["checks"]}
    assert states.keys() == {check.name for check in CHECKS}
    assert (states["layout"], states["geometry"], states["laws"]) == ("found", "holds", "waits")
    assert {
        "what": "paste",
        "costs": "decode takes registers only, no line of a log",
        "step": 8,
        "required": False,
    } in (told.json["missing"])


def test_the_command_refuses_what_is_no_backend(cli: Cli) -> None:
    cli("backend", "check", "gone:B").refused("gone:B cannot be loaded")
    cli("backend", "check").refused("MODULE:ATTRIBUTE|NAME")


# The library and the plugin, from outside.


def outside(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in *folder*, with this checkout and the example to import."""
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples' / 'toy'}", "PATH": "/usr/bin:/bin"}
    run = [sys.executable, *words]
    return subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_checks_need_no_pytest(tmp_path: Path) -> None:
    code = "import sys, kvmfault.testing\nassert 'pytest' not in sys.modules and 'hypothesis' not in sys.modules"
    done = outside("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


PLUGIN: Final = (
    () if any(e.name == "kvmfault" for e in entry_points(group="pytest11")) else ("-p", "kvmfault.pytest_plugin")
)
"""Where the package is installed with its entry points, the plugin is loaded by itself."""


@pytest.mark.parametrize(
    ("config", "test", "status", "says"),
    [
        (f"kvmfault_backends = {TOY}", "def test_it(conformance): conformance()", 0, f"{len(CHECKS)} passed"),
        (
            "",
            f"import pytest\n@pytest.mark.kvmfault_backend('{TOY}')\ndef test_it(conformance): conformance()",
            0,
            "passed",
        ),
        ("", "def test_it(conformance): conformance()", 4, "which backends? name them by"),
        ("kvmfault_backends = gone:B", "def test_it(conformance): conformance()", 4, "gone:B cannot be loaded"),
        (
            "kvmfault_backends = broken:B",
            "def test_it(conformance): conformance()",
            1,
            "layout: toy: code='NO' is none of CAUSE, ADDR (recipe, step 1 (registers))",
        ),
    ],
)
def test_the_plugin(config: str, test: str, status: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{config}\npythonpath = .\n")
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "broken.py").write_text(
        "from dataclasses import replace\nfrom kvmfault_toy import BACKEND\nB = replace(BACKEND, code='NO')\n"
    )
    done = outside("-m", "pytest", *PLUGIN, "-q", "-p", "no:cacheprovider", "--strict-markers", folder=tmp_path)
    assert says in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.returncode in (status, 2 if status == 4 else status), done.stdout + done.stderr
