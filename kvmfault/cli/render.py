"""Aligned text without a dependency: the fast commands start in the time that a table library takes to load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from itertools import zip_longest
from json import dumps
from textwrap import wrap

__all__ = ["columns", "grid", "plain", "to_json"]


def columns(rows: Sequence[Sequence[str]], *, indent: str = "", right: frozenset[int] = frozenset()) -> str:
    """Rows as aligned columns; the last one is not padded. Columns in *right* are right-aligned."""
    widths = [
        max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(max(map(len, rows), default=0))
    ]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(widths[i]) if i in right else cell if i == len(row) - 1 else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def grid(rows: Sequence[Sequence[str]], width: int, *, first: int = 0) -> Iterator[str]:
    """Rows as columns of folded text: the first as wide as it needs (at most *first*, if given), the rest alike."""
    needed = max(len(line) for row in rows for line in row[0].split("\n"))
    lead = min(needed, first) if first else needed
    each = (width - lead) // (len(rows[0]) - 1) - 2
    for row in rows:
        cells = [_folded(row[0], lead), *(_folded(cell, each) for cell in row[1:])]
        for parts in zip_longest(*cells, fillvalue=""):
            yield (parts[0].ljust(lead) + "".join(f"  {part.ljust(each)}" for part in parts[1:])).rstrip()


def _folded(cell: str, width: int) -> list[str]:
    # a line that begins with spaces keeps them on the lines that it is folded to
    folded: list[str] = []
    for line in cell.split("\n"):
        lead = line[: len(line) - len(line.lstrip())]
        folded += wrap(line, width, subsequent_indent=lead, break_on_hyphens=False)
    return folded


def plain(value: object) -> object:
    """Dataclasses, enums and tuples as what JSON has; integers above 2**53 and addresses stay exact as numbers."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return value


def to_json(value: object, *, indent: int | None = 2) -> str:
    """*value* as JSON text."""
    return dumps(plain(value), indent=indent)
