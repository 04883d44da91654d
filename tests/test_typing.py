"""What mypy refuses, and with which words: tests/typing/README.md says how a case is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import pytest
from mypy import api

from tests.conftest import ROOT

FOLDER: Final = "tests/typing"
MARK: Final = re.compile(r"#\s*error:\s*(.+?)\s*$", re.MULTILINE)
MESSAGE: Final = re.compile(r"(?P<path>[^:\n]+):(?P<line>\d+): error: (?P<text>.*)")


def disagreements(sources: Mapping[str, str], output: str) -> list[str]:
    """Where mypy's ``output`` differs from what the comments of ``sources`` (path -> text) announce."""
    expected = {
        (path, number): mark[1]
        for path, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (mark := MARK.search(line))
    }
    found: list[str] = []
    seen: set[tuple[str, int]] = set()
    for message in MESSAGE.finditer(output):
        where = (message["path"], int(message["line"]))
        seen.add(where)
        wanted = expected.get(where)
        if wanted is None:
            found.append(f"{where[0]}:{where[1]}: not announced: {message['text']}")
        elif wanted not in message["text"]:
            found.append(f"{where[0]}:{where[1]}: wanted {wanted!r}, mypy says {message['text']!r}")
    found += [f"{path}:{line}: accepted, wanted {expected[path, line]!r}" for path, line in expected.keys() - seen]
    for path, text in sources.items():
        if bool(MARK.search(text)) != path.split("/")[-1].startswith("reject_"):
            found.append(f"{path}: reject_*.py announce errors, accept_*.py announce none")
    return sorted(found)


def test_mypy_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # mypy prints paths relative to where it runs
    sources = {f"{FOLDER}/{p.name}": p.read_text() for p in sorted((ROOT / FOLDER).glob("*.py"))}
    for kind in ("accept_", "reject_"):
        assert any(f"/{kind}" in path for path in sources)
    options = ["--strict", "--config-file", "pyproject.toml", "--no-pretty", "--no-color-output", "--no-error-summary"]
    output, crash, _ = api.run([*options, *sources])
    assert not crash
    assert disagreements(sources, output) == []


@pytest.mark.parametrize(
    ("name", "source", "output", "expected"),
    [
        ("reject_a.py", "f(1)  # error: bad argument", "reject_a.py:1: error: A bad argument  [arg-type]", []),
        ("reject_a.py", "f(1)  # error: No\nf(2)", "reject_a.py:1: error: No  [x]", []),
        ("accept_a.py", "f(1)", "", []),
        ("accept_a.py", "f(1)", "accept_a.py:1: note: Revealed type", []),
        ("accept_a.py", "f(1)", "accept_a.py:1: error: No  [x]", ["accept_a.py:1: not announced: No  [x]"]),
        ("reject_a.py", "f(1)  # error: No", "", ["reject_a.py:1: accepted, wanted 'No'"]),
        (
            "reject_a.py",
            "f()  # error: No",
            "reject_a.py:1: error: Yes",
            ["reject_a.py:1: wanted 'No', mypy says 'Yes'"],
        ),
        ("reject_a.py", "f(1)", "", ["reject_a.py: reject_*.py announce errors, accept_*.py announce none"]),
    ],
)
def test_the_harness_notices(name: str, source: str, output: str, expected: list[str]) -> None:
    assert disagreements({name: source}, output) == expected
