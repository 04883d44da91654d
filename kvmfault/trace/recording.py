"""What every reader of recordings gives, whatever the file: events by name as columns, and what the file says itself.

A frame holds the events of one name. Its first columns are the same for all:

========  ========  ==================================================================================
column    type      meaning
========  ========  ==================================================================================
place     UInt64    where to find it: line of a text recording, number of the record in time order of a
                    binary one; from 1, counting every record, asked for or not
time      Int64     ns, or ticks of the recording's clock (``Meta.ticks``)
cpu       UInt16    CPU that recorded it
pid       Int32     task that ran there
========  ========  ==================================================================================

then the event's own fields by the kernel's names, in the order of its format: integers as UInt64 or Int64 by their
signedness, whatever their width (it differs between kernels), pointers and bitmasks as UInt64, text as String, other
arrays as Binary. Words that a tool prints for a number (an exit reason, the type of an MMIO access) are that number
again. A field that a text form leaves out is a column of nulls if the backend declares it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Frames", "Lost", "Meta", "ReadStats", "RecordedEvent", "Recording"]


Frames: TypeAlias = "Mapping[str, pl.DataFrame]"
"""The events of one stretch of time, by event name; each frame sorted by place. No frame is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What a recording says of itself; None or empty: it does not."""

    kind: str
    """Such as ``trace.dat version 7, zstd``, ``perf.data``, ``raw pages``, ``text``."""
    page_size: int | None = None
    """Of the recording host, bytes."""
    release: str | None = None
    """Kernel release."""
    machine: str | None = None
    """As uname says: ``aarch64``, ``x86_64``."""
    clock: str | None = None
    ticks: bool = False
    """Times are ticks of that clock, not ns."""
    cpus: tuple[int, ...] = ()
    comms: Mapping[int, str] = field(default_factory=dict)
    """Names of tasks by pid."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Whatever else is worth showing: the command line, the date, the CPU's statistics."""


class Lost(NamedTuple):
    """Events that the kernel dropped."""

    cpu: int
    events: int | None
    """None: it does not say how many."""
    after: int | None
    """Time of the last event of that CPU before the gap; None: there was none."""
    before: int | None
    """Time of the first one after it."""


@dataclass(slots=True)
class ReadStats:
    """What a reader met, complete once its iterator is exhausted. Line numbers are the first few."""

    bytes: int = 0
    """Bytes taken from the file, compressed if it is: for a progress bar."""
    lines: int = 0
    events: Counter[str] = field(default_factory=Counter)
    """Every event met, by name, asked for or not."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Events nobody asked for."""
    misfits: Counter[str] = field(default_factory=Counter)
    """Events asked for whose body fits no pattern, where that is counted and not an error."""
    misfit_lines: list[int] = field(default_factory=list)
    unreadable: int = 0
    unreadable_lines: list[int] = field(default_factory=list)
    lost: Counter[int] = field(default_factory=Counter)
    """Events that the kernel says it dropped, by CPU."""
    lost_unknown: int = 0
    """Marks of lost events without a number."""
    overwritten: int = 0
    """Events that tracefs says were written over before it printed the rest; it does not tell the CPU."""
    gaps: list[Lost] = field(default_factory=list)
    """When events were lost, by CPU: the first ten thousand times."""
    ticks: bool = False
    """A stamp had no point, so times are ticks of the recording's clock, not ns."""
    damage: str | None = None
    """What could not be read: where reading ended early, what a file leaves out, lines that are no events."""


class RecordedEvent(NamedTuple):
    """One event as a row; ``fields`` by the kernel's names, without those that are null."""

    place: int
    time: int
    cpu: int
    pid: int
    name: str
    fields: Mapping[str, int | str | bytes]


class Recording(Protocol):
    """An opened recording. ``frames`` and ``events`` may be called again: each call reads it from the start."""

    @property
    def path(self) -> str:
        """How messages name it."""
        ...

    @property
    def meta(self) -> Meta:
        """What it says of itself; of a text recording, what was seen up to now."""
        ...

    def frames(self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None) -> Iterator[Frames]:
        """Stretches in time order, none earlier than the one before; only events named in *wanted*, if given.

        *stats* counts everything met, asked for or not, and is complete when the iterator is exhausted. Raises
        TraceError with the offset or line where nothing can be read; damage after that is told in ``stats.damage``.
        Memory is bounded by a block of the file, never by its size.
        """
        ...
