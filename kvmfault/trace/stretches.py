"""Stretches of time of a recording: what each CPU gives to one, as frames, here or in another process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, NamedTuple, Protocol, TypeVar

import numpy as np
import polars as pl

from kvmfault.trace.binary import expect
from kvmfault.trace.extents import Clock, Extent, read_extent
from kvmfault.trace.frames import Block, Column, Plan, Records, columns_of
from kvmfault.trace.recording import Frames
from kvmfault.trace.ring import I64Col, Index, U16Col, U32Col, U64Col

__all__ = [
    "LONG_AGO",
    "RUN",
    "Cut",
    "Far",
    "Held",
    "Near",
    "Piece",
    "Run",
    "Stretch",
    "absolute",
    "far_runs",
    "made",
    "near_runs",
    "there",
]

T = TypeVar("T")

RUN: Final = 1 << 25
"""Bytes of pages that one run begins to read, or a little more."""
LONG_AGO: Final = -(1 << 63)


@dataclass(slots=True)
class Held:
    """An extent that was read, of which the records from ``done`` on wait."""

    extent: Extent
    block: Block
    latest: int
    """Latest time of its CPU before it."""
    key: I64Col
    """What orders its records: the latest time up to each."""
    done: int = 0

    @classmethod
    def of(cls, extent: Extent, block: Block, latest: int) -> Held:
        """*block*, which is what *extent* holds."""
        key = block.time
        if len(key) and (key[0] < latest or (key[1:] < key[:-1]).any()):
            key = np.maximum.accumulate(np.maximum(key, latest))
        return cls(extent, block, latest, key)


class Piece(NamedTuple):
    """Records of an extent that belong to a stretch."""

    held: Held
    start: int
    stop: int


class Run(Protocol):
    """Stretches that follow each other. Can be sent to another process."""

    @property
    def place(self) -> int:
        """Of its first record, or a smaller one that is larger than every place before it."""
        ...

    def frames(self, *, lead: bool = False) -> Iterator[Frames]:
        """The stretches; with *lead* first the one before them, empty if there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Near:
    """A run that was read."""

    place: int
    stretches: Sequence[Frames]
    earlier: Frames

    def frames(self, *, lead: bool = False) -> Iterator[Frames]:
        """See `Run.frames`."""
        return iter((self.earlier, *self.stretches) if lead else self.stretches)


class Cut(NamedTuple):
    """Which records of an extent a stretch takes."""

    extent: Extent
    latest: int
    """See `Held.latest`."""
    start: int
    stop: int


class Stretch(NamedTuple):
    """A stretch that is still to be read."""

    place: int
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Far:
    """A run to be read where it arrives."""

    plan: Plan
    clock: Clock
    stretches: Sequence[Stretch]
    earlier: Stretch | None

    @property
    def place(self) -> int:
        """See `Run.place`."""
        return self.stretches[0].place

    def frames(self, *, lead: bool = False) -> Iterator[Frames]:
        """See `Run.frames`. Raises UsageError where the file is not there, or another one."""
        if lead and self.earlier is None:
            yield {}
        before = [self.earlier] if lead and self.earlier is not None else []
        held: dict[tuple[str, int], Held] = {}
        for place, cuts in (*before, *self.stretches):
            pieces = []
            for extent, latest, start, stop in cuts:
                key = extent.path, extent.parts[0].offset
                if key not in held:
                    held[key] = Held.of(extent, there(extent, self.plan, self.clock), latest)
                pieces.append(Piece(held[key], start, stop))
                if stop == len(held[key].key):
                    del held[key]
            yield made(pieces, place, self.plan)


def there(extent: Extent, plan: Plan, clock: Clock) -> Block:
    """`read_extent` where its file may be missing: another machine. Raises UsageError that names it."""
    expect(extent.path, extent.whole)
    return read_extent(extent, plan, clock)


def absolute(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same, for processes in other folders."""
    return (replace(extent, path=os.path.abspath(extent.path)) for extent in extents)  # noqa: PTH100  links stay


def near_runs(stretches: Iterable[tuple[int, list[Piece]]], plan: Plan) -> Iterator[Near]:
    """Runs of *stretches*, which are read."""
    earlier: Frames = {}
    for place, some in _by_size(stretches, lambda place, pieces: made(pieces, place, plan)):
        yield Near(place, some, earlier)
        earlier = some[-1]


def far_runs(stretches: Iterable[tuple[int, list[Piece]]], plan: Plan, clock: Clock) -> Iterator[Far]:
    """Runs of *stretches* whose columns are to be read by *plan*."""
    earlier: Stretch | None = None
    for _, some in _by_size(stretches, _stretch):
        yield Far(plan, clock, some, earlier)
        earlier = some[-1]


def _stretch(place: int, pieces: list[Piece]) -> Stretch:
    return Stretch(place, tuple(Cut(p.held.extent, p.held.latest, p.start, p.stop) for p in pieces))


def _by_size(
    stretches: Iterable[tuple[int, list[Piece]]], make: Callable[[int, list[Piece]], T]
) -> Iterator[tuple[int, list[T]]]:
    # Where a run ends depends on the recording alone.
    some: list[T] = []
    begun = first = 0
    for place, pieces in stretches:
        first = first if some else place
        some.append(make(place, pieces))
        begun += sum(p.held.extent.size for p in pieces if not p.start)
        if begun >= RUN:
            yield first, some
            some, begun = [], 0
    if some:
        yield first, some


class _Some(NamedTuple):
    # Records of one event: of one piece, or of all in the order of place.
    place: U64Col
    time: I64Col
    cpu: U16Col
    at: Index
    size: U32Col


def made(pieces: Sequence[Piece], place: int, plan: Plan) -> dict[str, pl.DataFrame]:
    """The events of a stretch as frames; *place* is that of its first record."""
    parts: dict[int, list[_Some]] = {}
    words, moved = _words(pieces)
    for piece, by, places in zip(pieces, moved, _places(pieces, place), strict=True):
        block = piece.held.block
        for number, all_of_it in block.numbers.items():
            some = all_of_it[slice(*np.searchsorted(all_of_it, (piece.start, piece.stop)))]
            if len(some):
                cpu = np.full(len(some), block.cpu, np.uint16)
                at = block.at.take(some)
                at += by
                where = (
                    (some + (place - piece.start)).view(np.uint64)
                    if places is None
                    else places.take(some - piece.start)
                )
                parts.setdefault(number, []).append(_Some(where, block.time.take(some), cpu, at, block.size.take(some)))
    frames = {}
    for number, found in parts.items():
        first = found[0] if len(found) == 1 else _woven(found)
        event = plan.wanted[number]
        columns = columns_of(event, Records(words, first.at, first.size))
        frames[event.name] = _frame({"place": first.place, "time": first.time, "cpu": first.cpu, **columns})
    return frames


def _frame(columns: dict[str, Column]) -> pl.DataFrame:
    # As a list, for polars takes longer to look through a dict.
    return pl.DataFrame([pl.Series(name, column) for name, column in columns.items()])


def _woven(parts: list[_Some]) -> _Some:
    # One after the other would not be in order of place.
    order = np.argsort(np.concatenate([part.place for part in parts]), kind="stable")
    return _Some(*(np.concatenate(columns).take(order) for columns in zip(*parts, strict=True)))


def _words(pieces: Sequence[Piece]) -> tuple[U32Col, list[int]]:
    # What the records of all pieces stand in, and by how much it moves those of each.
    blocks = [piece.held.block for piece in pieces]
    if len(pieces) == 1:
        return blocks[0].words, [0]
    firsts = [int(block.at[piece.start]) for block, piece in zip(blocks, pieces, strict=True)]
    lasts = [piece.stop - 1 for piece in pieces]
    ends = [int(b.at[n]) + (int(b.size[n]) + 3 >> 2) for b, n in zip(blocks, lasts, strict=True)]
    words = np.concatenate([b.words[first:end] for b, first, end in zip(blocks, firsts, ends, strict=True)])
    befores = accumulate((end - first for first, end in zip(firsts, ends, strict=True)), initial=0)
    return words, [before - first for before, first in zip(befores, firsts, strict=False)]


def _places(pieces: Sequence[Piece], place: int) -> Sequence[U64Col | None]:
    # Of the records of each piece; None: one after the other.
    if len(pieces) == 1:
        return [None]
    lengths = [p.stop - p.start for p in pieces]
    numbers = np.arange(place, place + sum(lengths), dtype=np.uint64)
    places = np.empty_like(numbers)
    places[np.argsort(np.concatenate([p.held.key[p.start : p.stop] for p in pieces]), kind="stable")] = numbers
    return np.split(places, np.cumsum(lengths)[:-1])
