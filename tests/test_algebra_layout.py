"""A layout that contradicts itself is refused where it is declared, and the message says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from kvmfault.algebra.expr import Among, Maybe, Pred, Word
from kvmfault.algebra.layout import ZERO, Field, Register, join, register
from kvmfault.errors import LayoutError
from kvmfault.types import U64
from tests.conftest import ROOT
from tests.expressions import SMALL, WIDE


@pytest.mark.parametrize(
    ("declare", "says"),
    [
        (lambda: register("R 1", 8, ""), "'R 1', 8 bits: a register has an identifier for a name, and 1 to 64 bits"),
        (lambda: register("R", 65, ""), "'R', 65 bits: a register has an identifier for a name, and 1 to 64 bits"),
        (lambda: register("R", 0, ""), "'R', 0 bits: a register has an identifier for a name, and 1 to 64 bits"),
        (lambda: register("R", 8, "", A=(3, 0), B=3), "R: B and A both claim bit 3"),
        (lambda: register("R", 8, "", A=(7, 4), B=(5, 2)), "R: B and A both claim bit 4"),
        (lambda: register("R", 8, "", A=(0, 3)), "R: A=(0, 3) is not (high, low)"),
        (lambda: register("R", 8, "", A=-1), "R: A=(-1, -1) is not (high, low)"),
        (lambda: register("R", 8, "", A=(3, -2)), "R: A=(3, -2) is not (high, low)"),
        (lambda: register("R", 8, "", A=8), "R: A bit 8 is beyond the 8 bits of the register"),
        (lambda: register("R", 64, "", A=(64, 60)), "R: A bit 64 is beyond the 64 bits of the register"),
        (lambda: register("R", 8, "", {"A": {4: "four"}}, A=(1, 0)), "R.A: 0x4 does not fit 2 bits"),
        (lambda: register("R", 8, "", {"A": {-1: "x"}}, A=(1, 0)), "R.A: -0x1 does not fit 2 bits"),
        (lambda: register("R", 8, "", {"B": {0: "x"}}, A=0), "R: meanings for B, which is not a field"),
        (lambda: WIDE.field_at(64, 60), "WIDE: [64:60] bit 64 is beyond the 64 bits of the register"),
        (lambda: WIDE["NONE"], "WIDE has no field NONE; it has TOP, HIGH, CROSS, WORD, BYTES, THREE, TWO"),
        (lambda: WIDE["THREE"].is_(8), "WIDE.THREE: 0x8 does not fit 3 bits"),
        (lambda: WIDE["THREE"].is_(-1), "WIDE.THREE: -0x1 does not fit 3 bits"),
        (lambda: WIDE["THREE"].one_of((1, 9)), "WIDE.THREE: 0x9 does not fit 3 bits"),
        (lambda: WIDE["THREE"].one_of(()), "WIDE.THREE: no value is given"),
        (lambda: WIDE["THREE"].table({}), "WIDE.THREE: no value is given"),
        (lambda: WIDE["THREE"].is_set, "THREE has 3 bits: is_set needs one, use is_ or one_of"),
        (lambda: WIDE["WORD"].table({0: 1}), "WORD has 11 bits: a table takes up to 8"),
        (lambda: WIDE["THREE"].table({8: 1}), "WIDE.THREE: 0x8 does not fit 3 bits"),
        (lambda: WIDE["THREE"].table({0: 1 << 64}), "WIDE.THREE: a table holds words of 64 bits, not 0x1" + "0" * 16),
        (lambda: WIDE["THREE"].table({0: -1}), "WIDE.THREE: a table holds words of 64 bits, not -0x1"),
        (lambda: join(WIDE["THREE"], WIDE["TWO"]), "join: bits 0x3 come from two words"),
        (lambda: join(WIDE["THREE"], WIDE["THREE"]), "join: bits 0x7 come from two words"),
        (lambda: join(WIDE["TWO"].table({0: 6}), SMALL["B"] << 2), "join: bits 0x4 come from two words"),
    ],
)  # fmt: skip
def test_refused(declare: Callable[[], object], says: str) -> None:
    with pytest.raises(LayoutError) as refused:
        declare()
    assert str(refused.value) == says


def test_refused_when_the_module_is_imported() -> None:
    code = "from kvmfault.algebra.layout import register; R = register('R', 8, '', A=(3, 0), B=2); print('not reached')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "LayoutError: R: B and A both claim bit 2" in done.stderr
    assert not done.stdout


def test_a_name_cannot_be_reused() -> None:
    # the language itself refuses it: fields are keyword arguments
    with pytest.raises(SyntaxError, match="keyword argument repeated: A"):
        compile("register('R', 8, '', A=1, A=2)", "", "eval")


def test_what_a_declaration_gives() -> None:
    assert isinstance(WIDE, Register)
    assert [f.name for f in WIDE] == ["TOP", "HIGH", "CROSS", "WORD", "BYTES", "THREE", "TWO"]
    cross = WIDE["CROSS"]
    assert (cross.width, cross.mask, cross.place) == (14, 0x1FF_F800_0000, "bits 40:27")
    assert (WIDE["TOP"].width, WIDE["TOP"].mask, WIDE["TOP"].place) == (1, 1 << 63, "bit 63")
    named = sum(f.mask for f in WIDE)
    assert WIDE.reserved == U64 & ~named == 0x0003_FE00_0000_C020
    assert SMALL.reserved == 0
    assert WIDE["THREE"].meanings == {0: "none", 5: "five"}
    with pytest.raises(TypeError):
        WIDE.fields["NEW"] = cross  # type: ignore[index]  # the point: the mapping is read-only
    with pytest.raises(TypeError):
        WIDE["THREE"].meanings[1] = "one"  # type: ignore[index]  # as above


def test_the_caller_keeps_no_hold_on_meanings() -> None:
    mine = {0: "zero"}
    made = register("R", 8, "", {"A": mine}, A=(1, 0))
    mine[1] = "one"
    assert made["A"].meanings == {0: "zero"}


def test_a_range_is_accepted_as_values() -> None:
    pred = WIDE["THREE"].one_of(range(2, 5))
    assert isinstance(pred, Among)
    assert pred.values == {2, 3, 4}


def test_field_at_reads_across_fields() -> None:
    crossing = WIDE.field_at(5, 1)
    assert isinstance(crossing, Field)
    assert crossing.on({"WIDE": 0b11_0110}) == 0b1_1011


def test_join_takes_neighbours_and_constants() -> None:
    whole = join(SMALL["A"] << 7, SMALL["B"] << 6, SMALL["C"] << 3, Word((), 0b111))
    assert whole.on({"SMALL": 0b10_1_101_000}) == 0b10_1_101_111
    assert join().on({}) == ZERO.on({}) == 0


def _truth(thing: Pred | Word | Maybe) -> bool:
    return bool(thing)


@pytest.mark.parametrize(
    "thing",
    [WIDE["TOP"], WIDE["TOP"].is_set, ~WIDE["TOP"].is_set, ZERO, WIDE["TOP"].when(WIDE["TOP"].is_set)],
    ids=lambda t: type(t).__name__,
)
def test_no_truth_value(thing: Pred | Word | Maybe) -> None:
    with pytest.raises(TypeError, match=r"truth value"):
        _truth(thing)


def test_no_comparison_by_value() -> None:
    # `==` between expressions would look like a proof: it is identity, and `prove` compares
    a, b = WIDE["TOP"].is_set, WIDE["TOP"].is_set
    assert a != b
    assert WIDE["TOP"] << 1 != WIDE["TOP"] << 1
