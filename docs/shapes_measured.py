"""Parts of shapes.md that come out alike on every machine, as `kvmfault compare shapes` makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final

from docs.declared import newest, table
from kvmfault.compare import shapes
from kvmfault.summary.figures import Section
from kvmfault.summary.words import text

KEYS: Final = ("equivalence", "definitions", "knowledge", "replaced", "prefault", "blind", "mistakes")


@cache
def _sections() -> Mapping[str, Section]:
    return {section.key: section for section in (*shapes.deterministic(newest()), shapes.mistakes())}


def _block(key: str) -> Callable[[], str]:
    def write() -> str:
        section = _sections()[key]
        rows = [
            [text(cell, column.unit) for cell, column in zip(row, section.columns, strict=True)] for row in section.rows
        ]
        return table([column.name for column in section.columns], rows)

    return write


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {f"shapes_{key}": _block(key) for key in KEYS}
