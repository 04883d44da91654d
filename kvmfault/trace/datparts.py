"""What a trace.dat is made of: numbers of its options and sections, and the texts that both versions have."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from kvmfault.errors import TraceError
from kvmfault.trace.binary import Cursor, File
from kvmfault.trace.formats import PAGE_SIZES, FormatText, PageHeader, header_page, task_names

if TYPE_CHECKING:  # what records, and needs the numbers alone, loads without numpy and polars
    from kvmfault.trace.extents import PageRange

__all__ = [
    "LARGEST_OPTION",
    "MOST",
    "Buffer",
    "Container",
    "Option",
    "apart",
    "check_page",
    "read_cmdlines",
    "read_events",
    "read_ftrace",
    "read_header",
]

LARGEST_OPTION: Final = 1 << 24
MOST: Final = 1 << 16
"""Options, CPUs, systems, events of a system: no file has more of any."""


class Option(IntEnum):
    """Ids of options and, in version 7, of sections. (man 5 trace-cmd.dat.v6, trace-cmd.dat.v7)"""

    DONE = 0
    DATE = 1
    CPUSTAT = 2
    BUFFER = 3
    TRACECLOCK = 4
    UNAME = 5
    OFFSET = 7
    CPUCOUNT = 8
    VERSION = 9
    TRACEID = 11
    TIME_SHIFT = 12
    TSC2NSEC = 14
    HEADER_INFO = 16
    FTRACE_EVENTS = 17
    EVENT_FORMATS = 18
    KALLSYMS = 19
    PRINTK = 20
    CMDLINES = 21
    BUFFER_TEXT = 22


@dataclass(slots=True)
class Buffer:
    """One ring buffer: the top one ("") or that of an instance."""

    name: str
    clock: str | None
    page: int
    cpus: list[PageRange]


@dataclass(slots=True)
class Container:
    """What the file says, before it is made use of."""

    file: File
    version: int
    page: int
    codec: str = "none"
    header: PageHeader | None = None
    texts: list[FormatText] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=dict)
    options: list[tuple[int, Cursor]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    damage: TraceError | None = None

    def option(self, number: int) -> str | None:
        """The last of its kind, as text."""
        for n, data in reversed(self.options):
            if n == number:
                return data.rest().split(b"\0", 1)[0].decode(errors="replace").strip()
        return None


def apart(box: Container, cpus: list[PageRange]) -> list[PageRange]:
    """*cpus*, of which no two claim the same bytes: that is damage, and would be read as often as it is claimed."""
    end = 0
    for data in sorted(cpus, key=lambda c: c.at):
        if data.size:
            if data.at < end:
                raise box.file.wrong(f"CPU {data.cpu} begins inside the pages of another", data.at)
            end = data.at + data.size
    return cpus


def read_header(box: Container, data: Cursor) -> None:
    """How ring-buffer pages are laid out."""
    for name in ("header_page", "header_event"):
        at = data.at
        if data.string(16) != name:
            raise data.wrong(f"expected {name}", at)
        text = data.text(data.u64())
        if name == "header_page":
            box.header = header_page(text, path=box.file.path, offset=at)


def read_ftrace(box: Container, data: Cursor) -> None:
    """Formats of tracefs' own events."""
    _texts(box, data, "ftrace", data.u32())


def read_events(box: Container, data: Cursor) -> None:
    """Formats of the other events, by system."""
    systems = data.u32()
    if systems > MOST:
        raise data.wrong(f"{systems} systems of events")
    for _ in range(systems):
        _texts(box, data, data.string(256), data.u32())


def _texts(box: Container, data: Cursor, system: str, count: int) -> None:
    if count > MOST:
        raise data.wrong(f"{count} events in the system {system!r}")
    for _ in range(count):
        size = data.u64()
        at = data.at
        box.texts.append(FormatText(system, data.text(size), at))


def read_cmdlines(box: Container, data: Cursor) -> None:
    """Names of tasks by pid."""
    box.comms = task_names(data.text(data.u64()))


def check_page(page: int, data: Cursor) -> None:
    """Raise TraceError where a page of *page* bytes is none."""
    if page not in PAGE_SIZES:
        raise data.wrong(f"pages of {page} bytes", data.at - 4)
