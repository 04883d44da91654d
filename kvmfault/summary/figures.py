"""What is told of a recording: sections of rows, the same for text, JSON and the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Cell", "Column", "Histogram", "Section", "Summary"]

Cell: TypeAlias = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """Name and unit of a column: text, count, share, time, rate, ratio, address, bytes or change."""

    name: str
    unit: str = "count"
    wide: bool = False
    """Of those that are left out first where there is little room."""


@dataclass(frozen=True, slots=True)
class Section:
    """One table."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    keys: int = 1
    """Columns that name a row; the others are figures."""
    notes: tuple[str, ...] = ()

    def records(self) -> list[dict[str, Cell]]:
        """The rows by names of columns."""
        return [dict(zip((c.name for c in self.columns), row, strict=True)) for row in self.rows]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Times from exit to entry: (from, below, how many)."""

    name: str
    steps: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that is told of a recording. Times are ns, or with ``ticks`` those of its clock."""

    path: str
    about: Mapping[str, Cell]
    events: Mapping[str, int]
    """Count by name of everything in the file."""
    sections: tuple[Section, ...]
    unsaid: tuple[str, ...]
    """What the recording does not tell, and why."""
    start: int
    step: int
    """Width of a step of time."""
    rate: tuple[tuple[int, str, int], ...]
    """(number of the step from ``start``, kind, faults)."""
    place_step: int
    map: tuple[tuple[int, int, str, int], ...]
    """(number of the step, address, kind, faults); an address stands for ``place_step`` bytes."""
    histograms: tuple[Histogram, ...]
    ticks: bool
    damaged: bool

    def section(self, key: str) -> Section | None:
        """The table of that key."""
        return next((s for s in self.sections if s.key == key), None)
