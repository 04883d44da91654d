"""``kvmfault replay``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmfault.cli import whatif
from kvmfault.cli.options import Where
from kvmfault.cli.progress import progress
from kvmfault.cli.render import columns, to_json
from kvmfault.contract.format import size_text
from kvmfault.errors import UsageError
from kvmfault.replay.run import Report, replay
from kvmfault.replay.verdict import outcome_text
from kvmfault.trace.slotfile import read_slots

__all__ = ["as_data", "render", "run"]


def run(
    recording: str,
    targets: Sequence[str],
    slots: str | None,
    settings: Sequence[str],
    where: Where,
    *,
    strict: bool,
    json: bool,
) -> int:
    """Replay and print; status 1 if an outcome contradicts the recording."""
    known = read_slots(slots) if slots is not None else None
    size = Path(recording).stat().st_size if recording != "-" and Path(recording).is_file() else None
    with where.workers() as at, progress({"survey": size, "replay": size}) as done:
        report = replay(recording, targets, known, settings=settings, strict=strict, where=at, progress=done)
    if known is not None and not known.timed:  # written by hand: what the kernel refuses is a mistake in it
        refused = report.results[0].first_refused
        if refused:
            raise UsageError(f"{slots}: {refused}: KVM refuses it on {report.own.name}")
    print(to_json(as_data(report)) if json else render(report))
    return 1 if report.unexplained or report.read.damage else 0


def render(report: Report) -> str:
    """The report as text."""
    first = report.results[0]
    parts = [
        f"{report.recording}: {first.faults} faults of {report.own.name}, "
        f"memslots: {report.slots.origin} ({len(report.slots.changes)} changes)"
    ]
    parts.append(
        "kinds\n" + columns([(str(n), k) for k, n in report.kinds.most_common()], indent="  ", right=frozenset({0}))
    )
    names = sorted(
        {o for r in report.results for o in r.outcomes}, key=lambda o: (-sum(r.outcomes[o] for r in report.results), o)
    )
    head = ("outcome", *(r.target.name for r in report.results))
    rows = [head, *((o, *(str(r.outcomes[o] or "-") for r in report.results)) for o in names)]
    rows.append(("mapped", *(size_text(sum(1 << e.shift for e in r.vm.table.entries())) for r in report.results)))
    rows.append(("table pages", *(str(r.vm.table.tables()) for r in report.results)))
    rows.append(("unexplained", *(str(r.unexplained_count) if r.is_own else "n/a" for r in report.results)))
    parts.append(columns(rows, right=frozenset(range(1, len(head)))))
    if report.variants:
        parts.append(whatif.render(report.variants, report.kinds.total()))
    for result in report.results:
        if result.lost:
            told = ", ".join(f"{name} ({count})" for name, count in result.lost.most_common())
            parts.append(f"not carried over to {result.target.name}: {told}")
        parts += [f"{report.unit} {f.line}: {outcome_text(f.outcome)}: {f.why}" for f in result.unexplained]
    if report.inference is not None:
        c = report.inference
        true = c.matched + c.missed
        parts.append(
            f"inferred slots would hold {c.matched} of {true} pages, missing {c.missed} and inventing {c.invented}"
        )
        for what, ranges in (("missed", c.missed_ranges), ("invented", c.invented_ranges)):
            spans = [f"{gpa:#x}-{gpa + size - 1:#x} ({size_text(size)})" for gpa, size in ranges]
            shown = ", ".join(spans[:6]) + (f" and {len(spans) - 6} more" if len(spans) > 6 else "")
            parts += [f"  {what}: {shown}"] * bool(spans)
    parts.extend(f"note: {note}" for note in report.notes)
    return "\n".join(parts)


def as_data(report: Report) -> dict[str, object]:
    """The report as JSON data."""
    return {
        "recording": report.recording,
        "own": report.own.name,
        "events": dict(report.read.events),
        "faults": dict(report.assembled.faults),
        "kinds": dict(report.kinds),
        "slots": {"origin": report.slots.origin, "changes": list(report.slots.changes)},
        "results": [
            {
                "target": r.target.name,
                "own": r.is_own,
                "faults": r.faults,
                "outcomes": dict(r.outcomes),
                "mapped_bytes": sum(1 << e.shift for e in r.vm.table.entries()),
                "table_pages": r.vm.table.tables(),
                "lost": dict(r.lost),
                "unexplained": r.unexplained_count,
                "findings": [{"line": f.line, "outcome": outcome_text(f.outcome), "why": f.why} for f in r.unexplained],
            }
            for r in report.results
        ],
        "what_if": whatif.as_data(report.variants, report.kinds.total()),
        "inference": report.inference,
        "notes": report.notes,
    }
