"""One fact over millions of faults, beside the same loop in C."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cloop import CLoops, compiler
from bench.measure import Row, Work, seconds
from kvmfault.algebra.columns import Columns, U64Col, pred_column, word_column
from kvmfault.algebra.expr import Pred, Word
from kvmfault.contract.target import backend

SYNDROMES = (
    *(0x9200_0007, 0x9200_0047, 0x9200_0006, 0x9200_0046),  # load and store, no entry
    *(0x9200_000F, 0x9200_004F, 0x9200_000B, 0x9200_004B),  # permission, access flag
    *(0x93C0_8047, 0x93C3_8007, 0x9342_0006),  # described well enough for MMIO
    *(0x8200_0007, 0x8200_000F, 0x8200_0087),  # fetch, fetch of a walk
    *(0x9200_0087, 0x9200_00CF, 0x9200_00C7),  # walks of the guest's tables
    *(0x9200_0010, 0x9200_0410, 0x9200_0150),  # aborts, cache maintenance
)
FACTS = ("is_write", "is_permission", "is_read", "gpa_valid", "gpa_page", "granule_bytes")


def column_rows(rows: int = 10_000_000, rounds: int = 7) -> list[Row]:
    """Nanoseconds per row, ours and C's. C writes into an array that is there; ours makes a new one each time."""
    cc = compiler()
    definition = backend("arm64:4k@6.12").definition
    facts: dict[str, Pred | Word] = {}
    for name in FACTS:
        of = getattr(definition, name)
        assert isinstance(of, (Pred, Word))
        facts[name] = of
    columns = _faults(rows)
    with TemporaryDirectory() as folder:
        loops = CLoops(facts, Path(folder), cc) if cc else None
        return [_row(name, of, columns, rows, rounds, loops) for name, of in facts.items()]


def _row(name: str, of: Pred | Word, columns: Columns, rows: int, rounds: int, loops: CLoops | None) -> Row:
    def ours() -> NDArray[Any]:
        return word_column(of, columns) if isinstance(of, Word) else pred_column(of, columns)

    works: list[Work] = [ours]
    if loops is not None:
        out: NDArray[Any] = loops.column(name, columns, rows)
        assert np.array_equal(out, ours())
        works.append(lambda: loops.run(name, columns, out))
    times = seconds(*works, rounds=rounds)
    ns = [t / rows * 1e9 for t in times]
    work = f"{name} over {rows:,} faults"
    return Row(work, ns[0], "ns/fault", "loop in C, cc -O3:", ns[1], limit=3) if loops else Row(work, ns[0], "ns/fault")


def _faults(rows: int) -> dict[str, U64Col]:
    rng = np.random.default_rng(1)
    frames = rng.integers(0x4_0000, 0x8_0000, rows, np.uint64)
    return {
        "ESR_EL2": rng.choice(np.array(SYNDROMES, np.uint64), rows),
        "HPFAR_EL2": frames << np.uint64(4),
        "KVM": np.full(rows, 0xC, np.uint64),
    }
