"""The parts of an explored VM: whatever can change by itself, how it is copied, and by what it is recognised."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Final, NamedTuple


class Written(NamedTuple):
    """What the guest wrote in logged slots, as the one knows who counts on the log."""

    unreported: frozenset[tuple[int, int]] = frozenset()
    """Written, and not yet told to user space: (slot number, page)."""
    telling: frozenset[tuple[int, int]] = frozenset()
    """Of which user space is being told: it reads these pages when the TLBs are flushed."""
    logging: frozenset[int] = frozenset()
    """Slots for which user space was told that logging has begun."""


class Buffers(NamedTuple):
    """Memory accesses that nothing orders, each by (who, what). (see barriers)"""

    begun: frozenset[tuple[str, str]] = frozenset()
    """They have not taken effect."""
    got: frozenset[tuple[str, str, int]] = frozenset()
    """Loads that have, with their values, until these are used."""


class Part(NamedTuple):
    """How one kind of part is copied before somebody may change it, and by what it is recognised."""

    copy: Callable[[object], object]
    key: Callable[[object], Hashable]


def _same(value: object) -> object:
    return value


def _itself(value: object) -> Hashable:
    return value


if TYPE_CHECKING:
    from typing import Protocol

    class _Forks(Protocol):
        def fork(self) -> object: ...
        def key(self) -> Hashable: ...


__all__ = ["GUARDED", "OF_VCPU", "OF_VM", "Buffers", "Part", "Written", "part"]


def _fork(value: _Forks) -> object:
    return value.fork()


def _key(value: _Forks) -> Hashable:
    return value.key()


_OBJECT: Final = Part(_fork, _key)  # type: ignore[arg-type]  # parts of this kind have both
_VALUE: Final = Part(_same, _itself)
_MAPPING: Final = Part(_same, lambda value: frozenset(value.items()))  # type: ignore[attr-defined]
_BITMAPS: Final = Part(_same, lambda v: frozenset((n, pages.key()) for n, pages in v.items()))  # type: ignore[attr-defined]
_TABLE: Final = Part(_fork, lambda t: (t.key(), tuple(t.stale)))  # type: ignore[attr-defined,arg-type]

OF_VM: Final = {
    "slots": _OBJECT,
    "host": _OBJECT,
    "invalidations": _OBJECT,
    "own_table": _TABLE,
    "reverse": _OBJECT,
    "log": _OBJECT,
    "private": _OBJECT,
    "tracked": _OBJECT,
    "userfault": _BITMAPS,
    "memfds": _MAPPING,
    "memfd_pages": _MAPPING,
    "memfd_next": _VALUE,
    "signals": _VALUE,
    "warnings": _VALUE,
    "guest_tables": _VALUE,
    "mixing": _VALUE,
    "spare": _VALUE,
    "writer": _VALUE,
    "slots_lock": _VALUE,
    "written": _VALUE,
    "buffers": _VALUE,
}
"""Parts that a VM has once."""
OF_VCPU: Final = {
    "vcpu": _OBJECT,
    "tlb": _OBJECT,
    "ring": _VALUE,
    "reads": _VALUE,
    "inside": _VALUE,
    "marks": _VALUE,
    "retired": _VALUE,
    "idle": _VALUE,
    "fault": _VALUE,
}
"""Parts that each vCPU has: its own state; TLB; dirty ring; whether it holds mmu_lock for a fault; whether it is in an
SRCU read-side section (2: in one that somebody waits for); pages that it made writable and is yet to mark dirty;
whether its table was retired; whether it is in user space, for a device access; what its fault registers hold."""


GUARDED: Final = frozenset(("invalidations",))
"""Parts that nobody changes while a fault holds mmu_lock."""


def part(name: str, vcpu: int) -> str:
    """Name of a vCPU's part."""
    return f"{name}{vcpu}"
