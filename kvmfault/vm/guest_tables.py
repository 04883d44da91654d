"""The guest's own translations as data: what a walk of its tables finds at an address, or why it ends.

One set of tables stands for what translates the faulting address before memslots are looked at: the paging of a
shadowed guest, or the second stage that a nested guest's hypervisor made.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from typing import Final

from kvmfault.errors import ModelError
from kvmfault.types import Gpa

__all__ = ["GuestEntry", "GuestTables", "GuestTranslation", "GuestWalkFault", "WalkEnd"]

_ZERO: Final = Gpa(0)
_PAGE: Final = 4096
"""Smallest block of any guest: guests may use smaller pages than the host."""


class WalkEnd(Enum):
    """Why a walk of the guest's tables ends without a translation."""

    MISSING = "no entry"
    RESERVED = "reserved bits are set in an entry"
    ADDRESS_SIZE = "an entry holds an address that is too wide"
    NOT_ACCESSED = "the entry was never marked as accessed, and hardware does not mark it"
    UNREADABLE = "a table cannot be read"


@dataclass(frozen=True, slots=True)
class GuestTranslation:
    """Result of walking the guest's own second stage, or its paging when it is shadowed."""

    gpa: Gpa
    """Canonical address: the frame that memslots know."""
    size: int
    """Bytes of the guest's block."""
    readable: bool = True
    writable: bool = True
    executable: bool = True
    level: int = 3
    """The guest's own level number, kept in the entry where the format has room for it."""
    user: bool = True
    """User mode may use it, where the tables tell user mode from the supervisor."""
    user_executable: bool | None = None
    """Code of user level may run, where that differs from the kernel's (*executable*); None: as that."""

    def may_execute(self, user: bool) -> bool:
        """Whether code may run from the page, at *user* level or the kernel's."""
        return self.executable if self.user_executable is None or not user else self.user_executable


@dataclass(frozen=True, slots=True)
class GuestWalkFault:
    """The guest's own tables do not translate the address."""

    status: int | None = None
    """The architecture's own status code for the guest, where it was recorded; None: it follows from the rest."""
    errno: int = 0
    """Positive: the tables could not be read, and KVM_RUN is to fail as well where the kernel does so."""
    end: WalkEnd = WalkEnd.MISSING
    level: int = 0
    """The guest's own level number at which the walk ended."""
    granted: int = 0
    """R, W, X bits that all entries read so far grant together, the last one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestEntry:
    """A run of equal entries: ``size`` bytes from ``address`` go to as many from ``gpa``, in blocks of ``block``."""

    address: int
    """What the guest, or its guest, uses: virtual, or physical of the nested guest."""
    size: int
    gpa: Gpa = _ZERO
    block: int = 0
    """Bytes that one entry maps; 0: one entry maps all of it."""
    readable: bool = True
    writable: bool = True
    executable: bool = True
    user: bool = True
    level: int = 3
    end: WalkEnd | None = None
    """A walk that gets here ends so; None: it succeeds."""
    errno: int = 0
    """With UNREADABLE: what reading the table gave."""

    def __post_init__(self) -> None:
        block = self.block or self.size
        if block < _PAGE or block & (block - 1):
            raise ModelError(f"guest tables: a block of {block:#x} bytes; expected a power of two from {_PAGE:#x} on")
        if self.size <= 0 or self.size % block or self.address % block or (self.end is None and self.gpa % block):
            raise ModelError(
                f"guest tables: {self.size:#x} bytes at {self.address:#x} to {self.gpa:#x} are not whole blocks "
                f"of {block:#x}"
            )

    @property
    def stop(self) -> int:
        """First address after the run."""
        return self.address + self.size

    def at(self, address: int) -> GuestTranslation | GuestWalkFault:
        """What a walk for an address of the run finds."""
        if self.end is not None:
            missing = self.end is WalkEnd.MISSING  # an absent entry grants nothing
            granted = 0 if missing else self.readable << 2 | self.writable << 1 | self.executable
            return GuestWalkFault(None, self.errno, self.end, self.level, granted)
        return GuestTranslation(
            Gpa(self.gpa + address - self.address),
            self.block or self.size,
            self.readable,
            self.writable,
            self.executable,
            self.level,
            self.user,
        )

    def part(self, start: int, stop: int) -> GuestEntry:
        """The piece ``[start, stop)``. Raises ModelError if it is not of whole blocks."""
        block = self.block or self.size
        if (start | stop) % block:
            cut = start if start % block else stop
            raise ModelError(f"guest tables: a change at {cut:#x} would cut a block of {block:#x} bytes")
        gpa = Gpa(self.gpa + start - self.address) if self.end is None else self.gpa
        return replace(self, address=start, size=stop - start, gpa=gpa, block=block)


@dataclass(frozen=True, slots=True)
class GuestTables:
    """All runs of one set of tables. Immutable and hashable: changing gives new tables, a fork keeps the old ones."""

    entries: tuple[GuestEntry, ...] = ()
    """By address, none overlapping."""
    missing_level: int = 0
    """The guest's own level number at which a walk outside all runs ends."""
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        entries = tuple(sorted(self.entries, key=lambda entry: entry.address))
        for first, second in pairwise(entries):
            if first.stop > second.address:
                raise ModelError(f"guest tables: two entries for {second.address:#x}")
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "_starts", tuple(entry.address for entry in entries))

    def walk(self, address: int) -> GuestTranslation | GuestWalkFault:
        """Translate one address; costs the logarithm of the number of runs."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and address < self.entries[index].stop:
            return self.entries[index].at(address)
        return GuestWalkFault(level=self.missing_level)

    def without(self, address: int, size: int) -> GuestTables:
        """These tables with nothing in ``[address, address + size)``. Raises ModelError if that cuts a block."""
        return replace(self, entries=tuple(self._cut(address, address + size)))

    def put(self, entry: GuestEntry) -> GuestTables:
        """These tables with *entry* in place of what was there. Raises ModelError if that cuts a block."""
        return replace(self, entries=(*self._cut(entry.address, entry.stop), entry))

    def _cut(self, start: int, stop: int) -> list[GuestEntry]:
        kept = []
        for entry in self.entries:
            if entry.stop <= start or entry.address >= stop:
                kept.append(entry)
                continue
            if entry.address < start:
                kept.append(entry.part(entry.address, start))
            if entry.stop > stop:
                kept.append(entry.part(stop, entry.stop))
        return kept
