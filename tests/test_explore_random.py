"""Random small scenarios: the reduction changes no verdict, on any backend, with and without a bug of the past."""

from __future__ import annotations

import json
from random import Random
from typing import Final

import pytest

from kvmfault.contract.target import backend, backends
from kvmfault.explore.mutant import NONE
from kvmfault.explore.mutants import MUTANTS
from kvmfault.explore.search import breadth_first
from kvmfault.explore.setup import Setting
from kvmfault.scenario.read import parse_scenario
from kvmfault.scenario.world import Misuse

BOUND: Final = 100_000
FIRST, SECOND, FREE = 1 << 30, (1 << 30) + (1 << 16), 2 << 30
EVENTS: Final[tuple[dict[str, object], ...]] = (
    {"do": "migrate", "gpa": FIRST},
    {"do": "migrate", "gpa": SECOND},
    {"do": "migrate", "gpa": FIRST, "size": "128K"},
    {"do": "evict", "gpa": FIRST},
    {"do": "cow", "gpa": FIRST},
    {"do": "zero", "gpa": FIRST},
    {"do": "age", "gpa": FIRST},
    {"do": "track", "gpa": FIRST},
    {"do": "get_log", "slot": 0},
    {"do": "clear_log", "slot": 0, "first": 0, "count": 64},
    {"do": "set_slot", "id": 1, "gpa": FREE, "size": "2M", "hva": "64G"},
    {"do": "set_slot", "id": 0, "log_dirty": True},
    {"do": "set_slot", "id": 0, "log_dirty": False},
    {"do": "set_slot", "id": 0, "gpa": "3G"},
    {"do": "delete_slot", "id": 0},
)


def drawn(chance: Random) -> str:
    """One or two vCPUs, and one or two others, which do one or two events each."""

    def access(vcpu: int) -> dict[str, object]:
        return {"do": chance.choice(("read", "write", "write", "fetch")), "gpa": place(), "vcpu": vcpu}

    def place() -> int:
        return chance.choice((FIRST, FIRST, SECOND, FREE))

    actors = [[access(vcpu) for _ in range(chance.randint(1, 2))] for vcpu in range(chance.randint(1, 2))]
    actors += [chance.sample(EVENTS, chance.randint(1, 2)) for _ in range(chance.randint(1, 2))]
    return json.dumps(
        {
            "title": "drawn",
            "memory": [{"hva": "64G", "size": "2M"}],
            "slot": [{"gpa": FIRST, "size": "4M", "log_dirty": chance.random() < 0.5}],
            "event": [{"do": "write", "gpa": FIRST}] * (chance.random() < 0.5) or [{"do": "look"}],
            "actor": [{"event": events} for events in actors],
        }
    )


def compared(seed: int) -> bool:
    """Whether the scenario of *seed* could be searched to the end both ways."""
    chance = Random(seed)
    scenario = parse_scenario("drawn.json", drawn(chance)).scenario
    target = backend(chance.choice(sorted(backends())))
    mutant = chance.choice((NONE, *(m for m in MUTANTS if m.applies(target))))
    setting = Setting(scenario, target, (), mutant)
    try:
        reduced, plain = (breadth_first(setting.space(), bound=BOUND, reduce=reduce) for reduce in (True, False))
    except Misuse:  # an order in which the host could not do what it is asked for
        return False
    if not all(found.complete or found.violation is not None for found in (reduced, plain)):
        return False
    assert (reduced.violation is None) is (plain.violation is None), (target, mutant.name)
    return True


def test_the_reduction_changes_no_verdict() -> None:
    assert sum(compared(seed) for seed in range(8)) >= 4


@pytest.mark.long
@pytest.mark.parametrize("first", range(1000, 1400, 50))
def test_the_reduction_changes_no_verdict_of_many(first: int) -> None:
    assert sum(compared(seed) for seed in range(first, first + 50)) >= 25
