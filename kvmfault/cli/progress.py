"""Progress bars for work that takes long: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(totals: Mapping[str, int | None]) -> Generator[Callable[[str, int], None]]:
    """A bar for each name in *totals*, gone when the work is done. Call what it gives with a name and how much is done.

    A total counts bytes, items or whatever the calls count; None: not known.
    """
    if not sys.stderr.isatty():  # rich takes long to load
        yield lambda name, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks = {name: bars.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name, done: bars.update(tasks[name], completed=done)
