"""The public interface: every module says what it exports, tests/data/api.txt shows the stable part of it."""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path

import pytest

from docs import api
from tests.conftest import ROOT
from tests.exports import defined, exported, modules, with_exports


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_names_what_it_exports(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = exported(tree) or []
    missing = sorted(set(defined(tree)) - set(names))
    assert not missing, f"{missing} are not in __all__: run python -m tests.exports"
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in api.modules() if p.stem != "__init__"]
)
def test_what_is_exported_is_there(name: str) -> None:
    module = import_module(name)
    for exported_name in getattr(module, "__all__", ()):
        assert hasattr(module, exported_name), exported_name


def test_the_snapshot_is_current() -> None:
    assert api.snapshot() == api.SNAPSHOT.read_text(), f"the public interface changed: {api.HOW}, read the difference"


def test_the_snapshot_shows_what_users_would_notice() -> None:
    text = api.SNAPSHOT.read_text()
    for line in (
        "\nkvmfault.testing.checks\n",
        "  def backend(target: str) -> Target\n",
        "    def access(self, gpa: int, size: int=1, *, write: bool=False",
        "    gpa: Gpa | None = None\n",
        "  Vm (from elsewhere)\n",
        "    NORMAL = 'normal'\n",
    ):
        assert line in text, line
    assert "  _" not in text.replace("  __", "")


def test_every_stable_module_is_there() -> None:
    for path in api.modules():
        assert path.exists(), path


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("import a\n\nX = 1\n_Y = 2\n", 'import a\n\n__all__ = ["X"]\n\nX = 1\n_Y = 2\n'),
        ("import a\n\n__all__ = ['a']\n\n\ndef f(): ...\n", "import a\n\n__all__ = ['a', 'f']\n\n\ndef f(): ...\n"),
        ("T = TypeVar('T')\n", "T = TypeVar('T')\n"),
        (
            "import a\n\nA, B = 1, 2\nclass C: ...\n",
            "import a\n\n__all__ = ['A', 'B', 'C']\n\nA, B = 1, 2\nclass C: ...\n",
        ),
        ("'''Text.'''\nx: int = 1\n", "\n__all__ = ['x']\n'''Text.'''\nx: int = 1\n"),
    ],
)
def test_exports_are_written(source: str, wanted: str) -> None:
    assert with_exports(source).replace('"', "'") == wanted.replace('"', "'")
