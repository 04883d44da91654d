"""What a second-stage table consists of: its pages, and the entries that walks find."""

from __future__ import annotations

from typing import NamedTuple

from kvmfault.types import Gpa, Hpa


class TablePage:
    """One table page: descriptors by index, and the tables that its table descriptors point to."""

    __slots__ = ("children", "entries", "for_fetch", "hpa", "owner")

    def __init__(self, hpa: Hpa, owner: object) -> None:
        self.hpa = hpa
        self.owner = owner
        self.for_fetch = False
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


class Found(NamedTuple):
    """Where a walk ended: the entry, and what it maps or would map."""

    gpa: Gpa
    """First address that the entry covers."""
    shift: int
    desc: int
