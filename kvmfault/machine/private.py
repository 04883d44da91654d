"""Memory that user space gives in other ways than by a slot: attributes, guest_memfd, the userfault bitmap."""

from __future__ import annotations

from errno import EINVAL, ENOTTY
from typing import Final

from kvmfault.errors import ModelError
from kvmfault.machine.surroundings import Surroundings
from kvmfault.types import U64, Gfn, Pfn
from kvmfault.vm.frames import FrameSet

ATTRIBUTE_PRIVATE: Final = 1 << 3
"""KVM_MEMORY_ATTRIBUTE_PRIVATE."""
_PUNCHED_FRAMES: Final = 1 << 45
"""First frame given to pages whose hole was punched: away from all others of the model."""


class PrivateMemory(Surroundings):
    """Errnos are positive; 0 is success."""

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
        self.invalidations.begin()
        self.invalidations.add(Gfn(start), Gfn(end))
        self.table.unmap(*self.bytes_of(start, end))
        self.flush_stale()
        (self.private.add if private else self.private.discard)(start, end)
        self.invalidations.end()
        return 0

    def create_guest_memfd(self, fd: int, size: int, flags: int = 0) -> int:
        """KVM_CREATE_GUEST_MEMFD, the file known as *fd* from here on. ModelError: the number is in use."""
        if not (self.caps.guest_memfd or self.caps.guest_memfd_files):
            return ENOTTY
        signed = size - (1 << 64) if size >> 63 else size
        return self.slots.create_guest_memfd(fd, signed, flags & ~self.caps.memfd_flags)

    def punch_hole(self, fd: int, offset: int, size: int) -> None:
        """fallocate(PUNCH_HOLE) of whole pages: they leave the guest, and the next use gets other, cleared ones.

        Kernel: kvm_gmem_punch_hole.
        """
        self._invalidate_file(fd, offset, size)
        pages = range(offset >> self.page_shift, offset + size >> self.page_shift)
        changed = dict(self.memfds)
        for page in pages:
            changed[fd, page] = Pfn(_PUNCHED_FRAMES + len(self.memfds) + page - pages.start)
        self.memfds = changed

    def poison_memfd(self, fd: int, offset: int) -> None:
        """The page at *offset* of a guest_memfd fails for good. (kvm_gmem_error_folio)"""
        self._invalidate_file(fd, offset, 1 << self.page_shift)
        self.memfds = {**self.memfds, (fd, offset >> self.page_shift): None}

    def _invalidate_file(self, fd: int, offset: int, size: int) -> None:
        file, page = self.slots.files.get(fd), (1 << self.page_shift)
        if file is None or size <= 0 or (offset | size) & (page - 1) or not 0 <= offset <= file.size - size:
            raise ModelError(f"bytes {offset:#x} to {offset + size:#x} are not whole pages of guest_memfd {fd}")
        if size >> self.page_shift > _MOST_PAGES:
            raise ModelError(f"a hole of {size:#x} bytes: the model takes at most {_MOST_PAGES} pages at once")
        pages = size >> self.page_shift
        spans = []
        for as_id in range(self.caps.nr_address_spaces):
            for slot in self.slots.slots(as_id):
                if slot.gmem is not None and slot.gmem.fd == fd:
                    first = slot.base_gfn + (offset - slot.gmem.offset >> self.page_shift)
                    start, end = max(first, slot.base_gfn), min(first + pages, slot.end_gfn)
                    if start < end:
                        spans.append((Gfn(start), Gfn(end)))
        if spans:
            self.invalidations.begin()
            for start, end in spans:
                self.invalidations.add(start, end)
                self.table.unmap(*self.bytes_of(start, end))
            self.flush_stale()
            self.invalidations.end()

    def set_userfault(self, slot: int, first: int, count: int, *, wanted: bool) -> None:
        """User space sets or clears bits of a slot's userfault bitmap. Nothing that is mapped already is touched.

        *slot*: number with the address space; pages ``[first, first + count)`` of it.
        """
        found = self.slots.by_id(slot & 0xFFFF, slot >> 16) if slot >> 16 < self.caps.nr_address_spaces else None
        if found is None or not 0 <= first <= first + count <= found.npages:
            raise ModelError(f"slot {slot} has no pages {first} to {first + count}")
        pages = self.userfault.get(slot, FrameSet()).fork()
        (pages.add if wanted else pages.discard)(first, first + count)
        self.userfault = {**self.userfault, slot: pages}


_MOST_PAGES: Final = 1 << 16
