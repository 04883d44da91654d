"""What an actor is: one after another, atomic actions on the VM, and what it remembers between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import NamedTuple

from kvmfault.explore.world import Explored

__all__ = ["Actor", "Did", "Rest"]


class Did(NamedTuple):
    """An action that was carried out."""

    name: str
    """Few words for a timeline: a step of the path by its name."""
    local: Hashable
    """What the actor remembers from now on."""
    note: str = ""
    """What came of it, for people."""


class Rest(NamedTuple):
    """What an actor may still do from some point on; the reduction relies on it, and every action is held to it."""

    touches: frozenset[str]
    """Parts that it may read or change."""
    writes: frozenset[str]
    """Parts that it may change."""


class Actor(ABC):
    """Somebody who acts on the VM. Its own state is one hashable value, so that states of the whole can be compared."""

    name: str
    serves: bool = False
    """It only carries out what others began: nobody waits for its end."""
    holds: str = ""
    """Part that is True while the actor holds mmu_lock for a fault."""

    @abstractmethod
    def start(self) -> Hashable:
        """What it remembers before its first action."""

    @abstractmethod
    def act(self, vm: Explored, local: Hashable) -> Did:
        """Carry out the next action.

        Depends on *local* and on the parts of *vm* that it touches, and on nothing else. Raises Blocked if it has to
        wait in this state (whatever it changed until then is dropped), Broken or ModelError for what may not happen.
        """

    @abstractmethod
    def ended(self, local: Hashable) -> bool:
        """Whether there is no next action."""

    @abstractmethod
    def rest(self, local: Hashable, parts: tuple[str, ...]) -> Rest:
        """What it may touch and change from here to its end, of *parts*."""

    def restarts(self, local: Hashable) -> bool:
        """Whether this is a point to which it may come back: where faulting again begins."""
        return False
