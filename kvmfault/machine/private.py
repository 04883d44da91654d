"""Memory that user space gives in other ways than by a slot: attributes, guest_memfd, the userfault bitmap."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EINVAL, ENOTTY
from typing import Final

from kvmfault.errors import ModelError
from kvmfault.machine.surroundings import Surroundings
from kvmfault.types import U64, Gfn, Pfn
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.memslot_request import GuestMemfd

__all__ = ["ATTRIBUTE_PRIVATE", "PrivateMemory"]

ATTRIBUTE_PRIVATE: Final = 1 << 3
"""KVM_MEMORY_ATTRIBUTE_PRIVATE."""


class PrivateMemory(Surroundings):
    """Errnos are positive; 0 is success."""

    userfault: Mapping[int, FrameSet]
    memfd_pages: Mapping[tuple[int, int], Pfn | None]

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int = 0) -> int:
        """KVM_SET_MEMORY_ATTRIBUTES over ``[gpa, gpa + size)``: what is mapped there goes, through the protocol.

        Kernel: kvm_vm_ioctl_set_mem_attributes, kvm_vm_set_mem_attributes.
        """
        page = 1 << self.page_shift
        if not self.caps.memory_attributes:
            return ENOTTY
        supported = ATTRIBUTE_PRIVATE if self.facts.private_memory else 0
        if flags or attributes & ~supported or size == 0 or gpa + size > U64 or (gpa | size) & (page - 1):
            return EINVAL
        start, end = gpa >> self.page_shift, gpa + size >> self.page_shift
        private = bool(attributes & ATTRIBUTE_PRIVATE)
        if self.private.covers(start, end) if private else not self.private.meeting(start, end):
            return 0
        spans = self._in_slots(start, end)
        self._begin(spans)
        (self.private.add if private else self.private.discard)(start, end)
        self._end(spans)
        return 0

    def _in_slots(self, start: int, end: int) -> list[tuple[Gfn, Gfn]]:
        sets = self.slots.active
        met = [slot for one in sets for slot in one.overlapping(Gfn(start), Gfn(end))]
        return [(Gfn(max(start, slot.base_gfn)), Gfn(min(end, slot.end_gfn))) for slot in met]

    def _begin(self, spans: list[tuple[Gfn, Gfn]]) -> None:
        # where there is no slot nothing is mapped: neither begin nor end runs
        if spans:
            self.invalidations.begin()
            for start, end in spans:
                self.invalidations.add(start, end)
                self.drop(start, end)
            self.flush_stale()

    def _end(self, spans: list[tuple[Gfn, Gfn]]) -> None:
        if spans:
            self.invalidations.end()

    def create_guest_memfd(self, fd: int, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD, the file known as *fd* from here on. ModelError: the number is in use."""
        if not (self.caps.guest_memfd or self.caps.guest_memfd_files):
            return ENOTTY
        signed = size - (1 << 64) if size >> 63 else size
        return self.slots.create_guest_memfd(fd, signed, flags & ~self.caps.memfd_flags)

    def punch_hole(self, fd: int, offset: int, size: int) -> int:
        """fallocate(PUNCH_HOLE): pages leave the guest, and the next use gets other, cleared ones. 0 or EINVAL.

        What lies beyond the file is ignored. ModelError: *fd* is no guest_memfd, or the hole is too large for the
        model. Kernel: vfs_fallocate, kvm_gmem_fallocate, kvm_gmem_punch_hole.
        """
        file, page = self._file(fd), 1 << self.page_shift
        if offset < 0 or size <= 0 or (offset | size) & (page - 1):
            return EINVAL
        size = min(size, file.size - offset)
        if size >> self.page_shift > _MOST_PAGES:
            raise ModelError(f"a hole of {size:#x} bytes: the model takes at most {_MOST_PAGES} pages at once")
        if size > 0:
            spans = self._bound_to(fd, offset, size)
            self._begin(spans)
            self.replace_memfd_pages(fd, offset, size)
            self._end(spans)
        return 0

    def replace_memfd_pages(self, fd: int, offset: int, size: int) -> None:
        """The next use of these pages of the file gets others. The caller invalidates."""
        first, count = offset >> self.page_shift, size >> self.page_shift
        frame = self.new_memfd_frames(count)
        self.memfd_pages = {**self.memfd_pages, **{(fd, first + i): Pfn(frame + i) for i in range(count)}}

    def poison_memfd(self, fd: int, offset: int) -> None:
        """The page at *offset* of a guest_memfd fails until a hole is punched there. (kvm_gmem_error_folio)"""
        if not 0 <= offset < self._file(fd).size:
            raise ModelError(f"guest_memfd {fd} has no byte {offset:#x}")
        page = offset >> self.page_shift
        spans = self._bound_to(fd, page << self.page_shift, 1 << self.page_shift)
        self._begin(spans)
        self.memfd_pages = {**self.memfd_pages, (fd, page): None}
        self._end(spans)

    def _file(self, fd: int) -> GuestMemfd:
        file = self.slots.files.get(fd)
        if file is None:
            raise ModelError(f"file descriptor {fd} is no guest_memfd")
        return file

    def _bound_to(self, fd: int, offset: int, size: int) -> list[tuple[Gfn, Gfn]]:
        # the frames of all slots that use bytes [offset, offset + size) of the file
        spans = []
        for slots in self.slots.active:
            for slot in slots.slots():
                if slot.gmem is not None and slot.gmem.fd == fd:
                    first = slot.base_gfn + (offset - slot.gmem.offset >> self.page_shift)
                    start, end = max(first, slot.base_gfn), min(first + (size >> self.page_shift), slot.end_gfn)
                    if start < end:
                        spans.append((Gfn(start), Gfn(end)))
        return spans

    def set_userfault(self, slot: int, first: int, count: int, *, wanted: bool) -> None:
        """User space sets or clears bits of a slot's userfault bitmap. Nothing that is mapped already is touched.

        *slot*: number with the address space; pages ``[first, first + count)`` of it.
        """
        found = self.slots.by_id(slot & 0xFFFF, slot >> 16) if slot >> 16 < self.caps.nr_address_spaces else None
        if found is None or not 0 <= first <= first + count <= found.npages:
            raise ModelError(f"slot {slot} has no pages {first} to {first + count}")
        pages = self.userfault.get(slot, FrameSet()).fork()
        (pages.add if wanted else pages.discard)(first, first + count)
        others = {number: marked for number, marked in self.userfault.items() if number != slot}
        self.userfault = {**others, slot: pages} if pages else others


_MOST_PAGES: Final = 1 << 16
