"""``kvmfault trace convert``."""

from __future__ import annotations

from pathlib import Path

from kvmfault.cli.options import Where
from kvmfault.cli.progress import progress
from kvmfault.cli.render import columns, to_json
from kvmfault.errors import UsageError, needs

__all__ = ["as_data", "render", "run"]

with needs("trace", "trace convert"):
    from kvmfault.cli.info import fault_lines, unit_of
    from kvmfault.trace.convert import Converted, convert
    from kvmfault.trace.faults import FaultColumns
    from kvmfault.trace.opening import open_recording


def run(
    source: str, out: str, told: str | None, formats: str | None, instance: str | None, where: Where, *, json: bool
) -> int:
    """Convert and say what was written; status 1 if the recording is damaged."""
    if out == "-" or (Path(out).exists() and Path(source).exists() and Path(out).samefile(source)):
        raise UsageError(f"{out}: the Parquet file must be another file than the recording, and no stream")
    faults = FaultColumns.of(told)
    recording = open_recording(source, formats=formats, instance=instance)
    size = Path(source).stat().st_size if Path(source).is_file() else None
    with where.workers() as at, progress({"convert": size}) as done:
        made: Converted = convert(
            recording, Path(out), faults=faults, where=at, progress=lambda read: done("convert", read)
        )
    print(to_json(as_data(made, out)) if json else render(made, out))
    return 1 if made.read.damage else 0


def render(made: Converted, out: str) -> str:
    """What was written, as text."""
    counts = [(f"{made.written[name]:,}", name, ", ".join(named[5:])) for name, named in made.columns.items()]
    parts = [f"{out}: {made.rows:,} rows, {made.size:,} bytes, grouped by event: sort by place"]
    parts.append(
        columns(sorted(counts, key=lambda row: -int(row[0].replace(",", ""))), indent="  ", right=frozenset({0}))
    )
    if made.faults.faults or made.faults.unclaimed or made.faults.without_address:
        parts += fault_lines(made.faults, unit_of(made.meta))
    if skipped := sum(made.read.skipped.values()):
        parts.append(f"not of interest: {skipped:,} events of {len(made.read.skipped)} names")
    if misfits := sum(made.read.misfits.values()):
        parts.append(f"not readable by their format: {misfits:,} events ({', '.join(made.read.misfits)})")
    if made.read.lost or made.read.lost_unknown:
        told = ", ".join(f"{n:,} on CPU {cpu}" for cpu, n in sorted(made.read.lost.items()))
        more = f"{made.read.lost_unknown} times without a number" if made.read.lost_unknown else ""
        parts.append(f"lost by the kernel: {', '.join(filter(None, (told, more)))}")
    if made.read.damage:
        parts.append(f"damaged: {made.read.damage}")
    return "\n".join(parts)


def as_data(made: Converted, out: str) -> dict[str, object]:
    """The same as JSON data."""
    read = made.read
    return {
        "out": out,
        "rows": made.rows,
        "bytes": made.size,
        "columns": made.columns,
        "events": dict(read.events),
        "written": dict(made.written),
        "faults": {
            "decoded": dict(made.faults.faults),
            "unclaimed": dict(made.faults.unclaimed),
            "without_address": made.faults.without_address,
        },
        "skipped": dict(read.skipped),
        "misfits": dict(read.misfits),
        "lost": {
            "events": dict(read.lost),
            "without_number": read.lost_unknown,
            "windows": [gap._asdict() for gap in read.gaps],
        },
        "damage": read.damage,
    }
