"""``python -m bench.explore [--jobs N]``: every standing scenario on every backend, and every bug of the past.

Status 1 if a search of the kernel as it is finds something or does not come to its end, or if one of a mutant does not
find it. The search without the reduction runs beside, to a bound, for the figure of the reduction only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Final

from kvmfault.contract.target import backend
from kvmfault.explore.mutants import MUTANTS
from kvmfault.explore.run import Explored, Limits, Task, explore, targets_of
from kvmfault.parallel import workers
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.read import read_scenario

FOLDER: Final = Path(__file__).parent.parent / "examples" / "explore"
BOUND: Final = 1_000_000
PLAIN: Final = 300_000
"""States at which the search without the reduction gives up."""


def standing() -> dict[str, Scenario]:
    """The standing scenarios by name."""
    return {path.stem: read_scenario(str(path)).scenario for path in sorted(FOLDER.glob("*.toml"))}


def tasks() -> Iterator[tuple[str, Task]]:
    """Everything to search: the kernel as it is with and without the reduction, and the mutants."""
    for name, scenario in standing().items():
        for target in targets_of(scenario):
            yield name, Task(scenario, target.name, limits=Limits(BOUND))
            yield name, Task(scenario, target.name, limits=Limits(PLAIN, reduce=False))
    for mutant in MUTANTS:
        scenario = standing()[mutant.scenario]
        for target in targets_of(scenario):
            if mutant.applies(backend(target.name)):
                yield mutant.scenario, Task(scenario, target.name, mutant=mutant.name, limits=Limits(BOUND))


def _search(task: tuple[str, Task]) -> Explored:
    return explore(task[1])


def line(name: str, done: Explored, plain: Explored | None) -> tuple[str, bool]:
    """A line of the table, and whether it is as it should be."""
    found = done.found
    head = f"{name:<20} {done.target:<21} {done.mutant:<31} {found.states:>8}"
    if done.mutant:
        caught = found.violation is not None
        word = f"caught: {found.violation.name}, {len(found.schedule)} actions" if found.violation else "NOT CAUGHT"
        return f"{head} {'':>8} {done.seconds:>7.1f}  {word}", caught
    less = ""
    if plain is not None:
        less = f"{'' if plain.found.complete else '>'}{plain.found.states / found.states:.0f}x"
    good = found.violation is None and found.complete and (plain is None or plain.found.violation is None)
    word = "complete" if good else f"VIOLATION {found.violation}" if found.violation else "NOT COMPLETE"
    return f"{head} {less:>8} {done.seconds:>7.1f}  {word}", good


def main() -> int:
    """Search everything; some minutes."""
    parser = argparse.ArgumentParser(prog="python -m bench.explore", description="Explore every standing scenario.")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one for each CPU")
    jobs = parser.parse_args().jobs
    start, fine, count = monotonic(), True, 0
    print(f"{'scenario':<20} {'backend':<21} {'mutant':<31} {'states':>8} {'reduced':>8} {'seconds':>7}  verdict")
    work = list(tasks())
    with workers(jobs=jobs) as at:
        results = at.in_order(_search, work)
        for name, task in work:
            if not task.limits.reduce:
                continue
            done = next(results)
            plain = next(results) if not task.mutant else None
            text, good = line(name, done, plain)
            fine, count = fine and good, count + 1
            print(text, flush=True)
    print(f"{count} searches, {monotonic() - start:.0f} s: {'all as it should be' if fine else 'NOT as it should be'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
