"""Dirty logging as user space drives it: bitmaps read and cleared, rings harvested, and what each does to the table."""

from __future__ import annotations

from collections.abc import Iterator
from errno import EINVAL, ENOENT, ENXIO

from kvmfault.contract.format import Kind
from kvmfault.contract.outcome import Exit, Reason
from kvmfault.contract.values import DirtyMark
from kvmfault.machine.surroundings import Surroundings
from kvmfault.path.resolve import fits
from kvmfault.types import Gfn, Gpa
from kvmfault.vm.dirty import WORD, LogAnswer, RingEntry
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.memslot import Memslot

__all__ = ["DirtyLogging"]


class DirtyLogging(Surroundings):
    """Slot numbers are the ioctls': id in bits 15:0, address space in bits 31:16."""

    def enable_manual_protect(self, flags: int) -> int:
        """KVM_ENABLE_CAP of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0 or EINVAL."""
        return self.log.enable_manual_protect(flags)

    def enable_dirty_ring(self, size: int) -> int:
        """KVM_ENABLE_CAP of KVM_CAP_DIRTY_LOG_RING with *size* bytes, before the first vCPU is used: 0 or an errno."""
        return self.log.enable_ring(size, 1 << self.page_shift, self.caps.ring_reserved, vcpus=len(self.vcpus))

    def get_dirty_log(self, slot: int) -> LogAnswer:
        """KVM_GET_DIRTY_LOG. Without manual protection it clears what it gives, and protects those pages again.

        Kernel: kvm_get_dirty_log_protect.
        """
        refused, found = self._logged_slot(slot)
        if found is None:
            return LogAnswer(refused)
        pages = self.log.bitmap(slot)
        if pages is None:
            return LogAnswer(ENOENT)
        if self.target.policy.dirty_mark is DirtyMark.ON_HARVEST:
            self._collect(found, pages)
        answer = LogAnswer(0, pages.ranges())
        if not self.log.manual:
            for run in answer.runs:
                pages.discard(run.start, run.stop)
                self._see_writes(found, run)
            self.flush_stale()
        return answer

    def drop(self, start: int, end: int) -> None:
        """See State."""
        if self.target.policy.unmap_marks:
            spaces = self.slots.active
            for slot in (slot for space in spaces for slot in space.overlapping(Gfn(start), Gfn(end))):
                pages = self.log.bitmap(slot.number)
                if pages is not None:
                    self._mark_written(slot, pages, max(start, slot.base_gfn), min(end, slot.end_gfn))
        super().drop(start, end)

    def _collect(self, slot: Memslot, pages: FrameSet) -> None:
        # what the entries say of writes goes into the bitmap
        self._mark_written(slot, pages, slot.base_gfn, slot.end_gfn)
        self.own_table.watch_writes(*self.bytes_of(slot.base_gfn, slot.end_gfn), hardware_log=True)

    def _mark_written(self, slot: Memslot, pages: FrameSet, start: int, end: int) -> None:
        # what entries over these frames say of writes; a block counts whole
        fmt = self.format
        first, last = self.bytes_of(slot.base_gfn, slot.end_gfn)
        for leaf in self.own_table.in_range(*self.bytes_of(start, end)):
            if fmt.kind(leaf.desc, leaf.shift) is Kind.LEAF and fmt.is_dirty(leaf.desc):
                begin, stop = max(first, leaf.gpa), min(last, leaf.gpa + (1 << leaf.shift))
                pages.add(begin - first >> self.page_shift, stop - first >> self.page_shift)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: int) -> int:
        """KVM_CLEAR_DIRTY_LOG: bit n of *bitmap* is page ``first_page + n``. 0 or an errno.

        Only pages that were marked are write-protected again. Kernel: kvm_clear_dirty_log_protect.
        """
        refused, found = self._logged_slot(slot)
        if refused in (ENXIO, EINVAL):
            return refused
        if first_page % WORD:
            return EINVAL
        pages = self.log.bitmap(slot)
        if found is None or pages is None:
            return ENOENT
        rest = found.npages - first_page
        if rest < 0 or num_pages > rest or (num_pages < rest and num_pages % WORD):
            return EINVAL
        for marked in pages.meeting(first_page, first_page + num_pages):
            for run in _runs(bitmap >> marked.start - first_page, marked):
                pages.discard(run.start, run.stop)
                self._see_writes(found, run)
        self.flush_stale()
        return 0

    def _logged_slot(self, number: int) -> tuple[int, Memslot | None]:
        # the checks that both ioctls begin with, in their order
        slot_id, as_id = number & 0xFFFF, number >> 16
        if self.log.ring_entries:
            return ENXIO, None
        if as_id >= self.caps.nr_address_spaces or slot_id >= self.caps.nr_user_slots:
            return EINVAL, None
        found = self.slots.by_id(slot_id, as_id)
        return (0, found) if found is not None and found.logs_dirty else (ENOENT, None)

    def harvest_ring(self, vcpu: int = 0) -> tuple[RingEntry, ...]:
        """User space reads the ring of a vCPU, and marks what it read for reset. Oldest first."""
        ring = self.every_vcpu()[vcpu].ring
        self.every_vcpu()[vcpu].ring = tuple(entry._replace(harvested=True) for entry in ring)
        return tuple(entry for entry in ring if not entry.harvested)

    def reset_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: pages that were harvested are write-protected again. The number of entries reset, or
        -EINVAL: the VM has no rings."""
        if not self.log.ring_entries:
            return -EINVAL
        count = 0
        for vcpu in self.every_vcpu():
            while vcpu.ring and vcpu.ring[0].harvested:
                entry, vcpu.ring = vcpu.ring[0], vcpu.ring[1:]
                count += 1
                slot = self.slots.by_id(entry.slot & 0xFFFF, entry.slot >> 16)
                if slot is not None and entry.offset < slot.npages:  # the slot may be gone, or smaller
                    self._see_writes(slot, range(entry.offset, entry.offset + 1))
        self.flush_stale()
        return count

    def ring_is_full(self) -> Exit | None:
        """What KVM_RUN returns before the guest runs while the vCPU's ring is at its soft limit."""
        if not self.log.ring_entries or len(self.vcpu.ring) < self.log.soft_limit:
            return None
        return Exit(Reason.DIRTY_RING_FULL, why="the dirty ring is at its soft limit: harvest and reset it")

    def slot_published(self, old: Memslot | None, new: Memslot | None) -> None:
        """A slot that begins to log has its bitmap from the moment it can be found. (kvm_prepare_memory_region)"""
        if new is not None and new.logs_dirty and not (old is not None and old.logs_dirty):
            self.log.start(new.number, new.npages)

    def slot_changed(self, old: Memslot | None, new: Memslot | None) -> None:
        """After a memslot change: bitmaps go, pages are protected, blocks split or found again.

        Kernel: kvm_mmu_slot_apply_flags, kvm_mmu_wp_memory_region.
        """
        was, now = old is not None and old.logs_dirty, new is not None and new.logs_dirty
        policy = self.target.policy
        if old is not None and new is not None and was is not now and policy.logging_drops:
            super().drop(old.base_gfn, old.end_gfn)  # by the slot of before, which has no bitmap, or one that goes
            self.flush_stale()
        if old is not None and was and not now:
            self.log.stop(old.number)
            if new is not None and not new.readonly:
                self.recover_blocks(new)
        begins = old is not None and new is not None and now and not was
        watched = begins and policy.dirty_mark is not DirtyMark.ON_HARVEST
        if watched and new is not None and not new.readonly and not self.log.initially_set:
            if self.facts.eager_split:
                self.own_table.split(*self.bytes_of(new.base_gfn, new.end_gfn))
            self._see_writes(new, range(new.npages))
            self.flush_stale()

    def _see_writes(self, slot: Memslot, pages: range) -> None:
        # from now on the next write to each of these pages is noticed
        if self.target.policy.dirty_mark is DirtyMark.ON_HARVEST:
            return  # collecting has seen to it
        start, end = slot.base_gfn + pages.start, slot.base_gfn + pages.stop
        if self.log.initially_set and self.facts.eager_split:
            self.own_table.split(*self.bytes_of(start, end))
        for table, first, last in self.tables_over(start, end):
            # the CPU's log holds addresses of the nested guest there, so its entries are always write-protected
            by_hardware = self.facts.page_modification_log and table is self.own_table
            table.watch_writes(first, last, hardware_log=by_hardware)

    def recover_blocks(self, slot: Memslot) -> None:
        """Drop pages where a block is allowed now, so that the next fault maps it; not while the slot needs pages.

        Kernel: kvm_mmu_zap_collapsible_sptes.
        """
        policy = self.target.policy
        if not policy.recovers_blocks or slot.logs_dirty or slot.userfault:
            return
        for leaf in list(self.own_table.in_range(*self.bytes_of(slot.base_gfn, slot.end_gfn))):
            gfn = Gfn(leaf.gpa >> self.page_shift)
            if self.format.kind(leaf.desc, leaf.shift) is Kind.LEAF and self._may_be_block(slot, gfn, leaf.shift):
                self.own_table.unmap(leaf.gpa, Gpa(leaf.gpa + (1 << leaf.shift)), tables=True)
        self.flush_stale()

    def _may_be_block(self, slot: Memslot, gfn: Gfn, shift: int) -> bool:
        hva = slot.hva_of(gfn)
        sizes = (s for s in self.target.policy.fit_sizes if 1 << shift < s <= self.host.mapping_size(hva))
        return any(fits(self, slot, hva, size) and self.block_allowed(slot, gfn, size) for size in sizes)


def _runs(bits: int, pages: range) -> Iterator[range]:
    """The runs of *pages* whose bit in *bits* is set; bit 0 is the first page's. One word at a time, as the kernel."""
    start = None
    words = (bits & (1 << len(pages)) - 1).to_bytes(len(pages) // 8 + 1, "little")
    for at in range(0, len(words), WORD // 8):
        word, first = int.from_bytes(words[at : at + WORD // 8], "little"), pages.start + at * 8
        if word == (1 << WORD) - 1:
            start = first if start is None else start
            continue
        for page in range(first, first + WORD) if word or start is not None else ():
            if word >> page - first & 1:
                start = page if start is None else start
            elif start is not None:
                yield range(start, page)
                start = None
    if start is not None:
        yield range(start, pages.stop)
