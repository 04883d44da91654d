"""Everything the documentation shows is run: Python blocks, console blocks and the examples.

- python: the blocks of one page are one program, in order.
- console and sh: each line after ``$ `` is a command (a trailing backslash continues it). It must succeed; write
  ``; echo $?`` to show a failure. Output lines below it must be what it prints (stdout and stderr as a terminal of 100
  columns would show them); ``...`` stands for any text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from doctest import ELLIPSIS, Example, OutputChecker
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import ROOT, VECTORS

PAGES: Final = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "recipe.md"),  # test_recipe.py runs it
]
EXAMPLES: Final = sorted((ROOT / "examples").glob("*.py"))
BLOCK: Final = re.compile(r"^```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

SHIM: Final = """#!{python}
import sys
from kvmfault.cli.main import main
sys.exit(main())
"""

NOT_RUN: Final = {
    "make test": "runs this test",
    "make bench": "measures",
    "make long": "takes long",
    "make exhaustive": "takes long",
    "git clone": "needs a network",
    "cd ": "follows a clone",
    "pip install": "needs a network",
    "python3 -m venv": "follows a clone",
}
"""Commands that the documentation may show unchecked. Any other must run."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a page and the output shown for it ("" where none is shown)."""

    page: str
    line: int
    text: str
    output: str = ""


def commands(page: str, text: str) -> Iterator[Command]:
    """The commands in the console blocks of ``text``."""
    for block in BLOCK.finditer(text):
        if block["kind"] not in ("console", "sh"):
            continue
        first = text.count("\n", 0, block.start("body")) + 1
        chunks = re.split(r"^\$ ", block["body"].replace("\\\n", ""), flags=re.MULTILINE)
        assert not chunks[0].strip(), f"{page}:{first}: a console block begins with a line '$ command'"
        for chunk in chunks[1:]:
            command, _, output = chunk.partition("\n")
            yield Command(page, first, command, output.rstrip("\n") + "\n" if output.strip() else "")


def program(text: str) -> str:
    """The Python blocks of ``text`` as one program, each line at the number it has in the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        if block["kind"] == "python":
            first = text.count("\n", 0, block.start("body"))
            body = block["body"].splitlines()
            lines[first : first + len(body)] = body
    return "\n".join(lines).rstrip() + "\n"


def differences(wanted: str, got: str) -> str:
    """How ``got`` differs from ``wanted``, in which ``...`` stands for any text; "" if it does not."""
    trimmed = "".join(f"{line.rstrip()}\n" for line in got.splitlines())  # an editor trims the page the same way
    checker = OutputChecker()
    if checker.check_output(wanted, trimmed, ELLIPSIS):
        return ""
    return checker.output_difference(Example("", wanted), trimmed, ELLIPSIS)


def shell(command: str, folder: Path, *, cwd: Path = ROOT, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``command`` in *cwd* with `kvmfault` being this checkout's; stderr is part of stdout. *path*: more folders to
    import from."""
    shim = folder / "kvmfault"
    shim.write_text(SHIM.format(python=sys.executable))
    shim.chmod(0o755)
    where = {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT),
    }
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        ["sh", "-c", command],
        cwd=cwd,
        env=os.environ | where | plain,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def shown() -> list[Command]:
    """Every command of every page that is to be run."""
    found = [c for p in PAGES if p.exists() for c in commands(p.relative_to(ROOT).as_posix(), p.read_text())]
    return [c for c in found if not c.text.startswith(tuple(NOT_RUN))]


def test_there_is_something_to_check() -> None:
    assert PAGES[0].exists()
    assert EXAMPLES


@pytest.mark.parametrize("command", shown(), ids=lambda c: f"{c.page}:{c.line}: {c.text}")
def test_command(command: Command, tmp_path: Path) -> None:
    # `make` would wait for the environment that this very run is part of.
    text = command.text.replace("make demo", f"{sys.executable} -m kvmfault.cli.demo")
    done = shell(text, tmp_path)
    assert done.returncode == 0, done.stdout
    if command.output:
        assert not (difference := differences(command.output, done.stdout)), difference


@pytest.mark.parametrize("page", [p for p in PAGES if p.exists()], ids=lambda p: p.name)
def test_python_blocks(page: Path, tmp_path: Path) -> None:
    script = tmp_path / f"{page.stem}.py"
    script.write_text(program(page.read_text()))
    done = shell(f"{sys.executable} -W error {script}", tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example(example: Path, tmp_path: Path) -> None:
    done = shell(f"{sys.executable} -W error examples/{example.name}", tmp_path)
    assert done.returncode == 0, done.stdout
    wanted = example.with_suffix(".out")
    assert not wanted.exists() or done.stdout == wanted.read_text()


def test_outputs_belong_to_examples() -> None:
    assert {p.stem for p in (ROOT / "examples").glob("*.out")} <= {p.stem for p in EXAMPLES}


def test_provenance_lists_every_vector() -> None:
    listed = re.findall(r"^\| `([^`]+\.json)`", (VECTORS / "PROVENANCE.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in VECTORS.glob("*.json"))


PAGE: Final = """
```console
$ echo one; \\
echo two
one
two
$ true
```
```python
x = 1
```
```text
$ not run
```
```python
print(x)
```
"""


def test_commands_of_a_page() -> None:
    assert list(commands("p", PAGE)) == [Command("p", 3, "echo one; echo two", "one\ntwo\n"), Command("p", 3, "true")]


def test_program_of_a_page_keeps_line_numbers() -> None:
    numbered = list(enumerate(PAGE.splitlines()))
    code = [(number, line) for number, line in enumerate(program(PAGE).splitlines()) if line]
    assert code == [(number, line) for number, line in numbered if line in ("x = 1", "print(x)")]


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n", "a\nb\n", False),
        ("a\n...\n", "a\nb\nc\n", True),
        ("a\n...\n", "b\nc\n", False),
        ("took ... s\n", "took 1.5 s\n", True),
        ("a\n", "a   \n", True),
        ("a\n", "", False),
    ],
)
def test_output_is_compared(wanted: str, got: str, same: bool) -> None:
    assert (differences(wanted, got) == "") is same


def test_shell_reports_failure(tmp_path: Path) -> None:
    assert shell("echo no >&2; exit 3", tmp_path).returncode == 3
    assert shell("echo no >&2; exit 3", tmp_path).stdout == "no\n"
