"""What a second-stage table consists of: its pages, and the entries that walks find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from kvmfault.types import Gpa, Hpa

__all__ = ["Found", "Levels", "Removed", "TablePage"]

Levels: TypeAlias = tuple[tuple[int, int], ...]
"""Of a table's levels from the root on: shift of its entries, and the mask of an index."""


class TablePage:
    """One table page: descriptors by index, and the tables that its table descriptors point to."""

    __slots__ = ("children", "entries", "for_fetch", "hpa", "owner")

    def __init__(self, hpa: Hpa, owner: object) -> None:
        self.hpa: Hpa = hpa
        self.owner: object = owner
        self.for_fetch: bool = False
        """It stands for a block that code may not run from. (sp->nx_huge_page_disallowed)"""
        self.entries: dict[int, int] = {}
        self.children: dict[int, TablePage] = {}

    def copy(self, owner: object) -> TablePage:
        """The same entries, for the fork with that token to change."""
        new = TablePage(self.hpa, owner)
        new.for_fetch = self.for_fetch
        new.entries = self.entries.copy()
        new.children = self.children.copy()
        return new

    def way(self, levels: Levels, gpa: int) -> Iterator[tuple[int, TablePage]]:
        """The tables under this root that translate *gpa*, each with the shift of the entry that points to it."""
        table = self
        for shift, mask in levels:
            child = table.children.get(gpa >> shift & mask)
            if child is None:
                return
            yield shift, child
            table = child

    def below(self, levels: Levels, base: int = 0) -> Iterator[tuple[int, int, TablePage]]:
        """Every table under this one, with the shift of the entry that points to it and the first address there."""
        shift, _ = levels[0]
        for index, child in self.children.items():
            gpa = base | index << shift
            yield shift, gpa, child
            yield from child.below(levels[1:], gpa)


@dataclass(frozen=True, slots=True)
class Removed:
    """What an unmap took away: leaves and the bytes they covered."""

    leaves: int
    size: int


class Found(NamedTuple):
    """Where a walk ended: the entry, and what it maps or would map."""

    gpa: Gpa
    """First address that the entry covers."""
    shift: int
    desc: int
