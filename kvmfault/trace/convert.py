"""A recording as one Parquet file: a table of all events of interest, with what the recording says of itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import polars as pl

from kvmfault.errors import UsageError
from kvmfault.parallel import ALONE, Workers
from kvmfault.trace.assemble import AssembleStats
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.guess import by_runs
from kvmfault.trace.merge import runs
from kvmfault.trace.parquet import ENOUGH, Encoded, ParquetWriter, encode
from kvmfault.trace.recording import Frames, Meta, ReadStats, Recording
from kvmfault.trace.rows import of_interest

__all__ = ["FAULTS", "METADATA", "Converted", "convert"]

METADATA: Final = "kvmfault"
"""The key of the file's metadata under which all that is no event stands, as JSON."""
FAULTS: Final = "guest fault"
"""The ``event`` of rows that are decoded faults; no kernel event can have a name with a space."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and what was read."""

    written: Counter[str]
    """Rows by event, `FAULTS` too."""
    size: int
    """Bytes of the file."""
    columns: dict[str, list[str]]
    """By event, as the file calls them."""
    meta: Meta
    read: ReadStats
    faults: AssembleStats

    @property
    def rows(self) -> int:
        """Of the table."""
        return self.written.total()


def convert(
    recording: Recording,
    out: Path,
    wanted: Collection[str] | None = None,
    *,
    faults: FaultColumns | None = None,
    where: Workers = ALONE,
    progress: Callable[[int], object] = lambda read: None,
) -> Converted:
    """Write the events named in *wanted*, or all of interest, of *recording* to *out*.

    *faults* decode the faults of the recording, which become rows of their own (`FAULTS`): with place, time, cpu and
    pid of the event that they come from, and what `FaultColumns` gives. *where* works on it, and the file is the same
    wherever that is. *progress* is told the bytes read so far. *out* appears, or is replaced, when all is written.
    Raises what reading raises, and UsageError if *out* cannot be written.
    """
    stats = ReadStats()
    faults = FaultColumns({}) if faults is None else faults
    written = Counter[str]()
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("wb") as file:
            writer = ParquetWriter(file, first=FAULTS)
            asked = of_interest(recording) if wanted is None else wanted
            parts = runs(recording, asked, stats=stats, where=where)
            for made in by_runs(_encoded, parts, faults, where):
                for name, some in made:
                    if isinstance(some, list):
                        written[name] += sum(one.group.rows for one in some)
                        writer.add(some)
                    else:
                        written[name] += len(some)
                        writer.write(name, some)
                progress(stats.bytes)
            faults.end()
            columns = writer.columns()
            writer.close({METADATA: json.dumps(_described(recording, stats, columns, faults.stats))})
            size = file.tell()
        os.replace(part, out)  # noqa: PTH105  the same, and says that it replaces
    except OSError as e:
        raise UsageError(f"{out}: cannot be written: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
    return Converted(written, size, columns, recording.meta, stats, faults.stats)


def _encoded(faults: FaultColumns, stretches: Iterator[Frames]) -> list[tuple[str, list[Encoded] | pl.DataFrame]]:
    # What is many rows is encoded; what is few waits with the writer for more.
    parts: dict[tuple[str, str], list[pl.DataFrame]] = {}
    for frames in stretches:
        for name, frame in frames.items():
            parts.setdefault((name, ""), []).append(frame)
        for target, frame in faults.by_backend(frames).items():
            parts.setdefault((FAULTS, target), []).append(frame)
    whole = ((name, pl.concat(some)) for (name, _), some in parts.items())
    return [(name, encode(name, frame) if len(frame) >= ENOUGH else frame) for name, frame in whole]


def _described(
    recording: Recording, stats: ReadStats, columns: dict[str, list[str]], faults: AssembleStats
) -> dict[str, object]:
    return {
        "recording": {**asdict(recording.meta), "comms": dict(recording.meta.comms)},
        "columns": columns,
        "events": dict(stats.events),
        "faults": {
            "decoded": dict(faults.faults),
            "unclaimed": dict(faults.unclaimed),
            "without_address": faults.without_address,
        },
        "misfits": dict(stats.misfits),
        "lost": {
            "events": dict(stats.lost),
            "without_number": stats.lost_unknown,
            "windows": [gap._asdict() for gap in stats.gaps],
        },
        "damage": stats.damage,
    }
