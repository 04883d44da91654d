"""RangeTable against a plain dictionary, with enough ranges to have several chunks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.vm.ranges import RangeTable

SPACE = 4000


def check(table: RangeTable[int], model: dict[int, tuple[int, int]]) -> None:
    """*model*: start to (end, item)."""
    owner: dict[int, int] = {at: item for start, (end, item) in model.items() for at in range(start, end)}
    assert [table.find(at) for at in range(SPACE)] == [owner.get(at) for at in range(SPACE)]
    assert table.items() == tuple(item for _, (_, item) in sorted(model.items()))
    assert len(table) == len(model)


@pytest.mark.parametrize("seed", range(3))
def test_many_edits(seed: int) -> None:
    rng = random.Random(seed)
    table: RangeTable[int] = RangeTable()
    model: dict[int, tuple[int, int]] = {}
    most = 0
    for item in range(1, 1500):
        start = rng.randrange(SPACE)
        end = min(SPACE, start + rng.choice((1, 1, 1, 3, 400 if item % 100 == 0 else 1)))
        pieces = ((start, end, item),) if rng.random() < 0.8 else ()
        met = sorted(s for s, (e, _) in model.items() if s < end and start < e)
        assert table.overlapping(start, end) == tuple(model[s][1] for s in met)
        table = table.splice(start, end, pieces)
        for s in met:
            del model[s]
        model |= {s: (e, i) for s, e, i in pieces}
        most = max(most, len(model))
        if item % 50 == 0:
            check(table, model)
    assert most > 300  # several chunks
    check(table, model)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5), st.booleans()), max_size=30))
def test_few_edits(edits: list[tuple[int, int, bool]]) -> None:
    table: RangeTable[int] = RangeTable()
    model: dict[int, tuple[int, int]] = {}
    for item, (start, size, keep) in enumerate(edits):
        end = start + size
        table = table.splice(start, end, ((start, end, item),) if keep else ())
        model = {s: (e, i) for s, (e, i) in model.items() if not (s < end and start < e)}
        if keep:
            model[start] = (end, item)
    check(table, model)


def test_an_edit_leaves_the_old_table_alone() -> None:
    old: RangeTable[str] = RangeTable[str]().splice(2, 5, ((2, 5, "a"),))
    new = old.splice(3, 4, ((2, 3, "l"), (4, 5, "r")))
    assert old.items() == ("a",)
    assert new.items() == ("l", "r")
    assert (new.find(2), new.find(3), new.find(4), new.find(5)) == ("l", None, "r", None)


def test_a_range_may_grow_over_the_border_of_a_chunk() -> None:
    table: RangeTable[int] = RangeTable()
    for i in range(300):
        table = table.splice(10 * i, 10 * i + 1, ((10 * i, 10 * i + 1, i),))
    for i in range(2, 299):
        grown = table.splice(10 * i - 5, 10 * i + 3, ((10 * i - 5, 10 * i + 3, -1),))
        assert [grown.find(at) for at in range(10 * i - 11, 10 * i + 11)].count(-1) == 8
        assert (grown.find(10 * i - 10), grown.find(10 * i), grown.find(10 * i + 10)) == (i - 1, -1, i + 1)
