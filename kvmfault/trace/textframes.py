"""Recordings in text form as columns: the same frames that the binary forms give, less what text leaves out.

Events that a backend declares give the kernel's fields. Of any other, ``name=value`` pairs become columns: of a probe
(``name: (function+0x0/0x140) addr=0x180000 ret=-11``) hexadecimal numbers as UInt64 and decimal ones as Int64, and
everything else as the text that it is, since nothing tells in which base it was printed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import polars as pl

from kvmfault.contract.tracepoints import Tracepoint, Tracepoints
from kvmfault.trace.frames import FIRST
from kvmfault.trace.pattern import Fields, Misfit, Pattern, Value
from kvmfault.trace.recording import Frames, Meta, ReadStats
from kvmfault.trace.source import Source, source_name
from kvmfault.trace.text import TextEvent, misread, read_text

__all__ = ["AT_ONCE", "TextRecording"]

AT_ONCE: Final = 1 << 16
"""Events that are columns at one time."""
_MOST_FIELDS: Final = 100
"""Columns of an event that nobody declared; what a hostile file has beyond them is left out."""
_PAIR: Final = re.compile(r'([A-Za-z_]\w{0,63})=("[^"]*"|\S*)(?:\s+|$)')
_HEX: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_DECIMAL: Final = re.compile(r"-?\d{1,20}")
_TYPES: Final[Mapping[str, type[pl.DataType]]] = {
    "x": pl.UInt64, "d": pl.UInt64, "i": pl.Int64, "w": pl.String, "b": pl.Binary,
}  # fmt: skip
_LIMITS: Final[Mapping[type[pl.DataType], tuple[int, int]]] = {pl.UInt64: (0, 1 << 64), pl.Int64: (-1 << 63, 1 << 63)}
_Row: TypeAlias = tuple[TextEvent, Mapping[str, Value]]


class TextRecording:
    """A recording in text form: tracefs ``trace``, ``trace-cmd report``, ``perf script``, plain or gzipped.

    *declared* are the tracepoints of every backend. A source that is a stream can be read once.
    """

    def __init__(self, source: Source, declared: Iterable[Tracepoints]) -> None:
        self._source = source
        self.path: str = source_name(source)
        points: dict[str, list[Tracepoint]] = {}
        for backend in declared:
            for name, point in backend.items():
                points.setdefault(name, []).append(point)
        self._points = points
        self._forms: dict[str, list[Pattern]] = {}
        self._ticks = False
        self._cpus: set[int] = set()
        self._comms: dict[int, str] = {}

    @property
    def meta(self) -> Meta:
        """What was seen up to now."""
        comms = {pid: comm for pid, comm in self._comms.items() if comm != "<...>"}
        return Meta(kind="text", ticks=self._ticks, cpus=tuple(sorted(self._cpus)), comms=comms)

    def frames(self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None) -> Iterator[Frames]:
        """See `Recording.frames`."""
        stats = ReadStats() if stats is None else stats
        stretch: dict[tuple[str, Pattern | None], _Rows] = {}
        count = 0
        for event in read_text(self._source, wanted=wanted, stats=stats):
            read = self._read(event)
            if isinstance(read, Misfit):
                misread(self.path, event, read, stats, strict=False)
                continue
            pattern, fields = read
            self._cpus.add(event.cpu)
            self._comms[event.pid] = event.comm
            rows = stretch.setdefault((event.name, pattern), _Rows(pattern))
            rows.add(event, fields)
            count += 1
            if count >= AT_ONCE:
                self._ticks = stats.ticks
                yield _frames(stretch, stats)
                stretch, count = {}, 0
        self._ticks = stats.ticks
        if count:
            yield _frames(stretch, stats)

    def _read(self, event: TextEvent) -> tuple[Pattern | None, Mapping[str, Value]] | Misfit:
        # architectures give events of one name other fields: the declaration that fitted last is tried first
        forms = self._forms.get(event.name)
        if forms is None:
            known = self._points.get(event.name, [])
            forms = self._forms[event.name] = list(Pattern.all_of(known))
        misfit = None
        for number, pattern in enumerate(forms):
            read = pattern.read(event.body)
            if isinstance(read, Fields):
                if number:
                    forms.insert(0, forms.pop(number))
                return pattern, {**read.numbers, **read.words} if read.words else read.numbers
            misfit = misfit or read
        return misfit or (None, _pairs(event.body))


def _pairs(body: str) -> Mapping[str, Value]:
    # all of the body, or nothing: text that merely has a "=" in it says nothing by it
    place = body.startswith("(")
    at = body.find(") ") + 2 if place else 0
    fields: dict[str, Value] = {}
    while at < len(body):
        m = _PAIR.match(body, at)
        if m is None or len(fields) >= _MOST_FIELDS:
            return fields if m else {}
        text = m[2]
        value: Value = text
        if place and _HEX.fullmatch(text):
            value = int(text, 16)
        elif place and _DECIMAL.fullmatch(text):
            value = _Decimal(text)
        elif text[:1] == '"' and text[-1:] == '"':
            value = text[1:-1]
        fields[f"{m[1]}_" if m[1] in FIRST else m[1]] = value
        at = m.end()
    return fields


class _Decimal(int):
    # a number that was printed without 0x: signed
    pass


@dataclass(slots=True)
class _Rows:
    # The rows of one event in a stretch.
    pattern: Pattern | None
    place: list[int] = field(default_factory=list)
    time: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)
    pid: list[int] = field(default_factory=list)
    fields: list[Mapping[str, Value]] = field(default_factory=list)

    def add(self, event: TextEvent, fields: Mapping[str, Value]) -> None:
        self.place.append(event.line)
        self.time.append(event.time)
        self.cpu.append(event.cpu)
        self.pid.append(event.pid)
        self.fields.append(fields)

    def frame(self, name: str, stats: ReadStats) -> pl.DataFrame:
        columns = [
            pl.Series("place", self.place, pl.UInt64),
            pl.Series("time", self.time, pl.Int64),
            pl.Series("cpu", self.cpu, pl.UInt16),
            pl.Series("pid", self.pid, pl.Int32),
        ]
        for key, dtype in self._columns():
            values = [row.get(key) for row in self.fields]
            columns.append(_series(key, values, dtype, name, stats))
        return pl.DataFrame(columns)

    def _columns(self) -> list[tuple[str, type[pl.DataType]]]:
        if self.pattern is not None:
            return [(key, _TYPES[kind]) for key, (kind, _) in self.pattern.fields.items()]
        seen: dict[str, set[type]] = {}
        for row in self.fields:
            for key, value in row.items():
                if key in seen or len(seen) < _MOST_FIELDS:
                    seen.setdefault(key, set()).add(type(value))
        number: dict[type, type[pl.DataType]] = {int: pl.UInt64, _Decimal: pl.Int64}
        return [(key, number.get(next(iter(t)), pl.String) if len(t) == 1 else pl.String) for key, t in seen.items()]


def _series(
    key: str, values: Sequence[Value | None], dtype: type[pl.DataType], event: str, stats: ReadStats
) -> pl.Series:
    try:
        return pl.Series(key, values, dtype)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        pass
    if dtype is pl.String:
        return pl.Series(key, [v if v is None else str(v) for v in values], dtype)
    low, high = _LIMITS[dtype]
    fitting = [v if isinstance(v, int) and low <= v < high else None for v in values]
    stats.misfits[event] += sum(v is not None for v in values) - sum(v is not None for v in fitting)
    return pl.Series(key, fitting, dtype)


def _frames(stretch: Mapping[tuple[str, Pattern | None], _Rows], stats: ReadStats) -> dict[str, pl.DataFrame]:
    made: dict[str, pl.DataFrame] = {}
    for (name, _), rows in stretch.items():
        frame = rows.frame(name, stats)
        made[name] = pl.concat([made[name], frame], how="diagonal_relaxed").sort("place") if name in made else frame
    return made
