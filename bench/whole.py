"""Whole jobs: a proof over every predicate, a command from start to end, a recording replayed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

from bench.measure import Row, Work, seconds
from kvmfault.algebra.expr import Maybe, Pred
from kvmfault.algebra.prove import relate
from kvmfault.contract.accessors import FACTS
from kvmfault.contract.target import Target, backend
from kvmfault.replay.run import replay

ROOT = Path(__file__).resolve().parents[1]


def predicates(target: Target) -> list[Pred]:
    """Every truth that the architecture defines: facts, the kernel's accessors, and when those have a value."""
    named = [getattr(target.definition, fact) for fact in FACTS] + list(target.accessors.values())
    return [p.valid if isinstance(p, Maybe) else p for p in named if isinstance(p, (Pred, Maybe))]


def proof_rows(targets: Sequence[str] = ("arm64@6.12", "arm64@7.4"), rounds: int = 1) -> list[Row]:
    """How each predicate relates to each other one (equal? never both? implied?), on every value of the bits read."""
    pairs = [pair for name in targets for pair in combinations(predicates(backend(name)), 2)]
    cases = 0

    def prove() -> None:
        nonlocal cases
        cases = sum(relate(a, b).cases for a, b in pairs)

    [taken] = seconds(prove, rounds=rounds)
    return [Row(f"proof of all {len(pairs):,} pairs of arm64 predicates, {cases:,} cases", taken, "s", limit=5)]


COMMAND = "import sys; from kvmfault.cli.main import main; sys.exit(main())"


def command_rows(rounds: int = 11) -> list[Row]:
    """``kvmfault decode`` in a fresh process, beside a Python that does nothing."""
    decode, bare = seconds(_python("-c", COMMAND, "decode", "arm64", "0x9200004f"), _python("-c", ""), rounds=rounds)
    row = Row(
        "kvmfault decode arm64 0x9200004f", decode * 1e3, "ms", "bare python:", bare * 1e3, limit=200, on_value=True
    )
    return [row]


def _python(*arguments: str) -> Work:
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)


def recordings() -> list[Path]:
    """The bundled recordings; tests' data where there are none."""
    for folder in ("examples/recordings", "tests/data/traces"):
        found = sorted((ROOT / folder).glob("*.trace.txt*"))
        if found:
            return found
    return []


def replay_rows(paths: Sequence[Path] | None = None, rounds: int = 3) -> list[Row]:
    """Faults per second of a recording on its own backend: read twice (slots are inferred first), run, judged."""
    rows = []
    for path in recordings() if paths is None else paths:
        faults = sum(result.faults for result in replay(str(path)).results)
        [taken] = seconds(partial(replay, str(path)), rounds=rounds)
        rows.append(Row(f"replay of {path.name}, {faults:,} faults", faults / taken, "faults/s"))
    return rows
