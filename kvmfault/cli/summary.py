"""``kvmfault trace summary``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from kvmfault.cli.render import to_json
from kvmfault.summary.figures import Section, Summary
from kvmfault.summary.words import text

NARROW = 110
"""Columns of a terminal below which the figures that matter less are left out."""


def tables(summary: Summary, width: int) -> Iterator[Table | Text | str]:
    """The summary for people, section by section."""
    yield Text(", ".join(_head(summary)))
    for section in summary.sections:
        yield ""
        yield from _table(section, width, ticks=summary.ticks)
    if summary.unsaid:
        yield ""
        yield Text("What this recording does not tell", style="bold")
        yield from (Text(f"  {line}") for line in summary.unsaid)


def show(summary: Summary, console: Console) -> None:
    """Print it."""
    console.print(Group(*tables(summary, console.width)), soft_wrap=False, highlight=False)


def _head(summary: Summary) -> Iterator[str]:
    about = summary.about
    yield f"{summary.path}: {about['format']}"
    yield from (str(about[k]) for k in ("kernel", "machine") if about[k])
    yield f"{text(about['events'], 'count')} events"
    yield f"{text(about['faults'], 'count')} faults in {text(about['duration'], 'time', ticks=summary.ticks)}"
    if about["faults_per_second"] is not None:
        yield f"{text(about['faults_per_second'], 'rate')} faults a second"


def _table(section: Section, width: int, *, ticks: bool) -> Iterator[Table | Text]:
    shown = [i for i, c in enumerate(section.columns) if width >= NARROW or not c.wide]
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title=section.title,
        title_justify="left",
        title_style="bold",
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


def write_json(summary: Summary) -> str:
    """JSON text."""
    return to_json(as_data(summary))


def write_page(summary: Summary, path: str) -> None:
    """The page, into a file."""
    from kvmfault.summary.page import page

    Path(path).write_text(page(summary), encoding="utf-8")
