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
    each = max(NARROWEST, (width - lead) // len(column) - 2)
    yield (" " * lead + "".join(f"{actors[actor]:<{each + 2}}" for actor in column)).rstrip()
    number = 1
    for actor, run in groupby(schedule, key=lambda step: step.actor):
        steps = list(run)
        for at, text in _folded(steps, each):
            first = f"{number + at:>{lead - 2}}  " if at is not None else " " * lead
            yield (first + " " * (column[actor] * (each + 2)) + text).rstrip()
        number += len(steps)


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
        yield from _numbered(number, f"{step.name}: {step.note}", width)
    yield from _numbered(began, ", ".join(plain), width)


def _numbered(number: int, text: str, width: int) -> Iterator[tuple[int | None, str]]:
    for n, line in enumerate(wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)):
        yield (number if n == 0 else None), line
