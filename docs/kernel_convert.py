"""How many accessors exist twice while their callers are converted one after another. Pure functions.

Converting a caller means: it is handed an ESR value and asks functions of that value, no longer the vCPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

Uses = Mapping[str, frozenset[str]]
"""Name -> the accessors that it calls."""


def closure(names: Iterable[str], built_from: Uses, stop: frozenset[str] = frozenset()) -> frozenset[str]:
    """*names* and all that they are built from, not looking inside those in *stop*."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += () if name in stop else built_from.get(name, ())
    return frozenset(found)


def duplicates(
    converted: Iterable[str], callers: Uses, built_from: Uses, already: Iterable[str] = ()
) -> frozenset[str]:
    """Accessors that are needed in both forms when *converted* are converted and no other caller is.

    The ESR form is needed by a converted caller, or by the ESR form of another accessor that is built from it; those of
    *already* have it anyway. The vCPU form is needed by an unconverted caller, or by the vCPU form of another accessor
    that has no ESR form to stand on.
    """
    done = frozenset(converted)
    esr = closure((*already, *(a for c in done for a in callers[c])), built_from)
    vcpu = closure((a for c in callers if c not in done for a in callers[c]), built_from, stop=esr)
    return esr & vcpu


def steps(callers: Uses) -> dict[tuple[str, ...], frozenset[str]]:
    """Callers that ask for exactly the same are one step."""
    alike: dict[frozenset[str], list[str]] = {}
    for name, uses in callers.items():
        if uses:
            alike.setdefault(uses, []).append(name)
    return {tuple(names): uses for uses, names in alike.items()}


def sharing(callers: Uses, built_from: Uses) -> dict[str, frozenset[str]]:
    """The callers that share an accessor, asked for or built on, with another step. The others cost nothing, ever."""
    groups = {names: closure(uses, built_from) for names, uses in steps(callers).items()}
    shared = {
        name
        for names, reach in groups.items()
        for name in names
        if any(reach & other for others, other in groups.items() if others != names)
    }
    return {name: uses for name, uses in callers.items() if name in shared}


@dataclass(frozen=True, slots=True)
class Order:
    """An order of steps, and the number of duplicates after each."""

    steps: tuple[tuple[str, ...], ...]
    after: tuple[int, ...]

    @property
    def total(self) -> int:
        """Duplicates summed over all steps: how much is carried, and for how long."""
        return sum(self.after)

    @property
    def peak(self) -> int:
        """The largest number at one time."""
        return max(self.after, default=0)


class Conversion:
    """All orders of converting *callers*. Every subset of the steps is counted once: 2^n, not n!."""

    def __init__(self, callers: Uses, built_from: Uses, already: Iterable[str] = ()) -> None:
        self.steps = tuple(steps(callers))
        known = tuple(already)
        self._count = [
            len(duplicates((c for s in self._members(mask) for c in self.steps[s]), callers, built_from, known))
            for mask in range(1 << len(self.steps))
        ]
        self._uses = steps(callers)

    def _members(self, mask: int) -> list[int]:
        return [s for s in range(len(self.steps)) if mask >> s & 1]

    @property
    def at_start(self) -> int:
        """Duplicates before anything is converted."""
        return self._count[0]

    def order(self, chosen: Sequence[int]) -> Order:
        """The order of these steps, by index."""
        masks = accumulate((1 << s for s in chosen), int.__or__)
        return Order(tuple(self.steps[s] for s in chosen), tuple(self._count[mask] for mask in masks))

    def best(self, first: Sequence[str] = ()) -> Order:
        """The order with the smallest total, then the smallest peak. *first*: callers whose steps come first."""
        return self._extreme(min, lambda rest, here: (rest[0] + here, max(rest[1], here)), first)

    def lowest(self) -> Order:
        """The order with the smallest peak, then the smallest total."""
        return self._extreme(min, lambda rest, here: (max(rest[0], here), rest[1] + here), ())

    def worst(self) -> Order:
        """The order with the largest total, then the largest peak."""
        return self._extreme(max, lambda rest, here: (rest[0] + here, max(rest[1], here)), ())

    def bound(self) -> int:
        """No order has a smaller total: an accessor that k steps ask for exists twice after at least k - 1 of them."""
        asked = [a for uses in self._uses.values() for a in uses]
        return sum(asked.count(a) - 1 for a in set(asked))

    def _extreme(
        self,
        pick: Callable[[Iterable[tuple[tuple[int, int], int]]], tuple[tuple[int, int], int]],
        join: Callable[[tuple[int, int], int], tuple[int, int]],
        first: Sequence[str],
    ) -> Order:
        # what the steps after a set cost depends on the set alone, so the best rest of each set is found once
        full = (1 << len(self.steps)) - 1
        rest: list[tuple[tuple[int, int], int]] = [((0, 0), -1)] * (full + 1)
        for mask in range(full - 1, -1, -1):
            rest[mask] = pick(
                (join(rest[mask | 1 << s][0], self._count[mask | 1 << s]), s)
                for s in range(len(self.steps))
                if not mask >> s & 1
            )
        chosen = [next(i for i, names in enumerate(self.steps) if name in names) for name in first]
        mask = sum(1 << s for s in chosen)
        while mask != full:
            chosen.append(rest[mask][1])
            mask |= 1 << rest[mask][1]
        return self.order(chosen)
