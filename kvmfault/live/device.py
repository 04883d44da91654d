"""DeviceKvm: a script's operations on the KVM of this machine, by its ioctls."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from errno import EFAULT
from fcntl import ioctl
from types import TracebackType
from typing import Final, Self

from kvmfault.contract.live import GuestAccess, GuestCode
from kvmfault.contract.outcome import Error, Exit, MemoryFault, MmioAccess, Reason, UndecodedMmio
from kvmfault.errors import LiveError
from kvmfault.live import ioctl as k
from kvmfault.live.script import POOL, POOL_SIZE, Answer, HostAction, guards, log_bytes
from kvmfault.types import Gpa
from kvmfault.vm.memslot_request import NO_FILE, MemslotRequest, Via

__all__ = ["DEVICE", "GUEST_SLOT", "MOST_EXITS", "Device", "DeviceKvm"]

DEVICE: Final = "/dev/kvm"
GUEST_SLOT: Final = 509
"""Id of the slot under the guest's own memory: one that every KVM has, and that scripts leave alone."""
MOST_EXITS: Final = 64
"""Exits of one access, many times what the largest needs."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FIXED: Final = 0x10
_MAP_FIXED_NOREPLACE: Final = 0x100000
_NO_HUGE_PAGES: Final = 15


class Device:
    """/dev/kvm, opened. LiveError, with the reason in one line, where there is no KVM that a script could use."""

    def __init__(self, path: str = DEVICE) -> None:
        try:
            self.fd: int = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise LiveError(f"{path}: {e.strerror}") from None
        try:
            version = ioctl(self.fd, k.GET_API_VERSION)
        except OSError as e:
            os.close(self.fd)
            raise LiveError(f"{path} is no KVM: {e.strerror}") from None
        if version != k.API_VERSION:
            os.close(self.fd)
            raise LiveError(f"{path}: KVM's API version is {version}; it is {k.API_VERSION} since Linux 2.6.22")

    def extension(self, number: int) -> int:
        """KVM_CHECK_EXTENSION: 0 for what this KVM has not."""
        return ioctl(self.fd, k.CHECK_EXTENSION, number)

    def close(self) -> None:
        """Close it. VMs made from it live on."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class DeviceKvm:
    """A VM of *device* with one vCPU that runs *guest*; see script.Kvm. One at a time: they share the pool's address.

    The vCPU exists from the first access on, as the dirty ring has to be enabled before.
    """

    def __init__(self, device: Device, guest: GuestCode) -> None:
        self._guest = guest
        self._run_size = ioctl(device.fd, k.GET_VCPU_MMAP_SIZE)
        self._sizes: dict[int, int] = {}
        self._memfds: dict[int, int] = {}
        self._ring = self._next_entry = 0
        self._vcpu = -1
        self._run: mmap.mmap | None = None
        self._entries: mmap.mmap | None = None
        self._device = device
        self._own = mmap.mmap(-1, len(guest.memory))
        self._own[:] = guest.memory
        with _needs("a VM"):
            self._vm = ioctl(device.fd, k.CREATE_VM, 0)
        self._store = os.memfd_create("kvmfault")
        os.write(self._store, guest.end)
        try:
            self._map(POOL, POOL_SIZE, _MAP_FIXED_NOREPLACE)
        except LiveError:
            os.close(self._vm)
            os.close(self._store)
            raise
        for guard in guards(mmap.PAGESIZE):
            _libc.munmap(guard, mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._own))
        argument = k.REGION.pack(GUEST_SLOT, 0, guest.gpa, len(self._own), address)
        with suppress(OSError):  # a guest without its memory shows at its first access
            ioctl(self._vm, k.SET_REGION, argument)

    def close(self) -> None:
        """End the VM and give the pool back."""
        for part in (self._entries, self._run):
            if part is not None:
                part.close()
        for fd in (self._vcpu, self._vm, self._store, *self._memfds.values()):
            if fd >= 0:
                os.close(fd)
        _libc.munmap(POOL, POOL_SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # Slots.

    def set_region(self, request: MemslotRequest) -> Answer:
        """See Kvm."""
        r = request
        if r.via is Via.REGION1:
            argument = k.REGION.pack(r.slot, r.flags, r.gpa, r.size, r.hva)
            answer = self._do(k.SET_REGION, argument)
        else:
            memfd = self._memfds.get(r.memfd, NO_FILE)
            argument = k.REGION2.pack(r.slot, r.flags, r.gpa, r.size, r.hva, r.memfd_offset, memfd)
            answer = self._do(k.SET_REGION2, argument)
        if not answer.errno:
            self._sizes[r.slot] = r.size
        return answer

    # Dirty log.

    def get_dirty_log(self, slot: int, *, bad_pointer: bool = False) -> Answer:
        """See Kvm."""
        bits = ctypes.create_string_buffer(log_bytes(max(self._sizes.get(slot, 0) // mmap.PAGESIZE, 1)))
        address = 8 if bad_pointer else ctypes.addressof(bits)
        answer = self._do(k.GET_DIRTY_LOG, k.DIRTY_LOG.pack(slot, address))
        if answer.errno:
            return answer
        found = int.from_bytes(bits.raw, "little")
        return Answer(pages=tuple(n for n in range(found.bit_length()) if found >> n & 1))

    def clear_dirty_log(self, slot: int, first: int, count: int, bits: int) -> Answer:
        """See Kvm."""
        buffer = ctypes.create_string_buffer(bits.to_bytes(log_bytes(max(count, 1)), "little"))
        return self._do(k.CLEAR_DIRTY_LOG, k.CLEAR_LOG.pack(slot, count, first, ctypes.addressof(buffer)))

    def manual_protect(self, flags: int) -> Answer:
        """See Kvm."""
        return self._enable(k.Extension.MANUAL_DIRTY_LOG_PROTECT2, flags)

    def dirty_ring(self, size: int) -> Answer:
        """See Kvm."""
        answer = self._enable(k.Extension.DIRTY_LOG_RING_ACQ_REL, size)
        if not answer.errno:
            self._ring = size
        return answer

    def harvest_ring(self) -> Answer:
        """See Kvm."""
        self._start()
        found: list[tuple[int, int]] = []
        ring = self._entries
        while ring is not None:
            at = self._next_entry % (self._ring // k.RING_ENTRY.size) * k.RING_ENTRY.size
            flags, slot, page = k.RING_ENTRY.unpack_from(ring, at)
            if not flags & k.RING_DIRTY:
                break
            k.RING_ENTRY.pack_into(ring, at, k.RING_HARVESTED, slot, page)
            found.append((slot, page))
            self._next_entry += 1
        return Answer(ring=tuple(found))

    def reset_rings(self) -> Answer:
        """See Kvm."""
        try:
            return Answer(reset=ioctl(self._vm, k.RESET_DIRTY_RINGS))
        except OSError as e:
            return Answer(_errno(e))

    # Attributes, guest_memfd, pre-fault.

    def set_attributes(self, gpa: int, size: int, attributes: int, flags: int) -> Answer:
        """See Kvm."""
        return self._do(k.SET_ATTRIBUTES, k.ATTRIBUTES.pack(gpa, size, attributes, flags))

    def create_memfd(self, fd: int, size: int, flags: int) -> Answer:
        """See Kvm."""
        try:
            self._memfds[fd] = ioctl(self._vm, k.CREATE_MEMFD, bytearray(k.MEMFD.pack(size, flags)))  # of bytes: bytes
        except OSError as e:
            return Answer(_errno(e))
        return Answer()

    def prefault(self, gpa: int, size: int, flags: int) -> Answer:
        """See Kvm."""
        self._start()
        argument = bytearray(k.PREFAULT.pack(gpa, size, flags))
        try:
            errno = 0
            ioctl(self._vcpu, k.PRE_FAULT, argument)
        except OSError as e:
            errno = _errno(e)
        gpa, size, _ = k.PREFAULT.unpack(argument)
        return Answer(errno, rest=(gpa, size))

    # Host memory and the guest.

    def host(self, action: HostAction, hva: int, size: int) -> Answer:
        """See Kvm. Raises LiveError for a range that is not in the pool or not whole pages."""
        pages = range(hva, hva + size, mmap.PAGESIZE)
        inside = POOL <= hva <= POOL + POOL_SIZE - size and not (hva | size) % mmap.PAGESIZE
        if not inside or any(guard in pages for guard in guards(mmap.PAGESIZE)):
            raise LiveError(
                f"{size:#x} bytes at {hva:#x} are not whole pages of the pool at {POOL:#x}, or have a guard"
            )
        for page in pages:
            self._change(action, page)
        return Answer()

    def _change(self, action: HostAction, page: int) -> None:
        # what cannot be done, because nothing is mapped there or it is protected, is not done
        match action:
            case HostAction.MAP:
                self._map(page, mmap.PAGESIZE, _MAP_FIXED)
            case HostAction.UNMAP:
                _libc.munmap(page, mmap.PAGESIZE)
            case HostAction.READ_ONLY:
                _libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ)
            case HostAction.NO_ACCESS:
                _libc.mprotect(page, mmap.PAGESIZE, 0)
            case HostAction.WRITABLE:
                _libc.mprotect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
            case HostAction.DISCARD:
                _libc.madvise(page, mmap.PAGESIZE, mmap.MADV_DONTNEED)
            case HostAction.STORE:
                with suppress(OSError):  # by a system call: a store of this process itself might end it
                    os.preadv(self._store, [(ctypes.c_char * 1).from_address(page)], 0)

    def access(self, access: GuestAccess) -> Answer:
        """See Kvm. Raises LiveError for an exit that no access has."""
        run = self._start()
        with _needs(f"the registers of guest {self._guest.name}"):
            self._guest.aim(self._vcpu, access)
        exits: list[Exit | Error] = []
        while len(exits) < MOST_EXITS:
            try:
                errno = 0
                ioctl(self._vcpu, k.RUN)
            except OSError as e:
                errno = _errno(e)
            reason = int.from_bytes(run[k.EXIT_REASON : k.EXIT_REASON + 4], "little")
            if reason == self._guest.reason and not errno:
                break
            done = _exit(run, reason, errno)
            exits.append(done)
            if not isinstance(done, Exit) or done.reason is not Reason.MMIO:
                break
            if isinstance(done.detail, MmioAccess) and not done.detail.is_write:
                run[k.MMIO_DATA : k.MMIO_DATA + 8] = bytes(8)
        return Answer(exits=tuple(exits))

    # Inside.

    def _do(self, request: int, argument: bytes) -> Answer:
        try:
            ioctl(self._vm, request, argument)
        except OSError as e:
            return Answer(_errno(e))
        return Answer()

    def _enable(self, extension: k.Extension, value: int) -> Answer:
        return self._do(k.ENABLE_CAP, k.CAP.pack(extension, 0, value, 0, 0, 0))

    def _start(self) -> mmap.mmap:
        if self._run is None:
            with _needs("a vCPU"):
                self._vcpu = ioctl(self._vm, k.CREATE_VCPU, 0)
                self._guest.prepare(self._device.fd, self._vcpu)
            self._run = mmap.mmap(self._vcpu, self._run_size)
            if self._ring:
                self._entries = mmap.mmap(self._vcpu, self._ring, offset=k.RING_PAGE * mmap.PAGESIZE)
        return self._run

    def _map(self, hva: int, size: int, how: int) -> None:
        # present, so that the guest's first read finds a page that may be written; without huge pages, as the model's
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | how
        if _libc.mmap(hva, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != hva:
            raise LiveError(f"user address {hva:#x} is taken: another VM of this process?")
        _libc.madvise(hva, size, _NO_HUGE_PAGES)
        ctypes.memset(hva, self._guest.end[0], size)


def _exit(run: mmap.mmap, reason: int, errno: int) -> Exit | Error:
    try:
        known = Reason(reason)
    except ValueError:
        if not errno:
            raise LiveError(f"KVM_RUN returned with exit reason {reason}, which no access has") from None
        return Error(errno)
    detail: MmioAccess | MemoryFault | UndecodedMmio | None = None
    match known:
        case Reason.MMIO:
            gpa, data, size, is_write = k.MMIO.unpack_from(run, k.EXIT_DATA)
            detail = MmioAccess(Gpa(gpa), size, bool(is_write), data[:size] if is_write else b"")
        case Reason.MEMORY_FAULT:
            flags, gpa, size = k.MEMORY_FAULT.unpack_from(run, k.EXIT_DATA)
            detail = MemoryFault(Gpa(gpa), size, flags)
        case Reason.UNDECODED_MMIO:
            detail = UndecodedMmio(*k.UNDECODED.unpack_from(run, k.EXIT_DATA))
        case Reason.INTR | Reason.INTERNAL_ERROR | Reason.DIRTY_RING_FULL:
            pass
    # KVM_RUN sets the reason to "unknown" first, but leaves an older one where it fails before that
    return Error(errno) if errno and known is not Reason.MEMORY_FAULT else Exit(known, detail, errno)


@contextmanager
def _needs(what: str) -> Generator[None]:
    # what every script takes for granted
    try:
        yield
    except OSError as e:
        raise LiveError(f"this KVM refuses {what}: {e.strerror}") from None


def _errno(e: OSError) -> int:
    return e.errno or EFAULT
