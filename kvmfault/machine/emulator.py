"""KVM's instruction emulator, as far as page faults go: what becomes of an access that cannot be mapped."""

from __future__ import annotations

from kvmfault.contract.access import Access
from kvmfault.contract.outcome import Exit, MmioAccess, Outcome, Reason
from kvmfault.contract.ports import GuestTranslation, PinError
from kvmfault.machine.dirty import DirtyLogging
from kvmfault.types import Gfn, Gpa, Pfn

__all__ = ["Emulator"]


class Emulator(DirtyLogging):
    """Carries accesses out in the guest's place."""

    def emulate(self, gpa: Gpa, size: int, wanted: Access, data: int) -> tuple[Outcome, ...] | None:
        """The emulator carries the access out: memory by itself, the rest as device accesses of at most 8 bytes.

        What is left to the VMM, in order; None: the access waits for user space to supply a page.
        Kernel: emulator_read_write; the parts are those of the pages touched, and devices come after all memory.
        """
        if wanted.exec and self._in_memory(self.canonical(gpa), False) is not None:
            return (Exit(Reason.INTERNAL_ERROR, why="the emulator cannot fetch the instruction"),)
        exits: list[Outcome] = []
        for write in (False,) * bool(wanted.read) + (True,) * bool(wanted.write):
            if write and wanted.read and self._exchange_fails(gpa, size):
                return (*exits, Exit(Reason.INTERNAL_ERROR, why="the emulator cannot exchange values in host memory"))
            done = self._parts(gpa, size, write, data)
            if done is None:
                return None
            exits += done
        return tuple(exits)

    def _parts(self, gpa: Gpa, size: int, write: bool, data: int) -> list[Exit] | None:
        exits: list[Exit] = []
        page = 1 << self.page_shift
        at, end = int(gpa), gpa + size
        while at < end:
            part = min(end, (at & -page) + page)
            physical = self.canonical(Gpa(at))
            error = PinError.NO_SLOT if self._remembered(physical) else self._in_memory(physical, write)
            if error is PinError.WAITS:
                return None
            if error is not None:
                for piece in range(at, part, 8):
                    where, rest = Gpa(physical + piece - at), data >> 8 * (piece - gpa)
                    exits += self._device(where, min(8, part - piece), write, rest)
            at = part
        return exits

    def _remembered(self, gpa: Gpa) -> bool:
        # what the vCPU remembers goes before what is there (vcpu_is_mmio_gpa, vcpu_match_mmio_gpa)
        noted = self.slots.generation(self.mmio_space())
        return self.vcpu.mmio.hits(gpa, noted, self.page_shift, direct=True, nested=False)

    def canonical(self, address: Gpa) -> Gpa:
        """The guest-physical address that the emulator finds for an address of the guest; its tables translate it."""
        guest = self.walk_guest(address)
        return guest.gpa if isinstance(guest, GuestTranslation) else address

    def _in_memory(self, gpa: Gpa, write: bool) -> PinError | None:
        # kvm_vcpu_read_guest, kvm_vcpu_write_guest: by the user address, whatever the table says; None: done
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.find_slot(gfn)
        if slot is None or slot.invalid or (write and slot.readonly):
            return PinError.NO_SLOT
        got = self.host.pin(slot.hva_of(gfn), write=write)
        if got.invalidated is not None:
            self.invalidate(got.invalidated)
        if got.error is None and write:
            self.mark_dirty(slot, gfn, Pfn(0))
        return got.error

    def _exchange_fails(self, gpa: Gpa, size: int) -> bool:
        # emulator_cmpxchg_emulated: not within one page, or not in a slot that may be written, it is a plain store
        gfn = Gfn(self.canonical(gpa) >> self.page_shift)
        slot = self.find_slot(gfn)
        crosses = (gpa + size - 1 ^ gpa) >> self.page_shift
        if slot is None or slot.invalid or slot.readonly or crosses:
            return False
        return self.host.fork().pin(slot.hva_of(gfn), write=True).error is not None

    def _device(self, gpa: Gpa, size: int, write: bool, data: int) -> tuple[Exit, ...]:
        value = (data & (1 << 8 * size) - 1).to_bytes(size, "little") if write else b""
        access = MmioAccess(gpa, size, write, value)
        return () if self.bus(access) is not None else (Exit(Reason.MMIO, access, why="a device access"),)
