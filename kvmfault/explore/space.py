"""States as tuples of small numbers, and what each actor's next action makes of one.

An action is a function of what its actor remembers and of the parts that it touches. Both are kept once and numbered,
so an action is carried out on the real code once for each different situation, and looked up from then on: most
interleavings put the same situations together anew. That is what makes an exploration quick.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias

from kvmfault.errors import KvmfaultError, ModelError
from kvmfault.explore.actor import Actor, Rest
from kvmfault.explore.parts import GUARDED
from kvmfault.explore.world import Blocked, Broken, Explored
from kvmfault.scenario.world import Misuse

__all__ = ["UNSEEN", "Invariant", "Move", "Space", "State", "Violation"]

State: TypeAlias = tuple[int, ...]
"""First what each actor remembers, then every part of the VM: each a number that stands for a value."""
Invariant: TypeAlias = Callable[[Explored], str | None]
"""None, or what breaks it."""


class Violation(NamedTuple):
    """An invariant that a state breaks, or that an action breaks."""

    name: str
    what: str


class Move(NamedTuple):
    """What an action does to every state in which its actor finds the same."""

    name: str
    note: str
    local: int
    changes: tuple[tuple[int, int], ...]
    """(index in the state, new number) of what it changes, beside what the actor remembers."""
    reads: int
    """Bits of all parts touched."""
    writes: int
    """Bits of those changed."""
    violation: Violation | None


_NOTHING: Final = object()
UNSEEN: Final = frozenset(("vcpu", "reads", "inside", "retired", "idle", "fault", "signals", "spare", "slots_lock"))
"""Parts that no invariant looks at, so that nothing has to be looked for after a change of only these."""


class _Known:
    """Answers by the numbers of the parts that they depend on; which parts those are may differ between answers."""

    __slots__ = ("_by_parts",)

    def __init__(self) -> None:
        self._by_parts: list[tuple[Callable[[State], object], dict[object, object]]] = []

    def find(self, state: State) -> object:
        for pick, answers in self._by_parts:
            found = answers.get(pick(state), _NOTHING)
            if found is not _NOTHING:
                return found
        return _NOTHING

    def note(self, state: State, indexes: tuple[int, ...], answer: object, seen: dict[tuple[int, ...], int]) -> None:
        place = seen.get(indexes)
        if place is None:
            place = seen[indexes] = len(self._by_parts)
            pick: Callable[[State], object] = itemgetter(*indexes) if indexes else _none
            self._by_parts.append((pick, {}))
        pick, answers = self._by_parts[place]
        answers[pick(state)] = answer


def _none(state: State) -> object:
    return ()


class Space:
    """All states that the actors can bring a VM into, found as they are asked for."""

    def __init__(
        self,
        vm: Explored,
        parts: Sequence[object],
        actors: Sequence[Actor],
        invariants: Mapping[str, Invariant],
        *,
        guards: bool = True,
    ) -> None:
        self.vm = vm
        self.actors: tuple[Actor, ...] = tuple(actors)
        self.invariants = invariants
        self.names: tuple[str, ...] = vm.names
        self.ran: int = 0
        """Actions that were carried out on the real code; all others were looked up."""
        count = len(actors)
        self._first = count
        self._numbers: tuple[dict[Hashable, int], ...] = tuple({} for _ in vm.names)
        self._values: tuple[list[object], ...] = tuple([] for _ in vm.names)
        self._locals: list[Hashable] = []
        self._local_numbers: dict[Hashable, int] = {}
        self._rest: list[list[tuple[int, int] | None]] = [[] for _ in actors]
        self._known: list[dict[int, tuple[_Known, dict[tuple[int, ...], int]]]] = [{} for _ in actors]
        self._checked = {name: (_Known(), dict[tuple[int, ...], int]()) for name in invariants}
        self.visible: int = sum(1 << i for i, name in enumerate(vm.names) if name.rstrip("0123456789") not in UNSEEN)
        """Bits of the parts that invariants may look at."""
        self.guarded: int = sum(1 << i for i, name in enumerate(vm.names) if guards and name in GUARDED)
        """Bits of the parts that nobody changes while a fault holds mmu_lock."""
        self._held = {a.holds: vm.index[a.holds] for a in self.actors if a.holds in vm.index}
        numbers = tuple(self._number(i, value) for i, value in enumerate(parts))
        self.start: State = (*(self._local(actor.start()) for actor in actors), *numbers)

    def _number(self, part: int, value: object) -> int:
        key = self.vm.kinds[part].key(value)
        known = self._numbers[part]
        number = known.get(key)
        if number is None:
            number = known[key] = len(known)
            self._values[part].append(value)
        return number

    def _local(self, local: Hashable) -> int:
        number = self._local_numbers.get(local)
        if number is None:
            number = self._local_numbers[local] = len(self._locals)
            self._locals.append(local)
        return number

    def local(self, state: State, actor: int) -> Hashable:
        """What an actor remembers."""
        return self._locals[state[actor]]

    def holds_lock(self, state: State, actor: int) -> bool:
        """Whether an actor holds mmu_lock for a fault."""
        part = self._held.get(self.actors[actor].holds)
        return part is not None and self._values[part][state[self._first + part]] is True

    def ended(self, state: State, actor: int) -> bool:
        """Whether an actor has nothing left to do that anybody waits for."""
        return self.actors[actor].serves or self.actors[actor].ended(self._locals[state[actor]])

    def at_restart(self, state: State, actor: int) -> bool:
        """Whether an actor is at a point to which it may come back."""
        return self.actors[actor].restarts(self._locals[state[actor]])

    def load(self, state: State) -> Explored:
        """The VM in a state."""
        values, first = self._values, self._first
        self.vm.load(tuple([values[i][number] for i, number in enumerate(state[first:])]))
        return self.vm

    def move(self, state: State, actor: int) -> Move | None:
        """What the actor's next action does; None: it has to wait, or has ended."""
        known = self._known[actor].get(state[actor])
        if known is None:
            known = self._known[actor][state[actor]] = (_Known(), {})
        found = known[0].find(state)
        if found is _NOTHING:
            found, touched = self._act(state, actor)
            known[0].note(state, touched, found, known[1])
        return found  # type: ignore[return-value]  # what _act gave

    def _act(self, state: State, actor: int) -> tuple[Move | None, tuple[int, ...]]:
        who, local = self.actors[actor], self._locals[state[actor]]
        if who.ended(local):
            return None, ()
        vm, first = self.load(state), self._first
        self.ran += 1
        try:
            did = who.act(vm, local)
        except Misuse:
            raise
        except Blocked:
            return None, self._touched(vm)
        except (Broken, ModelError) as e:
            touched = self._touched(vm)
            name = e.name if isinstance(e, Broken) else "refused"
            return Move(name, str(e), state[actor], (), _bits(touched, first), 0, Violation(name, str(e))), touched
        touched = self._touched(vm)
        changes = tuple((i, n) for i in touched if (n := self._number(i - first, vm.live[i - first])) != state[i])
        reads, writes = _bits(touched, first), _bits((i for i, _ in changes), first)
        self._hold(actor, state[actor], did.name, reads, writes)
        return Move(did.name, did.note, self._local(did.local), changes, reads, writes, None), touched

    def _touched(self, vm: Explored) -> tuple[int, ...]:
        return tuple(sorted(i + self._first for i in vm.live))

    def _hold(self, actor: int, local: int, name: str, reads: int, writes: int) -> None:
        touches, may_write = self.rest(actor, local)
        beyond = (reads & ~touches) | (writes & ~may_write)
        if beyond:
            parts = ", ".join(n for i, n in enumerate(self.names) if beyond >> i & 1)
            raise KvmfaultError(f"{self.actors[actor].name}: {name} touches {parts}, which it does not declare")

    def rest(self, actor: int, local: int) -> tuple[int, int]:
        """Bits of the parts that an actor may still touch, and of those that it may change."""
        known = self._rest[actor]
        if local >= len(known):
            known += [None] * (local + 1 - len(known))
        bits = known[local]
        if bits is None:
            rest: Rest = self.actors[actor].rest(self._locals[local], self.names)
            names = list(enumerate(self.names))
            touches, writes = (sum(1 << i for i, n in names if n in wanted) for wanted in rest)
            bits = known[local] = (touches | writes, writes)
        return bits

    def after(self, state: State, actor: int, move: Move) -> State:
        """The state after a move."""
        new = list(state)
        new[actor] = move.local
        for index, number in move.changes:
            new[index] = number
        return tuple(new)

    def broken(self, state: State) -> Violation | None:
        """The first invariant that a state breaks."""
        for name, (known, places) in self._checked.items():
            found = known.find(state)
            if found is _NOTHING:
                vm = self.load(state)
                what = self.invariants[name](vm)
                touched = self._touched(vm)
                if _bits(touched, self._first) & ~self.visible:
                    raise KvmfaultError(f"invariant {name} looks at what changes unseen: {', '.join(sorted(UNSEEN))}")
                found = None if what is None else Violation(name, what)
                known.note(state, touched, found, places)
            if found is not None:
                return found  # type: ignore[return-value]  # what was noted
        return None

    def stuck(self, state: State) -> Violation | None:
        """Nobody can go on though not all have ended; or the last one left comes to no end."""
        left = [actor for actor in range(len(self.actors)) if not self.ended(state, actor)]
        if left and all(self.move(state, actor) is None for actor in range(len(self.actors))):
            return Violation("deadlock", f"{' and '.join(self.actors[a].name for a in left)} can never go on")
        if len(left) == 1 and self.at_restart(state, left[0]):
            return self._for_ever(state, left[0])
        return None

    def _for_ever(self, state: State, actor: int) -> Violation | None:
        seen = {state}
        while not self.ended(state, actor):
            move = self.move(state, actor)
            if move is None or move.violation is not None:
                return None  # found where the search comes there
            state = self.after(state, actor, move)
            if state in seen:
                return Violation("progress", f"{self.actors[actor].name} faults for ever, and nobody disturbs it")
            seen.add(state)
        return None


def _bits(indexes: Iterable[int], first: int) -> int:
    return sum(1 << i - first for i in indexes)
