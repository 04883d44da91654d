"""What the conformance checks say: findings, and which step of the recipe (docs/recipe.md) is about each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import islice
from typing import Final

from kvmfault.contract.backend import Backend
from kvmfault.contract.format import Memory, R, Stage2Format
from kvmfault.contract.target import Target
from kvmfault.errors import KvmfaultError
from kvmfault.types import Hpa

__all__ = [
    "AT_MOST",
    "Case",
    "Check",
    "Finding",
    "Missing",
    "Report",
    "Result",
    "Split",
    "State",
    "Step",
    "per_backend",
    "per_format",
    "per_target",
]

AT_MOST: Final = 4
"""Findings that one case tells; the first ones explain the rest."""


class Step(Enum):
    """A step of the recipe for a backend; the value is its number."""

    REGISTERS = 1
    FORMATS = 2
    FACTS = 3
    ENCODE = 4
    POLICIES = 5
    JOINTS = 6
    TRACEPOINTS = 7
    EXTRAS = 8

    def __str__(self) -> str:
        return f"step {self.value} ({self.name.lower()})"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not conform."""

    check: str
    on: str
    """The backend, format or target."""
    what: str
    step: Step
    """Where the recipe explains it."""

    def __str__(self) -> str:
        return f"{self.check}: {self.on}: {self.what} (recipe, {self.step})"


@dataclass(frozen=True, slots=True)
class Missing:
    """A part that the backend does not have. *required*: it is no backend without; else *costs* is what cannot be
    done."""

    what: str
    costs: str
    step: Step
    required: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that every backend must keep. *needs*: checks without which it can tell nothing."""

    name: str
    step: Step
    about: str
    """What holds, in one line."""
    split: Callable[[Backend], Iterable[tuple[str, Callable[[], Iterable[str]]]]]
    """What it looks at, one by one: a name, and a function that gives what does not hold."""
    needs: tuple[str, ...] = ()

    def cases(self, backend: Backend) -> Iterator[Case]:
        """The check on each thing that it looks at."""
        for on, find in self.split(backend):
            yield Case(self, on, find)


@dataclass(frozen=True, slots=True)
class Case:
    """One check on one backend, format or target."""

    check: Check
    on: str
    find: Callable[[], Iterable[str]]

    def __str__(self) -> str:
        return f"{self.check.name}-{self.on}"

    def findings(self) -> tuple[Finding, ...]:
        """What does not hold, at most AT_MOST. What the backend raises is a finding, too."""
        found: list[str] = []
        try:
            found.extend(islice(self.find(), AT_MOST))
        except KvmfaultError as e:
            found.append(f"raises {type(e).__name__}: {e}")
        except Exception as e:  # a backend in the making may raise anything  # noqa: BLE001
            frame = traceback.extract_tb(e.__traceback__)[-1]
            found.append(f"raises {type(e).__name__}: {e} ({frame.name}, line {frame.lineno} of {frame.filename})")
        return tuple(Finding(self.check.name, self.on, " ".join(text.split()), self.check.step) for text in found)

    def __call__(self) -> None:
        """Raises AssertionError with every finding: what a test calls."""
        found = self.findings()
        assert not found, "\n".join(map(str, found))


class State(Enum):
    """How a check ended."""

    HOLDS = "holds"
    FOUND = "found something"
    WAITS = "waits for another check"
    EMPTY = "nothing to look at yet"


@dataclass(frozen=True, slots=True)
class Result:
    """One check of a report. *cases*: how many things were looked at."""

    check: Check
    state: State
    cases: int = 0
    findings: tuple[Finding, ...] = ()
    waits_for: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A backend checked."""

    backend: Backend
    results: tuple[Result, ...]
    missing: tuple[Missing, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order of the checks."""
        return tuple(finding for result in self.results for finding in result.findings)

    @property
    def conforms(self) -> bool:
        """Nothing was found and nothing required is missing."""
        return not self.findings and not any(missing.required for missing in self.missing)


def per_backend(find: Callable[[Backend], Iterable[str]]) -> Callable[[Backend], list[Split]]:
    """For ``Check.split``: the backend itself."""
    return lambda backend: [(backend.name, lambda: find(backend))]


def per_format(find: Callable[[Stage2Format], Iterable[str]]) -> Callable[[Backend], list[Split]]:
    """For ``Check.split``: each format, also as it is where the CPU does not set accessed and dirty bits."""

    def split(backend: Backend) -> list[Split]:
        found: list[Split] = []
        for name, fmt in backend.formats.items():
            found.append((f"{backend.name}:{name}", partial(find, fmt)))
            other = fmt.with_hardware_ad(False)
            if other != fmt and _knows_age(other):
                found.append((f"{backend.name}:{name} without hardware A/D", partial(find, other)))
        return found

    return split


def _knows_age(fmt: Stage2Format) -> bool:
    # without such a CPU some formats keep no age at all, and KVM takes every page for used
    leaf = fmt.leaf(fmt.page_shift, Hpa(0), R, Memory.NORMAL, young=True, host_writable=False, tag=0)
    return not fmt.is_young(fmt.with_young(leaf, False))


def per_target(find: Callable[[Target], Iterable[str]]) -> Callable[[Backend], list[Split]]:
    """For ``Check.split``: each format with each kernel version."""

    def split(backend: Backend) -> list[Split]:
        return [
            (f"{backend.name}:{name}@{kernel}", partial(_on_target, find, backend, name, kernel))
            for name in backend.formats
            for kernel in backend.kernels
        ]

    return split


def _on_target(find: Callable[[Target], Iterable[str]], backend: Backend, name: str, kernel: str) -> Iterable[str]:
    return find(Target(backend, name, kernel))


Split = tuple[str, Callable[[], Iterable[str]]]
