"""trace.dat version 7: sections, which options say the places of, and what a file holds that lost its end."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

from kvmfault.errors import TraceError
from kvmfault.trace.binary import Cursor, Memory
from kvmfault.trace.datparts import (
    LARGEST_OPTION,
    MOST,
    Buffer,
    Container,
    Option,
    apart,
    check_page,
    read_cmdlines,
    read_events,
    read_ftrace,
    read_header,
)
from kvmfault.trace.extents import PageRange, codec, first_pages

__all__ = ["read_version7"]

_LARGEST_SECTION: Final = 1 << 26
_TEXTS: Final[dict[int, Callable[[Container, Cursor], None]]] = {
    Option.HEADER_INFO: read_header,
    Option.FTRACE_EVENTS: read_ftrace,
    Option.EVENT_FORMATS: read_events,
    Option.CMDLINES: read_cmdlines,
}
"""What reads the section that an option of the same number says the place of."""


def read_version7(box: Container, start: Cursor) -> None:
    """What *box* says after the start of a file of version 7. Raises TraceError where nothing can be read."""
    box.codec, version = start.string(64) or "none", start.string(64)
    codec(box.codec)  # refuses one that is not known
    if version:
        box.notes["compressed with"] = f"{box.codec} {version}"
    first = start.u64()
    sections = {}
    try:
        _options7(box, first)
    except TraceError as e:
        box.damage = e
        sections = _salvage7(box, start.at)
        if first >= box.file.size:
            what = f"the file was cut short: it ends here, after {box.file.size:,} bytes"
            lacks = (
                f"the index that it should have is at {first:#x}{'' if box.buffers else ', no page of events before'}"
            )
            box.damage = box.file.wrong(f"{what}, and {lacks}", box.file.size)
            if not box.buffers:
                raise box.damage from e
    for number, data in box.options:
        if number in _TEXTS:
            sections[number] = data.u64()
    for number, read in _TEXTS.items():
        if number in sections:
            read(box, _section(box, sections[number], number))
    for number, data in box.options:
        if number == Option.BUFFER and not (box.damage and box.buffers):
            _buffer7(box, data)
        if number == Option.BUFFER_TEXT:
            box.notes["text"] = "a buffer that holds only text (a latency tracer) was not read"


def _salvage7(box: Container, at: int) -> dict[int, int]:
    # A file that ends early lacks the options that say where everything is, for they come last. Sections follow each
    # other, and what follows the header of the buffer's are the pages of its CPUs, each from a page boundary.
    box.options.clear()
    sections: dict[int, int] = {}
    count = 0
    try:
        while (number := Cursor(box.file, at, box.file.size).u16()) != Option.BUFFER:
            head = Cursor(box.file, at + 8, box.file.size)
            if number == Option.DONE:
                data = _section(box, at, Option.DONE)
                while (option := data.u16()) != Option.DONE:
                    box.options.append((option, data.part(data.u32())))
            sections.setdefault(number, at)
            at += 16 + head.u64()
        count = next((Cursor(box.file, data.at, data.end).u32() for n, data in box.options if n == Option.CPUCOUNT), 0)
    except TraceError:
        return sections
    at += 16
    if ranges := _pages_from(box, at + -at % box.page, count):
        box.buffers.append(Buffer("", None, box.page, ranges))
        found = f"{len(ranges)} of {count} CPUs were found, and are counted from 0"
        box.notes["salvaged"] = f"the file ends before it says whose pages are whose: {found}"
    return sections


def _pages_from(box: Container, at: int, count: int) -> list[PageRange]:
    # The pages of *count* CPUs: compressed ones say how many they are; others begin where time goes back.
    ranges: list[PageRange] = []
    if box.codec == "none":
        bounds = pairwise(first_pages(box.file, at, box.page, count))
        return [PageRange(box.file, cpu, "none", a, b - a, box.page) for cpu, (a, b) in enumerate(bounds)]
    while len(ranges) < count and at < box.file.size:
        ranges.append(PageRange(box.file, len(ranges), box.codec, at, max(box.file.size - at, box.page), box.page))
        at = ranges[-1].ends()
        at += -at % box.page
    return ranges


def _options7(box: Container, at: int) -> None:
    seen: set[int] = set()
    while at:
        if at in seen:
            raise box.file.wrong("the sections of options go round in a circle", at)
        seen.add(at)
        data = _section(box, at, Option.DONE)
        at = 0
        while not data.empty:
            number, size = data.u16(), data.u32()
            if size > LARGEST_OPTION or len(box.options) > MOST:
                raise data.wrong("too many options, or one too large")
            option = data.part(size)
            if number == Option.DONE:
                at = option.u64()
                break
            box.options.append((number, option))


def _section(box: Container, at: int, expected: int) -> Cursor:
    head = Cursor(box.file, at, box.file.size)
    number, flags = head.u16(), head.u16()
    head.u32()
    size = head.u64()
    if number != expected:
        raise box.file.wrong(f"expected section {expected}, found {number}", at)
    if not flags & 1:
        return head.part(size)
    stored, full = head.u32(), head.u32()
    inflate = codec(box.codec)
    if inflate is None or full > _LARGEST_SECTION:
        raise box.file.wrong(f"a section compressed by {box.codec!r} to {stored} bytes, from {full}", at)
    data, wrong = inflate(head.take(stored), full)
    if wrong:
        raise box.file.wrong(wrong, at)
    return Cursor(Memory(box.file.path, data, at), 0, len(data))


def _buffer7(box: Container, data: Cursor) -> None:
    data.u64()
    name, clock, page, count = data.string(256), data.string(64), data.u32(), data.u32()
    check_page(page, data)
    if count > MOST:
        raise data.wrong(f"a buffer of {count} CPUs")
    entries = [(data.u32(), data.u64(), data.u64()) for _ in range(count)]
    cpus = [PageRange(box.file, cpu, box.codec, at, size, page) for cpu, at, size in entries]
    box.buffers.append(Buffer(name, clock or None, page, apart(box, cpus)))
