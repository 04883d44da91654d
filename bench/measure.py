"""How a piece of work is timed, and how the result is put beside its budget."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np

from bench.cloop import compiler

Work = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, with what it is to be compared with."""

    work: str
    value: float
    unit: str
    beside: str = ""
    """What ``other`` measures: the same work done otherwise, in the same run."""
    other: float | None = None
    limit: float | None = None
    """The budget: of the ratio if there is one and ``on_value`` is not set, else of the value."""
    on_value: bool = False
    least: bool = False
    """The budget is what it must be at least, not at most."""

    @property
    def ratio(self) -> float | None:
        """How many times the other."""
        return None if self.other is None else self.value / self.other

    @property
    def budget(self) -> str:
        """``at most 3x``, ``at most 7 us``, ``at least 15x``, or nothing."""
        if self.limit is None:
            return ""
        unit = "x" if self._judges_ratio else f" {self.unit}"
        return f"at {'least' if self.least else 'most'} {self.limit:g}{unit}"

    @property
    def verdict(self) -> str:
        """``met``, or by how much it was missed."""
        if self.limit is None:
            return ""
        part = (self.ratio if self._judges_ratio and self.ratio is not None else self.value) / self.limit
        met = part >= 1 if self.least else part <= 1
        return "met" if met else f"missed: {part:.2f} times the budget"

    @property
    def _judges_ratio(self) -> bool:
        return self.other is not None and not self.on_value


def seconds(*works: Work, rounds: int) -> list[float]:
    """Median time of each work over *rounds*. They take turns, so that a slow moment of the machine hits all alike."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, times, strict=True):
            gc.collect()
            start = perf_counter()
            work()
            taken.append(perf_counter() - start)
    return [median(t) for t in times]


@dataclass(frozen=True, slots=True)
class Each(Generic[T]):
    """Work on each of *items* by the function that *begin* gives, anew in each round."""

    items: Sequence[T]
    begin: Callable[[], Callable[[T], object]]


def seconds_each(*works: Each[Any], rounds: int) -> list[float]:
    """Median time for one item of each work. They take turns.

    Sixteen items are timed together: enough to hide the clock, and so few that the machine seldom does something else
    meanwhile; when it does, the median does not see it.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, times, strict=True):
            do = work.begin()
            gc.collect()
            for first in range(0, len(work.items), 16):
                some = work.items[first : first + 16]
                start = perf_counter()
                for item in some:
                    do(item)
                taken.append((perf_counter() - start) / len(some))
    return [median(t) for t in times]


HEAD = ("work", "measured", "beside it", "ratio", "budget", "verdict")


def cells(row: Row) -> tuple[str, ...]:
    """The row as text."""
    beside = "" if row.other is None else f"{row.beside} {number(row.other)} {row.unit}"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    return row.work, f"{number(row.value)} {row.unit}", beside, ratio, row.budget, row.verdict


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Aligned columns with a head."""
    head, *body = _padded(rows)
    return "\n".join(line.rstrip() for line in (head, "-" * len(head), *body))


def markdown(rows: Sequence[Row]) -> str:
    """The same as a page of text, with what was measured on."""
    head, *body = (f"| {line} |" for line in _padded(rows, " | "))
    rule = "|" + "|".join("-" * len(cell) for cell in head.strip("|").split("|")) + "|"
    lines = "\n".join((head, rule, *body))
    return f"""# Speed

Written by `python -m bench --write`, all in one run. Times are medians; what is compared took turns.
An absolute budget is meant for a quiet machine of this class; a ratio holds on any.
The loop in C writes into an array that is there already; a column of ours is a new array each time.

Measured on: {machine()}.

{lines}
"""


def _padded(rows: Sequence[Row], separator: str = "  ") -> list[str]:
    texts = [HEAD, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [separator.join(f"{text:{width}}" for text, width in zip(t, widths, strict=True)) for t in texts]


def machine() -> str:
    """What was measured on: the kinds of CPU and software, nothing that names the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    found = [line.split(":")[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    model = found[0] if found else platform.machine()
    cc = compiler()
    built = _lines_of([cc, "--version"])[0] if cc else "none"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{model}, {os.cpu_count()} CPUs; {python}, numpy {np.__version__}; C compiler: {built}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _lines_of(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
