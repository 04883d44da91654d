"""Parts of docs/concurrency.md: timelines that the tool prints, and tables of scenarios, invariants and mutants."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from docs.declared import table
from kvmfault.contract.target import backend, backends
from kvmfault.explore.invariants import NAMES
from kvmfault.explore.mutants import BY_NAME, MUTANTS
from kvmfault.explore.run import Task, explore
from kvmfault.explore.timeline import timeline
from kvmfault.scenario.read import read_scenario

FOLDER: Final = Path(__file__).parents[1] / "examples" / "explore"
_WIDTH: Final = 100


def found(mutant: str, target: str) -> str:
    """The timeline of the shortest way to what a mutant breaks, with the command that prints it."""
    bug = BY_NAME[mutant]
    scenario = read_scenario(str(FOLDER / f"{bug.scenario}.toml")).scenario
    done = explore(Task(scenario, backend(target).name, mutant=mutant))
    violation = done.found.violation
    assert violation is not None
    lines = [f"kvmfault explore examples/explore/{bug.scenario}.toml --backend {target} --mutant {mutant}", ""]
    lines += [*timeline(done.actors, done.found.schedule, _WIDTH), "", f"{violation.name}: {violation.what}"]
    return "\n".join(("```text", *lines, "```"))


def scenarios() -> str:
    """The standing scenarios."""
    files = sorted(FOLDER.glob("*.toml"))
    rows = [(f"`{path.name}`", tomllib.loads(path.read_text(encoding="utf-8"))["title"]) for path in files]
    return table(("file in examples/explore", "explores"), rows)


def invariants() -> str:
    """What must hold."""
    return table(("invariant", "says"), [(f"`{name}`", text) for name, text in NAMES.items()])


def mutants() -> str:
    """Bugs of the past."""
    rows = []
    for mutant in MUTANTS:
        scenario = read_scenario(str(FOLDER / f"{mutant.scenario}.toml")).scenario
        where = [n for n in scenario.targets or backends() if mutant.applies(backend(n))]
        fix = f"{mutant.fix} ({mutant.commit})" if mutant.commit else mutant.fix
        rows.append((f"`{mutant.name}`", mutant.about, fix, f"`{mutant.scenario}.toml`: {', '.join(where)}"))
    return table(("mutant", "what was wrong", "fixed by", "found in"), rows)


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "explore_no_recheck": partial(found, "no-recheck", "arm64"),
    "explore_sequence_after_area": partial(found, "sequence-after-area", "arm64"),
    "explore_rmb": partial(found, "sample-without-rmb", "x86-ept"),
    "explore_wmb": partial(found, "end-without-wmb", "arm64"),
    "explore_invalid_slot": partial(found, "invalid-slot-mapped", "x86-ept"),
    "explore_generation": partial(found, "mmio-generation-once", "x86-ept"),
    "explore_protect": partial(found, "protect-before-swap", "x86-npt"),
    "explore_mixing": partial(found, "block-while-mixing", "x86-ept"),
    "explore_scenarios": scenarios,
    "explore_invariants": invariants,
    "explore_mutants": mutants,
}
