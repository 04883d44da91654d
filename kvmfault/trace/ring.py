"""The kernel's ring-buffer pages, all of a block walked at once.

Records inside a page form a chain: only the header of one says where the next begins. Pages do not depend on each
other, so one step of the walk handles the next record of every page. What is where: ``ring_buffer.c`` of the kernel.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Gap", "I64Col", "Index", "Layout", "U16Col", "U32Col", "U64Col", "Walked", "walk"]

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

_ODD: Final = 255
_STEP: Final = {_LONG: _ODD, _PADDING: _ODD, _TIME_EXTEND: 2, _TIME_STAMP: 2}
_STEPS: Final = bytes(_STEP.get(kind & 31, 1 + (kind & 31)) for kind in range(256))
"""Words from one header to the next, by the lowest byte of the first; `_ODD`: it takes a closer look."""


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
    # Positions of all headers, in order. Every call in the loop costs more than its work, so there are few, and a chain
    # that has reached its end stays there until all have.
    lowest = np.empty(len(words) + 1, np.uint8)
    lowest[:-1] = words  # the lowest byte of each, which says the kind of record
    lowest[end] = 1  # nothing odd there
    at = np.minimum(start, end)
    found = [at]
    while len(found) % 8 or np.count_nonzero(at < end):
        steps = lowest.take(at, mode="clip").tobytes().translate(_STEPS)
        after = at + np.frombuffer(steps, np.uint8)
        if _ODD in steps:
            odd = np.flatnonzero(np.frombuffer(steps, np.uint8) == _ODD)
            after[odd] = at[odd] + _told_steps(words, at[odd], end[odd], damage)
        at = np.minimum(after, end)
        found.append(at)
    by_page = np.array(found).T
    return by_page[by_page < end[:, None]]


def _told_steps(words: U32Col, at: Index, end: Index, damage: list[tuple[int, str]]) -> Index:
    # A length follows the header of large records, and of padding unless nothing comes after it.
    header = words[at]
    last = (header & np.uint32(31) == _PADDING) & (header >> np.uint32(5) == 0)
    length = words.take(at + 1, mode="clip").astype(np.int64)
    bad = ~last & ((at + 1 >= end) | (length < 4))
    damage += [(int(where) * 4, "a record without a length") for where in at[bad]]
    step = 1 + (length + 3 >> 2)
    step[last | bad] = len(words)
    return step


def _records(
    words: U32Col, at: Index, base: Index, end: Index, commit: U32Col, layout: Layout, damage: list[tuple[int, str]]
) -> Walked:
    header = words.take(at)
    kind = header & np.uint32(31)
    odd = np.flatnonzero(kind - np.uint32(2) > _PADDING - 3)  # no plain record, or too short for one: few
    odd_kind, told = kind[odd], words.take(at[odd] + 1, mode="clip")
    first = np.searchsorted(at, np.append(base, len(words)))
    delta = (header >> np.uint32(5)).astype(np.uint64)
    extend = odd_kind == _TIME_EXTEND
    delta[odd[extend]] += told[extend].astype(np.uint64) << np.uint64(27)
    stamp = odd_kind == _TIME_STAMP
    time = _times(words, base, first, delta, odd[stamp], told[stamp])

    size = kind << np.uint32(2)
    word = at + 1
    long = odd_kind == _LONG
    size[odd[long]] = told[long] - np.uint32(4)
    word[odd[long]] += 1
    # Only the last record of a page can reach over its end; none may lack what every event begins with.
    filled = first[1:] > first[:-1]
    ends = first[1:][filled] - 1
    over = word[ends] + (size[ends].astype(np.int64) + 3 >> 2) > end[filled]
    wrong = np.concatenate([ends[over], odd[size[odd] < 8]])
    wrong = wrong[kind[wrong] < _PADDING]
    drop = odd[odd_kind >= _PADDING]
    if len(wrong):
        wrong = np.unique(wrong)
        known = {where for where, _ in damage}
        damage += [(w, f"no room for a record of {size[n]} bytes") for n in wrong if (w := int(at[n]) * 4) not in known]
        damage.sort()
        drop = np.union1d(drop, wrong)
    gaps = _gaps(words, base, end, commit, layout, first[:-1] - np.searchsorted(drop, first[:-1]))
    if len(drop):
        keep = np.ones(len(at), np.bool_)
        keep[drop] = False
        time, word, size = time[keep], word[keep], size[keep]
    return Walked(time, words.take(word, mode="clip").astype(np.uint16), word, size, gaps, damage)


def _times(words: U32Col, base: Index, first: Index, delta: U64Col, stamps: Index, told: U32Col) -> U64Col:
    # Each record adds its delta to the time of the one before; pages and absolute stamps begin anew.
    begins = words.take(base).astype(np.uint64) | words.take(base + 1).astype(np.uint64) << np.uint64(32)
    page = np.searchsorted(first, stamps, side="right") - 1
    top = begins[page] & _STAMP_TOP
    absolute = (told.astype(np.uint64) << np.uint64(27)) + delta[stamps] | top
    delta[stamps] = 0
    total = np.cumsum(delta)
    where = np.concatenate([first[:-1], stamps])
    value = np.concatenate([begins - np.append(np.uint64(0), total)[first[:-1]], absolute - total[stamps]])
    order = np.argsort(where, kind="stable")  # a page that begins with a stamp: the stamp holds
    total += np.repeat(value[order], np.diff(np.append(where[order], len(delta))))
    wrapped = (top != 0) & (stamps > first[page]) & (total[stamps] < total[stamps - 1])
    for n in np.flatnonzero(wrapped):  # the 59 bits of the stamp went round on this page
        total[stamps[n] : first[page[n] + 1]] += np.uint64(1 << 59)
    return total


def _gaps(words: U32Col, base: Index, end: Index, commit: U32Col, layout: Layout, before: Index) -> list[Gap]:
    found = []
    for page in np.flatnonzero(commit & np.uint32(_MISSED)):
        count = None
        at = int(end[page])
        if commit[page] & np.uint32(_MISSED_STORED) and at * 4 + layout.long <= int(base[page]) * 4 + layout.page:
            count = int.from_bytes(words[at : at + layout.long // 4].tobytes(), "little")
        found.append(Gap(int(before[page]), count))
    return found
