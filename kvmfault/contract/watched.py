"""Watched: how a live view counts the events of an architecture. Declared by backends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from kvmfault.algebra.expr import Word

__all__ = ["Sort", "Watched", "WatchedEvents"]


class Sort(Enum):
    """What is counted."""

    FAULT = "faults"
    """Guest faults, by an event of their own."""
    HANDLED = "handled"
    """Faults that went as far as asking for an entry: counted as faults where those have no event."""
    ENTRY = "entries"
    """Entries of the second-stage table set or changed."""
    MMIO = "mmio"
    """Accesses to devices."""
    INVALIDATION = "invalidations"
    """What the host does to a range of the process's memory: unmap, age."""
    EXIT = "exits"
    """The guest stopped."""
    USER_EXIT = "user exits"
    """KVM_RUN returned."""
    WALK = "walks"
    """KVM walked the guest's own tables."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Watched:
    """What one event counts as."""

    sort: Sort
    by: str = ""
    """Field that tells kinds of it apart, in the words that its tracepoint has for it; a fault has its registers."""
    address: Word | None = None
    """Guest-physical address, over the event's fields; a fault has its registers."""


WatchedEvents: TypeAlias = Mapping[str, Watched]
"""By event name."""
