"""One Parquet file of many events: every row group holds the rows of one event, and nothing for columns of others.

A table of all events side by side is mostly holes. Writers that are given it spend their time on them; here a hole is
one small page for a whole row group, and the columns need not be known before the end. A reader sees one table, and
one that asks for an event skips the row groups of the others by the statistics of the column ``event``.
The format: the specification of Apache Parquet (parquet.thrift); pages of version 1, compressed with zstd.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import IO, Any, Final, NamedTuple

import numpy as np
import polars as pl
import zstandard
from numpy.typing import NDArray

from kvmfault.trace.thrift import I8, I64, Items, Struct, struct, structs, varint

__all__ = ["ENOUGH", "Encoded", "ParquetWriter", "encode"]

_MAGIC: Final = b"PAR1"
_LEVEL: Final = 1
_ROWS: Final = 1 << 18
"""Rows of an event that make a row group."""
_MOST: Final = 1 << 20
"""Rows of a row group at most."""
ENOUGH: Final = _ROWS // 2
"""Rows of an event that are worth a row group of their own."""
_HELD: Final = 1 << 26
"""Bytes that wait for their row group to fill; above it the largest is written as it is."""

# Numbers of the format.
_BOOLEAN, _INT32, _INT64, _DOUBLE, _BYTE_ARRAY = 0, 1, 2, 5, 6
_PLAIN, _RLE, _DELTA, _DICTIONARY = 0, 3, 5, 8
_ZSTD: Final = 6
_DATA_PAGE, _DICTIONARY_PAGE = 0, 2


class _Type(NamedTuple):
    # How a column is stored: physical type, what its values are in the file, converted and logical type.
    physical: int
    stored: str
    converted: int | None = None
    logical: Struct | None = None
    suffix: str = ""


def _integer(bits: int, *, signed: bool, suffix: str = "") -> _Type:
    wide = bits == 64
    converted = {8: 11, 16: 12, 32: 13, 64: 14}[bits] + (4 if signed else 0)
    logical = struct((10, struct((1, I8(bits)), (2, signed))))
    return _Type(_INT64 if wide else _INT32, "<i8" if wide else "<i4", converted, logical, suffix)


_TYPES: Final[Mapping[type[pl.DataType], _Type]] = {
    pl.UInt64: _integer(64, signed=False, suffix="_unsigned"),
    pl.Int64: _integer(64, signed=True, suffix="_signed"),
    pl.UInt32: _integer(32, signed=False, suffix="_32"),
    pl.Int32: _integer(32, signed=True, suffix="_signed_32"),
    pl.UInt16: _integer(16, signed=False, suffix="_16"),
    pl.UInt8: _integer(8, signed=False, suffix="_8"),
    pl.Boolean: _Type(_BOOLEAN, "", suffix="_flag"),
    pl.Float64: _Type(_DOUBLE, "<f8", suffix="_real"),
    pl.String: _Type(_BYTE_ARRAY, "", 0, struct((1, struct())), suffix="_text"),
    pl.Binary: _Type(_BYTE_ARRAY, "", suffix="_bytes"),
}


class _Key(NamedTuple):
    # A column of the file: two events may have fields of one name and of different types.
    name: str
    dtype: type[pl.DataType]


class _Chunk(NamedTuple):
    # A column of a row group, as it was written.
    at: int
    dictionary: int | None
    encoding: int
    stored: int
    full: int
    statistics: Struct

    def moved(self, by: int) -> _Chunk:
        # The same so many bytes later.
        return self._replace(at=self.at + by, dictionary=None if self.dictionary is None else self.dictionary + by)


class _Group(NamedTuple):
    event: str
    rows: int
    chunks: dict[_Key, _Chunk]


class Encoded(NamedTuple):
    """A row group; where its chunks are counts from its own begin."""

    group: _Group
    data: bytes


def encode(event: str, frame: pl.DataFrame) -> list[Encoded]:
    """Rows of one event as row groups. A function of its arguments alone."""
    return [_encode(event, frame.slice(start, _MOST)) for start in range(0, len(frame), _MOST)]


def _encode(event: str, frame: pl.DataFrame) -> Encoded:
    pages = _Pages()
    chunks = {_Key("event", pl.String): pages.constant(event, len(frame))}
    for series in frame:
        chunks[_Key(series.name, series.dtype.base_type())] = pages.chunk(series)
    return Encoded(_Group(event, len(frame), chunks), b"".join(pages.data))


class ParquetWriter:
    """Writes frames of events to an open binary file; ``close`` must be called for it to be a Parquet file.

    The columns of the event *first* keep their names whatever the others have.
    """

    def __init__(self, file: IO[bytes], first: str | None = None) -> None:
        self._file = file
        self._first = first
        self._at = 0
        self._groups: list[_Group] = []
        self._keys: dict[_Key, None] = {_Key("event", pl.String): None}
        self._waiting: dict[str, list[pl.DataFrame]] = {}
        self._sizes: dict[str, int] = {}
        self._put(_MAGIC)

    def write(self, event: str, frame: pl.DataFrame) -> None:
        """Rows of one event; a frame with other columns than the one before begins a row group."""
        if event in self._waiting and self._waiting[event][0].schema != frame.schema:
            self._flush(event)
        waiting = self._waiting.setdefault(event, [])
        waiting.append(frame)
        self._sizes[event] = self._sizes.get(event, 0) + int(frame.estimated_size())
        if sum(map(len, waiting)) >= _ROWS:
            self._flush(event)
        elif sum(self._sizes.values()) > _HELD:
            self._flush(max(self._sizes, key=lambda name: self._sizes[name]))

    def columns(self) -> dict[str, list[str]]:
        """Write what waits. The columns of each event, by the names that the file gives them."""
        for event in list(self._waiting):
            self._flush(event)
        names = self._names()
        keys: dict[str, dict[_Key, None]] = {}
        for group in self._groups:
            keys.setdefault(group.event, {}).update(dict.fromkeys(group.chunks))
        return {event: [names[key] for key in found] for event, found in keys.items()}

    def close(self, metadata: Mapping[str, str]) -> None:
        """Write what waits, the holes, and the footer with *metadata*."""
        self.columns()
        names = self._names()
        keys = list(self._keys)
        holes: dict[int, tuple[bytes, _Chunk]] = {}
        groups = [self._row_group(group, names, holes) for group in self._groups]
        schema = [struct((4, "events"), (5, len(keys))), *(_element(key, names[key]) for key in keys)]
        pairs = [struct((1, name), (2, value)) for name, value in metadata.items()]
        footer = struct(
            (1, 2),
            (2, structs(schema)),
            (3, I64(sum(group.rows for group in self._groups))),
            (4, structs(groups)),
            (5, structs(pairs)),
            (6, "kvmfault"),
            (7, structs(struct((1, struct())) for _ in keys)),  # statistics are in the order of the type
        )
        self._put(footer + len(footer).to_bytes(4, "little") + _MAGIC)

    def _put(self, data: bytes) -> int:
        at = self._at
        self._file.write(data)
        self._at += len(data)
        return at

    def add(self, made: Iterable[Encoded]) -> None:
        """Row groups that are encoded already. What waits of their events is written before them."""
        for (event, rows, chunks), data in made:
            if event in self._waiting:
                self._flush(event)
            at = self._put(data)
            self._keys.update(dict.fromkeys(chunks))
            self._groups.append(_Group(event, rows, {key: chunk.moved(at) for key, chunk in chunks.items()}))

    def _flush(self, event: str) -> None:
        frame = pl.concat(self._waiting.pop(event))
        del self._sizes[event]
        self.add(encode(event, frame))

    def _row_group(self, group: _Group, names: Mapping[_Key, str], holes: dict[int, tuple[bytes, _Chunk]]) -> Struct:
        columns, stored, full = [], 0, 0
        for key in self._keys:
            chunk = group.chunks.get(key) or self._hole(group.rows, holes)
            columns.append(_column(key, names[key], chunk, group.rows))
            stored, full = stored + chunk.stored, full + chunk.full
        return struct((1, structs(columns)), (2, I64(full)), (3, I64(group.rows)), (6, I64(stored)))

    def _hole(self, rows: int, holes: dict[int, tuple[bytes, _Chunk]]) -> _Chunk:
        # The same bytes for all holes of as many rows.
        if rows not in holes:
            pages = _Pages()
            run = varint(rows << 1) + b"\0"
            data = (len(run).to_bytes(4, "little"), run)
            chunk = pages.chunk_of(None, data, rows, _PLAIN, struct((3, I64(rows))))
            holes[rows] = b"".join(pages.data), chunk
        page, chunk = holes[rows]
        return chunk.moved(self._put(page))

    def _names(self) -> dict[_Key, str]:
        # The type most events have keeps the name; another one says what it is.
        users = {key: sum(key in group.chunks for group in self._groups) for key in self._keys}
        first = {key for group in self._groups if group.event == self._first for key in group.chunks}
        names: dict[_Key, str] = {}
        for key in sorted(self._keys, key=lambda k: (k not in first, -users[k])):
            taken = names.values()
            names[key] = key.name if key.name not in taken else key.name + _TYPES[key.dtype].suffix
        return names


class _Pages:
    # The pages of chunks, one after the other.
    def __init__(self) -> None:
        self.data: list[bytes] = []
        self._at = 0
        self._compress = zstandard.ZstdCompressor(level=_LEVEL).compress

    def chunk(self, series: pl.Series) -> _Chunk:
        kind = _TYPES[series.dtype.base_type()]
        valid = series.is_not_null().to_numpy() if series.null_count() else None
        levels = _levels(len(series), valid)
        present = series.drop_nulls() if valid is not None else series
        if kind.physical == _BYTE_ARRAY:
            return self._coded(present, len(series), levels)
        if kind.physical == _BOOLEAN:
            bits = np.packbits(present.to_numpy(), bitorder="little")
            nulls = struct((3, I64(len(series) - len(present))))
            return self.chunk_of(None, (levels, bits), len(series), _PLAIN, nulls)
        return self._numbers(np.ascontiguousarray(present.to_numpy()), len(series), levels, kind)

    def _numbers(self, values: NDArray[Any], rows: int, levels: bytes, kind: _Type) -> _Chunk:
        # What is compressed takes the time, so it is made small: numbers of a small range as one byte each, and rising
        # ones (places, times) by their steps.
        stored = values.astype(kind.stored, copy=False)
        if not len(values):
            return self.chunk_of(None, (levels,), rows, _PLAIN, struct((3, I64(rows))))
        low, high = values.min(), values.max()
        ends = (np.array([v]).astype(kind.stored).tobytes() for v in (high, low))
        statistics = struct((3, I64(rows - len(values))), *zip((5, 6), ends, strict=True))
        if kind.physical != _DOUBLE and (span := int(high) - int(low)) < min(256, len(values)):
            known = (low + np.arange(span + 1, dtype=values.dtype)).astype(kind.stored)
            run = _run((values - low).astype(np.uint8), 8) if span else _zeros(len(values))
            return self.chunk_of((known.tobytes(), len(known)), (levels, run), rows, _DICTIONARY, statistics)
        if kind.physical == _INT64 and (steps := _steps(stored)) is not None:
            return self.chunk_of(None, (levels, steps), rows, _DELTA, statistics)
        return self.chunk_of(None, (levels, stored), rows, _PLAIN, statistics)

    def _coded(self, present: pl.Series, rows: int, levels: bytes) -> _Chunk:
        # Text and bytes: the distinct values once, then their numbers, as 8, 16 or 32 bits each.
        known = present.unique(maintain_order=True)
        codes = pl.DataFrame({"v": known, "n": np.arange(len(known), dtype=np.uint32)})
        numbers = pl.DataFrame({"v": present}).join(codes, on="v", how="left", maintain_order="left")["n"].to_numpy()
        width = 8 if len(known) <= 1 << 8 else 16 if len(known) <= 1 << 16 else 32
        statistics = struct((3, I64(rows - len(present))))
        return self.chunk_of(_words(known), (levels, _run(numbers, width)), rows, _DICTIONARY, statistics)

    def constant(self, value: str, rows: int) -> _Chunk:
        statistics = struct((3, I64(0)), (5, value), (6, value))
        return self.chunk_of(_words([value]), (_levels(rows, None), _zeros(rows)), rows, _DICTIONARY, statistics)

    def chunk_of(
        self, known: tuple[bytes, int] | None, data: tuple[Any, ...], rows: int, encoding: int, statistics: Struct
    ) -> _Chunk:
        # *known*: the distinct values, plain, and how many.
        dictionary, full, start = None, 0, self._at
        if known is not None:
            dictionary = start
            full += self._page(known[0], _DICTIONARY_PAGE, (7, struct((1, known[1]), (2, _PLAIN))))
        at = self._at
        full += self._page(b"".join(data), _DATA_PAGE, _data_header(rows, encoding))
        return _Chunk(at, dictionary, encoding, self._at - start, full, statistics)

    def _page(self, data: bytes, kind: int, header: tuple[int, Struct]) -> int:
        # Its size if it were not compressed.
        stored = self._compress(data)
        head = struct((1, kind), (2, len(data)), (3, len(stored)), header)
        self.data += (head, stored)
        self._at += len(head) + len(stored)
        return len(head) + len(data)


def _levels(rows: int, valid: NDArray[np.bool_] | None) -> bytes:
    # Which rows have a value: one run of ones, or a bit each.
    if valid is None:
        run = varint(rows << 1) + b"\1"
    else:
        run = varint(-(-rows // 8) << 1 | 1) + np.packbits(valid, bitorder="little").tobytes()
    return len(run).to_bytes(4, "little") + run


def _words(values: Iterable[str | bytes]) -> tuple[bytes, int]:
    encoded = [v.encode() if isinstance(v, str) else v for v in values]
    return b"".join(len(v).to_bytes(4, "little") + v for v in encoded), len(encoded)


def _run(numbers: NDArray[Any], width: int) -> bytes:
    # Numbers of a dictionary's values, *width* bits each, in groups of eight.
    packed = numbers.astype(f"<u{width // 8}", copy=False).tobytes() + bytes(-len(numbers) % 8 * width // 8)
    return bytes([width]) + varint(-(-len(numbers) // 8) << 1 | 1) + packed


def _zeros(rows: int) -> bytes:
    # One run: all are the dictionary's value 0.
    return b"\x08" + varint(rows << 1) + b"\0"


def _steps(values: NDArray[Any]) -> bytes | None:
    # Blocks of 128 steps in four parts; all steps as wide as the largest needs. None: they do not rise, or by too much,
    # which mostly shows at once.
    few = np.diff(values[:128].view("<u8"))  # one back is a very large one
    if len(few) < 127 or int(few.max()) >= 1 << 32:
        return None
    steps = np.diff(values.view("<u8"))
    most = int(steps.max())
    if most >= 1 << 32:
        return None
    width = 1 if most < 1 << 8 else 2 if most < 1 << 16 else 4
    blocks = np.zeros((-(-len(steps) // 128), 5 + 128 * width), np.uint8)  # each: the least step 0, four widths, steps
    blocks[:, 1:5] = 8 * width
    padded = np.zeros(len(blocks) * 128, f"<u{width}")
    padded[: len(steps)] = steps
    blocks[:, 5:] = padded.view(np.uint8).reshape(len(blocks), -1)
    unused = (len(padded) - len(steps)) // 32  # parts of the last block that hold no step are left out
    if unused:
        blocks[-1, 5 - unused : 5] = 0
    first = int(values.view("<i8")[0])
    head = varint(128) + varint(4) + varint(len(values)) + varint(first << 1 if first >= 0 else (-first << 1) - 1)
    return head + blocks.tobytes()[: blocks.size - unused * 32 * width]


def _element(key: _Key, name: str) -> Struct:
    kind = _TYPES[key.dtype]
    return struct((1, kind.physical), (3, 1), (4, name), (6, kind.converted), (10, kind.logical))


def _data_header(rows: int, encoding: int) -> tuple[int, Struct]:
    return 5, struct((1, rows), (2, encoding), (3, _RLE), (4, _RLE))


@cache
def _begun(key: _Key, name: str, encoding: int) -> Struct:
    # The part of a column's metadata that is the same in every row group.
    encodings = Items([*dict.fromkeys((_PLAIN, _RLE, encoding))])
    return struct((1, _TYPES[key.dtype].physical), (2, encodings), (3, Items([name])), (4, _ZSTD))


def _column(key: _Key, name: str, chunk: _Chunk, rows: int) -> Struct:
    meta = struct(
        (5, I64(rows)),
        (6, I64(chunk.full)),
        (7, I64(chunk.stored)),
        (9, I64(chunk.at)),
        (11, None if chunk.dictionary is None else I64(chunk.dictionary)),
        (12, chunk.statistics),
        begun=(4, _begun(key, name, chunk.encoding)),
    )
    return struct((2, I64(0)), (3, meta))
