"""One memslot, and one set of them with its three indexes (by gfn, by id, by hva)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntFlag
from functools import reduce
from itertools import accumulate
from typing import Final, NamedTuple

from kvmfault.types import Gfn, Hva
from kvmfault.vm.ranges import RangeTable

__all__ = [
    "MAX_SLOT_PAGES",
    "NR_SLOTS",
    "GmemBinding",
    "HvaHit",
    "Memslot",
    "MemslotFlag",
    "SlotSet",
    "slot_number",
    "slot_set",
]

NR_SLOTS: Final = 32767
"""Slot ids of one address space, user and internal together (KVM_MEM_SLOTS_NUM, SHRT_MAX)."""
MAX_SLOT_PAGES: Final = (1 << 31) - 1
"""Largest slot in pages (KVM_MEM_MAX_NR_PAGES)."""
_BUCKETS: Final = 128


def slot_number(as_id: int, slot_id: int) -> int:
    """A slot as the ioctls name it: id in bits 15:0, address space in bits 31:16."""
    return as_id << 16 | slot_id


class MemslotFlag(IntFlag):
    """Flags of a slot. Bits 0-15 belong to the ioctl, bits 16 and up to the kernel (KVM_MEM_*, KVM_MEMSLOT_INVALID)."""

    LOG_DIRTY = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2
    USERFAULT = 1 << 3
    """Proposed: pages marked in a bitmap of user space leave to it before they are mapped."""
    INVALID = 1 << 16
    """The slot is being deleted or moved: still found by look-ups, but nothing may be mapped from it."""


class GmemBinding(NamedTuple):
    """Where a slot's private pages come from: guest_memfd *fd*, from byte *offset* on."""

    fd: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memslot:
    """A range of guest frames backed by a range of user addresses (struct kvm_memory_slot).

    The plain attributes at the end are computed once, because every fault reads them.
    """

    id: int
    as_id: int
    base_gfn: Gfn
    npages: int
    """Pages of the host; never 0 (a slot of no pages does not exist)."""
    hva: Hva
    flags: MemslotFlag
    page_shift: int
    gmem: GmemBinding | None = None
    end_gfn: Gfn = field(init=False, repr=False, compare=False)
    """First frame behind the slot."""
    number: int = field(init=False, repr=False, compare=False)
    """Id and address space in one: see ``slot_number``."""
    readonly: bool = field(init=False, repr=False, compare=False)
    logs_dirty: bool = field(init=False, repr=False, compare=False)
    userfault: bool = field(init=False, repr=False, compare=False)
    invalid: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "end_gfn", Gfn(self.base_gfn + self.npages))
        put(self, "number", slot_number(self.as_id, self.id))
        put(self, "readonly", bool(self.flags & MemslotFlag.READONLY))
        put(self, "logs_dirty", bool(self.flags & MemslotFlag.LOG_DIRTY))
        put(self, "userfault", bool(self.flags & MemslotFlag.USERFAULT))
        put(self, "invalid", bool(self.flags & MemslotFlag.INVALID))

    def contains(self, gfn: Gfn) -> bool:
        """Whether *gfn* lies in the slot (try_get_memslot)."""
        return self.base_gfn <= gfn < self.end_gfn

    def hva_of(self, gfn: Gfn) -> Hva:
        """User address of the first byte of *gfn*, which must lie in the slot (__gfn_to_hva_memslot)."""
        return Hva(self.hva + ((gfn - self.base_gfn) << self.page_shift))

    @property
    def hva_end(self) -> Hva:
        """First user address behind the slot."""
        return Hva(self.hva + (self.npages << self.page_shift))

    def invalidated(self) -> Memslot:
        """The copy that is published while the slot is deleted or moved (kvm_invalidate_memslot)."""
        return replace(self, flags=self.flags | MemslotFlag.INVALID)


class HvaHit(NamedTuple):
    """What a range of user addresses means in one slot: frames ``[start, end)``."""

    slot: Memslot
    start: Gfn
    end: Gfn


class SlotSet:
    """The slots of one address space at one time. Immutable; an edit gives a new set. (struct kvm_memslots)"""

    __slots__ = ("_buckets", "_by_gfn", "_by_hva", "_hash", "find")

    def __init__(self) -> None:
        self._fill(RangeTable(), ({},) * _BUCKETS)

    def _fill(self, by_gfn: RangeTable[Memslot], buckets: tuple[dict[int, Memslot], ...]) -> None:
        self._by_gfn = by_gfn
        self._buckets = buckets
        self._by_hva: tuple[list[Memslot], list[int], list[int]] | None = None
        self._hash: int | None = None
        self.find: Callable[[int], Memslot | None] = by_gfn.find
        """The slot that contains a gfn, INVALID ones too, or None. O(log n). Never raises. (search_memslots)"""

    def by_id(self, slot_id: int) -> Memslot | None:
        """The slot numbered *slot_id*, INVALID ones too, or None. (id_to_memslot)"""
        return self._buckets[slot_id % _BUCKETS].get(slot_id)

    def overlapping(self, start: Gfn, end: Gfn) -> tuple[Memslot, ...]:
        """Slots that share a frame with ``[start, end)``. (kvm_for_each_memslot_in_gfn_range)"""
        return self._by_gfn.overlapping(start, end)

    def in_hva_range(self, start: Hva, end: Hva) -> tuple[HvaHit, ...]:
        """Slots, INVALID ones too, whose user addresses meet ``[start, end)``, with the frames concerned.

        User addresses of different slots may overlap. A page that is touched at all counts. O(log n + answer) unless a
        large slot overlaps many small ones. (kvm_handle_hva_range)
        """
        by_start, starts, highest_end = self._hva_index()
        hits = []
        i = bisect_left(starts, end)
        while i > 0 and highest_end[i - 1] > start:  # some slot at or before i - 1 reaches into the range
            i -= 1
            slot = by_start[i]
            if slot.hva_end > start:
                first, last = max(start, slot.hva), min(end, slot.hva_end) - 1
                gfns = [slot.base_gfn + ((hva - slot.hva) >> slot.page_shift) for hva in (first, last)]
                hits.append(HvaHit(slot, Gfn(gfns[0]), Gfn(gfns[1] + 1)))
        return tuple(reversed(hits))

    def _hva_index(self) -> tuple[list[Memslot], list[int], list[int]]:
        # Built when first asked for: only invalidations need it, and most sets never see one.
        if self._by_hva is None:
            by_start = sorted(self._by_gfn.items(), key=lambda slot: slot.hva)
            self._by_hva = (by_start, [s.hva for s in by_start], list(accumulate((s.hva_end for s in by_start), max)))
        return self._by_hva

    def replace(self, old: Memslot | None, new: Memslot | None) -> SlotSet:
        """The set with *old* (one of its slots) taken out and *new* put in. (kvm_replace_memslot)"""
        by_gfn, buckets = self._by_gfn, list(self._buckets)
        if old is not None:
            by_gfn = by_gfn.splice(old.base_gfn, old.end_gfn, ())
            buckets[old.id % _BUCKETS] = {k: v for k, v in buckets[old.id % _BUCKETS].items() if k != old.id}
        if new is not None:
            by_gfn = by_gfn.splice(new.base_gfn, new.end_gfn, ((new.base_gfn, new.end_gfn, new),))
            buckets[new.id % _BUCKETS] = {**buckets[new.id % _BUCKETS], new.id: new}
        result = SlotSet.__new__(SlotSet)
        result._fill(by_gfn, tuple(buckets))
        return result

    def slots(self) -> tuple[Memslot, ...]:
        """All slots by rising gfn."""
        return self._by_gfn.items()

    def __len__(self) -> int:
        return len(self._by_gfn)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, SlotSet) and self.slots() == other.slots())

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.slots())
        return self._hash

    def __reduce__(self) -> tuple[Callable[[tuple[Memslot, ...]], SlotSet], tuple[tuple[Memslot, ...]]]:
        # Built anew in another process, where the hash of an equal set is a different number.
        return slot_set, (self.slots(),)


def slot_set(slots: tuple[Memslot, ...]) -> SlotSet:
    """The set of *slots*, which do not overlap and have different ids."""
    return reduce(lambda made, slot: made.replace(None, slot), slots, SlotSet())
