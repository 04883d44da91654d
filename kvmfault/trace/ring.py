"""The kernel's ring-buffer pages, all of a block walked at once.

Records inside a page form a chain: only the header of one says where the next begins. Pages do not depend on each
other, so one step of the walk handles the next record of every page. What is where: ``ring_buffer.c`` of the kernel.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

U16Col: TypeAlias = NDArray[np.uint16]
U32Col: TypeAlias = NDArray[np.uint32]
U64Col: TypeAlias = NDArray[np.uint64]
I64Col: TypeAlias = NDArray[np.int64]
Index: TypeAlias = NDArray[np.int64]

# type_len of a record's header; 1..28 is the number of words of its data.
_LONG: Final = 0
_PADDING: Final = 29
_TIME_EXTEND: Final = 30
_TIME_STAMP: Final = 31

_COMMIT: Final = (1 << 27) - 1
_MISSED: Final = 1 << 31
_MISSED_STORED: Final = 1 << 30
_STAMP_TOP: Final = np.uint64(0xF8 << 56)
"""An absolute stamp has 59 bits; the rest is the page's."""

_STEP: Final = np.array([0, *range(2, 30), 0, 2, 2], np.int64)
"""Words from one header to the next; 0: it takes a closer look."""


class Layout(NamedTuple):
    """How pages of a recording are laid out, in bytes."""

    page: int
    """Size; a power of two."""
    data: int = 16
    """Where records begin."""
    long: int = 8
    """The kernel's long."""


class Gap(NamedTuple):
    """Events were lost before the record numbered ``before``; ``events`` None: the kernel does not say how many."""

    before: int
    events: int | None


class Walked(NamedTuple):
    """The records of some pages, in the order they stand there. Discarded ones are not among them."""

    time: U64Col
    kind: U16Col
    """common_type."""
    word: Index
    """Where a record's data begins, in words from the start of the block."""
    size: U32Col
    """Bytes of its data."""
    gaps: list[Gap]
    damage: list[tuple[int, str]]
    """Byte in the block, and what is wrong there; what follows on that page is not read."""


def walk(words: U32Col, layout: Layout) -> Walked:
    """The records of all pages of *words*, which holds whole pages, the last one filled up with zeros."""
    per_page = layout.page // 4
    base = np.arange(0, len(words), per_page, dtype=np.int64)
    commit = words[2::per_page]
    used = commit & np.uint32(_COMMIT)
    bad = used > layout.page - layout.data
    damage = [
        (int(page) * layout.page + 8, f"a page says that it holds {used[page]} bytes") for page in np.flatnonzero(bad)
    ]
    start = base + layout.data // 4
    end = start + np.where(bad, np.uint32(0), used >> np.uint32(2))
    headers = _headers(words, start, end, damage)
    return _records(words, headers, base, end, commit, layout, damage)


def _headers(words: U32Col, start: Index, end: Index, damage: list[tuple[int, str]]) -> Index:
    # Positions of all headers. A page drops out of `at` and `end` when its chain has reached its end.
    mark = np.zeros(len(words), np.bool_)
    running = start < end
    at, end = start[running], end[running]
    while len(at):
        mark[at] = True
        kind = words.take(at, mode="clip") & np.uint32(31)
        step = _STEP.take(kind, mode="clip")
        if not step.all():
            odd = np.flatnonzero(step == 0)
            step[odd] = _odd_steps(words, at[odd], end[odd], damage)
        at += step
        running = at < end
        if not running.all():
            at, end = at[running], end[running]
    return np.flatnonzero(mark)


def _odd_steps(words: U32Col, at: Index, end: Index, damage: list[tuple[int, str]]) -> Index:
    # A length follows the header of large records, and of padding unless nothing comes after it.
    header = words[at]
    last = (header & np.uint32(31) == _PADDING) & (header >> np.uint32(5) == 0)
    cut = ~last & (at + 1 >= end)
    length = words.take(at + 1, mode="clip").astype(np.int64)
    small = ~last & ~cut & (length < 4)
    damage += [(int(where) * 4, "a record without a length") for where in at[cut | small]]
    step = 1 + (length + 3 >> 2)
    step[last | cut | small] = len(words)
    return step


def _records(
    words: U32Col, at: Index, base: Index, end: Index, commit: U32Col, layout: Layout, damage: list[tuple[int, str]]
) -> Walked:
    header = words.take(at)
    kind = header & np.uint32(31)
    first = np.searchsorted(at, np.append(base, len(words)))
    counts = np.diff(first)
    after = words.take(at + 1, mode="clip")
    delta = (header >> np.uint32(5)).astype(np.uint64)
    extended = np.flatnonzero(kind == _TIME_EXTEND)
    delta[extended] += after[extended].astype(np.uint64) << np.uint64(27)
    stamps = np.flatnonzero(kind == _TIME_STAMP)
    time = _times(words, base, first, counts, delta, stamps, after)

    long = kind == _LONG
    size = kind << np.uint32(2)
    word = at + 1
    if long.any():
        size[long] = after[long] - np.uint32(4)
        word[long] += 1
    keep = kind < _PADDING
    over = keep & (word + ((size.astype(np.int64) + 3) >> 2) > np.repeat(end, counts))
    short = keep & ~over & (size < 8)  # no room for what every event begins with
    long_cut = long & (after < 4)
    for n in np.flatnonzero((over | short) & ~long_cut):
        damage += [(int(at[n]) * 4, f"no room for a record of {size[n]} bytes")]
    keep &= ~(over | short | long_cut)
    gaps = _gaps(words, base, end, commit, layout, np.append(0, np.cumsum(keep))[first[:-1]])
    if not keep.all():
        time, word, size = time[keep], word[keep], size[keep]
    damage.sort()
    return Walked(time, words.take(word).astype(np.uint16), word, size, gaps, damage)


def _times(
    words: U32Col, base: Index, first: Index, counts: Index, delta: U64Col, stamps: Index, after: U32Col
) -> U64Col:
    # Each record adds its delta to the time of the one before; pages and absolute stamps begin anew.
    begins = words.take(base).astype(np.uint64) | words.take(base + 1).astype(np.uint64) << np.uint64(32)
    if not len(stamps):
        total = np.cumsum(delta)
        before = np.append(np.uint64(0), total)[first[:-1]]
        total += np.repeat(begins - before, counts)
        return total
    page = np.searchsorted(first, stamps, side="right") - 1
    top = begins[page] & _STAMP_TOP
    absolute = (after[stamps].astype(np.uint64) << np.uint64(27)) + delta[stamps] | top
    delta[stamps] = 0
    total = np.cumsum(delta)
    where = np.concatenate([first[:-1], stamps])
    value = np.concatenate([begins - np.append(np.uint64(0), total)[first[:-1]], absolute - total[stamps]])
    order = np.argsort(where, kind="stable")  # a page that begins with a stamp: the stamp holds
    lengths = np.diff(np.append(where[order], len(delta)))
    time: U64Col = total + np.repeat(value[order], lengths)
    wrapped = np.flatnonzero((top != 0) & (stamps > 0) & (time[stamps] < time[stamps - 1]) & (stamps > first[page]))
    for n in wrapped:  # the 59 bits of the stamp went round on this page
        time[stamps[n] : first[page[n] + 1]] += np.uint64(1 << 59)
    return time


def _gaps(words: U32Col, base: Index, end: Index, commit: U32Col, layout: Layout, before: Index) -> list[Gap]:
    found = []
    for page in np.flatnonzero(commit & np.uint32(_MISSED)):
        count = None
        at = int(end[page])
        if commit[page] & np.uint32(_MISSED_STORED) and at * 4 + layout.long <= int(base[page]) * 4 + layout.page:
            count = int.from_bytes(words[at : at + layout.long // 4].tobytes(), "little")
        found.append(Gap(int(before[page]), count))
    return found
