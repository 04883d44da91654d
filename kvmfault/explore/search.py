"""Searches through the states: breadth first to the end, or random walks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Final, NamedTuple

from kvmfault.explore.space import Move, Space, State, Violation

__all__ = ["DEFAULT_BOUND", "Found", "Taken", "Tell", "breadth_first", "random_walks", "straightened", "taken"]

DEFAULT_BOUND: Final = 1_000_000
"""States, unless a bound is given."""
_TELL_EVERY: Final = 5000


class Taken(NamedTuple):
    """One action of a schedule."""

    actor: int
    name: str
    note: str


@dataclass(frozen=True)
class Found:
    """How a search ended."""

    states: int
    """Different states seen; with the reduction only those where somebody had a choice that matters."""
    moves: int
    """Actions taken, looked up or carried out."""
    ran: int
    """Actions that were carried out on the real code."""
    complete: bool
    """Everything within reach was seen. False: the bound ended it, a violation did, or it was a random walk."""
    violation: Violation | None = None
    schedule: tuple[Taken, ...] = ()
    """A way to the violation (of a random walk: the way it took)."""
    shortest: bool = False
    """No way is shorter."""


Tell = Callable[[int, int], None]
"""Told now and then: states seen, states waiting."""


def breadth_first(space: Space, *, bound: int = DEFAULT_BOUND, reduce: bool = True, tell: Tell | None = None) -> Found:
    """Every state within reach, nearest first, so that what is found is reached by as few actions as possible.

    *reduce*: an action that nobody else can notice, or influence, is taken at once and alone (a persistent set of one).
    """
    return _Search(space, bound, reduce, tell).run()


class _Search:
    def __init__(self, space: Space, bound: int, reduce: bool, tell: Tell | None) -> None:
        self.space, self.bound, self.reduce, self.tell = space, bound, reduce, tell
        self.came: dict[State, tuple[State, tuple[int, ...]] | None] = {}
        self.moves = 0

    def run(self) -> Found:
        space = self.space
        violation = space.broken(space.start)
        if violation is not None:
            return self._found(False, violation, space.start, ())
        start, way, violation = self._follow(space.start, ())
        self.came[start] = (space.start, way) if way else None
        if violation is not None:
            return self._found(False, violation, space.start, way)
        waiting = deque((start,))
        while waiting:
            state = waiting.popleft()
            if self.tell is not None and not len(self.came) % _TELL_EVERY:
                self.tell(len(self.came), len(waiting))
            could = 0
            for actor in range(len(space.actors)):
                move = space.move(state, actor)
                if move is None:
                    continue
                could += 1
                self.moves += 1
                if move.violation is not None:
                    return self._found(False, move.violation, state, (actor,))
                after = space.after(state, actor, move)
                way = (actor,)
                if after in self.came:
                    continue
                if move.writes & space.visible:
                    violation = space.broken(after)
                    if violation is not None:
                        return self._found(False, violation, state, way)
                if self.reduce:
                    after, way, violation = self._follow(after, way)
                    if violation is not None:
                        return self._found(False, violation, state, way)
                    if after in self.came:
                        continue
                self.came[after] = (state, way)
                waiting.append(after)
            violation = space.stuck(state) if could < 2 else None
            if violation is not None:
                return self._found(False, violation, state, ())
            if len(self.came) > self.bound:
                return self._found(False, None, state, ())
        return self._found(True, None, space.start, ())

    def _follow(self, state: State, way: tuple[int, ...]) -> tuple[State, tuple[int, ...], Violation | None]:
        # as long as somebody's next action is nobody else's business: that one
        space = self.space
        if not self.reduce:
            return state, way, None
        actors = range(len(space.actors))
        seen = {state}
        going = True
        while going:
            going = False
            rests = [space.rest(actor, state[actor]) for actor in actors]
            for actor in actors:
                move = self._alone(state, actor, rests)
                if move is None:
                    continue
                way = (*way, actor)
                self.moves += 1
                if move.violation is not None:
                    return state, way, move.violation
                after = space.after(state, actor, move)
                if after in seen:  # a circle of such actions: others must have their turn
                    return state, way[:-1], None
                seen.add(after)
                state, going = after, True
                break
        return state, way, None

    def _alone(self, state: State, actor: int, rests: list[tuple[int, int]]) -> Move | None:
        space = self.space
        if not rests[actor][0] or space.at_restart(state, actor):
            return None
        move = space.move(state, actor)
        if move is None:
            return None
        touched = changed = 0
        for other, (touches, writes) in enumerate(rests):
            if other != actor:
                touched |= touches
                changed |= writes
        if space.holds_lock(state, actor):
            changed &= ~space.guarded
        if move.reads & changed or move.writes & (touched | space.visible):
            return None
        return move

    def _found(self, complete: bool, violation: Violation | None, state: State, last: tuple[int, ...]) -> Found:
        space = self.space
        schedule: tuple[Taken, ...] = ()
        if violation is not None:
            ways = [last]
            came = self.came.get(state)
            while came is not None:
                state, way = came
                ways.append(way)
                came = self.came.get(state) if state is not space.start else None
            schedule = taken(space, [actor for way in reversed(ways) for actor in way])
        return Found(len(self.came), self.moves, space.ran, complete, violation, schedule, shortest=not self.reduce)


def taken(space: Space, order: list[int]) -> tuple[Taken, ...]:
    """The actions of a schedule, given whose turn it is each time. Ends with the first that cannot be taken."""
    state, told = space.start, []
    for actor in order:
        move = space.move(state, actor)
        if move is None:
            break
        told.append(Taken(actor, move.name, move.note))
        if move.violation is not None:
            break
        state = space.after(state, actor, move)
    return tuple(told)


def random_walks(space: Space, count: int, seed: int, *, length: int = 10_000, tell: Tell | None = None) -> Found:
    """*count* walks that choose by chance who goes on. The same seed gives the same walks."""
    chance = random.Random(seed)
    seen: set[State] = set()
    moves = 0
    for walk in range(count):
        if tell is not None:
            tell(len(seen), count - walk)
        state, order = space.start, list[int]()
        violation = space.broken(state)
        while violation is None and len(order) < length:
            could = [a for a in range(len(space.actors)) if space.move(state, a) is not None]
            if not could:
                over = all(space.ended(state, a) for a in range(len(space.actors)))
                violation = None if over else Violation("deadlock", "nobody can go on")
                break
            actor = chance.choice(could)
            move = space.move(state, actor)
            assert move is not None
            order.append(actor)
            moves += 1
            violation = move.violation
            state = space.after(state, actor, move)
            seen.add(state)
            violation = violation or space.broken(state)
        if violation is not None:
            return Found(len(seen), moves, space.ran, False, violation, taken(space, order))
    return Found(len(seen), moves, space.ran, False)


_MOST_REORDERED: Final = 100_000


def straightened(space: Space, found: Found) -> Found:
    """The same violation by as many actions, in an order in which the actors take turns as seldom as can be."""
    order = [step.actor for step in found.schedule]
    if found.violation is None or not order:
        return found
    counts = tuple(order.count(actor) for actor in range(len(space.actors)))
    best: list[tuple[int, tuple[int, ...], tuple[int, ...], State]] = [(0, (), counts, space.start)]
    seen: set[tuple[State, tuple[int, ...], int]] = set()
    while best and len(seen) < _MOST_REORDERED:
        turns, way, left, state = heappop(best)
        last = way[-1] if way else -1
        if (state, left, last) in seen:
            continue
        seen.add((state, left, last))
        if not any(left) and found.violation in (space.broken(state), space.stuck(state)):
            return replace(found, schedule=taken(space, list(way)))
        for actor, more in enumerate(left):
            move = space.move(state, actor) if more else None
            if move is None:
                continue
            rest = tuple(n - (a == actor) for a, n in enumerate(left))
            following = (*way, actor)
            if move.violation is not None:
                if not any(rest) and move.violation == found.violation:
                    return replace(found, schedule=taken(space, list(following)))
                continue
            after = space.after(state, actor, move)
            if any(rest) and move.writes & space.visible and space.broken(after) is not None:
                continue  # another violation, or this one by another way
            heappush(best, (turns + (actor != last), following, rest, after))
    return found
