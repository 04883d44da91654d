"""perf.data as ``perf record`` writes it, to a file or a pipe, compressed (-z) or not: its tracepoints as columns.

The file has one stream of records in which each CPU's come in rounds. What a round brings is not older than the end of
the round before the last, so that far records can be put in order of time and given out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvmfault.errors import TraceError
from kvmfault.trace.binary import Cursor, File
from kvmfault.trace.formats import Formats, FormatText
from kvmfault.trace.frames import Plan
from kvmfault.trace.merge import Damage
from kvmfault.trace.perforder import Mark, Order
from kvmfault.trace.perfstream import Chunk, Stream
from kvmfault.trace.perfwalk import (
    ATTR,
    AUXTRACE,
    COMM,
    COMPRESSED,
    COMPRESSED2,
    FEATURE,
    FINISHED_ROUND,
    LOST,
    LOST_SAMPLES,
    SAMPLE,
    TRACING_DATA,
    Attr,
    Found,
    Samples,
    holds_raw,
    ids,
    samples,
)
from kvmfault.trace.recording import Frames, Meta, ReadStats
from kvmfault.trace.ring import Index, Layout, U32Col
from kvmfault.trace.tracedat import embedded_formats

__all__ = ["MAGIC", "PerfRecording"]

MAGIC: Final = b"PERFILE2"
_PIPE, _FILE = 16, 104
_FEATURES: Final = {1: "tracing data", 3: "host", 4: "release", 5: "perf", 6: "machine", 8: "cpu", 9: "cpu id"}
_CLOCKS: Final = {0: "realtime", 1: "mono", 4: "mono_raw", 7: "boot", 11: "tai"}
_MOST: Final = 1 << 16
_TASKS: Final = 1 << 20


@dataclass(slots=True)
class _Head:
    # What the file says of itself.
    file: File
    attrs: list[Attr] = field(default_factory=list)
    by_id: dict[int, Attr] = field(default_factory=dict)
    texts: list[FormatText] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=dict)
    page: int | None = None
    notes: dict[str, str] = field(default_factory=dict)
    at: int = 0
    end: int = 0
    pipe: bool = False

    def attr(self, data: Cursor, ids: Cursor) -> None:
        """One event: a perf_event_attr, and the ids of its samples."""
        attr = Attr.of(data.rest())
        self.attrs.append(attr)
        if len(self.attrs) > _MOST:
            raise data.wrong("a file of too many events")
        while ids.end - ids.at >= 8 and len(self.by_id) < _TASKS:
            self.by_id[ids.u64()] = attr

    def feature(self, number: int, data: Cursor) -> None:
        """One section of what is told about the machine."""
        name = _FEATURES.get(number)
        if name == "tracing data":
            self.tracing(data)
        elif name is not None:
            self.notes[name] = data.text(data.u32()).split(b"\0", 1)[0].decode(errors="replace")

    def tracing(self, data: Cursor) -> None:
        """The formats of the events."""
        self.texts, comms, self.page = embedded_formats(self.file, data)
        self.comms.update(comms)


class PerfRecording:
    """The tracepoints of a perf.data. Raises UsageError, TraceError."""

    def __init__(self, path: str) -> None:
        self.path = path
        file = File(path)
        self._damage = Damage()
        head = _Head(file)
        start = Cursor(file, 0, file.size)
        if start.take(8) != MAGIC:
            raise file.wrong("not a perf.data of a little-endian host: it does not begin with 'PERFILE2'", 0)
        size = start.u64()
        if size not in (_PIPE, _FILE):
            raise file.wrong(f"a header of {size} bytes: it has {_FILE}, or {_PIPE} if perf wrote to a pipe", 8)
        head.pipe = size == _PIPE
        try:
            (_pipe_head if head.pipe else _file_head)(head, start)
        except TraceError as e:
            if not head.texts or not head.attrs:
                raise
            self._damage.add(e)
        traced = [attr for attr in head.attrs if holds_raw(attr)]
        if not traced:
            raise file.wrong("no tracepoint with raw data and time in this file: record with `perf record -e kvm:*`", 0)
        self.formats: Formats = Formats(path, head.texts)
        self._head = head

    @property
    def meta(self) -> Meta:
        """What the file says of itself; names of tasks are known when its records have been read."""
        head = self._head
        clocks = {attr.clock for attr in head.attrs}
        notes = {k: v for k, v in head.notes.items() if k not in ("release", "machine")}
        return Meta(
            kind="perf.data" + (", from a pipe" if head.pipe else ""),
            page_size=head.page,
            release=head.notes.get("release"),
            machine=head.notes.get("machine"),
            clock=_CLOCKS.get(clock, f"clock {clock}") if (clock := clocks.pop()) is not None else "local",
            comms=head.comms,
            notes=notes,
        )

    def of_interest(self) -> frozenset[str]:
        """See `Formats.of_interest`."""
        return self.formats.of_interest()

    def probes(self) -> frozenset[str]:
        """See `Formats.probes`."""
        return self.formats.probes()

    def frames(self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None) -> Iterator[Frames]:
        """See `Recording.frames`."""
        stats = ReadStats() if stats is None else stats
        head = self._head
        plan = Plan.of(Layout(4096, 16, 8), self.formats, wanted)
        damage = Damage(self._damage.first, self._damage.more)
        for wrong in self.formats.chosen(self.formats.of_interest())[1]:
            damage.add(wrong)
        order = Order(plan, stats)
        stream = Stream(head.file, head.at, head.end, stats, damage)
        reader = _Reader(head, order, stats)
        for chunk in stream.chunks():
            reader.take(chunk)
            yield from order.ready()
        yield from order.rest()
        if order.late:
            damage.add(TraceError(f"{order.late} records came too late to be put in order", path=self.path))
        stats.damage = damage.text()


class _Reader:
    # What records say, in the order of the file.
    def __init__(self, head: _Head, order: Order, stats: ReadStats) -> None:
        self._head = head
        self._order = order
        self._stats = stats
        self._layouts = {attr.layout for attr in head.attrs}

    def take(self, chunk: Chunk) -> None:
        found = chunk.found
        is_sample = found.type == SAMPLE
        taken = self._samples(chunk, np.flatnonzero(is_sample))
        events = []
        for number in np.flatnonzero(~is_sample).tolist():
            kind = int(found.type[number])
            if kind == FINISHED_ROUND:
                events.append(Mark(number))
            elif kind in (LOST, LOST_SAMPLES):
                data = chunk.record(number)
                count = data[1:2] if kind == LOST else data[:1]
                events.append(Mark(number, self._cpu(data), sum(count)))
            elif kind == COMM:
                self._comm(chunk.bytes(number))
        self._order.add(taken, events)

    def _samples(self, chunk: Chunk, which: Index) -> Samples | None:
        found, words = chunk.found, chunk.words
        parts = []
        for attr, some in self._by_layout(words, found, which) if len(which) else ():
            if not holds_raw(attr):
                self._stats.events["samples that are no tracepoints"] += len(some)
                continue
            part, bad = samples(words, some, found.at[some], found.size[some], attr)
            if bad:
                self._stats.misfits["sample"] += bad
            parts.append(part)
        if len(parts) < 2:
            return parts[0] if parts else None
        columns = [np.concatenate(column) for column in zip(*(part[1:] for part in parts), strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return Samples(words, *(column[order] for column in columns))

    def _by_layout(self, words: U32Col, found: Found, which: Index) -> Iterator[tuple[Attr, Index]]:
        attrs = self._head.attrs
        if len({(attr.layout, holds_raw(attr)) for attr in attrs}) == 1:
            yield attrs[0], which
            return
        told = ids(words, found.at[which], attrs[0])
        if told is None:
            raise TraceError("events whose samples differ, and nothing tells them apart", path=self._head.file.path)
        values, index = np.unique(told, return_inverse=True)
        groups: dict[tuple[tuple[int, int], bool], list[int]] = {}
        chosen: dict[tuple[tuple[int, int], bool], Attr] = {}
        for number, value in enumerate(values.tolist()):
            attr = self._head.by_id.get(value)
            if attr is None:
                self._stats.misfits["sample"] += int(np.count_nonzero(index == number))
                continue
            key = attr.layout, holds_raw(attr)
            groups.setdefault(key, []).append(number)
            chosen[key] = attr
        for key, numbers in groups.items():
            yield chosen[key], which[np.isin(index, numbers)]

    def _comm(self, data: bytes) -> None:
        if len(self._head.comms) < _TASKS and len(data) > 16:
            comm = data[16:].split(b"\0", 1)[0].decode(errors="replace")
            self._head.comms[int.from_bytes(data[12:16], "little")] = comm

    def _cpu(self, data: tuple[int, ...]) -> int | None:
        place = self._head.attrs[0].behind(1 << 7)
        return data[place // 8] & 0xFFFF if place is not None and -place // 8 < len(data) else None


def _file_head(head: _Head, data: Cursor) -> None:
    attr_size = data.u64()
    sections = [(data.u64(), data.u64()) for _ in range(3)]
    bits = data.take(32)
    (attrs, length), (head.at, size), _ = sections
    file = head.file
    if attr_size < 64 + 16 or attr_size > 1 << 12 or length % attr_size:
        raise file.wrong(f"events of {attr_size} bytes, {length} in all", 16)
    head.end = head.at + size if size else file.size  # perf was killed: it writes the size at the end
    for n in range(length // attr_size):
        entry = Cursor(file, attrs + n * attr_size, file.size)
        attr = entry.part(attr_size - 16)
        at, count = entry.u64(), entry.u64()
        head.attr(attr, Cursor(file, at, min(at + count, file.size)))
    if not size:
        head.notes["end"] = "perf did not finish this file"
    table = Cursor(file, head.at + size, file.size)
    have = [n for n in range(256) if bits[n // 8] >> n % 8 & 1]
    if size and head.end + 16 * len(have) > file.size:
        lacks = f"it ends here, and the table that leads to the formats of its events should be at {head.end:#x}"
        raise file.wrong(f"the file was cut short: {lacks}; without formats no sample can be read", file.size)
    features = {n: (table.u64(), table.u64()) for n in have}
    for number, (at, count) in sorted(features.items()):
        if number in _FEATURES:
            head.feature(number, Cursor(file, at, min(at + count, file.size)))


def _pipe_head(head: _Head, data: Cursor) -> None:
    head.at, head.end = data.at, head.file.size
    for _ in range(_MOST):
        if data.end - data.at < 8:
            return
        kind, _, size = data.u32(), data.u16(), data.u16()
        if size < 8:
            raise data.wrong(f"a record of {size} bytes", data.at - 8)
        if kind in (SAMPLE, COMPRESSED, COMPRESSED2) or (kind == FINISHED_ROUND and head.texts):
            return
        body = data.part(size - 8)
        if kind == ATTR:
            attr_size = int.from_bytes(body.rest()[4:8], "little")
            head.attr(body.part(min(attr_size, body.end - body.at)), body)
        elif kind == FEATURE:
            head.feature(body.u64(), body)
        elif kind == TRACING_DATA:
            head.tracing(data.part(-(-body.u32() // 8) * 8))
        elif kind == AUXTRACE:
            data.skip(body.u64())
