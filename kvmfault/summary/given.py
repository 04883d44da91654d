"""What the sections are made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from kvmfault.contract.tracepoints import Role
from kvmfault.summary.figures import Cell, Column, Section
from kvmfault.summary.meaning import Meaning
from kvmfault.summary.partial import RULES, Partial, Reading
from kvmfault.summary.reasons import Known
from kvmfault.trace.recording import Lost, Meta

__all__ = ["TOP", "Given", "Source", "ranked", "shares"]

TOP: Final = 20
"""Rows of a list of the busiest."""


@dataclass(frozen=True, slots=True)
class Source:
    """What readers tell beside the events."""

    path: str
    meta: Meta
    events: Mapping[str, int]
    lost: Sequence[Lost] = ()
    damage: str | None = None
    unclaimed: int = 0
    """Fault events whose encoding is not known."""
    unplaced: int = 0
    """Exits that are faults, without an event that tells their address."""
    slots: str | None = None
    """Where memslots come from."""


class Given:
    """The gathered figures of a whole recording, with what is needed to read them."""

    def __init__(self, whole: Partial, reading: Reading, source: Source) -> None:
        self.whole: Partial = whole
        self.reading: Reading = reading
        self.source: Source = source

    @property
    def meaning(self) -> Meaning:
        """What events mean."""
        return self.reading.meaning

    @property
    def shift(self) -> int:
        """log2 of the bytes of a frame."""
        return self.reading.page_shift

    @cached_property
    def kinds(self) -> list[tuple[str, str, int | None, int]]:
        """(backend, kind, granule, faults)."""
        return list(self.rows("kinds"))

    @cached_property
    def faults(self) -> int:
        """How many there are."""
        return sum(n for *_, n in self.kinds)

    @property
    def placed(self) -> int:
        """Those whose guest-physical address is known."""
        return sum(n for *_, n in self.rows("ranges"))

    @property
    def known(self) -> Known:
        """What the recording can tell at all."""
        return Known(entries=self.has(Role.CHANGE), host=self.has(Role.UNMAP, Role.AGE))

    def has(self, *roles: Role) -> bool:
        """An event of one of *roles* is in the file."""
        return not self.source.events.keys().isdisjoint(self.meaning.names(*roles))

    def rows(self, name: str) -> Iterable[tuple[Any, ...]]:
        """Rows of a gathered table."""
        table = self.whole.tables.get(name)
        return () if table is None else table.iter_rows()

    def cut(self, name: str) -> tuple[str, ...]:
        """A note where the table is only a sample."""
        table, rule = self.whole.tables.get(name), RULES[name]
        full = table is not None and table.height >= rule.cap
        return (f"more than {rule.cap} different ones: a sample of them is counted",) if full else ()


def ranked(counts: Counter[Any]) -> list[tuple[Any, int]]:
    """The largest first; of equals in the order of their text."""
    return sorted(counts.items(), key=lambda c: (-c[1], str(c[0])))


def shares(key: str, title: str, column: Column, pairs: Iterable[tuple[Cell, int]], *notes: str) -> Section:
    """A table of counts by one value."""
    counts = Counter[Cell]()
    for value, n in pairs:
        counts[value] += n
    total = counts.total()
    rows = tuple((value, n, n / total) for value, n in ranked(counts))
    return Section(key, title, (column, Column("faults"), Column("share", "share")), rows, notes=notes)
