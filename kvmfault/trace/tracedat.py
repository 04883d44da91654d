"""trace.dat files as trace-cmd writes them: versions 6 and 7, of little-endian hosts.

See the man pages trace-cmd.dat.v6(5) and v7(5). The file says where everything is; only what is needed is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from kvmfault.errors import TraceError, UsageError
from kvmfault.trace.binary import Cursor, File, Memory
from kvmfault.trace.extents import Clock, PageRange, codec, counts_ns, first_pages
from kvmfault.trace.formats import PAGE_SIZES, Formats, FormatText, PageHeader, header_page, task_names
from kvmfault.trace.merge import RingRecording
from kvmfault.trace.recording import Meta
from kvmfault.trace.ring import Layout

__all__ = ["MAGIC", "embedded_formats", "open_tracedat"]

MAGIC: Final = b"\x17\x08\x44tracing"
_LARGEST_SECTION: Final = 1 << 26
_LARGEST_OPTION: Final = 1 << 24
_MOST: Final = 1 << 16
"""Options, CPUs, systems, events of a system: no file has more of any."""
# Options, and sections, by number.
_DONE, _DATE, _CPUSTAT, _BUFFER, _CLOCK, _UNAME, _OFFSET, _CPUCOUNT, _VERSION = 0, 1, 2, 3, 4, 5, 7, 8, 9
_TIME_SHIFT, _TSC2NSEC, _HEADER, _FTRACE, _EVENTS, _CMDLINES, _TEXT = 12, 14, 16, 17, 18, 21, 22


@dataclass(slots=True)
class _Buffer:
    # One ring buffer: the top one ("") or that of an instance.
    name: str
    clock: str | None
    page: int
    cpus: list[PageRange]


@dataclass(slots=True)
class _Container:
    # What the file says, before it is made use of.
    file: File
    version: int
    page: int
    codec: str = "none"
    compressor: str = ""
    header: PageHeader | None = None
    texts: list[FormatText] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=dict)
    options: list[tuple[int, Cursor]] = field(default_factory=list)
    buffers: list[_Buffer] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    damage: TraceError | None = None

    def option(self, number: int) -> str | None:
        # The last of its kind, as text.
        for n, data in reversed(self.options):
            if n == number:
                return data.rest().split(b"\0", 1)[0].decode(errors="replace").strip()
        return None


def open_tracedat(path: str, instance: str | None = None) -> RingRecording:
    """The recording in the file *path*; of its top buffer, or of the *instance* of that name.

    Raises TraceError with the offset where nothing can be read, UsageError if there is no such file or instance.
    """
    file = File(path)
    start = Cursor(file, 0, file.size)
    if start.take(len(MAGIC)) != MAGIC:
        raise file.wrong("not a trace.dat: it does not begin with 17 08 44 'tracing'", 0)
    version = start.string(16)
    if version not in ("6", "7"):
        raise file.wrong(f"trace.dat version {version!r}; versions 6 and 7 can be read", len(MAGIC))
    endian = start.u8()
    if endian != 0:
        raise file.wrong("of a big-endian host; only little-endian ones can be read", start.at - 1)
    start.u8()  # long of the user space that recorded: says nothing of the kernel's
    box = _Container(file, int(version), start.u32())
    _check_page(box.page, start)
    (_version7 if box.version == 7 else _version6)(box, start)
    return _recording(box, instance)


def _recording(box: _Container, instance: str | None) -> RingRecording:
    if box.header is None:
        raise box.damage or box.file.wrong("the file does not say how ring-buffer pages are laid out", 0)
    buffer = _chosen(box, instance)
    ticks, clock, name = _clock(box, buffer)
    uname = (box.option(_UNAME) or "").split()
    kind = f"trace.dat version {box.version}, {box.codec if box.codec != 'none' else 'uncompressed'}"
    if (version := box.option(_VERSION)) is not None:
        box.notes["trace-cmd"] = version
    stats = [data.rest().strip(b"\0").decode(errors="replace") for n, data in box.options if n == _CPUSTAT]
    for text in stats:
        head, _, rest = text.partition("\n")
        box.notes[head] = ", ".join(rest.splitlines())
    meta = Meta(
        kind=kind,
        page_size=box.page,
        release=uname[2] if len(uname) >= 4 else None,
        machine=uname[-1] if len(uname) >= 4 else None,
        clock=name,
        ticks=ticks,
        cpus=tuple(sorted(data.cpu for data in buffer.cpus)),
        comms=box.comms,
        notes=box.notes,
    )
    formats = Formats(box.file.path, box.texts)
    layout = Layout(buffer.page, box.header.data, box.header.long)
    return RingRecording(box.file.path, meta, formats, layout, buffer.cpus, clock, box.damage)


def _chosen(box: _Container, instance: str | None) -> _Buffer:
    if not box.buffers:
        raise box.damage or box.file.wrong("the file holds no buffer with events", 0)
    names = ", ".join(repr(b.name) if b.name else "the top one" for b in box.buffers)
    if instance is not None:
        for buffer in box.buffers:
            if buffer.name == instance:
                return buffer
        raise UsageError(f"{box.file.path}: no instance {instance!r}; the file has {names}")
    full = [b for b in box.buffers if any(data.size for data in b.cpus)]
    buffer = next((b for b in full if not b.name), full[0] if full else box.buffers[0])
    if len(box.buffers) > 1:
        box.notes["buffers"] = f"{names}; read here: {repr(buffer.name) if buffer.name else 'the top one'}"
    return buffer


def _clock(box: _Container, buffer: _Buffer) -> tuple[bool, Clock, str | None]:
    # Whether times are ticks, how they are made of stamps, and the clock's name.
    text = box.option(_CLOCK) or ""
    current = re.search(r"\[([^\]]*)\]", text)
    name = buffer.clock or (current[1] if current else text) or None
    offset = multiplier = shift = 0
    for number, data in box.options:
        if number in (_DATE, _OFFSET):
            shown = data.rest().split(b"\0", 1)[0].decode(errors="replace").strip()
            try:
                value = int(shown, 0)
            except ValueError:
                box.notes["time"] = f"an offset that is no number, {shown[:40]!r}, was not added"
                continue
            offset += value * 1000 if number == _DATE else value
        elif number == _TSC2NSEC:
            multiplier, shift = data.u32(), data.u32()
            if shift >= 64:
                raise box.file.wrong(f"a clock cannot be scaled by 2^{shift}", data.at - 4)
        elif number == _TIME_SHIFT:
            box.notes["time"] = "stamps of this guest were not moved to the clock of its host"
    if offset:
        box.notes["time offset"] = f"{offset} ns were added to every stamp, as the file says"
    ticks = not counts_ns(name) and not multiplier
    return ticks, Clock(multiplier, shift, offset), name


# -- version 7 -----------------------------------------------------------------------------------------


def _version7(box: _Container, start: Cursor) -> None:
    box.compressor, version = start.string(64) or "none", start.string(64)
    box.codec = box.compressor
    codec(box.codec)  # refuses one that is not known
    if version:
        box.notes["compressed with"] = f"{box.compressor} {version}"
    first = start.u64()
    sections = {}
    try:
        _options7(box, first)
    except TraceError as e:
        box.damage = e
        sections = _salvage7(box, start.at)
        if first >= box.file.size:
            lacks = f"the index that it should have is at {first:#x}{'' if box.buffers else ', and no page of events before'}"
            box.damage = box.file.wrong(f"the file was cut short: it ends here, {lacks}", box.file.size)
            if not box.buffers:
                raise box.damage from e
    for number, data in box.options:
        if number in (_HEADER, _FTRACE, _EVENTS, _CMDLINES):
            sections[number] = data.u64()
    for number, read in ((_HEADER, _header_info), (_FTRACE, _ftrace), (_EVENTS, _events), (_CMDLINES, _cmdlines)):
        if number in sections:
            read(box, _section(box, sections[number], number))
    for number, data in box.options:
        if number == _BUFFER and not (box.damage and box.buffers):
            _buffer7(box, data)
        if number == _TEXT:
            box.notes["text"] = "a buffer that holds only text (a latency tracer) was not read"


def _salvage7(box: _Container, at: int) -> dict[int, int]:
    # A file that ends early lacks the options that say where everything is, for they come last. Sections follow each
    # other, and what follows the header of the buffer's are the pages of its CPUs, each from a page boundary.
    box.options.clear()
    sections: dict[int, int] = {}
    count = 0
    try:
        while (number := Cursor(box.file, at, box.file.size).u16()) != _BUFFER:
            head = Cursor(box.file, at + 8, box.file.size)
            if number == _DONE:
                data = _section(box, at, _DONE)
                while (option := data.u16()) != _DONE:
                    box.options.append((option, data.part(data.u32())))
            sections.setdefault(number, at)
            at += 16 + head.u64()
        count = next((Cursor(box.file, data.at, data.end).u32() for n, data in box.options if n == _CPUCOUNT), 0)
    except TraceError:
        return sections
    at += 16
    if ranges := _pages_from(box, at + -at % box.page, count):
        box.buffers.append(_Buffer("", None, box.page, ranges))
        found = f"{len(ranges)} of {count} CPUs were found, and are counted from 0"
        box.notes["salvaged"] = f"the file ends before it says whose pages are whose: {found}"
    return sections


def _pages_from(box: _Container, at: int, count: int) -> list[PageRange]:
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


def _options7(box: _Container, at: int) -> None:
    seen: set[int] = set()
    while at:
        if at in seen:
            raise box.file.wrong("the sections of options go round in a circle", at)
        seen.add(at)
        data = _section(box, at, _DONE)
        at = 0
        while not data.empty:
            number, size = data.u16(), data.u32()
            if size > _LARGEST_OPTION or len(box.options) > _MOST:
                raise data.wrong("too many options, or one too large")
            option = data.part(size)
            if number == _DONE:
                at = option.u64()
                break
            box.options.append((number, option))


def _section(box: _Container, at: int, expected: int) -> Cursor:
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


def _buffer7(box: _Container, data: Cursor) -> None:
    data.u64()
    name, clock, page, count = data.string(256), data.string(64), data.u32(), data.u32()
    _check_page(page, data)
    if count > _MOST:
        raise data.wrong(f"a buffer of {count} CPUs")
    entries = [(data.u32(), data.u64(), data.u64()) for _ in range(count)]
    cpus = [PageRange(box.file, cpu, box.codec, at, size, page) for cpu, at, size in entries]
    box.buffers.append(_Buffer(name, clock or None, page, _apart(box, cpus)))


def _apart(box: _Container, cpus: list[PageRange]) -> list[PageRange]:
    # What two CPUs claim is damage: it would be read as often as it is claimed.
    end = 0
    for data in sorted(cpus, key=lambda c: c.at):
        if data.size:
            if data.at < end:
                raise box.file.wrong(f"CPU {data.cpu} begins inside the pages of another", data.at)
            end = data.at + data.size
    return cpus


# -- version 6 -----------------------------------------------------------------------------------------


def _version6(box: _Container, data: Cursor) -> None:
    _header_info(box, data)
    _ftrace(box, data)
    _events(box, data)
    for _ in ("kallsyms", "printk"):
        data.skip(data.u32())
    _cmdlines(box, data)
    count = data.u32()
    if count > _MOST:
        raise data.wrong(f"a file of {count} CPUs")
    instances: list[tuple[int, str]] = []
    page = box.header.page if box.header is not None and box.header.page in PAGE_SIZES else box.page
    while True:
        at = data.at
        tag = data.take(10)
        if tag == b"options  \0":
            while number := data.u16():
                size = data.u32()
                if size > _LARGEST_OPTION or len(box.options) > _MOST:
                    raise data.wrong("too many options, or one too large")
                option = data.part(size)
                if number == _BUFFER:
                    instances.append((option.u64(), option.string(256)))
                else:
                    box.options.append((number, option))
        elif tag == b"flyrecord\0":
            _buffer6(box, data, "", count, page)
            break
        elif tag == b"latency  \0":
            box.notes["text"] = "a buffer that holds only text (a latency tracer) was not read"
            break
        else:
            raise box.file.wrong(f"expected 'options' or 'flyrecord', found {tag!r}", at)
    for at, name in instances:
        there = Cursor(box.file, at, box.file.size)
        if there.take(10) == b"flyrecord\0":
            _buffer6(box, there, name, count, page)


def _buffer6(box: _Container, data: Cursor, name: str, count: int, page: int) -> None:
    cpus = [PageRange(box.file, cpu, "none", data.u64(), data.u64(), page) for cpu in range(count)]
    clock = None
    if not name and any(number == _CLOCK for number, _ in box.options):
        text = data.take(min(data.u64(), 4096)).split(b"\0", 1)[0].decode(errors="replace").strip()
        current = re.search(r"\[([^\]]*)\]", text)
        clock = current[1] if current else text
    box.buffers.append(_Buffer(name, clock or None, page, _apart(box, cpus)))


# -- bodies that both versions have --------------------------------------------------------------------


def _header_info(box: _Container, data: Cursor) -> None:
    for name in ("header_page", "header_event"):
        at = data.at
        if data.string(16) != name:
            raise data.wrong(f"expected {name}", at)
        text = data.text(data.u64())
        if name == "header_page":
            box.header = header_page(text, path=box.file.path, offset=at)


def _ftrace(box: _Container, data: Cursor) -> None:
    _texts(box, data, "ftrace", data.u32())


def _events(box: _Container, data: Cursor) -> None:
    systems = data.u32()
    if systems > _MOST:
        raise data.wrong(f"{systems} systems of events")
    for _ in range(systems):
        _texts(box, data, data.string(256), data.u32())


def _texts(box: _Container, data: Cursor, system: str, count: int) -> None:
    if count > _MOST:
        raise data.wrong(f"{count} events in the system {system!r}")
    for _ in range(count):
        size = data.u64()
        at = data.at
        box.texts.append(FormatText(system, data.text(size), at))


def _cmdlines(box: _Container, data: Cursor) -> None:
    box.comms = task_names(data.text(data.u64()))


def _check_page(page: int, data: Cursor) -> None:
    if page not in PAGE_SIZES:
        raise data.wrong(f"pages of {page} bytes", data.at - 4)


def embedded_formats(file: File, data: Cursor) -> tuple[list[FormatText], dict[int, str], int]:
    """Format texts, names of tasks and page size out of the tracing data that a perf.data holds, which begins as a
    trace.dat does. Raises TraceError."""
    if data.take(len(MAGIC)) != MAGIC:
        raise data.wrong("tracing data should begin with 17 08 44 'tracing'")
    data.string(16)
    if data.u8() != 0:
        raise data.wrong("of a big-endian host; only little-endian ones can be read", data.at - 1)
    data.u8()
    box = _Container(file, 6, data.u32())
    _check_page(box.page, data)
    _header_info(box, data)
    _ftrace(box, data)
    _events(box, data)
    for _ in ("kallsyms", "printk"):
        data.skip(data.u32())
    if not data.empty:
        _cmdlines(box, data)
    return box.texts, box.comms, box.page
