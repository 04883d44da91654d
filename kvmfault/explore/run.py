"""What ``explore`` does: search a scenario's interleavings on targets, and make a scenario of what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Final

from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import UsageError
from kvmfault.explore.host import HostActor
from kvmfault.explore.mutant import NONE, Mutant
from kvmfault.explore.mutants import BY_NAME
from kvmfault.explore.search import DEFAULT_BOUND, Found, Tell, breadth_first, random_walks, straightened, taken
from kvmfault.explore.setup import Setting
from kvmfault.explore.space import Space, State
from kvmfault.parallel import Workers
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.world import Misuse
from kvmfault.trace.document import near

__all__ = [
    "Explored",
    "Limits",
    "Task",
    "as_scenario",
    "explore",
    "explore_all",
    "mutant_named",
    "reproduce",
    "targets_of",
]

_SEED: Final = 1


@dataclass(frozen=True)
class Limits:
    """How far a search goes."""

    bound: int = DEFAULT_BOUND
    """States."""
    reduce: bool = True
    """Without it every order of actions that cannot notice each other is taken, too."""
    walks: int = 0
    """Random walks instead."""
    seed: int = _SEED
    """Of the random walks."""


@dataclass(frozen=True)
class Explored:
    """One scenario on one target."""

    title: str
    target: str
    mutant: str
    actors: tuple[str, ...]
    found: Found
    seconds: float
    limits: Limits


@dataclass(frozen=True)
class Task:
    """What one process does by itself."""

    scenario: Scenario
    target: str
    settings: tuple[str, ...] = ()
    mutant: str = ""
    limits: Limits = Limits()

    @property
    def setting(self) -> Setting:
        """Raises UsageError."""
        return Setting(self.scenario, backend(self.target), self.settings, mutant_named(self.mutant))


def mutant_named(name: str) -> Mutant:
    """Raises UsageError for an unknown one; "" is the kernel as it is."""
    if name and name not in BY_NAME:
        raise UsageError(f"no mutant is called {name[:40]!r}{near(name, list(BY_NAME))}")
    return BY_NAME[name] if name else NONE


def targets_of(scenario: Scenario, names: Sequence[str] = ()) -> tuple[Target, ...]:
    """*names*, or those that the scenario names, or else every backend. Raises UsageError."""
    return tuple(backend(name) for name in names or scenario.targets or backends())


def explore(task: Task, tell: Tell | None = None) -> Explored:
    """Search. Raises UsageError, Misuse."""
    if not task.scenario.actor:
        raise UsageError("the scenario has no actors: there is nothing to interleave")
    space, limits = task.setting.space(), task.limits
    start = perf_counter()
    if limits.walks:
        found = random_walks(space, limits.walks, limits.seed, tell=tell)
    else:
        found = breadth_first(space, bound=limits.bound, reduce=limits.reduce, tell=tell)
        found = straightened(space, _shortest(space, found, limits))
    if found.complete:
        for actor in space.actors:
            if isinstance(actor, HostActor):
                actor.check()
    seconds = perf_counter() - start
    names = tuple(actor.name for actor in space.actors)
    return Explored(task.scenario.title, task.target, task.mutant, names, found, seconds, limits)


def _shortest(space: Space, found: Found, limits: Limits) -> Found:
    # the reduction takes actions that matter to nobody as early as it can, so its way may be longer than need be
    if found.violation is None or not limits.reduce:
        return found
    plain = breadth_first(space, bound=limits.bound, reduce=False)
    if plain.violation is None:
        return found
    return replace(found, violation=plain.violation, schedule=plain.schedule, shortest=True)


def explore_all(tasks: Sequence[Task], where: Workers, tell: Callable[[Task, int, int], None]) -> Iterator[Explored]:
    """Each task, spread over *where*, in order."""
    if where.apart:
        yield from where.in_order(explore, tasks)
        return
    for task in tasks:
        yield explore(task, lambda states, waiting, task=task: tell(task, states, waiting))  # type: ignore[misc]


def as_scenario(task: Task, done: Explored) -> Scenario:
    """The scenario with the schedule of what was found: to be run on this target."""
    told = tuple(f"{done.actors[step.actor]} {step.name}" for step in done.found.schedule)
    return task.scenario.model_copy(update={"targets": (done.target,), "mutant": done.mutant, "schedule": told})


def reproduce(task: Task) -> Explored:
    """Take the actions in the order of the scenario's schedule, and look for what they break after each.

    Raises Misuse for an action that cannot be taken then, or is another than the schedule says.
    """
    space = task.setting.space()
    start = perf_counter()
    order, states = _ordered(space, task.scenario.schedule)
    violation = None
    for state, actor in zip(states, [*order, None], strict=True):
        move = space.move(state, actor) if actor is not None else None
        violation = space.broken(state) or (move.violation if move is not None else None)
        violation = violation or space.stuck(state)
        if violation is not None:
            break
    found = Found(len(states), len(order), space.ran, False, violation, taken(space, order))
    names = tuple(actor.name for actor in space.actors)
    return Explored(task.scenario.title, task.target, task.mutant, names, found, perf_counter() - start, task.limits)


def _ordered(space: Space, schedule: Sequence[str]) -> tuple[list[int], list[State]]:
    names = [actor.name for actor in space.actors]
    order, states = list[int](), [space.start]
    for number, entry in enumerate(schedule):
        name, _, does = entry.partition(" ")
        if name not in names:
            raise Misuse(f"no actor is called {name!r}; there is: {', '.join(names)}", "schedule", number)
        actor, state = names.index(name), states[-1]
        move = space.move(state, actor)
        if move is None:
            why = "has ended" if space.ended(state, actor) else "has to wait"
            raise Misuse(f"{name} {why} here", "schedule", number)
        order.append(actor)
        if move.violation is not None:
            return order, states
        if does and does != move.name:
            raise Misuse(f"{name} does {move.name!r} here, not {does!r}", "schedule", number)
        states.append(space.after(state, actor, move))
    return order, states
