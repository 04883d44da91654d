"""The records of perf.data: found one after the other, samples taken apart as columns.

See include/uapi/linux/perf_event.h and the kernel's tools/perf/Documentation/perf.data-file-format.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmfault.trace.ring import I64Col, Index, U32Col

__all__ = [
    "ATTR",
    "AUXTRACE",
    "COMM",
    "COMPRESSED",
    "COMPRESSED2",
    "FEATURE",
    "FINISHED_ROUND",
    "LOST",
    "LOST_SAMPLES",
    "SAMPLE",
    "TRACEPOINT",
    "TRACING_DATA",
    "Attr",
    "Found",
    "Samples",
    "find",
    "holds_raw",
    "ids",
    "samples",
    "walk",
]

LOST, COMM, SAMPLE, LOST_SAMPLES = 2, 3, 9, 13
ATTR, TRACING_DATA, FINISHED_ROUND, AUXTRACE, FEATURE, COMPRESSED, COMPRESSED2 = 64, 66, 68, 71, 80, 81, 83
TRACEPOINT: Final = 2
"""perf_event_attr.type."""

# sample_type
_IP, _TID, _TIME, _ADDR, _READ, _CALLCHAIN = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
_ID, _CPU, _PERIOD, _STREAM, _RAW, _IDENTIFIER = 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 10, 1 << 16
_BEFORE: Final = (_IDENTIFIER, _IP, _TID, _TIME, _ADDR, _ID, _STREAM, _CPU, _PERIOD)
"""Fields of 8 bytes, in the order of a sample."""
_BEHIND: Final = (_TID, _TIME, _ID, _STREAM, _CPU, _IDENTIFIER)
"""Those behind other records (sample_id_all)."""
# read_format
_ENABLED, _RUNNING, _READ_ID, _GROUP, _READ_LOST = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
_ID_ALL: Final = 1 << 18
_CLOCKID: Final = 1 << 25


@dataclass(frozen=True, slots=True)
class Attr:
    """What one event of perf records, and how its samples are laid out."""

    type: int
    config: int
    sample_type: int
    read_format: int
    flags: int
    clock: int | None
    """The clock that was chosen, by its number; None: perf's own."""

    @classmethod
    def of(cls, data: bytes) -> Attr:
        """From a perf_event_attr; fields that it is too short for are 0."""
        whole = data[:112].ljust(112, b"\0")

        def at(offset: int, size: int) -> int:
            return int.from_bytes(whole[offset : offset + size], "little")

        flags = at(40, 8)
        return cls(at(0, 4), at(8, 8), at(24, 8), at(32, 8), flags, at(92, 4) if flags & _CLOCKID else None)

    def place(self, bit: int) -> int | None:
        """Offset of a field of a sample, from its record's start; None: it is not recorded."""
        before = _BEFORE.index(bit)
        have = sum(bool(self.sample_type & field) for field in _BEFORE[:before])
        return 8 + 8 * have if self.sample_type & bit else None

    def behind(self, bit: int) -> int | None:
        """Offset of a field behind another record, from its end."""
        if not self.flags & _ID_ALL or not self.sample_type & bit:
            return None
        return -8 * sum(bool(self.sample_type & field) for field in _BEHIND[_BEHIND.index(bit) :])

    @property
    def layout(self) -> tuple[int, int]:
        """Attributes with equal ones have samples that are laid out alike."""
        return self.sample_type, self.read_format if self.sample_type & _READ else 0


class Found(NamedTuple):
    """The records in some bytes: where each begins, its type and size; all in bytes."""

    at: Index
    type: U32Col
    size: NDArray[np.uint16]
    end: int
    """Bytes used: what follows is the beginning of a record."""
    wrong: str | None = None
    """What follows cannot be a record."""


class Samples(NamedTuple):
    """Samples of tracepoints. ``at`` (in ``words``) and ``size`` (bytes) are of the kernel's record."""

    words: U32Col
    record: Index
    """Which of the records each is."""
    time: I64Col
    cpu: NDArray[np.uint16]
    at: Index
    size: U32Col


def walk(data: bytes) -> Found:
    """Every whole record of *data*, up to one that is followed by data which is no record."""
    where, end, wrong = find(data)
    raw = np.frombuffer(data, np.uint8)
    kinds, sizes = raw[where].astype(np.uint32), raw[where + 6].astype(np.uint16)
    for n in (1, 2, 3):
        kinds |= raw[where + n].astype(np.uint32) << np.uint32(8 * n)
    sizes |= raw[where + 7].astype(np.uint16) << np.uint16(8)
    return Found(where, kinds, sizes, end, wrong)


def find(data: bytes) -> tuple[Index, int, str | None]:
    """Where records begin, where the last whole one ends, and what is wrong there; see `walk`."""
    words = len(data) // 8
    sizes = np.frombuffer(data, "<u2", 4 * words)[3::4]
    steps = np.where(sizes & 7, 0, sizes >> 3).astype(np.uint16)  # 0: not as most are, looked at below
    starts: list[int] = []
    append, step_at, at = starts.append, memoryview(steps.tobytes()).cast("H"), 0
    try:
        while step := step_at[at]:
            append(at)
            at += step
    except IndexError:
        if at > words:  # the last one is not whole
            at = starts.pop()
    where = 8 * np.array(starts, np.int64)
    end = 8 * at
    first = np.frombuffer(data, np.uint8)[where]
    stops = np.flatnonzero((first == TRACING_DATA) | (first == AUXTRACE))
    if len(stops):
        last = int(where[stops[0]])
        return where[: stops[0] + 1], last + 8 * int(steps[last // 8]), None
    others: list[int] = []
    # compressed records, and few others, have sizes of any kind: what follows them lies anywhere
    while end + 8 <= len(data):
        size = int.from_bytes(data[end + 6 : end + 8], "little")
        if size < 8:
            return np.append(where, np.array(others, np.int64)), end, f"a record of {size} bytes: it has 8 at least"
        if end + size > len(data):
            break
        others.append(end)
        end += size
        if data[others[-1]] in (TRACING_DATA, AUXTRACE):
            break
    return np.append(where, np.array(others, np.int64)), end, None


def samples(words: U32Col, record: Index, at: Index, size: NDArray[np.uint16], attr: Attr) -> tuple[Samples, int]:
    """The samples at *at* (bytes), laid out as *attr* says; and how many of them hold no record of the kernel."""
    at = at >> 2
    time, cpu = attr.place(_TIME), attr.place(_CPU)
    fixed = 8 + 8 * sum(bool(attr.sample_type & field) for field in _BEFORE)
    raw = np.full(len(at), fixed, np.int64)
    limit = size.astype(np.int64)
    if attr.sample_type & _READ:
        raw += _read_size(words, at, raw, limit, attr.read_format)
    if attr.sample_type & _CALLCHAIN:
        raw += 8 + 8 * _count(words, at, raw, limit)
    good = raw + 8 <= limit
    length = words.take(at + (np.where(good, raw, 0) >> 2), mode="clip").astype(np.int64)
    good &= raw + 4 + length <= limit
    good &= length >= 8
    if not good.all():
        at, raw, length, record = at[good], raw[good], length[good], record[good]
    return (
        Samples(
            words,
            record,
            _u64(words, at + ((time or 0) >> 2)).view(np.int64) if time is not None else np.zeros(len(at), np.int64),
            words[at + (cpu >> 2)].astype(np.uint16) if cpu is not None else np.zeros(len(at), np.uint16),
            at + ((raw + 4) >> 2),
            length.astype(np.uint32),
        ),
        int(len(good) - np.count_nonzero(good)),
    )


def holds_raw(attr: Attr) -> bool:
    """Whether samples of *attr* hold a record of the kernel, with the time at which it was made."""
    return attr.type == TRACEPOINT and bool(attr.sample_type & _RAW) and bool(attr.sample_type & _TIME)


def ids(words: U32Col, at: Index, attr: Attr) -> NDArray[np.uint64] | None:
    """Which event each sample is of; None: they do not tell."""
    place = attr.place(_IDENTIFIER) or attr.place(_ID)
    return None if place is None else _u64(words, at + place >> 2)


def _read_size(words: U32Col, at: Index, raw: I64Col, limit: I64Col, read_format: int) -> I64Col:
    times = sum(bool(read_format & bit) for bit in (_ENABLED, _RUNNING))
    each = 1 + sum(bool(read_format & bit) for bit in (_READ_ID, _READ_LOST))
    if not read_format & _GROUP:
        return np.full(len(at), 8 * (times + each), np.int64)
    return 8 * (1 + times + each * _count(words, at, raw, limit))


def _count(words: U32Col, at: Index, raw: I64Col, limit: I64Col) -> I64Col:
    # a number that says how many follow; what cannot be so leads beyond the record, where it is noticed
    inside = raw + 8 <= limit
    value = _u64(words, at + (np.where(inside, raw, 0) >> 2))
    return np.where(inside & (value < np.uint64(1 << 16)), value.astype(np.int64), 1 << 16)


def _u64(words: U32Col, at: Index) -> NDArray[np.uint64]:
    wide = np.empty((len(at), 2), "<u4")
    wide[:, 0] = words.take(at, mode="clip")
    wide[:, 1] = words.take(at + 1, mode="clip")
    return wide.view("<u8").reshape(-1)
