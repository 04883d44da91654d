"""Columns and C give what Python gives: for every fact of every backend, and for expressions made at random.

The C is the benchmark's: the same text, the same flags, the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeAlias

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.cloop import CLoops, compiler
from kvmfault.algebra.c import c_expression, c_function
from kvmfault.algebra.columns import Columns, pred_column, word_column
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred, Word
from kvmfault.algebra.layout import ZERO, join
from kvmfault.algebra.prove import combinations
from kvmfault.contract.accessors import FACTS, Gap, stand_in
from kvmfault.contract.target import backend, backends
from kvmfault.errors import UsageError
from kvmfault.types import U64
from tests.expressions import SMALL, WIDE, Meant, MeantWord, preds, words

Facts: TypeAlias = Mapping[str, Pred | Word]
ROWS_IN_PYTHON: Final = 1 << 13
"""Where more combinations than this are compared with C, Python computes some of them."""


def facts_of_all_targets() -> Facts:
    """``TARGET_FACT`` -> expression; a gap as its stand-in. What two kernels define alike is listed for both."""
    facts: dict[str, Pred | Word] = {}
    for name, source in backends().items():
        for kernel in source.kernels:
            definition = backend(f"{name}@{kernel}").definition
            for fact in FACTS:
                of: Pred | Gap | Word = getattr(definition, fact)
                key = f"{name}_{kernel}_{fact}".replace("-", "_").replace(".", "_")
                facts[key] = of if isinstance(of, Word) else stand_in(of)
    return facts


def inputs(of: Pred | Word, seed: int = 1) -> Iterator[Columns]:
    """Every combination of the bits that a predicate reads, if not too many; for a word (and then) the bits one by one,
    none, all and random registers."""
    reads = of.reads
    if isinstance(of, Pred) and sum(mask.bit_count() for mask in reads.values()) <= 20:
        yield from combinations(reads)
        return
    rng = np.random.default_rng(seed)
    one_hot = np.array([0, *(1 << bit for bit in range(64)), U64], np.uint64)
    for hot in reads or {"none": 0}:
        noise = {r: rng.integers(0, U64, 2000, np.uint64, endpoint=True) for r in reads or {"none": 0}}
        quiet = {r: one_hot if r == hot else np.zeros_like(one_hot) for r in noise}
        yield {r: np.concatenate([quiet[r], noise[r], quiet[r] | noise[r][: len(one_hot)]]) for r in noise}


def in_python(of: Pred | Word, columns: Columns, rows: NDArray[np.intp]) -> list[int]:
    """The scalar value of some rows."""
    names = list(columns)
    values = zip(*(columns[n][rows].tolist() for n in names), strict=True)
    return [of.on(dict(zip(names, row, strict=True))) for row in values]


def check(facts: Facts, folder: Path) -> int:
    """Compare the three evaluations of every fact; gives the number of rows compared."""
    cc = compiler()
    if cc is None:
        pytest.skip("cc not installed: no C compiler")
    loops = CLoops(facts, folder, cc)
    compared = 0
    for name, of in facts.items():
        for columns in inputs(of):
            rows = len(next(iter(columns.values())))
            wanted = word_column(of, columns) if isinstance(of, Word) else pred_column(of, columns)
            assert np.array_equal(loops.column(name, columns, rows), wanted), f"C and columns differ: {name}"
            some = np.unique(np.linspace(0, rows - 1, min(rows, ROWS_IN_PYTHON)).astype(np.intp))
            assert in_python(of, columns, some) == wanted[some].tolist(), f"Python and columns differ: {name}"
            compared += rows
    return compared


def test_every_fact_is_the_same_in_python_columns_and_c(tmp_path: Path) -> None:
    facts = facts_of_all_targets()
    assert {"arm64_6_12_is_write", "arm64_7_4_gpa_page", "x86_ept_7_4_is_write", "x86_shadow_6_12_gva_bits"} <= {*facts}
    assert check(facts, tmp_path) > 1_000_000


BY_HAND: Final[Facts] = {
    "always": ALWAYS,
    "never": NEVER,
    "whole_byte": WIDE.field_at(15, 8).is_(4),
    "most_of_a_byte": WIDE.field_at(15, 8).one_of((4, 5)),
    "any_of_it": WIDE["BYTES"].one_of(range(256)),
    "zero": ZERO,
    "constant": Word((), 1 << 61),
    "field_and_constant": join(WIDE["TWO"], Word((), 1 << 61)),
    "table_and_constant": join(WIDE["TWO"], SMALL["C"].table({1: 8}), Word((), 1 << 61)),
    "gone": WIDE["WORD"] << 64,
}


@settings(max_examples=3, phases=(Phase.explicit, Phase.generate))  # shrinking would compile for minutes
@given(st.lists(preds(), min_size=20, max_size=20), st.lists(words(), min_size=20, max_size=20))
def test_random_expressions_are_the_same_in_python_columns_and_c(truths: list[Meant], values: list[MeantWord]) -> None:
    facts: dict[str, Pred | Word] = {f"pred_{i}": meant.pred for i, meant in enumerate(truths)}
    facts |= {f"word_{i}": meant.word for i, meant in enumerate(values)}
    with TemporaryDirectory() as folder:
        check({**facts, **BY_HAND}, Path(folder))


@pytest.mark.parametrize("of", [ALWAYS, WIDE["BYTES"].is_(5), WIDE["BYTES"].one_of(range(256)), ~WIDE["TOP"].is_set])
def test_a_column_result_is_the_callers_own(of: Pred) -> None:
    column = np.full(5, 5 << 6, np.uint64)
    first = pred_column(of, {"WIDE": column})
    before = first.tolist()
    pred_column(of, {"WIDE": column})[:] = False
    assert first.tolist() == before
    assert column.tolist() == [5 << 6] * 5


def test_c_text() -> None:
    names = {"SMALL": "small", "WIDE": "wide"}
    assert c_expression(SMALL["C"].one_of(range(4, 8)) & ~SMALL["B"].is_set, names).text == (
        "((!!(small & 0x20ULL)) & (!(small & 0x40ULL)))"
    )
    assert c_expression(WIDE["WORD"] << 64, names).text == "0ULL"  # no shift that C leaves undefined
    looked_up = c_expression(SMALL["C"].table({1: 8, 7: 16}), names, "sizes")
    assert looked_up.text == "sizes0[((small & 0x38ULL) >> 3)]"
    assert looked_up.tables == ("static const uint64_t sizes0[8] = { [0x1] = 8ULL, [0x7] = 0x10ULL };",)
    assert c_function("page", WIDE.field_at(63, 4) << 12, names) == (
        "static inline uint64_t page(uint64_t small, uint64_t wide)\n"
        "{\n\treturn ((wide & 0xfffffffffffff0ULL) << 8);\n}\n"
    )


@pytest.mark.parametrize("names", [{}, {"WIDE": "wide"}, {"SMALL": "1; evil"}])
def test_c_wants_a_variable_for_each_register(names: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="no C variable is named for register SMALL"):
        c_expression(SMALL["F"].is_set, names)
