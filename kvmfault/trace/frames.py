"""Records to columns: the fields of all records of an event at once, by the offsets that its format gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from kvmfault.trace.formats import EventFormat, Field, Formats, Kind, Place
from kvmfault.trace.ring import Gap, Index, Layout, U32Col, walk

__all__ = ["FIRST", "Block", "Column", "Plan", "Records", "columns_of", "read_pages"]

FIRST: Final = ("place", "time", "cpu", "pid")
"""Columns that every frame begins with."""
Column: TypeAlias = "NDArray[Any] | pl.Series"

_NUMBERS: Final = {(n, signed): f"<{'i' if signed else 'u'}{n}" for n in (1, 2, 4, 8) for signed in (False, True)}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to read of a recording, and how its pages are laid out. Can be sent to another process."""

    layout: Layout
    names: Mapping[int, str]
    """Of every event, by common_type."""
    wanted: Mapping[int, EventFormat]
    columns: bool = True
    """False: records are only counted and their times told."""

    def index(self) -> Plan:
        """The same without columns."""
        sizes = {number: replace(event, fields=(), print_format="") for number, event in self.wanted.items()}
        return Plan(self.layout, self.names, sizes, columns=False)

    @classmethod
    def of(cls, layout: Layout, formats: Formats, wanted: Collection[str] | None) -> Plan:
        """The events named in *wanted*, or all, whose formats can be read. Raises TraceError if none can."""
        chosen, _ = formats.chosen(wanted)
        return cls(layout, formats.names, chosen)


@dataclass(slots=True)
class Block:
    """The records of consecutive pages of one CPU, in the order they stand there."""

    cpu: int
    words: U32Col
    """The pages; none if records were only counted, and the next three have no items then."""
    at: Index
    """Where the data of each begins, in words."""
    size: U32Col
    """Bytes of its data."""
    numbers: dict[int, Index]
    """By common_type, which of them they are; only of events that are wanted, and only where there are some."""
    time: NDArray[np.int64]
    events: Counter[str]
    """Every record, by event name."""
    skipped: Counter[str]
    misfits: Counter[str]
    """Records shorter than their format."""
    gaps: list[Gap]
    damage: list[tuple[int, str]]
    """Byte in the pages, what is wrong."""


def read_pages(pages: bytes, cpu: int, plan: Plan) -> Block:
    """The records of *pages*, which are whole. A function of its arguments alone."""
    words = np.frombuffer(pages, "<u4")
    time, kind, at, size, gaps, damage = walk(words, plan.layout)
    block = Block(cpu, words, at, size, {}, time.view(np.int64), Counter(), Counter(), Counter(), gaps, damage)
    # Records of one event together, in the order they came: a radix sort, since the key has 16 bits.
    order = np.argsort(kind, kind="stable")
    kinds = kind.take(order)
    ends = np.append(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1, len(kinds)) if len(kinds) else order
    start = 0
    for end in ends.tolist():
        some, number, start = order[start:end], int(kinds[start]), end
        name = plan.names.get(number, f"unknown-{number}")
        block.events[name] += len(some)
        if (event := plan.wanted.get(number)) is None:
            block.skipped[name] += len(some)
            continue
        if (short := size.take(some) < event.size).any():
            block.misfits[name] += int(short.sum())
            some = some[~short]
        if len(some):
            block.numbers[number] = some
    if not plan.columns:
        block.words, block.at, block.size, block.numbers = words[:0], at[:0], size[:0], {}
    return block


@dataclass(slots=True)
class Records:
    """Records of one event: where each begins in *words*, and its size in bytes, never less than the format's."""

    words: U32Col
    at: Index
    size: U32Col
    _pairs: Index | None = None

    @property
    def pairs(self) -> Index:
        """Each of *at*, and the word after it."""
        if self._pairs is None:
            pairs = np.empty((len(self.at), 2), np.int64)
            pairs[:, 0] = self.at
            np.add(self.at, 1, out=pairs[:, 1])
            self._pairs = pairs.reshape(-1)
        return self._pairs


def columns_of(event: EventFormat, records: Records) -> dict[str, Column]:
    """``pid`` and the fields of *event*, a value for each of *records*."""
    columns: dict[str, Column] = {"pid": _narrow(records, event.pid, 4, signed=True)}
    for f in event.fields:
        name = f.name if f.name not in columns and f.name not in FIRST else f"{f.name}_"
        columns[name] = _column(f, records)
    return columns


def _column(f: Field, records: Records) -> Column:
    if f.kind is Kind.NUMBER:
        return _number(records, f.offset, f.size, signed=f.signed)
    if f.place is Place.HERE and f.size:
        values = _fixed(f, records)
    else:
        values = pl.Series(_variable(f, records), dtype=pl.Binary)
    return values if f.kind is Kind.BYTES else _texts(values)


def _texts(values: pl.Series) -> pl.Series:
    # Few are distinct: each is made once.
    known = values.unique()
    texts = [None if value is None else value.split(b"\0", 1)[0].decode(errors="replace") for value in known]
    return values.replace_strict(known, pl.Series(texts, dtype=pl.String))


def _number(records: Records, offset: int, size: int, *, signed: bool) -> NDArray[Any]:
    # As 64 bits.
    return _narrow(records, offset, size, signed=signed).astype(np.int64 if signed else np.uint64, copy=False)


def _narrow(records: Records, offset: int, size: int, *, signed: bool) -> NDArray[Any]:
    # As many bytes as the field has. Fields are aligned to their size, but a hostile format need not be.
    first, shift = divmod(offset, 4)
    words = records.words[first:]
    if size == 8 and not shift:
        return words.take(records.pairs, mode="clip").view(_NUMBERS[size, signed])
    if shift + size > 4:
        rows = np.ascontiguousarray(_bytes(records, offset, size))
        return rows.view(_NUMBERS[size, signed]).reshape(-1)
    word = words.take(records.at, mode="clip")
    if shift or size < 4:
        word = (word >> np.uint32(8 * shift)).astype(f"<u{size}")
    return word.view(_NUMBERS[size, signed])


def _bytes(records: Records, offset: int, size: int) -> NDArray[np.uint8]:
    # One row for each record.
    words, at = records.words, records.at
    first, shift = divmod(offset, 4)
    length = -(-(shift + size) // 4)
    span = np.ndarray((len(words) - length + 1,), f"V{4 * length}", words, strides=(4,))
    rows: NDArray[np.uint8] = span[at + first].view(np.uint8).reshape(-1, 4 * length)
    return rows[:, shift : shift + size]


def _fixed(f: Field, records: Records) -> pl.Series:
    rows = pl.Series(np.ascontiguousarray(_bytes(records, f.offset, f.size)))
    return rows.cast(pl.List(pl.UInt8)).cast(pl.Binary)


def _variable(f: Field, records: Records) -> list[bytes | None]:
    # None where the record says that the array lies outside it.
    data = records.words.view(np.uint8).data
    starts, sizes = (records.at * 4).tolist(), records.size.tolist()
    if f.place is Place.HERE:
        ends = sizes if not f.size else [f.offset + f.size] * len(sizes)
        return [bytes(data[start + f.offset : start + end]) for start, end in zip(starts, ends, strict=True)]
    told = _number(records, f.offset, 4, signed=False).astype(np.int64)
    froms = (told & 0xFFFF) + (f.offset + 4 if f.place is Place.AFTER else 0)
    lengths = told >> 16
    return [
        bytes(data[start + at : start + at + n]) if at + n <= size else None
        for start, size, at, n in zip(starts, sizes, froms.tolist(), lengths.tolist(), strict=True)
    ]
