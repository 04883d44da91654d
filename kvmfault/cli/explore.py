"""``kvmfault explore``, and ``kvmfault run`` of a scenario with a schedule."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from time import monotonic
from typing import Final

from kvmfault.cli.options import Where
from kvmfault.cli.render import columns, to_json
from kvmfault.errors import UsageError
from kvmfault.explore.invariants import NAMES
from kvmfault.explore.mutants import MUTANTS
from kvmfault.explore.run import (
    Explored,
    Limits,
    Task,
    as_scenario,
    explore_all,
    mutant_named,
    reproduce,
    targets_of,
)
from kvmfault.explore.timeline import timeline
from kvmfault.scenario.read import Source, read_scenario
from kvmfault.scenario.world import Misuse

__all__ = ["again", "as_data", "list_mutants", "run"]

_WIDEST: Final = 160
_ELSEWHERE: Final = 100


def run(
    files: Sequence[str],
    targets: Sequence[str],
    settings: Sequence[str],
    mutant: str,
    limits: Limits,
    where: Where,
    write: str | None,
    *,
    json: bool,
) -> int:
    """Explore and print; status 1 if a violation was found."""
    sources = [read_scenario(file) for file in files]
    given = [(source, task) for source in sources for task in _tasks(source, targets, settings, mutant, limits)]
    done: list[tuple[Source, Task, Explored]] = []
    with where.workers() as at, _told() as tell:
        found = explore_all([task for _, task in given], at, tell)
        for source, task in given:
            try:
                one = next(found)
            except Misuse as e:
                raise UsageError(f"{source.place(*e.place)}: {e}") from e
            done.append((source, task, one))
            if not json:
                print("\n".join(_shown(source, one)), flush=True)
            if write is not None and one.found.violation is not None:
                place = _written(Path(write), source, task, one)
                if not json:
                    print(f"  written to {place}; to see it again: kvmfault run {place}")
    if json:
        print(to_json([as_data(source, one) for source, _, one in done]))
    return 1 if any(one.found.violation is not None for _, _, one in done) else 0


def _tasks(
    source: Source, targets: Sequence[str], settings: Sequence[str], mutant: str, limits: Limits
) -> Iterator[Task]:
    scenario = source.scenario
    if not scenario.actor:
        raise UsageError(f"{source.path}: the scenario has no [[actor]]: there is nothing to interleave")
    name = mutant or scenario.mutant
    bug = mutant_named(name)
    meant = [t for t in targets_of(scenario, targets) if bug.applies(t)]
    if not meant:
        raise UsageError(f"{source.path}: {name} applies to none of the targets")
    for target in meant:
        yield Task(scenario, target.name, tuple(settings), name, limits)


def list_mutants(*, json: bool) -> int:
    """Print the mutants and the invariants."""
    if json:
        known = ("name", "fix", "commit", "about", "scenario")
        mutants = [{name: getattr(mutant, name) for name in known} for mutant in MUTANTS]
        print(to_json({"mutants": mutants, "invariants": NAMES}))
        return 0
    print("mutants")
    for mutant in MUTANTS:
        print(f"  {mutant.name}: {mutant.about}")
        print(f"    {mutant.fix}{f' ({mutant.commit})' if mutant.commit else ''}; see {mutant.scenario}")
    print("invariants")
    print(columns(list(NAMES.items()), indent="  "))
    return 0


def again(source: Source, targets: Sequence[str], settings: Sequence[str], *, json: bool) -> int:
    """Run a scenario in the order of its schedule; status 1 if it ends in a violation."""
    scenario = source.scenario
    if not scenario.schedule:
        raise UsageError(f"{source.path}: it has actors and no schedule: see 'kvmfault explore'")
    (target,) = targets_of(scenario, targets or scenario.targets)
    try:
        done = reproduce(Task(scenario, target.name, tuple(settings), scenario.mutant))
    except Misuse as e:
        raise UsageError(f"{source.place(*e.place)}: {e}") from e
    if json:
        print(to_json(as_data(source, done)))
    else:
        print("\n".join((scenario.title, "", *timeline(done.actors, done.found.schedule, _width()), "")))
        print("\n".join(_verdict(done)))
    return 1 if done.found.violation is not None else 0


def _width() -> int:
    return min(_WIDEST, get_terminal_size((_ELSEWHERE, 0)).columns)


def _shown(source: Source, done: Explored) -> Iterator[str]:
    found = done.found
    bug = f" with {done.mutant}" if done.mutant else ""
    speed = found.moves / done.seconds if done.seconds else 0
    yield (
        f"{Path(source.path).stem} on {done.target}{bug}: {found.states} states, {found.moves} actions "
        f"({found.ran} carried out), {done.seconds:.1f} s, {speed:,.0f} actions/s: {_word(done)}"
    )
    if found.violation is not None:
        yield from (f"  {line}".rstrip() for line in timeline(done.actors, found.schedule, _width() - 2))
        yield from (f"  {line}" for line in _verdict(done))
        if not found.shortest:
            yield f"  a shorter way may exist: {_not_shortest(done)}"


def _not_shortest(done: Explored) -> str:
    if done.limits.walks:
        return "this is how a random walk went"
    return f"the search for it came to the bound of {done.limits.bound} states (--bound)"


def _word(done: Explored) -> str:
    if done.found.violation is not None:
        return f"VIOLATION of {done.found.violation.name}"
    if done.limits.walks:
        return f"no violation in {done.limits.walks} random walks"
    return "complete, no violation" if done.found.complete else f"no violation up to the bound of {done.limits.bound}"


def _verdict(done: Explored) -> Iterator[str]:
    violation = done.found.violation
    if violation is None:
        yield "no violation"
        return
    about = NAMES.get(violation.name, "")
    yield from wrap(f"{violation.name}: {violation.what}", _width() - 2, subsequent_indent="  ")
    yield from wrap(f"({about})", _width() - 2, initial_indent="  ", subsequent_indent="  ")


def as_data(source: Source, done: Explored) -> dict[str, object]:
    """An exploration as JSON data."""
    found = done.found
    return {
        "scenario": source.path,
        "title": done.title,
        "target": done.target,
        "mutant": done.mutant or None,
        "actors": done.actors,
        "states": found.states,
        "actions": found.moves,
        "carried_out": found.ran,
        "seconds": round(done.seconds, 3),
        "complete": found.complete,
        "bound": done.limits.bound,
        "reduced": done.limits.reduce,
        "random_walks": done.limits.walks,
        "seed": done.limits.seed if done.limits.walks else None,
        "violation": None if found.violation is None else found.violation._asdict(),
        "shortest": None if found.violation is None else found.shortest,
        "schedule": [{"actor": done.actors[s.actor], "action": s.name, "note": s.note} for s in found.schedule],
    }


def _written(folder: Path, source: Source, task: Task, done: Explored) -> Path:
    violation = done.found.violation
    assert violation is not None
    target = done.target.replace(":", "-").replace("@", "-")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{Path(source.path).stem}-{done.mutant or violation.name}-{target}.json"
    scenario = as_scenario(task, done)
    place.write_text(scenario.model_dump_json(indent=2, exclude_defaults=True) + "\n", encoding="utf-8")
    return place


@contextmanager
def _told() -> Generator[Callable[[Task, int, int], None]]:
    # a line on the terminal while a search runs
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda task, states, waiting: None
        return
    with console.status("") as line:
        seen: dict[int, float] = {}

        def tell(task: Task, states: int, waiting: int) -> None:
            begun = seen.setdefault(id(task), monotonic())
            speed = states / max(monotonic() - begun, 1e-3)
            line.update(f"{task.scenario.title} on {task.target}: {states} states, {waiting} waiting, {speed:,.0f}/s")

        yield tell
