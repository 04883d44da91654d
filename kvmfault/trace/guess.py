"""Faults decoded by workers that begin anywhere in a recording, with the same result as from its start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import polars as pl

from kvmfault.parallel import Workers
from kvmfault.trace.assemble import AssembleStats
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.recording import Frames
from kvmfault.trace.stretches import Run

__all__ = ["Work", "by_runs"]

T = TypeVar("T")
Work: TypeAlias = Callable[[FaultColumns, Iterator[Frames]], T]
_Known: TypeAlias = Mapping[str, pl.DataFrame]


def by_runs(work: Work[T], taken: Iterable[Run], faults: FaultColumns, where: Workers) -> Iterator[T]:
    """*work* of each run in turn. It feeds the stretches to the `FaultColumns` that it is given, and depends on nothing
    else; *faults* ends up as if it had been fed them all. Apart, *work* and what it returns must pickle.

    A worker knows the stretch before its run. Where it turns out that this was too little, the run is done again here.
    """
    if not where.apart:
        for run in taken:
            yield work(faults, run.frames())
        return
    given = deque[Run]()

    def noted() -> Iterator[Run]:
        for run in taken:
            given.append(run)
            yield run

    for guess in where.in_order(partial(_guessed, work, faults.fresh), noted()):
        run = given.popleft()
        if _same(_of(faults.exits, guess.asked), guess.exits) and _same(_some(faults.waiting), guess.waiting):
            _learn(faults, guess)
            yield guess.made
        else:
            yield work(faults, run.frames())


class _Guess(NamedTuple, Generic[T]):
    # What a run comes to, if what counted of the time before it was in the stretch before it.
    made: T
    stats: AssembleStats
    asked: frozenset[int]
    exits: _Known
    """The last exits before the run, of the tasks asked for."""
    waiting: _Known
    after: tuple[_Known, dict[str, pl.DataFrame]]
    """Exits and waiting faults as it ends."""


def _guessed(work: Work[T], fresh: Callable[[], FaultColumns], run: Run) -> _Guess[T]:
    faults, stretches = fresh(), run.frames(lead=True)
    faults.by_backend(next(stretches))
    exits, waiting = dict(faults.exits), _some(faults.waiting)
    faults.stats, faults.since, faults.asked = AssembleStats(), run.place, set()
    made = work(faults, stretches)
    asked = frozenset(faults.asked)
    return _Guess(made, faults.stats, asked, _of(exits, asked), waiting, (faults.exits, faults.waiting))


def _learn(faults: FaultColumns, guess: _Guess[T]) -> None:
    stats, more = faults.stats, guess.stats
    stats.faults.update(more.faults)
    stats.unclaimed.update(more.unclaimed)
    stats.unclaimed_lines += more.unclaimed_lines[: max(0, 5 - len(stats.unclaimed_lines))]
    stats.without_address += more.without_address
    exits, faults.waiting = guess.after
    for name, last in exits.items():
        known = [faults.exits[name]] if name in faults.exits else []
        faults.exits[name] = pl.concat([*known, last]).sort("place").group_by("pid", maintain_order=True).last()
        faults.exits[name] = faults.exits[name].select("place", "pid", "holds")


def _of(exits: _Known, tasks: Collection[int]) -> _Known:
    return _some({name: frame.filter(pl.col("pid").is_in(list(tasks))) for name, frame in exits.items()})


def _some(known: _Known) -> _Known:
    return {name: frame.sort("place") for name, frame in known.items() if frame.height}


def _same(one: _Known, other: _Known) -> bool:
    return one.keys() == other.keys() and all(one[name].equals(other[name]) for name in one)
