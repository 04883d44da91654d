"""ModelKvm: a script's operations on the model."""

from __future__ import annotations

from errno import EFAULT
from typing import Final

from kvmfault.contract.live import GuestAccess, Touch
from kvmfault.contract.outcome import Error, Exit
from kvmfault.contract.ports import GuestTranslation
from kvmfault.live.script import POOL, POOL_SIZE, Answer, HostAction, guards
from kvmfault.machine.vm import Vm
from kvmfault.types import Gpa, Hva
from kvmfault.vm.memslot_request import MemslotRequest

__all__ = ["ModelKvm", "OneToOne"]


class OneToOne(Vm):
    """A VM whose guest, where it has tables of its own that matter, maps every address to itself."""

    def walk_guest(self, gpa: Gpa) -> GuestTranslation:
        """See Ports."""
        return GuestTranslation(gpa, _GUEST_BLOCK)


_GUEST_BLOCK: Final = 2 << 20


class ModelKvm:
    """*vm*, which has no slots yet, as a script drives it; see script.Kvm.

    *interpreted*: KVM's emulator runs the whole guest, so that no access goes through the second-stage table.
    """

    def __init__(self, vm: Vm, *, interpreted: bool = False) -> None:
        self.vm: Vm = vm.back(POOL, POOL_SIZE)
        self._interpreted = interpreted
        self._page = 1 << vm.page_shift
        for guard in guards(self._page):
            vm.invalidate(vm.host.unback(Hva(guard), self._page))
        self._is: dict[int, HostAction] = {}  # how pages are mapped, where not writable

    def set_region(self, request: MemslotRequest) -> Answer:
        """See Kvm."""
        return Answer(self.vm.set_region(request).errno)

    def get_dirty_log(self, slot: int, *, bad_pointer: bool = False) -> Answer:
        """See Kvm. The bitmap is copied last: what a bad pointer lost is lost."""
        log = self.vm.get_dirty_log(slot)
        return Answer(EFAULT) if bad_pointer and not log.errno else Answer(log.errno, log.pages)

    def clear_dirty_log(self, slot: int, first: int, count: int, bits: int) -> Answer:
        """See Kvm."""
        return Answer(self.vm.clear_dirty_log(slot, first, count, bits))

    def manual_protect(self, flags: int) -> Answer:
        """See Kvm."""
        return Answer(self.vm.enable_manual_protect(flags))

    def dirty_ring(self, size: int) -> Answer:
        """See Kvm."""
        return Answer(self.vm.enable_dirty_ring(size))

    def harvest_ring(self) -> Answer:
        """See Kvm."""
        return Answer(ring=tuple((entry.slot, entry.offset) for entry in self.vm.harvest_ring()))

    def reset_rings(self) -> Answer:
        """See Kvm."""
        return Answer(reset=self.vm.reset_rings())

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int) -> Answer:
        """See Kvm."""
        return Answer(self.vm.set_attributes(gpa, size, attributes, flags))

    def create_memfd(self, fd: int, size: int, flags: int) -> Answer:
        """See Kvm."""
        return Answer(self.vm.create_guest_memfd(fd, size, flags))

    def prefault(self, gpa: int, size: int, flags: int) -> Answer:
        """See Kvm."""
        done = self.vm.prefault(gpa, size, flags)
        return Answer(done.errno, rest=(done.gpa, done.size))

    def host(self, action: HostAction, hva: int, size: int) -> Answer:
        """See Kvm."""
        for page in range(hva, hva + size, self._page):
            self._change(action, page)
        return Answer()

    def _change(self, action: HostAction, page: int) -> None:
        was = self._is.get(page, HostAction.WRITABLE)
        if action is not HostAction.MAP and was in (HostAction.UNMAP, action):
            return  # nothing is there to change, or it is so already: the kernel invalidates nothing
        match action:
            case HostAction.STORE:
                self.vm.invalidate(self.vm.host.pin(Hva(page), write=True).invalidated)  # it copies a shared page
                return
            case HostAction.DISCARD:
                self.vm.invalidate(self.vm.host.make_cow(Hva(page), zero=True))
                return
            case HostAction.MAP | HostAction.WRITABLE:
                self.vm.back(page, self._page)
            case HostAction.READ_ONLY:
                self.vm.back(page, self._page, readonly=True)
            case HostAction.UNMAP | HostAction.NO_ACCESS:
                self.vm.invalidate(self.vm.host.unback(Hva(page), self._page))
        self._is[page] = HostAction.WRITABLE if action is HostAction.MAP else action

    def access(self, access: GuestAccess) -> Answer:
        """See Kvm."""
        run = self.vm.access(
            access.gpa,
            access.size,
            write=access.touch is Touch.WRITE,
            exchange=access.touch is Touch.EXCHANGE,
            fetch=access.touch is Touch.FETCH,
            data=access.value,
            emulated=self._interpreted,
        )
        return Answer(exits=tuple(done for done in run.exits if isinstance(done, Exit | Error)))
