"""``kvmfault trace summary`` and ``kvmfault compare traces``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from kvmfault.cli.options import Where
from kvmfault.cli.render import to_json
from kvmfault.errors import UsageError, needs
from kvmfault.parallel import Workers
from kvmfault.summary.compare import Comparison
from kvmfault.summary.compare import compare as compared
from kvmfault.summary.figures import Section, Summary
from kvmfault.summary.run import summarise
from kvmfault.summary.words import text
from kvmfault.trace.slotfile import read_slots

__all__ = ["NARROW", "as_data", "compare", "remarks", "run", "show", "table"]

NARROW = 110
"""Columns of a terminal below which the figures that matter less are left out."""


def run(
    path: str,
    slots: str | None,
    told: str | None,
    formats: str | None,
    instance: str | None,
    page: str | None,
    where: Where,
    *,
    json: bool,
) -> int:
    """Summarise and print; status 1 if the file is damaged."""
    write = _writer(page)
    with where.workers() as at:
        summary = _summarised(path, at, slots, told, formats, instance)
    write(summary)
    print(to_json(as_data(summary))) if json else show(_tables(summary))
    return 1 if summary.damaged else 0


def compare(
    before: str, after: str, told: str | None, *, page: str | None, limit: float | None, where: Where, json: bool
) -> int:
    """Compare and print; status 1 if something is slower by more than *limit* percent."""
    write = _writer(page)
    with where.workers() as at:
        found = compared(_summarised(before, at, told=told), _summarised(after, at, told=told))
    if limit is not None and (found.before.ticks or found.after.ticks):
        raise UsageError(f"{before}, {after}: times are ticks, which --fail-if-slower cannot compare")
    slower = found.slower(limit) if limit is not None else []
    write(found)
    if json:
        sections = {section.key: section.records() for section in found.sections}
        print(to_json({"before": before, "after": after, **sections, "cautions": found.cautions, "slower": slower}))
    else:
        show(_differences(found, slower))
    return 1 if slower or found.before.damaged or found.after.damaged else 0


def _writer(path: str | None) -> Callable[[Summary | Comparison], object]:
    # before anything is read: what is missing to draw with is told at once
    if path is None:
        return lambda _: None
    with needs("report", "--html"):
        from kvmfault.summary.page import comparison, page

    def write(what: Summary | Comparison) -> None:
        text = page(what) if isinstance(what, Summary) else comparison(what)
        Path(path).write_text(text, encoding="utf-8")

    return write


def _summarised(
    path: str,
    where: Workers,
    slots: str | None = None,
    told: str | None = None,
    formats: str | None = None,
    instance: str | None = None,
) -> Summary:
    known = read_slots(slots) if slots is not None else None
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    size = Path(path).stat().st_size if Path(path).is_file() else None
    with bar:
        task = bar.add_task("read", total=size)
        return summarise(
            path,
            formats=formats,
            instance=instance,
            slots=known,
            told=told,
            where=where,
            progress=lambda done: bar.update(task, completed=done),
        )


def show(parts: Iterable[Table | Text]) -> None:
    """Print tables and lines."""
    console = Console(soft_wrap=False, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)


def _tables(summary: Summary) -> Iterator[Table | Text]:
    yield Text(", ".join(_head(summary)))
    for section in summary.sections:
        yield from table(section, ticks=summary.ticks)
    yield from remarks("What this recording does not tell", summary.unsaid)


def _differences(found: Comparison, slower: list[str]) -> Iterator[Table | Text]:
    for which, summary in (("before", found.before), ("after", found.after)):
        yield Text(f"{which}: {', '.join(_head(summary))}")
    for section in found.sections:
        yield from table(section, ticks=found.before.ticks)
    yield from remarks("Why figures may not be comparable", found.cautions)
    yield from remarks("Slower", slower)


def remarks(title: str, lines: Sequence[str]) -> Iterator[Text]:
    """A list with its title; nothing where it is empty."""
    if lines:
        yield Text(f"\n{title}", style="bold")
        yield from (Text(f"  {line}") for line in lines)


def _head(summary: Summary) -> Iterator[str]:
    about = summary.about
    yield f"{summary.path}: {about['format']}"
    yield from (str(about[k]) for k in ("kernel", "machine") if about[k])
    yield f"{text(about['events'], 'count')} events"
    yield f"{text(about['faults'], 'count')} faults in {text(about['duration'], 'time', ticks=summary.ticks)}"
    if about["faults_per_second"] is not None:
        yield f"{text(about['faults_per_second'], 'rate')} faults a second"


def table(section: Section, *, ticks: bool) -> Iterator[Table | Text]:
    """A section as text."""
    width = Console().width
    shown = [i for i, c in enumerate(section.columns) if width >= NARROW or not c.wide]
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        collapse_padding=True,
    )
    for i in shown:
        column = section.columns[i]
        words = column.unit == "text"
        table.add_column(
            column.name, justify="left" if words else "right", overflow="fold", no_wrap=not words, vertical="top"
        )
    for row in section.rows:
        table.add_row(*(Text(text(row[i], section.columns[i].unit, ticks=ticks)) for i in shown))
    yield Text(f"\n{section.title}", style="bold")
    yield table
    yield from (Text(f"  {note}", style="dim") for note in section.notes)


def as_data(summary: Summary) -> dict[str, object]:
    """The summary as JSON data."""
    return {
        "recording": summary.path,
        "about": dict(summary.about),
        "events": dict(summary.events),
        **{section.key: section.records() for section in summary.sections},
        "notes": {section.key: list(section.notes) for section in summary.sections if section.notes},
        "rate": {
            "start": summary.start,
            "step": summary.step,
            "faults": [{"step": step, "kind": kind, "faults": n} for step, kind, n in summary.rate],
        },
        "histograms": {
            h.name: [{"from": a, "below": b, "exits": n} for a, b, n in h.steps] for h in summary.histograms
        },
        "unsaid": list(summary.unsaid),
    }
