"""The comparison of ``kvmfault replay``: what the recorded accesses cost on other targets and settings."""

from __future__ import annotations

from collections.abc import Sequence

from kvmfault.cli.render import columns
from kvmfault.contract.format import size_text
from kvmfault.machine.guest import Ended
from kvmfault.replay.whatif import Variant

__all__ = ["as_data", "render"]


def render(variants: Sequence[Variant]) -> str:
    """One column for each variant, the recorded machine first."""
    rows: list[tuple[str, ...]] = [("what if", *(v.name for v in variants))]

    def row(name: str, *values: object) -> None:
        if any(values):
            rows.append((name, *(str(v) if v else "-" for v in values)))

    row("accesses", *(v.figures.accesses for v in variants))
    row("faults taken", *(v.figures.faults for v in variants))
    row("  against the recorded machine", *(_against(v, variants[0]) for v in variants))
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
    text = columns(rows, right=frozenset(range(1, len(variants) + 1)))
    skipped = {why: n for v in variants for why, n in v.skipped.items()}
    return "\n".join((text, *(f"left out: {n} faults: {why}" for why, n in skipped.items())))


def _against(variant: Variant, recorded: Variant) -> str:
    before, after = recorded.figures.faults, variant.figures.faults
    return "" if variant is recorded or not before else f"{(after - before) / before:+.1%}"


def as_data(variants: Sequence[Variant]) -> list[dict[str, object]]:
    """The same as JSON data."""
    return [
        {
            "target": v.name,
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
