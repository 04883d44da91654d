"""trace.dat files as trace-cmd writes them: versions 6 and 7, of little-endian hosts.

See the man pages trace-cmd.dat.v6(5) and v7(5). The file says where everything is; only what is needed is read.
"""

from __future__ import annotations

import re
from typing import Final

from kvmfault.errors import UsageError
from kvmfault.trace.binary import Cursor, File
from kvmfault.trace.dat7 import read_version7
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
from kvmfault.trace.extents import Clock, PageRange, counts_ns
from kvmfault.trace.formats import PAGE_SIZES, Formats, FormatText
from kvmfault.trace.merge import RingRecording
from kvmfault.trace.recording import Meta
from kvmfault.trace.ring import Layout

__all__ = ["MAGIC", "embedded_formats", "open_tracedat"]

MAGIC: Final = b"\x17\x08\x44tracing"


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
    box = Container(file, int(version), start.u32())
    check_page(box.page, start)
    (read_version7 if box.version == 7 else _version6)(box, start)
    return _recording(box, instance)


def _recording(box: Container, instance: str | None) -> RingRecording:
    if box.header is None:
        raise box.damage or box.file.wrong("the file does not say how ring-buffer pages are laid out", 0)
    buffer = _chosen(box, instance)
    ticks, clock, name = _clock(box, buffer)
    uname = (box.option(Option.UNAME) or "").split()
    kind = f"trace.dat version {box.version}, {box.codec if box.codec != 'none' else 'uncompressed'}"
    if (version := box.option(Option.VERSION)) is not None:
        box.notes["trace-cmd"] = version
    stats = [data.rest().strip(b"\0").decode(errors="replace") for n, data in box.options if n == Option.CPUSTAT]
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


def _chosen(box: Container, instance: str | None) -> Buffer:
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


def _clock(box: Container, buffer: Buffer) -> tuple[bool, Clock, str | None]:
    # Whether times are ticks, how they are made of stamps, and the clock's name.
    text = box.option(Option.TRACECLOCK) or ""
    current = re.search(r"\[([^\]]*)\]", text)
    name = buffer.clock or (current[1] if current else text) or None
    offset = multiplier = shift = 0
    for number, data in box.options:
        if number in (Option.DATE, Option.OFFSET):
            shown = data.rest().split(b"\0", 1)[0].decode(errors="replace").strip()
            try:
                value = int(shown, 0)
            except ValueError:
                box.notes["time"] = f"an offset that is no number, {shown[:40]!r}, was not added"
                continue
            offset += value * 1000 if number == Option.DATE else value
        elif number == Option.TSC2NSEC:
            multiplier, shift = data.u32(), data.u32()
            if shift >= 64:
                raise box.file.wrong(f"a clock cannot be scaled by 2^{shift}", data.at - 4)
        elif number == Option.TIME_SHIFT:
            box.notes["time"] = "stamps of this guest were not moved to the clock of its host"
    if offset:
        box.notes["time offset"] = f"{offset} ns were added to every stamp, as the file says"
    ticks = not counts_ns(name) and not multiplier
    return ticks, Clock(multiplier, shift, offset), name


# -- version 6 -----------------------------------------------------------------------------------------


def _version6(box: Container, data: Cursor) -> None:
    read_header(box, data)
    read_ftrace(box, data)
    read_events(box, data)
    for _ in ("kallsyms", "printk"):
        data.skip(data.u32())
    read_cmdlines(box, data)
    count = data.u32()
    if count > MOST:
        raise data.wrong(f"a file of {count} CPUs")
    instances: list[tuple[int, str]] = []
    page = box.header.page if box.header is not None and box.header.page in PAGE_SIZES else box.page
    while True:
        at = data.at
        tag = data.take(10)
        if tag == b"options  \0":
            while number := data.u16():
                size = data.u32()
                if size > LARGEST_OPTION or len(box.options) > MOST:
                    raise data.wrong("too many options, or one too large")
                option = data.part(size)
                if number == Option.BUFFER:
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


def _buffer6(box: Container, data: Cursor, name: str, count: int, page: int) -> None:
    cpus = [PageRange(box.file, cpu, "none", data.u64(), data.u64(), page) for cpu in range(count)]
    clock = None
    if not name and any(number == Option.TRACECLOCK for number, _ in box.options):
        text = data.take(min(data.u64(), 4096)).split(b"\0", 1)[0].decode(errors="replace").strip()
        current = re.search(r"\[([^\]]*)\]", text)
        clock = current[1] if current else text
    box.buffers.append(Buffer(name, clock or None, page, apart(box, cpus)))


# -- inside a perf.data -------------------------------------------------------------------------------


def embedded_formats(file: File, data: Cursor) -> tuple[list[FormatText], dict[int, str], int]:
    """Format texts, names of tasks and page size out of the tracing data that a perf.data holds, which begins as a
    trace.dat does. Raises TraceError."""
    if data.take(len(MAGIC)) != MAGIC:
        raise data.wrong("tracing data should begin with 17 08 44 'tracing'")
    data.string(16)
    if data.u8() != 0:
        raise data.wrong("of a big-endian host; only little-endian ones can be read", data.at - 1)
    data.u8()
    box = Container(file, 6, data.u32())
    check_page(box.page, data)
    read_header(box, data)
    read_ftrace(box, data)
    read_events(box, data)
    for _ in ("kallsyms", "printk"):
        data.skip(data.u32())
    if not data.empty:
        read_cmdlines(box, data)
    return box.texts, box.comms, box.page
