"""``kvmfault compare shapes``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.text import Text

from kvmfault.cli.progress import progress
from kvmfault.cli.render import to_json
from kvmfault.cli.summary import remarks, show, table
from kvmfault.compare.shapes import STEPS, Report, compare
from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import needs

__all__ = ["NOT_MEASURED", "run"]

NOT_MEASURED = "Not measured here"


def run(targets: Sequence[str], html: str | None, *, json: bool) -> int:
    """Compare and report; status 1 if a shape does not tell what the definitions say."""
    on = [backend(t) for t in targets or backends()]
    write = _writer(html)
    with progress({"compare": STEPS}) as told:
        report = compare(on, lambda done: told("compare", done))
    write(on, report)
    if json:
        sections = {s.key: s.records() for s in report.sections}
        notes = {s.key: list(s.notes) for s in report.sections}
        names = [t.name for t in on]
        print(to_json({"targets": names, **sections, "notes": notes, "missing": report.missing, "equal": report.equal}))
    else:
        show([Text(", ".join(t.name for t in on))])
        for section in report.sections:
            show(table(section, ticks=False))
        show(remarks(NOT_MEASURED, report.missing))
    return 0 if report.equal else 1


def _writer(path: str | None) -> Callable[[Sequence[Target], Report], object]:
    # before anything is measured: what is missing to draw with, or cannot be written to, is told at once
    if path is None:
        return lambda on, report: None
    with needs("report", "--html"):
        from kvmfault.summary.charts import PALETTE, bars
        from kvmfault.summary.page import tables
    with Path(path).open("ab"):
        pass

    def write(on: Sequence[Target], report: Report) -> None:
        plots = [
            bars(s.key, s.title, s.notes[0], unit, [(str(r[0]), str(r[1]), float(r[4] or 0)) for r in s.rows])
            for s in report.sections
            for unit in [{"instructions": "instructions per fault", "python": "ns per fault"}.get(s.key)]
            if unit
        ]
        shapes = dict.fromkeys(str(r[1]) for s in report.sections if s.key == "python" for r in s.rows)
        about = {"targets": ", ".join(t.name for t in on), "shapes": ", ".join(shapes)}
        colours = dict(zip(shapes, PALETTE, strict=False))
        missing = (NOT_MEASURED, report.missing)
        page = tables("Shapes of a guest page fault", about, plots, colours, report.sections, missing)
        Path(path).write_text(page, encoding="utf-8")

    return write
