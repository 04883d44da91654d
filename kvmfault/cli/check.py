"""``kvmfault replay --check``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvmfault.check.run import CheckReport, check
from kvmfault.check.tally import MAIN, Aspect, Tally
from kvmfault.cli.progress import progress
from kvmfault.cli.render import columns, to_json
from kvmfault.errors import UsageError
from kvmfault.trace.slotfile import read_slots

__all__ = ["SHOWN", "as_data", "percent", "render", "run"]

SHOWN = 20
"""Disagreements printed; all are in the JSON."""


def run(
    recording: str, targets: Sequence[str], slots: str | None, settings: Sequence[str], aux: str | None, *, json: bool
) -> int:
    """Check and print; status 1 if anything differs that the recording does not explain."""
    if len(targets) > 1:
        raise UsageError("--check compares with the kernel that recorded: give one --backend at most")
    known = read_slots(slots) if slots is not None else None
    size = Path(recording).stat().st_size if recording != "-" and Path(recording).is_file() else None
    with progress({"survey": size, "check": size}) as done:
        report = check(recording, targets[0] if targets else None, aux, slots=known, settings=settings, progress=done)
    print(to_json(as_data(report)) if json else render(report))
    return 1 if report.unexplained or report.damage else 0


def percent(agreed: int, compared: int) -> str:
    """Never rounded up to 100."""
    return f"{int(agreed * 10000 / compared) / 100:.2f} %" if compared else "-"


def render(report: CheckReport) -> str:
    """The report as text."""
    tally = report.tally
    own = f"{report.probed} hits of probes in it" if report.probed else "trace events alone"
    beside = f"probes: {report.aux}" if report.aux is not None else own
    parts = [f"{report.recording}: {report.faults} faults of {report.target.name}, {beside}"]
    rows = [("aspect", "agree", "compared", "")]
    for aspect in Aspect:
        agreed, compared = tally.of(aspect)
        if compared:
            rows.append((str(aspect), str(agreed), str(compared), percent(agreed, compared)))
    parts.append(columns(rows, right=frozenset({1, 2, 3})))
    by_kind = _by_kind(tally)
    if len(by_kind) > 1:
        parts.append(columns(by_kind, right=frozenset(range(1, len(by_kind[0])))))
    parts += [str(d) for d in tally.disagreements[:SHOWN]]
    if len(tally.disagreements) > SHOWN:
        parts.append(f"and {len(tally.disagreements) - SHOWN} more: --json has them all")
    if tally.causes:
        rows = [("differ", "in", "not recorded", "")]
        rows += [
            (str(n), str(aspect), cause or "(nothing is missing: the model is wrong)", "")
            for (aspect, cause), n in tally.causes.most_common()
        ]
        parts.append(columns(rows, right=frozenset({0})))
    if report.taken:
        rows = [(str(n), what, "", "") for what, n in report.taken.most_common()]
        parts.append("taken from the recording\n" + columns(rows, indent="  ", right=frozenset({0})))
    parts.extend(f"note: {note}" for note in report.notes)
    return "\n".join(parts)


def _by_kind(tally: Tally) -> list[tuple[str, ...]]:
    # kinds of faults, and of the main aspects how many of them agree
    aspects = [a for a in (*MAIN, Aspect.CALL) if tally.of(a)[1]]
    kinds = sorted({kind for aspect, kind in tally.compared if aspect in aspects})
    rows = [("kind", *(str(aspect) for aspect in aspects))]
    for kind in kinds:
        cells = [
            f"{tally.agreed[a, kind]}/{tally.compared[a, kind]}" if tally.compared[a, kind] else "-" for a in aspects
        ]
        rows.append((kind, *cells))
    return rows


def as_data(report: CheckReport) -> dict[str, object]:
    """The report as JSON data."""
    tally = report.tally
    return {
        "recording": report.recording,
        "aux": report.aux,
        "probed": report.probed,
        "target": report.target.name,
        "faults": report.faults,
        "unknown": dict(report.unknown),
        "aspects": {
            aspect.name.lower(): {
                "agree": tally.of(aspect)[0],
                "compared": tally.of(aspect)[1],
                "kinds": {
                    kind: {"agree": tally.agreed[aspect, kind], "compared": n}
                    for (a, kind), n in tally.compared.items()
                    if a is aspect
                },
            }
            for aspect in Aspect
            if tally.of(aspect)[1]
        },
        "disagreements": list(tally.disagreements),
        "causes": [{"aspect": a, "cause": cause, "count": n} for (a, cause), n in tally.causes.items()],
        "unexplained": report.unexplained,
        "taken": dict(report.taken),
        "mended": report.mended,
        "slots": {"origin": report.slots.origin, "changes": len(report.slots.changes)},
        "notes": report.notes,
    }
