"""Which pages the guest wrote: the bitmap of each logged slot, or a ring for each vCPU.

State only. Taking write permission away again, so that the next write is seen, is the business of who holds the table.
Slots are named as in the ioctls, address space in bits 31:16, and pages count from the slot's first.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from errno import E2BIG, EINVAL
from typing import Final, NamedTuple

from kvmfault.vm.frames import FrameSet

__all__ = ["INITIALLY_SET", "MANUAL_PROTECT", "RING_ENTRY_BYTES", "WORD", "DirtyLog", "LogAnswer", "RingEntry"]

MANUAL_PROTECT: Final = 1 << 0
"""KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE: reading the log copies it, clearing is a call of its own."""
INITIALLY_SET: Final = 1 << 1
"""KVM_DIRTY_LOG_INITIALLY_SET: a new bitmap is all ones, and nothing is protected until it is cleared."""
RING_ENTRY_BYTES: Final = 16
_LARGEST_RING: Final = 65536
WORD: Final = 64
"""Pages of one word of a bitmap: KVM_CLEAR_DIRTY_LOG takes whole words."""


class RingEntry(NamedTuple):
    """One entry of a dirty ring (struct kvm_dirty_gfn)."""

    slot: int
    offset: int
    """Page of the slot."""
    harvested: bool = False
    """User space has read it and set the reset flag; the kernel may use its place again."""


@dataclass(frozen=True, slots=True)
class LogAnswer:
    """What KVM_GET_DIRTY_LOG gives: 0 and the pages written, or a positive errno."""

    errno: int = 0
    runs: tuple[range, ...] = ()
    """The pages as ranges that do not touch, in order: as small as they are few, however large the slot is."""

    @property
    def pages(self) -> tuple[int, ...]:
        """The pages, one by one."""
        return tuple(page for run in self.runs for page in run)


class DirtyLog:
    """Bitmaps and the sizes of rings of one VM; the rings themselves belong to the vCPUs."""

    __slots__ = ("_bitmaps", "flags", "ring_entries", "ring_reserved")

    def __init__(self) -> None:
        self.flags: int = 0
        """MANUAL_PROTECT and INITIALLY_SET, as enabled by KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""
        self.ring_entries: int = 0
        """Entries of each vCPU's ring; 0: the VM has bitmaps."""
        self.ring_reserved: int = 0
        self._bitmaps: Mapping[int, FrameSet] = {}  # the sets are never shared with a fork, see ``fork``

    @property
    def manual(self) -> bool:
        """Reading the log does not clear it."""
        return bool(self.flags & MANUAL_PROTECT)

    @property
    def initially_set(self) -> bool:
        """New bitmaps are all ones."""
        return bool(self.flags & INITIALLY_SET)

    def enable_manual_protect(self, flags: int) -> int:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0, or EINVAL for an unknown flag or INITIALLY_SET alone."""
        if flags & ~(MANUAL_PROTECT | INITIALLY_SET) or flags == INITIALLY_SET:
            return EINVAL
        self.flags = flags
        return 0

    def enable_ring(self, size: int, page: int, reserved: int, *, vcpus: int) -> int:
        """KVM_CAP_DIRTY_LOG_RING with *size* bytes: 0, EINVAL or E2BIG. (kvm_vm_ioctl_enable_dirty_log_ring, which
        takes 32 bits of it)

        *page*: bytes of a host page; *reserved*: entries kept free for what one entry into the guest may add.
        """
        size &= 0xFFFF_FFFF
        if not size or size & (size - 1) or size < max(page, reserved * RING_ENTRY_BYTES):
            return EINVAL
        if size > _LARGEST_RING * RING_ENTRY_BYTES:
            return E2BIG
        if self.ring_entries or vcpus:
            return EINVAL
        self.ring_entries, self.ring_reserved = size // RING_ENTRY_BYTES, reserved
        return 0

    @property
    def soft_limit(self) -> int:
        """Entries at which a vCPU may not enter the guest (kvm_dirty_ring_soft_full)."""
        return self.ring_entries - self.ring_reserved

    def start(self, slot: int, npages: int) -> None:
        """A slot begins to log. (kvm_alloc_dirty_bitmap)"""
        if not self.ring_entries:
            pages = FrameSet()
            if self.initially_set:
                pages.add(0, npages)
            self._bitmaps = {**self._bitmaps, slot: pages}

    def stop(self, slot: int) -> None:
        """A slot logs no more, or is gone. (kvm_destroy_dirty_bitmap)"""
        self._bitmaps = {key: pages for key, pages in self._bitmaps.items() if key != slot}

    def bitmap(self, slot: int) -> FrameSet | None:
        """The pages of a slot that are marked, or None: it has no bitmap."""
        return self._bitmaps.get(slot)

    def mark(self, slot: int, page: int) -> None:
        """A page of a logged slot was written; without a bitmap nothing happens. (set_bit_le in mark_page_dirty)"""
        pages = self._bitmaps.get(slot)
        if pages is not None:
            pages.add(page)

    def pages(self, slot: int) -> tuple[int, ...]:
        """Marked pages of a slot by rising number; none where nothing is logged."""
        return tuple(self._bitmaps.get(slot, ()))

    def fork(self) -> DirtyLog:
        """An independent copy; costs as many steps as slots are logged."""
        new = DirtyLog()
        new.flags, new.ring_entries, new.ring_reserved = self.flags, self.ring_entries, self.ring_reserved
        new._bitmaps = {slot: pages.fork() for slot, pages in self._bitmaps.items()}
        return new

    def key(self) -> Hashable:
        """All state, hashable."""
        bitmaps = frozenset((slot, pages.key()) for slot, pages in self._bitmaps.items())
        return self.flags, self.ring_entries, self.ring_reserved, bitmaps
