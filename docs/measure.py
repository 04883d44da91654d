"""Replays every recording under a folder and prints the table of recordings.md: ``python docs/measure.py FOLDER``.

Each recording is a file ``trace.txt``, or ``report.txt`` where there is none, plain or ``.gz``. Memslots come from an
``aux.txt`` beside it, where that holds any; then what inference would have found is compared with them. Elsewhere they
are inferred.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvmfault.errors import KvmfaultError
from kvmfault.replay.run import replay
from kvmfault.trace.slotfile import read_slots
from kvmfault.trace.slots import SlotSource


def row(trace: Path, name: str) -> tuple[str, int]:
    """The recording's row of the table, and how many outcomes contradict it."""
    known = recorded(trace.parent)
    report = replay(str(trace), (), known)
    own = next(result for result in report.results if result.is_own)
    c = report.inference
    slots = f"{'inferred' if known is None else 'recorded'}, {len(report.slots.changes)} changes"
    inferred = "" if c is None else f"{c.matched} found, {c.missed} missed, {c.invented} invented"
    cells = (name, report.own.name, own.faults, len(report.kinds), report.unexplained, slots, inferred)
    return "| " + " | ".join(map(str, cells)) + " |\n", report.unexplained


def recorded(folder: Path) -> SlotSource | None:
    """The memslots of the kprobe recording in *folder*, if it has any."""
    for aux in folder.glob("aux.txt*"):
        try:
            return read_slots(aux)
        except KvmfaultError:
            continue
    return None


def main(folder: Path) -> int:
    """Print a row for every recording; status 1 if an outcome contradicts its recording."""
    write = sys.stdout.write
    write("| recording | replayed on | faults | kinds | unexplained | memslots | pages of inferred memory |\n")
    write("|---|---|---|---|---|---|---|\n")
    unexplained = 0
    found = {path.parent: path for name in ("report.txt*", "trace.txt*") for path in folder.rglob(name)}
    for inside, trace in sorted(found.items()):
        text, wrong = row(trace, inside.relative_to(folder).as_posix())
        unexplained += wrong
        write(text)
        sys.stdout.flush()
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
