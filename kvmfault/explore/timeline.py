"""A schedule for people: a column for each actor, from top to bottom in the order of what happened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import wrap
from typing import Final

from kvmfault.explore.search import Taken

__all__ = ["NARROWEST", "timeline"]

NARROWEST: Final = 16
"""Columns of one actor, at least."""


def timeline(actors: Sequence[str], schedule: Sequence[Taken], width: int = 100) -> Iterator[str]:
    """Lines of at most *width* columns, unless there are so many actors that theirs would become too narrow."""
    acting = {step.actor for step in schedule}
    # accesses that take effect by themselves (see barriers) have a column only if one of the kind does
    shown = [actor for actor, name in enumerate(actors) if actor in acting or ":" not in name]
    column = {actor: at for at, actor in enumerate(shown)}
    lead = len(str(len(schedule))) + 2
    runs = [(actor, list(run)) for actor, run in groupby(schedule, key=lambda step: step.actor)]
    lines = [(a, len(text)) for a, run in runs for _, text in _folded(run, width)]
    wanted = [max([len(actors[a]), *(needs for who, needs in lines if who == a)]) for a in shown]
    wide = _widths(wanted, width - lead - 2 * len(shown))
    begin = {actor: sum(w + 2 for w in wide[: column[actor]]) for actor in shown}
    yield (" " * lead + "".join(f"{actors[a]:<{w + 2}}" for a, w in zip(shown, wide, strict=True))).rstrip()
    number = 1
    for actor, steps in runs:
        for at, text in _folded(steps, wide[column[actor]]):
            first = f"{number + at:>{lead - 2}}  " if at is not None else " " * lead
            yield (first + " " * begin[actor] + text).rstrip()
        number += len(steps)


def _whole(step: Taken) -> str:
    return f"{step.name}: {step.note}" if step.note else step.name


def _widths(wanted: Sequence[int], room: int) -> list[int]:
    # who needs less than a fair share gets that, the others share the rest; nobody gets less than NARROWEST of a share
    left, of, widths = room, len(wanted), [0] * len(wanted)
    for needs, at in sorted((needs, at) for at, needs in enumerate(wanted)):
        widths[at] = min(needs, max(NARROWEST, left // of))
        left, of = left - widths[at], of - 1
    return widths


def _folded(steps: Sequence[Taken], width: int) -> Iterator[tuple[int | None, str]]:
    # actions of which there is nothing to tell share lines
    plain: list[str] = []
    began = 0
    for number, step in enumerate(steps):
        if not step.note:
            began = began if plain else number
            plain.append(step.name)
            continue
        yield from _numbered(began, ", ".join(plain), width)
        plain = []
        yield from _numbered(number, _whole(step), width)
    yield from _numbered(began, ", ".join(plain), width)


def _numbered(number: int, text: str, width: int) -> Iterator[tuple[int | None, str]]:
    for n, line in enumerate(wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)):
        yield (number if n == 0 else None), line
