"""A recording as one Parquet file: a table of all events of interest, with what the recording says of itself."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from kvmfault.errors import UsageError
from kvmfault.trace.assemble import AssembleStats
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.parquet import ParquetWriter
from kvmfault.trace.recording import Meta, ReadStats, Recording
from kvmfault.trace.rows import of_interest

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
    progress: Callable[[int], object] = lambda read: None,
) -> Converted:
    """Write the events named in *wanted*, or all of interest, of *recording* to *out*.

    *faults* decode the faults of the recording, which become rows of their own (`FAULTS`): with place, time, cpu and
    pid of the event that they come from, and what `FaultColumns` gives. *progress* is told the bytes read so far. *out*
    appears, or is replaced, when all is written. Raises what reading raises, and UsageError if *out* cannot be written.
    """
    stats = ReadStats()
    made = faults.stats if faults is not None else AssembleStats()
    written = Counter[str]()
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("wb") as file:
            writer = ParquetWriter(file, first=FAULTS)
            for frames in recording.frames(of_interest(recording) if wanted is None else wanted, stats=stats):
                decoded = faults.by_backend(frames).values() if faults is not None else ()
                for name, frame in (*frames.items(), *((FAULTS, frame) for frame in decoded)):
                    written[name] += len(frame)
                    writer.write(name, frame)
                progress(stats.bytes)
            columns = writer.columns()
            writer.close({METADATA: json.dumps(_described(recording, stats, columns, made))})
            size = file.tell()
        os.replace(part, out)  # noqa: PTH105  the same, and says that it replaces
    except OSError as e:
        raise UsageError(f"{out}: cannot be written: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
    return Converted(written, size, columns, recording.meta, stats, made)


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
