"""Runs spin on the model: what it found, and how many states it took."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

MODEL: Final = Path(__file__).parent / "invalidation.pml"
OLD_PAGE: Final = "old page"
"""A vCPU reaches a page after the host took it back."""
ENDLESS: Final = "endless"
"""A fault that nobody disturbs does not end."""
_DEEPEST: Final = 1_000_000
_FLAGS: Final = ("-w", "-DSAFETY")
_MEANS: Final = {"gone": OLD_PAGE, "undisturbed": ENDLESS}
_WRONG: Final = re.compile(r"^pan:1: (.*)$", re.MULTILINE)
_ERRORS, _STATES = re.compile(r"errors: (\d+)"), re.compile(r"^\s*(\d+) states, stored", re.MULTILINE)
_MOVES, _SECONDS = re.compile(r"^\s*(\d+) transitions", re.MULTILINE), re.compile(r"elapsed time ([\d.e+-]+) seconds")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a search ended with."""

    finds: str
    """"" if everything holds; ``OLD_PAGE``, ``ENDLESS``, or what else is wrong."""
    states: int
    moves: int
    seconds: float
    """Of the search; making the program is not counted."""


def missing_tool() -> str | None:
    """What has to be installed: spin makes C, and preprocesses with gcc."""
    return next((tool for tool in ("spin", "gcc") if shutil.which(tool) is None), None)


def check(switches: Sequence[str], *, reduce: bool = True, fast: bool = False) -> Verdict:
    """Search the model with these switches to the end, or to the first mistake. *fast*: the compiler takes its time.

    Raises RuntimeError if the search ended for another reason.
    """
    flags = (*_FLAGS, "-O2" if fast else "-O0", *(() if reduce else ("-DNOREDUCE",)))
    with TemporaryDirectory() as folder:
        _run(folder, ["spin", "-a", *(f"-D{switch}" for switch in switches), str(MODEL)])
        _run(folder, ["gcc", *flags, "-o", "pan", "pan.c"])
        told = _run(folder, ["./pan", f"-m{_DEEPEST}"])
    wrong = _WRONG.search(told)
    if "max search depth too small" in told or (wrong is None and int(_found(_ERRORS, told))):
        raise RuntimeError(f"spin did not come to an end with {' '.join(switches)}:\n{told}")
    finds = next((name for word, name in _MEANS.items() if word in wrong[1]), wrong[1]) if wrong is not None else ""
    return Verdict(finds, int(_found(_STATES, told)), int(_found(_MOVES, told)), float(_found(_SECONDS, told)))


def _run(folder: str, command: list[str]) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def _found(what: re.Pattern[str], told: str) -> str:
    match = what.search(told)
    if match is None:
        raise RuntimeError(f"spin did not say {what.pattern!r}:\n{told}")
    return match[1]
