"""Memory ordering of the invalidation protocol: each barrier is needed where it is, and only where memory is weak."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvmfault.contract.target import backend
from kvmfault.explore.barriers import BARRIERS, RMB, TEST_RMB, WITHOUT_BARRIERS, WMB, protocol
from kvmfault.explore.mutant import Mutant, without
from kvmfault.explore.run import Task, as_scenario, explore, reproduce
from kvmfault.explore.search import Found, breadth_first
from kvmfault.explore.setup import Setting
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.read import parse_scenario

TARGETS = ("arm64", "x86-ept")
ONE_VCPU = """
title = "A vCPU reads two pages of which the host moves one"

[[slot]]
gpa = "1G"
size = "64M"

[[actor]]
event = [{ do = "read", gpa = "1G" }, { do = "write", gpa = 0x4000_1000 }]

[[actor]]
event = [{ do = "migrate", gpa = "1G" }]
"""


def small() -> Scenario:
    return parse_scenario("small", ONE_VCPU).scenario


def search(target: str, mutant: Mutant) -> Found:
    return breadth_first(Setting(small(), backend(target), (), mutant).space())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("missing", "frame_lock", "caught"),
    [
        ("", False, False),
        ("", True, False),
        (RMB, False, True),
        (RMB, True, True),
        (WMB, False, False),  # under mmu_lock nobody sees the stores of the end but in order
        (WMB, True, True),
        (TEST_RMB, True, True),
    ],
)
def test_a_missing_barrier_shows_in_the_weak_mode_alone(
    target: str, missing: str, frame_lock: bool, caught: bool
) -> None:
    strong = search(target, protocol(weak=False, frame_lock=frame_lock, missing=missing))
    assert (strong.complete, strong.violation) == (True, None)
    weak = search(target, protocol(weak=True, frame_lock=frame_lock, missing=missing))
    assert (weak.violation.name if weak.violation else None) == ("reaches-old-page" if caught else None)
    assert weak.complete is not caught


@pytest.mark.parametrize("weak", [False, True])
def test_the_look_without_the_lock_needs_no_barrier_and_replaces_no_test(weak: bool) -> None:
    # whatever it sees, the test under the lock follows; without that, no barrier helps
    kernel = protocol(weak=weak)
    blind = replace(kernel, changes=(*kernel.changes, without("precheck", "recheck")))
    assert search("x86-ept", blind).violation is None
    trusting = replace(kernel, changes=(*kernel.changes, without("stale")))
    found = search("x86-ept", trusting)
    assert found.violation is not None
    assert found.violation.name == "reaches-old-page"


@pytest.mark.parametrize("mutant", WITHOUT_BARRIERS, ids=lambda m: m.name)
def test_its_schedule_shows_the_violation_again(mutant: Mutant) -> None:
    task = Task(small(), "arm64", mutant=mutant.name)
    done = explore(task)
    told = as_scenario(task, done)
    assert any(step.split()[0].startswith(("vcpu0:", "host:")) for step in told.schedule)
    assert reproduce(replace(task, scenario=told)).found.violation == done.found.violation


def test_every_barrier_of_the_protocol_is_left_out_once() -> None:
    assert len(WITHOUT_BARRIERS) == len(BARRIERS)
