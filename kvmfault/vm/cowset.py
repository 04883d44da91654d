"""A set that forks in constant time: shared until one side writes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

__all__ = ["CowSet"]

T = TypeVar("T", bound=Hashable)


class CowSet(Generic[T]):
    """Mutable set; ``fork`` is O(1), the first write after one copies."""

    __slots__ = ("_shared", "items")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self.items: set[T] = set(items)
        """Read only; changed through the methods."""
        self._shared = False

    def add(self, item: T) -> None:
        """Put *item* in."""
        if item not in self.items:
            self._own().add(item)

    def discard(self, item: T) -> bool:
        """Take *item* out; whether it was in."""
        found = item in self.items
        if found:
            self._own().discard(item)
        return found

    def take(self) -> frozenset[T]:
        """Everything, leaving the set empty."""
        taken = frozenset(self.items)
        self.items, self._shared = set(), False
        return taken

    def _own(self) -> set[T]:
        if self._shared:
            self.items, self._shared = set(self.items), False
        return self.items

    def fork(self) -> CowSet[T]:
        """An independent copy."""
        new: CowSet[T] = CowSet()
        new.items, new._shared, self._shared = self.items, True, True
        return new

    def key(self) -> frozenset[T]:
        """The content, hashable."""
        return frozenset(self.items)

    def __contains__(self, item: object) -> bool:
        return item in self.items

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
