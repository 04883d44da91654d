"""One definition, one meaning: plain Python, the compiled function of a tuple, of a mapping, and columns all agree."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmfault.algebra.columns import BLOCK, Columns, maybe_column, pred_column, word_column
from kvmfault.algebra.cubes import cubes
from kvmfault.algebra.expr import ALWAYS, NEVER, AllOf, Among, AnyOf, Not, Pred, Word, union
from kvmfault.algebra.layout import ZERO, Field
from kvmfault.algebra.scalar import compile_pred, compile_word
from kvmfault.errors import DecodeError
from kvmfault.types import U64
from tests.expressions import (
    FIELDS,
    INTERESTING,
    ORDER,
    SMALL,
    WIDE,
    Meant,
    MeantWord,
    Registers,
    bits,
    leaves,
    preds,
    registers,
    words,
)


def as_columns(rows: Sequence[Registers]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint64]]]:
    return {name: np.array([row[name] for row in rows], np.uint64) for name in ORDER}


def as_tuple(row: Registers) -> tuple[int, ...]:
    return tuple(row[name] for name in ORDER)


ROWS = st.lists(registers(), min_size=1, max_size=8).map(lambda rows: [*rows, *INTERESTING])


@given(preds(), ROWS)
def test_a_predicate_has_one_meaning(meant: Meant, rows: list[dict[str, int]]) -> None:
    wanted = [meant.holds(row) for row in rows]
    by_position = compile_pred(meant.pred, ORDER)
    assert [by_position(as_tuple(row)) for row in rows] == wanted
    assert [meant.pred.on(row) for row in rows] == wanted
    assert pred_column(meant.pred, as_columns(rows)).tolist() == wanted


@given(preds(), registers())
def test_a_predicate_gives_a_bool(meant: Meant, row: dict[str, int]) -> None:
    assert type(meant.pred.on(row)) is bool
    assert type(compile_pred(meant.pred, ORDER)(as_tuple(row))) is bool


@given(words(), ROWS)
def test_a_word_has_one_value(meant: MeantWord, rows: list[dict[str, int]]) -> None:
    wanted = [meant.value(row) for row in rows]
    by_position = compile_word(meant.word, ORDER)
    assert [by_position(as_tuple(row)) for row in rows] == wanted
    assert [meant.word.on(row) for row in rows] == wanted
    assert word_column(meant.word, as_columns(rows)).tolist() == wanted
    assert all(value & ~meant.word.mask_out == 0 for value in wanted)


@given(words(), preds(), ROWS)
def test_when_is_the_value_where_it_holds(value: MeantWord, valid: Meant, rows: list[dict[str, int]]) -> None:
    maybe = value.word.when(valid.pred)
    wanted = [value.value(row) if valid.holds(row) else None for row in rows]
    assert [maybe.on(row) for row in rows] == wanted
    column, mask = maybe_column(maybe, as_columns(rows))
    assert [int(v) if m else None for v, m in zip(column, mask, strict=True)] == wanted
    assert maybe.reads == union(value.word.reads, valid.pred.reads)


@given(preds(), words(), registers(), st.data())
def test_nothing_outside_reads_matters(meant: Meant, word: MeantWord, row: dict[str, int], data: st.DataObject) -> None:
    for reads, value in ((meant.pred.reads, meant.pred.on), (word.word.reads, word.word.on)):
        noise = data.draw(registers())
        other = {n: row[n] & reads.get(n, 0) | noise[n] & ~reads.get(n, 0) for n in ORDER}
        assert value(other) == value(row)


@given(leaves())
def test_a_membership_reads_its_field(meant: Meant) -> None:
    assert isinstance(meant.pred, Among)
    assert meant.pred.reads == {meant.pred.field.register: meant.pred.field.mask}


# Words have 64 bits.


@pytest.mark.parametrize("f", FIELDS, ids=lambda f: f.name)
@pytest.mark.parametrize("by", [0, 1, 7, 31, 32, 33, 50, 63, 64, 65, 200])
def test_a_shift_drops_what_leaves_alike(f: Field, by: int) -> None:
    dice = random.Random(by)
    rows = [*INTERESTING, *({"WIDE": dice.getrandbits(64), "SMALL": dice.getrandbits(9)} for _ in range(200))]
    columns = as_columns(rows)
    shifted: list[tuple[Word, Callable[[int], int]]] = [
        (f << by, lambda v: v << by & U64),
        (f >> by, lambda v: v >> by),
        (f << by >> by, lambda v: (v << by & U64) >> by),
        (f >> by << by, lambda v: v >> by << by & U64),
        (f << by << 3 >> 1, lambda v: (v << by + 3 & U64) >> 1),
    ]
    for word, value in shifted:
        wanted = [value(bits(f, row)) for row in rows]
        assert [word.on(row) for row in rows] == wanted
        assert word_column(word, columns).tolist() == wanted
        assert word.mask_out <= U64


def test_constants_and_tables_are_dropped_too() -> None:
    table = SMALL["F"].table({0: U64, 1: 1})
    for by in (0, 1, 63, 64, 70):
        assert [(table << by).on({"SMALL": v}) for v in (0, 1)] == [U64 << by & U64, 1 << by & U64]
        assert [(table >> by).on({"SMALL": v}) for v in (0, 1)] == [U64 >> by, 1 >> by]
        assert (Word((), U64) << by).on({}) == U64 << by & U64
        assert (Word((), U64) >> by).on({}) == U64 >> by


def test_a_negative_shift_is_refused() -> None:
    refused: list[Callable[[], object]] = [lambda: WIDE["WORD"] << -1, lambda: WIDE["WORD"] >> -1]
    for shift in refused:
        with pytest.raises(ValueError, match="negative shift"):
            shift()


# Trees.


def test_chains_are_one_node() -> None:
    a, b, c, d = (SMALL[n].is_set for n in "BDEF")
    both = a & b & c & d
    assert isinstance(both, AllOf)
    assert both.parts == (a, b, c, d)
    either = a | (b | c) | d
    assert isinstance(either, AnyOf)
    assert either.parts == (a, b, c, d)
    mixed = a & b | c & d
    assert isinstance(mixed, AnyOf)
    assert [type(p) for p in mixed.parts] == [AllOf, AllOf]


def test_the_constants_are_neutral() -> None:
    a = SMALL["B"].is_set
    assert (ALWAYS & a) is a
    assert (NEVER | a) is a
    assert ~~a is a
    assert isinstance(~a, Not)
    for row in INTERESTING:
        assert (a | ALWAYS).on(row)
        assert not (a & NEVER).on(row)
    assert ALWAYS.on({})
    assert not NEVER.on({})
    assert ALWAYS.reads == NEVER.reads == {}


def test_fold_sees_every_node_once() -> None:
    a, b, c = (SMALL[n].is_set for n in "BDE")
    text = (~(a & b) | c).fold(
        lambda leaf: leaf.field.name,
        lambda parts: f"all({','.join(parts)})",
        lambda parts: f"any({','.join(parts)})",
        lambda part: f"not({part})",
    )
    assert text == "any(not(all(B,D)),E)"
    assert ALWAYS.fold(lambda _: 1, lambda p: len(p), lambda p: 5, lambda _: 7) == 0


def test_no_node_of_ones_own() -> None:
    class Mine(Pred):
        """What a user might try."""

    uses: list[Callable[[], object]] = [lambda: Mine().on({}), lambda: Mine().reads, lambda: (Mine() & ALWAYS).on({})]
    for use in uses:
        with pytest.raises(TypeError, match="Mine is not a node of the algebra"):
            use()


# Columns.


@pytest.mark.parametrize("rows", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_block_boundaries(rows: int) -> None:
    columns: Columns = {
        "WIDE": np.arange(rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
        "SMALL": np.arange(rows, dtype=np.uint64) & np.uint64(511),
    }
    pred = WIDE["HIGH"].is_(5) | ~SMALL["C"].one_of((1, 2)) & WIDE["TOP"].is_set
    word = WIDE["CROSS"] << 3
    got, value = pred_column(pred, columns), word_column(word, columns)
    assert len(got) == len(value) == rows
    wide, small = columns["WIDE"], columns["SMALL"]
    wanted = (wide >> np.uint64(50) & np.uint64(0x1FFF)) == 5
    wanted |= ~np.isin(small >> np.uint64(3) & np.uint64(7), (1, 2)) & (wide >> np.uint64(63) == 1)
    assert np.array_equal(got, wanted)
    assert np.array_equal(value, (wide >> np.uint64(27) & np.uint64(0x3FFF)) << np.uint64(3))
    assert pred_column(ALWAYS, columns).all()
    assert not pred_column(NEVER, columns).any()
    assert not word_column(ZERO, columns).any()


@given(preds(), words())
def test_columns_need_not_be_contiguous(meant: Meant, word: MeantWord) -> None:
    rows = list(INTERESTING)
    strided = {n: np.repeat(c, 3)[::3] for n, c in as_columns(rows).items()}
    backwards = {n: c[::-1] for n, c in as_columns(rows).items()}
    assert pred_column(meant.pred, strided).tolist() == [meant.holds(row) for row in rows]
    assert pred_column(meant.pred, backwards).tolist() == [meant.holds(row) for row in reversed(rows)]
    assert word_column(word.word, strided).tolist() == [word.value(row) for row in rows]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"SMALL": [1]}, "no column for register WIDE; given: SMALL"),
        ({}, "no column for register WIDE; given: none"),
        ({"WIDE": [1], "SMALL": [1, 2]}, "columns differ in length: [1, 2]"),
    ],
)
@pytest.mark.parametrize("evaluate", ["pred", "word", "maybe"])
def test_columns_that_do_not_fit(columns: dict[str, list[int]], says: str, evaluate: str) -> None:
    given_ = {name: np.array(values, np.uint64) for name, values in columns.items()}
    top = WIDE["TOP"]
    run: dict[str, Callable[[], object]] = {
        "pred": lambda: pred_column(top.is_set, given_),
        "word": lambda: word_column(top, given_),
        "maybe": lambda: maybe_column(top.when(top.is_set), given_),
    }
    with pytest.raises(DecodeError) as refused:
        run[evaluate]()
    assert str(refused.value) == says
    assert refused.value.register in ("WIDE", *columns)


def test_a_register_that_is_not_in_the_order() -> None:
    with pytest.raises(KeyError, match="WIDE"):
        compile_pred(WIDE["TOP"].is_set, ("SMALL",))
    with pytest.raises(KeyError, match="WIDE"):
        compile_word(WIDE["TOP"], ("SMALL",))


# Memberships as tests of bits (all subsets of few bits: test_algebra_c.py).


@given(st.integers(4, 8).flatmap(lambda w: st.tuples(st.just(w), st.frozensets(st.integers(0, (1 << w) - 1)))))
@example((6, frozenset({4, 5, 6, 7, 0x2B})))
@example((8, frozenset(range(256))))
@example((4, frozenset()))
def test_cubes_equal_their_set(case: tuple[int, frozenset[int]]) -> None:
    width, values = case
    tests = cubes(values, width)
    for v in range(1 << width):
        assert any(v & mask == value for mask, value in tests) is (v in values)
    assert all(value & ~mask == 0 for mask, value in tests)
    assert len(tests) <= len(values)
