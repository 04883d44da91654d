"""A vCPU's cached translations: filled when the guest uses an entry, emptied only by the flushes that KVM issues.

So a flush that is missing can be seen: the guest still reaches a page through what it has cached.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from kvmfault.types import Gpa, Pfn

__all__ = ["Cached", "Tlb"]


class Cached(NamedTuple):
    """One cached leaf."""

    gpa: Gpa
    """First address that it translates."""
    shift: int
    pfn: Pfn
    """Host frame of ``gpa``."""
    prot: int
    dirty: bool
    """The dirty state was set when it was cached or since: a write through it marks nothing any more."""


class Tlb:
    """Cached leaves by address. Nothing is ever evicted: the worst case is what finds missing flushes."""

    __slots__ = ("_entries", "_shifts", "flushes")

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], Cached] = {}
        self._shifts: tuple[int, ...] = ()  # of all leaves that were ever cached, smallest first
        self.flushes: int = 0
        """Flushes that reached this vCPU."""

    def find(self, gpa: Gpa) -> Cached | None:
        """The cached leaf over *gpa*; of several (a block and a page of it) the smallest."""
        for shift in self._shifts:
            entry = self._entries.get((shift, gpa >> shift))
            if entry is not None:
                return entry
        return None

    def fill(self, entry: Cached) -> None:
        """Cache a leaf, in place of the same one with other bits."""
        self._entries[entry.shift, entry.gpa >> entry.shift] = entry
        if entry.shift not in self._shifts:
            self._shifts = tuple(sorted((*self._shifts, entry.shift)))

    def drop(self, gpa: Gpa) -> None:
        """Forget what translates *gpa*: what a CPU does before it reports a fault there."""
        for shift in self._shifts:
            self._entries.pop((shift, gpa >> shift), None)

    def flush(self, start: Gpa, end: Gpa) -> None:
        """Forget every leaf that translates an address in ``[start, end)``."""
        self.flushes += 1
        kept = {k: e for k, e in self._entries.items() if e.gpa >= end or e.gpa + (1 << e.shift) <= start}
        self._entries = kept

    def flush_all(self) -> None:
        """Forget everything."""
        self.flushes += 1
        self._entries = {}

    def entries(self) -> tuple[Cached, ...]:
        """Everything cached, by address."""
        return tuple(sorted(self._entries.values()))

    def fork(self) -> Tlb:
        """An independent copy."""
        new = Tlb()
        new._entries, new._shifts, new.flushes = dict(self._entries), self._shifts, self.flushes
        return new

    def key(self) -> Hashable:
        """What is cached, hashable. The count of flushes takes no part: it changes no behaviour."""
        return frozenset(self._entries.values())
