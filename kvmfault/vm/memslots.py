"""The memslots of one VM: look-ups, and changes as one call or as the atomic steps between which a fault may run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from errno import EINVAL
from typing import Final, NamedTuple

from kvmfault.errors import ModelError
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.hostmem import HostMemory
from kvmfault.vm.memslot import GmemBinding, HvaHit, Memslot, MemslotFlag, SlotSet
from kvmfault.vm.memslot_change import PLANS, ChangeResult, Stage
from kvmfault.vm.memslot_request import Allocation, ChangeKind, GuestMemfd, MemslotRequest
from kvmfault.vm.memslot_rules import (
    CHANGE_RULES,
    PREPARE_RULES,
    REQUEST_RULES,
    Asked,
    Refusal,
    first_broken,
    first_broken_area,
)

__all__ = ["UPDATING", "Memslots", "SlotCache"]

UPDATING: Final = 1 << 63
"""Bit of a generation while the sets are being swapped (KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS)."""


class SlotCache(NamedTuple):
    """A vCPU's last slot, good only while the generation is the same. Also keeps address spaces apart."""

    slot: Memslot | None = None
    generation: int = -1


@dataclass(frozen=True, slots=True)
class _Space:
    """One address space: two sets, of which one is active. The other is where the next change is prepared."""

    sets: tuple[SlotSet, SlotSet]
    active: int
    """Node index of the active set."""
    generation: int


@dataclass(frozen=True, slots=True)
class _Pending:
    asked: Asked
    kind: ChangeKind
    old: Memslot | None
    new: Memslot | None
    refusal: Refusal | None = None


class Memslots:
    """Slots of all address spaces, the guest_memfds they may be bound to, and at most one change under way.

    A change needs slots_lock, so a second one cannot begin before the first has ended.
    """

    __slots__ = ("_pending", "_spaces", "_stages", "active", "caps", "files", "total_pages", "warnings")

    def __init__(self, caps: HostCaps) -> None:
        self.caps: HostCaps = caps
        self.total_pages: int = 0
        """Pages of all slots together; follows a change at its COMMIT (nr_memslot_pages)."""
        self.warnings: int = 0
        """Kernel warnings: page counts that do not add up."""
        self.files: Mapping[int, GuestMemfd | None] = {}
        """Open files by descriptor; None stands for a file that is no guest_memfd. A descriptor is not used twice."""
        self._pending: _Pending | None = None
        self._stages: tuple[Stage, ...] = ()
        empty = SlotSet()
        self._install(tuple(_Space((empty, empty), 0, as_id) for as_id in range(caps.nr_address_spaces)))

    def _install(self, spaces: tuple[_Space, ...]) -> None:
        self._spaces = spaces
        self.active: tuple[SlotSet, ...] = tuple(space.sets[space.active] for space in spaces)
        """The set of each address space that look-ups see."""

    # Look-ups. None of them depends on a cache or on what was asked before.

    def find(self, gfn: Gfn, as_id: int = 0) -> Memslot | None:
        """The slot that contains *gfn*, INVALID ones too, or None. O(log n). Never raises. (gfn_to_memslot)"""
        return self.active[as_id].find(gfn)

    def find_cached(self, gfn: Gfn, cache: SlotCache, as_id: int = 0) -> tuple[Memslot | None, SlotCache]:
        """The same with a vCPU's cache; gives the cache as it is afterwards. (kvm_vcpu_gfn_to_memslot)"""
        generation = self._spaces[as_id].generation
        if cache.generation != generation:
            cache = SlotCache(None, generation)
        if cache.slot is not None and cache.slot.contains(gfn):
            return cache.slot, cache
        slot = self.find(gfn, as_id)
        return slot, cache if slot is None else SlotCache(slot, generation)

    def by_id(self, slot_id: int, as_id: int = 0) -> Memslot | None:
        """The slot of that number, INVALID and internal ones too, or None. (id_to_memslot)"""
        return self.active[as_id].by_id(slot_id)

    def visible(self, slot_id: int, as_id: int = 0) -> Memslot | None:
        """The same, but only if user space made the slot and it is not INVALID. (kvm_is_visible_memslot)"""
        slot = self.by_id(slot_id, as_id)
        return slot if slot and slot.id < self.caps.nr_user_slots and not slot.invalid else None

    def in_hva_range(self, start: Hva, end: Hva) -> tuple[HvaHit, ...]:
        """Slots of all address spaces that user addresses ``[start, end)`` mean, with frames. (kvm_handle_hva_range)"""
        return tuple(hit for active in self.active for hit in active.in_hva_range(start, end))

    def slots(self, as_id: int = 0) -> tuple[Memslot, ...]:
        """All slots of an address space by rising gfn, INVALID ones too."""
        return self.active[as_id].slots()

    def generation(self, as_id: int = 0) -> int:
        """Counts swaps in steps of the number of address spaces; with ``UPDATING`` while one is under way."""
        return self._spaces[as_id].generation

    def node_index(self, as_id: int = 0) -> int:
        """Which of the two sets is active: 0 or 1."""
        return self._spaces[as_id].active

    def inactive(self, as_id: int = 0) -> SlotSet:
        """The set that is not active: equal to the active one but for a change under way."""
        space = self._spaces[as_id]
        return space.sets[1 - space.active]

    # Files.

    def create_guest_memfd(self, fd: int, size: int, flags: int = 0) -> int:
        """Open a guest_memfd of *size* bytes as *fd*. Gives 0, or EINVAL for any flag or a size not of pages."""
        if flags or size <= 0 or size & ((1 << self.caps.page_shift) - 1):
            return EINVAL
        self.open_file(fd, GuestMemfd(size))
        return 0

    def open_file(self, fd: int, file: GuestMemfd | None) -> None:
        """Make *fd* an open file: a guest_memfd, of this VM or another, or (None) anything else."""
        if fd in self.files:
            raise ModelError(f"file descriptor {fd} is in use")
        self.files = {**self.files, fd: file}

    # Changes.

    def set_region(
        self, request: MemslotRequest, *, host: HostMemory | None = None, failing: Allocation | None = None
    ) -> ChangeResult:
        """Carry *request* out at once. The caller unmaps ``result.old`` if that was deleted or moved, or came back.

        *host*: the areas that the architecture may look at. *failing*: an allocation that does not succeed.
        (kvm_set_memory_region)
        """
        result = self.begin(request, failing=failing)
        while result is None:
            result = self.step(host)
        return result

    def begin(self, request: MemslotRequest, *, failing: Allocation | None = None) -> ChangeResult | None:
        """Judge *request*. Gives the result if that is all; None if a change is now under way (see :meth:`step`)."""
        if self._pending:
            raise ModelError("a memslot change is under way; slots_lock allows one at a time")
        exists = request.as_id < len(self.active)
        asked = Asked(
            request=request,
            caps=self.caps,
            spaces=self.active,
            total_pages=self.total_pages,
            files=self.files,
            old=self.by_id(request.id, request.as_id) if exists else None,
            failing=failing,
        )
        kind = asked.kind
        refusal = first_broken(REQUEST_RULES, asked)
        if refusal is None and kind is not None:
            refusal = first_broken(CHANGE_RULES, asked)
        if refusal is not None:
            self.warnings += refusal.rule == "page-count"
            return _refused(refusal, None, asked.old)
        if kind is None:
            return ChangeResult(why="nothing to change", old=asked.old, new=asked.old)
        self._pending, self._stages = _Pending(asked, kind, asked.old, self._new_slot(asked)), PLANS[kind]
        return None

    @property
    def next_stage(self) -> Stage | None:
        """What the next :meth:`step` does; None if no change is under way."""
        return self._stages[0] if self._stages else None

    @property
    def changing(self) -> tuple[Memslot | None, Memslot | None]:
        """The old and the new slot of the change under way; ``(None, None)`` without one."""
        return (self._pending.old, self._pending.new) if self._pending else (None, None)

    def step(self, host: HostMemory | None = None) -> ChangeResult | None:
        """Do the next step of the change. Gives the result after the last one. (kvm_set_memslot)"""
        now = self._pending
        if now is None:
            raise ModelError("no memslot change is under way")
        as_id = now.asked.request.as_id
        stage, self._stages = self._stages[0], self._stages[1:]
        match stage:
            case Stage.PUBLISH_INVALID if now.old:
                self._publish(as_id, now.old, now.old.invalidated())
            case Stage.PUBLISH:
                self._publish(as_id, now.old, now.new)
            case Stage.REVERT:  # the inactive set still has the old slot: the INVALID copy went into one set only
                self._publish(as_id, None, None)
            case Stage.SETTLE_INVALID:
                self._settle(as_id, mirror=False)
            case Stage.SETTLE:
                self._settle(as_id, mirror=True)
            case Stage.PREPARE:
                now = self._prepare(now, host)
                self._pending = now
            case Stage.COMMIT:
                self.total_pages += (now.new.npages if now.new else 0) - (now.old.npages if now.old else 0)
        if self._stages:
            return None
        self._pending = None
        if now.refusal:
            return _refused(now.refusal, now.kind, now.old)
        return ChangeResult(kind=now.kind, old=now.old, new=now.new)

    def _new_slot(self, asked: Asked) -> Memslot | None:
        if asked.kind is ChangeKind.DELETE:
            return None
        request, flags = asked.request, MemslotFlag(asked.request.flags)
        return Memslot(
            id=request.id,
            as_id=request.as_id,
            base_gfn=asked.base_gfn,
            npages=asked.npages,
            hva=request.hva,
            flags=flags,
            page_shift=self.caps.page_shift,
            gmem=GmemBinding(request.memfd, request.memfd_offset) if MemslotFlag.GUEST_MEMFD in flags else None,
        )

    def _prepare(self, now: _Pending, host: HostMemory | None) -> _Pending:
        refusal = first_broken(PREPARE_RULES, now.asked)
        if refusal is None and host is not None and now.new is not None:
            refusal = first_broken_area(now.asked, host.areas(now.new.hva, now.new.hva_end))
        if refusal is None:
            return now
        self._stages = (Stage.REVERT, Stage.SETTLE) if Stage.PUBLISH_INVALID in PLANS[now.kind] else ()
        return replace(now, refusal=refusal)

    def _publish(self, as_id: int, old: Memslot | None, new: Memslot | None) -> None:
        # Edit the inactive set, then make it the active one. (kvm_replace_memslot, kvm_swap_active_memslots)
        space = self._spaces[as_id]
        index = 1 - space.active
        edited = space.sets[index].replace(old, new)
        sets = (edited, space.sets[1]) if index == 0 else (space.sets[0], edited)
        self._put(as_id, _Space(sets, index, space.generation | UPDATING))

    def _settle(self, as_id: int, *, mirror: bool) -> None:
        # Nobody reads the former set any more: give it the same edit, so that the next change starts from the truth.
        space = self._spaces[as_id]
        generation = (space.generation & ~UPDATING) + self.caps.nr_address_spaces
        active = space.sets[space.active]
        self._put(as_id, _Space((active, active) if mirror else space.sets, space.active, generation))

    def _put(self, as_id: int, space: _Space) -> None:
        self._install((*self._spaces[:as_id], space, *self._spaces[as_id + 1 :]))

    # Copies.

    def fork(self) -> Memslots:
        """An independent copy, in constant time."""
        new = Memslots.__new__(Memslots)
        new.caps, new.total_pages, new.warnings = self.caps, self.total_pages, self.warnings
        new.files, new._spaces, new.active = self.files, self._spaces, self.active
        new._pending, new._stages = self._pending, self._stages
        return new

    def key(self) -> Hashable:
        """All state, hashable; equal keys (with equal caps) behave alike."""
        now = self._pending
        under_way = now and (now.asked.request, now.asked.failing, self._stages, now.refusal)
        return self._spaces, self.total_pages, self.warnings, frozenset(self.files.items()), under_way


def _refused(refusal: Refusal, kind: ChangeKind | None, old: Memslot | None) -> ChangeResult:
    return ChangeResult(errno=refusal.errno, kind=kind, rule=refusal.rule, why=refusal.why, old=old, new=old)
