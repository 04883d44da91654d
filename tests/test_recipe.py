"""docs/recipe.md leads from an empty folder to a backend that conforms, and to exactly the package in examples/toy.

In this page ```LANGUAGE title="FILE"`` blocks are files, and console blocks are run in the folder that has them.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from tests.conftest import ROOT
from tests.test_docs import commands, differences, shell

PAGE: Final = ROOT / "docs" / "recipe.md"
TOY: Final = ROOT / "examples" / "toy"
FILE: Final = re.compile(r'^```\w+ title="(?P<name>[^"]+)"\n(?P<body>.*?)^```$', re.MULTILINE | re.DOTALL)
CONSOLE: Final = re.compile(r"^```console\n.*?^```$", re.MULTILINE | re.DOTALL)
INSTALL: Final = "pip install -e ."
PYTEST: Final = "python -m pytest -q"


def test_the_recipe(tmp_path: Path) -> None:
    text = PAGE.read_text()
    parts = sorted([*FILE.finditer(text), *CONSOLE.finditer(text)], key=lambda m: m.start())
    assert len(parts) > 20
    for part in parts:
        if part.re is FILE:
            path = tmp_path / "toy" / part["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(part["body"])
        else:
            line = text.count("\n", 0, part.start()) + 1
            for command in commands(f"docs/recipe.md:{line}", part[0]):
                run(command.text, command.output, command.page, tmp_path)
    assert {p.relative_to(tmp_path / "toy"): p.read_text() for p in files(tmp_path / "toy")} == {
        p.relative_to(TOY): p.read_text() for p in files(TOY)
    }


def files(folder: Path) -> list[Path]:
    """Source files below a folder."""
    return [p for p in folder.rglob("*") if p.suffix in (".py", ".toml") and "dist-info" not in str(p)]


def run(command: str, output: str, page: str, folder: Path) -> None:
    """One command of the page, in the folder of the package."""
    if command == INSTALL:  # what an installation leaves behind, without a network
        info = folder / "toy" / "kvmfault_toy-0.1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvmfault-toy\nVersion: 0.1.0\n")
        (info / "entry_points.txt").write_text("[kvmfault.backends]\ntoy = kvmfault_toy:BACKEND\n")
        return
    loaded = any(e.name == "kvmfault" for e in entry_points(group="pytest11"))
    python = PYTEST.replace("python", sys.executable) + ("" if loaded else " -p kvmfault.pytest_plugin")
    done = shell(command.replace(PYTEST, python), folder, cwd=folder / "toy", path=str(folder / "toy"))
    assert done.returncode == 0, f"{page}: {command}: {done.stdout}"
    assert not differences(output, done.stdout), f"{page}: {command}\n{differences(output, done.stdout)}"
