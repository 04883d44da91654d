"""A recording as one Parquet file: a table of all events of interest, with what the recording says of itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from kvmfault.errors import UsageError
from kvmfault.trace.parquet import ParquetWriter
from kvmfault.trace.recording import Frames, Meta, ReadStats, Recording
from kvmfault.trace.rows import of_interest

METADATA: Final = "kvmfault"
"""The key of the file's metadata under which all that is no event stands, as JSON."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written, and what was read."""

    rows: int
    size: int
    """Bytes of the file."""
    columns: dict[str, list[str]]
    """By event, as the file calls them."""
    meta: Meta
    read: ReadStats


def convert(
    recording: Recording,
    out: Path,
    wanted: Collection[str] | None = None,
    *,
    add: Callable[[Frames], Frames] = lambda frames: frames,
    progress: Callable[[int], object] = lambda read: None,
) -> Converted:
    """Write the events named in *wanted*, or all of interest, of *recording* to *out*.

    *add* may add columns to frames; *progress* is told the bytes read so far. *out* appears, or is replaced, when all
    is written. Raises what reading raises, and UsageError if *out* cannot be written.
    """
    stats = ReadStats()
    rows = 0
    part = out.with_name(f"{out.name}.part")
    try:
        with part.open("wb") as file:
            writer = ParquetWriter(file)
            for frames in recording.frames(of_interest(recording) if wanted is None else wanted, stats=stats):
                for name, frame in add(frames).items():
                    rows += len(frame)
                    writer.write(name, frame)
                progress(stats.bytes)
            columns = writer.columns()
            writer.close({METADATA: json.dumps(_described(recording, stats, columns))})
            size = file.tell()
        os.replace(part, out)  # noqa: PTH105  the same, and says that it replaces
    except OSError as e:
        raise UsageError(f"{out}: cannot be written: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
    return Converted(rows, size, columns, recording.meta, stats)


def _described(recording: Recording, stats: ReadStats, columns: dict[str, list[str]]) -> dict[str, object]:
    return {
        "recording": {**asdict(recording.meta), "comms": dict(recording.meta.comms)},
        "columns": columns,
        "events": dict(stats.events),
        "misfits": dict(stats.misfits),
        "lost": {
            "events": dict(stats.lost),
            "without_number": stats.lost_unknown,
            "windows": [gap._asdict() for gap in stats.gaps],
        },
        "damage": stats.damage,
    }
