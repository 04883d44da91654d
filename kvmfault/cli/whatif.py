"""The comparison of ``kvmfault replay``: what the recorded accesses cost on other targets and settings."""

from __future__ import annotations

from collections.abc import Sequence

from kvmfault.cli.render import columns
from kvmfault.contract.format import size_text
from kvmfault.machine.guest import Ended
from kvmfault.replay.whatif import Variant

__all__ = ["as_data", "render"]


def render(variants: Sequence[Variant], faults: int) -> str:
    """What was recorded (so many *faults*), then what the model takes: of the recorded machine first."""
    rows: list[tuple[str, ...]] = [
        ("what if", "recorded", *("model of" if v is variants[0] else "model on" for v in variants)),
        ("", variants[0].target.backend.name, *(v.name for v in variants)),
    ]

    def row(name: str, *values: object, recorded: object = "") -> None:
        if any(values):
            rows.append((name, str(recorded), *(str(v) if v else "-" for v in values)))

    row("accesses", *(v.figures.accesses for v in variants), recorded=variants[0].figures.accesses)
    row("faults taken", *(v.figures.faults for v in variants), recorded=faults)
    row("  against the recorded ones", *(_against(v, faults) for v in variants))
    row("  against the model of that machine", *(_against(v, variants[0].figures.faults) for v in variants))
    row("accesses without a fault", *(v.figures.avoided for v in variants))
    row("further faults of an access", *(v.figures.repeated for v in variants))
    row("retries", *(v.figures.retries for v in variants))
    row("exits to user space", *(v.figures.exits for v in variants))
    for ended in Ended:
        if ended is not Ended.DONE:
            row(ended.value, *(v.ended[ended] for v in variants))
    entries = [v.entries() for v in variants]
    for size in sorted({size for each in entries for size in each}, reverse=True):
        row(f"entries of {size_text(size)}", *(each.get(size, 0) for each in entries))
    row("mapped", *(size_text(sum(size * n for size, n in each.items())) for each in entries))
    row("memory of page tables", *(size_text(v.table_bytes()) for v in variants))
    row("pages in dirty logs", *(v.dirty_pages() for v in variants))
    row("faults left out", *(sum(v.skipped.values()) for v in variants))
    text = columns(rows, right=frozenset(range(1, len(variants) + 2)))
    skipped = {why: n for v in variants for why, n in v.skipped.items()}
    return "\n".join((text, *(f"left out: {n} faults: {why}" for why, n in skipped.items())))


def _against(variant: Variant, before: int) -> str:
    return f"{(variant.figures.faults - before) / before:+.1%}" if before else ""


def as_data(variants: Sequence[Variant], faults: int) -> list[dict[str, object]]:
    """The same as JSON data."""
    return [
        {
            "target": v.name,
            "models_recorded_machine": v is variants[0],
            "recorded_faults": faults,
            "accesses": v.figures.accesses,
            "faults": v.figures.faults,
            "avoided": v.figures.avoided,
            "repeated": v.figures.repeated,
            "retries": v.figures.retries,
            "exits": v.figures.exits,
            "ended": {ended.name.lower(): n for ended, n in v.ended.items()},
            "entries": {str(size): n for size, n in v.entries().items()},
            "table_bytes": v.table_bytes(),
            "dirty_pages": v.dirty_pages(),
            "skipped": dict(v.skipped),
        }
        for v in variants
    ]
