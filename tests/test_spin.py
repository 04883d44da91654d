"""spin on a model of the invalidation protocol, and the explorer on the path's code: they find the same."""

from __future__ import annotations

import pytest

from tests.spin.checker import check, missing_tool
from tests.spin.protocol import Case, cases

SHORT = (
    "range test, a flag for the count",
    "plain test, no test under the lock",
    "plain test, sequence in an int",
    "block, sampled after the area",
    "mmu_lock, strong memory, no rmb",
    "mmu_lock, weak memory, no rmb",
    "mmu_lock, weak memory, all barriers",
    "frame lock, weak memory, no wmb",
)
"""Of every kind one, and quick."""
CASES = {case.name: case for case in cases()}


@pytest.fixture(autouse=True)
def spin() -> None:
    tool = missing_tool()
    if tool is not None:
        pytest.skip(f"{tool} is not installed")


@pytest.mark.parametrize("case", [CASES[name] for name in SHORT], ids=lambda case: case.name)
def test_both_checkers_find_the_same(case: Case) -> None:
    assert (check(case.model).finds, case.explored().finds) == (case.finds, case.finds)


def test_spin_finds_the_same_without_its_reduction() -> None:
    case = CASES["mmu_lock, weak memory, all barriers"]
    reduced, plain = check(case.model), check(case.model, reduce=False)
    assert reduced.finds == plain.finds == ""
    assert reduced.states < plain.states
