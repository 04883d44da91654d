"""Which step decides the recorded cases: what every architecture does, no joint does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import pytest

from docs import declared
from docs.decided import MEMBERS, NEUTRAL, PORTS, Decided, Noting, arm64, path, sizes, x86
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.target import backend
from kvmfault.path.run import PATH, Locked
from kvmfault.types import Gfn, Gpa
from tests.conftest import VECTORS


def of_sizes(noting: Noting) -> list[Decided]:
    return [case for _, case in sizes(noting)]


RUNS: Final[dict[str, tuple[Callable[[Noting], object], int, set[tuple[str, str]]]]] = {
    "arm64@6.12": (arm64, 131, set()),
    "arm64@7.4": (arm64, 131, set()),
    "x86-npt@6.12": (x86, 91, {("apic_page", "slot")}),
    "x86-npt@7.4": (x86, 91, {("apic_page", "slot")}),
    "x86-shadow@6.12": (of_sizes, 576, set()),
}
"""Target -> its cases, how many, and the joint that does what is not a joint's: it hides a slot that was looked up."""


@pytest.mark.parametrize("target", RUNS)
def test_neutral_work_is_done_by_neutral_steps(target: str) -> None:
    run, count, crossed = RUNS[target]
    noting = path(target)
    cases = list(run(noting))  # type: ignore[call-overload]  # each gives an iterable of cases
    assert len({case.case for case in cases}) == len(cases) == count
    for case in cases:
        for what, step in case.neutral.items():
            assert step in NEUTRAL[what], case.case
    assert noting.crossed == crossed
    assert {what for case in cases for what in case.neutral} == set(NEUTRAL)


def test_the_steps_that_do_it_are_no_places_for_joints() -> None:
    steps = {s.name: s for e in PATH for s in (e.steps if isinstance(e, Locked) else (e,))}
    assert all(steps[name].run is not None for names in NEUTRAL.values() for name in names)
    assert {f for f in MEMBERS if not hasattr(Progress, f)} == set()
    assert {p for p in PORTS if not hasattr(Ports, p)} == set()


def _pins(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    vm.find_slot(Gfn(1))
    return None


def _sizes(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    at.size = 1 << 21
    at.at = Gpa(0)
    return None


def test_a_joint_that_does_it_is_noted() -> None:
    on = backend("x86-npt@6.12")
    noting = Noting(on.policy, replace(on.joints, repair=(_pins, _sizes)))
    list(x86(noting))
    assert noting.crossed == {("_pins", "find_slot"), ("_sizes", "size"), ("apic_page", "slot")}


def cells(part: str, column: int) -> list[str]:
    """A column of a table, without head and marks."""
    rows = [line.replace("\\|", " ").split("|")[1:-1] for line in part.splitlines()[2:]]
    return [row[column].strip().strip("`") for row in rows]


def test_every_case_has_its_row() -> None:
    recorded = json.loads((VECTORS / "arm64_decisions.json").read_text())["cases"]
    assert cells(declared.arm64_cases(), 0) == [case["name"] for case in recorded]
    rows = json.loads((VECTORS / "x86_vectors.json").read_text())
    lines = [" ".join(f"{key}={value}" for key, value in row["in"].items()) for row in rows["path"]]
    assert cells(declared.x86_cases(), 0) == lines
    assert sum(map(int, cells(declared.size_cases(), -1))) == len(rows["hugepage"]) == 576
