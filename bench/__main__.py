"""``python -m bench [--write]``: measure the budgets and print them; ``--write`` also keeps them in RESULTS.md."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.columns import column_rows
from bench.faults import decode_rows, path_rows, scale_rows, slot_rows
from bench.measure import Row, machine, markdown, table
from bench.spin import spin_rows
from bench.traces import trace_rows
from bench.whole import command_rows, proof_rows, replay_rows

RESULTS = Path(__file__).parent / "RESULTS.md"
PARTS = (
    column_rows,
    decode_rows,
    path_rows,
    scale_rows,
    slot_rows,
    proof_rows,
    command_rows,
    replay_rows,
    trace_rows,
    spin_rows,
)


def main() -> int:
    """Measure everything; a few minutes."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the speed budgets, as ratios.")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULTS.name}")
    write = parser.parse_args().write
    rows: list[Row] = []
    for part in PARTS:
        _now(f"{part.__name__.replace('_', ' ')} ...")
        rows += part()
    _now("")
    print(f"{table(rows)}\n\nmeasured on: {machine()}")
    if write:
        RESULTS.write_text(markdown(rows))
    return 0


def _now(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
