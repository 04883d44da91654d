"""Four shapes of one fault, interchangeable wherever a PageFault is wanted. None contains logic.

a. ``Snapshot``   every fact captured in a frozen record;
b. ``Raw``        registers kept, every fact computed when asked;
c. ``View`` of a ``Handle``   opaque to the reader, bound to a table of accessor functions;
d. ``Hybrid``     the few facts that neutral code wants most captured, the rest computed from the syndrome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

from kvmfault.algebra.scalar import Regs
from kvmfault.contract.accessors import FACTS, Accessors, Snapshot, map_accessors
from kvmfault.contract.fault import MmioFault
from kvmfault.types import Gpa, Gva

__all__ = ["SHAPES", "STORED", "Handle", "HandleOps", "Hybrid", "Ops", "Raw", "Shape", "View", "snapshot"]

H = TypeVar("H")
A_co = TypeVar("A_co", covariant=True)

Ops: TypeAlias = Accessors[Callable[[H], bool], Callable[[H], int]]
"""A table of accessor functions over something opaque."""


@dataclass(frozen=True, slots=True)
class View(Generic[H]):
    """Something opaque, read through its accessor functions. Equal when both parts are."""

    ops: Ops[H] = field(repr=False)
    of: H

    def kvm_get_fault_gpa(self) -> Gpa | None:
        """Page address that hardware reported, or None."""
        return Gpa(self.ops.gpa_page(self.of)) if self.ops.gpa_valid(self.of) else None

    @property
    def syndrome(self) -> int:
        """Raw word of the report."""
        return self.ops.syndrome(self.of)

    @property
    def gpa_offset(self) -> int | None:
        """Low 12 bits of the guest-physical address."""
        return self.ops.gpa_offset_bits(self.of) if self.ops.gpa_offset_valid(self.of) else None

    @property
    def gva(self) -> Gva | None:
        """Guest-virtual address."""
        return Gva(self.ops.gva_bits(self.of)) if self.ops.gva_valid(self.of) else None

    @property
    def granule(self) -> int | None:
        """Bytes mapped at the level where translation ended."""
        return self.ops.granule_bytes(self.of) if self.ops.granule_valid(self.of) else None

    @property
    def is_read(self) -> bool:
        """Data was read."""
        return self.ops.is_read(self.of)

    @property
    def is_write(self) -> bool:
        """Write permission is needed."""
        return self.ops.is_write(self.of)

    @property
    def is_exec(self) -> bool:
        """Execute permission is needed."""
        return self.ops.is_exec(self.of)

    @property
    def is_user(self) -> bool:
        """The guest was in user mode."""
        return self.ops.is_user(self.of)

    @property
    def is_translation(self) -> bool:
        """No entry maps the page."""
        return self.ops.is_translation(self.of)

    @property
    def is_permission(self) -> bool:
        """An entry maps the page and forbids the access."""
        return self.ops.is_permission(self.of)

    @property
    def is_access_flag(self) -> bool:
        """Only the access flag is missing."""
        return self.ops.is_access_flag(self.of)

    @property
    def is_reserved(self) -> bool:
        """An entry has reserved bits set."""
        return self.ops.is_reserved(self.of)

    @property
    def is_address_size(self) -> bool:
        """An address is too wide."""
        return self.ops.is_address_size(self.of)

    @property
    def is_external_abort(self) -> bool:
        """The memory system failed."""
        return self.ops.is_external_abort(self.of)

    @property
    def is_table_walk(self) -> bool:
        """Made for a walk of the guest's tables."""
        return self.ops.is_table_walk(self.of)

    @property
    def is_final(self) -> bool:
        """Made to the final address."""
        return self.ops.is_final(self.of)

    @property
    def is_protection_key(self) -> bool:
        """Forbidden by a key or overlay."""
        return self.ops.is_protection_key(self.of)

    @property
    def is_shadow_stack(self) -> bool:
        """Access to a shadow stack."""
        return self.ops.is_shadow_stack(self.of)

    @property
    def is_cache_op(self) -> bool:
        """Cache maintenance, not a load or store."""
        return self.ops.is_cache_op(self.of)

    @property
    def is_private(self) -> bool:
        """Access to private memory."""
        return self.ops.is_private(self.of)

    @property
    def is_prefetch(self) -> bool:
        """Nobody waits for the page."""
        return self.ops.is_prefetch(self.of)

    @property
    def mmio_size(self) -> int | None:
        """Access size in bytes."""
        return self.ops.mmio_bytes(self.of) if self.ops.mmio_valid(self.of) else None

    @property
    def mmio_register(self) -> int | None:
        """Transfer register."""
        return self.ops.mmio_register_number(self.of) if self.ops.mmio_valid(self.of) else None

    @property
    def mmio_sign_extend(self) -> bool:
        """A load sign-extends."""
        return self.ops.mmio_sign_extend(self.of)

    @property
    def mmio_wide(self) -> bool:
        """The register is 64 bits wide."""
        return self.ops.mmio_wide(self.of)

    @property
    def mmio_ordered(self) -> bool:
        """Acquire or release semantics."""
        return self.ops.mmio_ordered(self.of)


Raw: TypeAlias = View[Regs]
"""Shape b: the registers, and every fact computed from them when asked."""


@dataclass(frozen=True, slots=True)
class Handle(Generic[A_co]):
    """Shape c: registers that only the accessor functions of architecture ``A_co`` may read.

    Annotate the variable, ``h: Handle[Mine] = Handle(regs)``; ``Handle[Mine](regs)`` fails on Python 3.11.
    """

    _registers: Regs


class HandleOps(Generic[A_co]):
    """The accessor functions for handles of one architecture; refuses, under mypy, a handle of another."""

    __slots__ = ("ops",)

    def __init__(self, raw: Ops[Regs]) -> None:
        def through(read: Callable[[Regs], T]) -> Callable[[Handle[A_co]], T]:
            return lambda handle: read(handle._registers)

        self.ops: Ops[Handle[A_co]] = map_accessors(raw, through, through)

    def bind(self, handle: Handle[A_co]) -> View[Handle[A_co]]:
        """The handle together with its functions: a PageFault."""
        return View(self.ops, handle)


T = TypeVar("T")

STORED: Final = ("gpa_valid", "gpa_page", "is_write", "is_exec", "is_permission")
"""The facts that a `Hybrid` captures."""


class Hybrid(View[Regs]):
    """Shape d, where the discussion of August 2025 ended: some fields stored, the rest from the syndrome."""

    __slots__ = ("_exec", "_gpa", "_permission", "_write")

    def __init__(self, ops: Ops[Regs], of: Regs) -> None:
        View.__init__(self, ops, of)
        put = object.__setattr__  # the base is frozen; these four are set once, here
        put(self, "_gpa", View.kvm_get_fault_gpa(self))
        put(self, "_write", ops.is_write(of))
        put(self, "_exec", ops.is_exec(of))
        put(self, "_permission", ops.is_permission(of))

    _gpa: Gpa | None
    _write: bool
    _exec: bool
    _permission: bool

    def __reduce__(self) -> tuple[type[Hybrid], tuple[Ops[Regs], Regs]]:
        return Hybrid, (self.ops, self.of)  # a copy computes its four again

    def kvm_get_fault_gpa(self) -> Gpa | None:
        """Stored."""
        return self._gpa

    @property
    def is_write(self) -> bool:
        """Stored."""
        return self._write

    @property
    def is_exec(self) -> bool:
        """Stored."""
        return self._exec

    @property
    def is_permission(self) -> bool:
        """Stored."""
        return self._permission


def snapshot(raw: View[H]) -> Snapshot:
    """Shape a of the same fault: every fact evaluated now."""
    return map_accessors(raw.ops, lambda read: read(raw.of), lambda read: read(raw.of))


@dataclass(frozen=True, slots=True)
class Shape:
    """One of the four, for those who compare them or write them in another language."""

    name: str
    kind: str
    """What makes it in this module."""
    about: str
    stored: tuple[str, ...]
    """Facts that are captured when the fault is made; the others are computed when asked."""
    keeps_registers: bool
    through_table: bool
    """Read through a table of functions."""
    on: Callable[[Ops[Regs]], Callable[[Raw], MmioFault]]
    """With the accessor functions of a target: what makes the fault in this shape."""


def _bound(ops: Ops[Regs]) -> Callable[[Raw], MmioFault]:
    table: HandleOps[object] = HandleOps(ops)
    return lambda raw: table.bind(Handle(raw.of))


SHAPES: Final[Mapping[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("fields", "snapshot", "every fact captured", FACTS, False, False, lambda ops: snapshot),
        Shape("raw", "raw", "registers kept, every fact computed when asked", (), True, False, lambda ops: lambda r: r),
        Shape("opaque", "handle", "a handle read through a table of accessor functions", (), True, True, _bound),
        Shape(
            "hybrid",
            "hybrid",
            "what neutral code wants most captured, the rest computed",
            STORED,
            True,
            False,
            lambda ops: lambda raw: Hybrid(ops, raw.of),
        ),
    )
}
"""In the order of this module's text."""
