"""Facts of riscv, loongarch, s390 and powerpc equal an if/else transcription on all combinations of the bits that
decide them, scalar and in columns."""

from __future__ import annotations

from typing import Final

import numpy as np
import pytest

from kvmfault.algebra.columns import U64Col, pred_column, word_column
from kvmfault.algebra.expr import Pred, Word
from kvmfault.contract.accessors import FACTS, Gap
from kvmfault.contract.target import Target
from tests import oracle_others
from tests.emitted import inputs
from tests.targets import newest

SOURCES: Final = {name: getattr(oracle_others, name) for name in ("riscv", "loongarch", "s390", "powerpc")}
CASES: Final = [
    pytest.param(target, name, id=f"{target.backend.name}-{name}")
    for target in newest()
    if target.backend.name in SOURCES
    for name in FACTS
    if name != "syndrome" and not isinstance(getattr(target.definition, name), Gap)
]
ROWS: Final = 1 << 15
"""Of more rows so many are taken by chance."""


def rows(target: Target, name: str, fact: Pred | Word) -> dict[str, U64Col]:
    """Registers, as wide as they are; what describes an instruction means something where one is described."""
    valid = target.definition.mmio_valid
    if name.startswith("mmio_") and isinstance(valid, Pred):
        asked = fact & valid if isinstance(fact, Pred) else fact.when(valid)
        parts = list(inputs(asked, target.order))
    else:
        parts = list(inputs(fact, target.order))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in target.order}
    count = len(columns[target.order[0]])
    if count > ROWS:
        chosen = np.random.default_rng(3).choice(count, ROWS, replace=False)
        columns = {name: column[chosen] for name, column in columns.items()}
    widths = {register.name: register.width for register in target.backend.registers}
    return {name: column & np.uint64((1 << widths[name]) - 1) for name, column in columns.items()}


@pytest.mark.parametrize(("target", "name"), CASES)
def test_a_fact_is_what_its_transcription_says(target: Target, name: str) -> None:
    fact: Pred | Word = getattr(target.definition, name)
    if not fact.reads:
        return  # NEVER and ALWAYS, and values that never are valid
    columns = rows(target, name, fact)
    found = pred_column(fact, columns) if isinstance(fact, Pred) else word_column(fact, columns)
    source, compared = SOURCES[target.backend.name], 0
    listed = [column.tolist() for column in columns.values()]
    for number, values in enumerate(zip(*listed, strict=True)):
        registers = dict(zip(columns, values, strict=True))
        wanted = source(registers)[name]
        if wanted is None:
            continue
        compared += 1
        assert int(found[number]) == wanted, registers
        if number % 16 == 0:
            assert fact.on(registers) == wanted, registers
    assert compared
