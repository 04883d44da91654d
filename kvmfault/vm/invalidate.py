"""The protocol by which a fault notices that host memory changed under it (MMU notifier, sequence and range)."""

from __future__ import annotations

from typing import Final

from kvmfault.types import U64, Gfn

__all__ = ["UNSET", "Invalidation"]

UNSET: Final = U64
"""Start and end of the range while none is set (INVALID_GPA)."""


class Invalidation:
    """Invalidations that run, the sequence of those that ended, and the frames concerned.

    Writer: ``begin``, ``add`` at least once, unmap, ``end``; all with mmu_lock held for write. Reader: ``snapshot``,
    then get the page, then take mmu_lock and ask :meth:`retry` or :meth:`retry_gfn`. Misuse is a kernel warning, not
    an exception: ``warnings`` counts every one (the kernel prints the first), ``bugged`` is a VM that KVM gave up.
    """

    __slots__ = ("active", "bugged", "in_progress", "range_end", "range_start", "seq", "warnings")

    def __init__(self) -> None:
        self.seq: int = 0
        """Invalidations ended, modulo 2^64 (mmu_invalidate_seq)."""
        self.in_progress: int = 0
        """Invalidations begun and not ended; negative after an end without a begin (mmu_invalidate_in_progress)."""
        self.range_start: int = UNSET
        self.range_end: int = UNSET
        """Frames ``[range_start, range_end)`` of the invalidations in progress, as one hull; not cleared at the end."""
        self.active: int = 0
        """Notifier calls between start and end, also those that met no slot (mn_active_invalidate_count)."""
        self.warnings: int = 0
        self.bugged: bool = False

    def begin(self) -> None:
        """An invalidation starts; the first one forgets the old range. (kvm_mmu_invalidate_begin)"""
        self.in_progress += 1
        if self.in_progress == 1:
            self.range_start = self.range_end = UNSET

    def add(self, start: Gfn, end: Gfn) -> None:
        """Frames ``[start, end)`` are being invalidated: widen the hull. (kvm_mmu_invalidate_range_add)"""
        if not self.in_progress:
            self.warnings += 1
        if self.range_start == UNSET:
            self.range_start, self.range_end = start, end
        else:
            self.range_start, self.range_end = min(self.range_start, start), max(self.range_end, end)

    def end(self) -> None:
        """An invalidation ends: the sequence moves before the count drops. (kvm_mmu_invalidate_end)"""
        self.raise_sequence()
        self.drop_count()

    def raise_sequence(self) -> None:
        """The first half of ``end``; a write barrier stands between the two."""
        self.seq = (self.seq + 1) & U64

    def drop_count(self) -> None:
        """The second half."""
        self.in_progress -= 1
        if self.in_progress < 0:
            self.bugged = True
            self.warnings += 1
        if self.range_start == UNSET:  # nothing was added between begin and end
            self.warnings += 1

    def snapshot(self) -> int:
        """The sequence to compare with later; taken before anything that the invalidation protects."""
        return self.seq

    def retry(self, seq: int) -> bool:
        """Whether a fault that sampled *seq* must start over, whatever its frame. (mmu_invalidate_retry)"""
        return self.in_progress != 0 or self.seq != seq

    def retry_gfn(self, seq: int, gfn: Gfn) -> bool:
        """The same, but a running invalidation counts only if its hull holds *gfn*. Under mmu_lock.

        An invalidation without a range counts for every frame, and warns. (mmu_invalidate_retry_gfn)
        """
        if self.in_progress:
            if UNSET in (self.range_start, self.range_end):
                self.warnings += 1
                return True
            if self.range_start <= gfn < self.range_end:
                return True
        return self.seq != seq

    def retry_gfn_unsafe(self, seq: int, gfn: Gfn) -> bool:
        """A cheap look without the lock: may be wrong both ways, so :meth:`retry_gfn` must follow.

        An invalidation without a range does not count here. (mmu_invalidate_retry_gfn_unsafe)
        """
        return (self.in_progress != 0 and self.range_start <= gfn < self.range_end) or self.seq != seq

    def notifier_enters(self) -> None:
        """A notifier call starts: from here on no memslot change is published. (invalidate_range_start)"""
        self.active += 1

    def notifier_leaves(self) -> None:
        """It ends. (invalidate_range_end)"""
        self.active -= 1
        if self.active < 0:
            self.active = 0
            self.warnings += 1

    def fork(self) -> Invalidation:
        """An independent copy."""
        new = Invalidation()
        for name in self.__slots__:
            setattr(new, name, getattr(self, name))
        return new

    def key(self) -> tuple[int, ...]:
        """All state, hashable; equal keys behave alike."""
        return (self.seq, self.in_progress, self.range_start, self.range_end, self.active, self.warnings, self.bugged)
