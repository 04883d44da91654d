"""The parts of docs/ that repeat declarations are current; pages are reachable and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from docs import declared
from docs.declared import table
from docs.generate import BLOCK, BLOCKS, HOW, current, pages
from kvmfault.contract.accessors import FACTS
from kvmfault.contract.policy import Policy
from kvmfault.path.run import PATH, Locked
from tests.conftest import ROOT

DOCS: Final = sorted((ROOT / "docs").rglob("*.md"))
LINK: Final = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
FILE: Final = re.compile(r"`((?:arch|docs|examples|kvmfault|tests)/[\w./-]+)`")


@pytest.mark.parametrize("page", pages(), ids=lambda p: p.name)
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text()
    assert text == current(text), f"docs/{page.name} is not current; {HOW}"


def test_every_block_is_shown_once() -> None:
    shown = [found[1] for page in pages() for found in BLOCK.finditer(page.read_text())]
    assert sorted({*shown}) == sorted(BLOCKS)
    assert set(shown) >= {"answers", "expressions", "policies", "presence"}


def test_a_stale_part_is_written_anew() -> None:
    page = "before\n<!-- generated: overview -->\nold\n<!-- end -->\nafter\n"
    written = current(page)
    assert "old" not in written
    assert written.startswith("before\n<!-- generated: overview -->\n| backend ")
    assert written.endswith("|\n<!-- end -->\nafter\n")
    assert current(written) == written


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(KeyError, match="nobody"):
        current("<!-- generated: nobody -->\n<!-- end -->\n")


def test_matrices_are_complete() -> None:
    assert re.findall(r"^\| `(\w+)`", declared.answers(), re.MULTILINE) == list(FACTS)
    assert re.findall(r"^\| `(\w+)`", declared.facts(), re.MULTILINE) == list(FACTS)
    assert re.findall(r"^\| `(\w+)`", declared.policies(), re.MULTILINE) == list(Policy.__annotations__)
    steps = [s.name for e in PATH for s in (e.steps if isinstance(e, Locked) else (e,))]
    assert re.findall(r"^\| `(\w+)`", declared.presence(), re.MULTILINE) == steps


@pytest.mark.parametrize("part", [declared.facts, declared.policy_meanings, declared.outcomes, declared.steps])
def test_everything_declared_is_documented(part: object) -> None:
    assert callable(part)
    assert [line for line in str(part()).splitlines() if re.search(r"\|\s*\|\s*(?!-)|: *$", line)] == []


def test_a_table_is_aligned_until_it_is_wide() -> None:
    assert table(("a", "b"), [("long", "x|y")]) == "| a    | b |\n|------|------|\n| long | x\\|y |"
    assert table(("a", "b"), [("x" * 200, "y")]).splitlines()[0] == "| a | b |"


def test_index_names_every_page_and_example() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    assert {p.relative_to(ROOT / "docs").as_posix() for p in DOCS} - {"index.md"} <= set(LINK.findall(index))
    examples = {f"examples/{p.name}" for p in (ROOT / "examples").glob("*.py")}
    assert examples <= set(FILE.findall(index))


@pytest.mark.parametrize("page", [*DOCS, ROOT / "README.md"], ids=lambda p: p.name)
def test_what_a_page_points_to_exists(page: Path) -> None:
    text = page.read_text()
    links = [link for link in LINK.findall(text) if not link.startswith("reference/")]  # the site makes those pages
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == []
