"""Driving an x86 vCPU: two guests, in both of which an address of the guest is a guest-physical one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from struct import Struct, pack
from typing import Final

from kvmfault.contract.live import GuestAccess, Live, Touch
from kvmfault.types import Gfn, Gpa
from kvmfault.vm.caps import HostCaps

_GET_SUPPORTED_CPUID: Final = 0xC008AE05
_SET_CPUID2: Final = 0x4008AE90
_GET_SREGS: Final = 0x8138AE83
_SET_SREGS: Final = 0x4138AE84
_SET_REGS: Final = 0x4090AE82
_SREGS: Final = 312
_SEGMENT: Final = Struct("=QIHBBBBBBBBBx")
"""base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable"""
_CS, _DS, _ES, _SS, _TR, _CR0, _EFER = 0, 24, 48, 120, 144, 224, 264
_CONTROL: Final = Struct("=QQQQQ")
"""cr0, cr2, cr3, cr4, cr8"""
_REGS: Final = Struct("=18Q")
"""rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags"""
_CPUID_ENTRIES: Final = 256
_PORT: Final = 0x80
_PML_ENTRIES: Final = 512

_MEMORY_AT: Final = 0xFFFE0000
_PAGE: Final = 4096
_TASK_AT: Final = _MEMORY_AT + _PAGE
_TABLES_AT: Final = _TASK_AT + _PAGE
_SLICE: Final = 16
_OUT: Final = b"\xee"
"""out dx, al: one byte long, and with IOPL 3 allowed in user mode too."""
_EXIT_IO: Final = 2
_INSTRUCTIONS: Final = {  # the address in (e/r)bx, the value in (r/e)ax; the same bytes in 32-bit and 64-bit code
    (Touch.READ, 1): b"\x8a\x03",
    (Touch.READ, 2): b"\x66\x8b\x03",
    (Touch.READ, 4): b"\x8b\x03",
    (Touch.WRITE, 1): b"\x88\x03",
    (Touch.WRITE, 2): b"\x66\x89\x03",
    (Touch.WRITE, 4): b"\x89\x03",
    (Touch.EXCHANGE, 1): b"\x86\x03",
    (Touch.EXCHANGE, 2): b"\x66\x87\x03",
    (Touch.EXCHANGE, 4): b"\x87\x03",
}
_ENTRY: Final = {key: number * _SLICE for number, key in enumerate(_INSTRUCTIONS)}
_CODE: Final = b"".join(code.ljust(_SLICE, _OUT) for code in _INSTRUCTIONS.values()).ljust(_PAGE, _OUT)


def _tables(at: int) -> bytes:
    # 4 GiB mapped one to one by pages of 2 MiB: one table, one of the next level, four of the last; A and D are set
    last = b"".join(pack("=Q", n << 21 | 0xE7) for n in range(2048))
    upper = b"".join(pack("=Q", at + (2 + n) * _PAGE | 0x67) for n in range(4))
    return pack("=Q", at + _PAGE | 0x67).ljust(_PAGE, b"\0") + upper.ljust(_PAGE, b"\0") + last


# a task segment of zeros but for the offset of its I/O bitmap, whose zeros allow every port: not every KVM keeps IOPL
_TASK: Final = pack("=102xH", 104).ljust(_PAGE, b"\0")


class Guest:
    """See GuestCode. *user*: 64-bit user mode with paging; else 32-bit kernel mode without."""

    def __init__(self, name: str, *, user: bool, interpreted: Callable[[], bool]) -> None:
        self.name = name
        self.gpa, self.end, self.reason = Gpa(_MEMORY_AT), _OUT, _EXIT_IO
        self.interpreted = interpreted
        self._user = user

    @property
    def memory(self) -> bytes:
        """See GuestCode: pages of code, of a task segment, of page tables."""
        return _CODE + _TASK + _tables(_TABLES_AT)

    def prepare(self, kvm: int, vcpu: int) -> None:
        """See GuestCode: the guest sees the host's CPUID, without which there is no 64-bit mode."""
        found = bytearray(8 + 40 * _CPUID_ENTRIES)
        found[:4] = pack("=I", _CPUID_ENTRIES)
        ioctl(kvm, _GET_SUPPORTED_CPUID, found)
        ioctl(vcpu, _SET_CPUID2, found)

    def aim(self, vcpu: int, access: GuestAccess) -> None:
        """See GuestCode."""
        user = self._user
        cpl = 3 if user else 0
        sregs = bytearray(_SREGS)
        ioctl(vcpu, _GET_SREGS, sregs)
        _SEGMENT.pack_into(sregs, _CS, 0, 0xFFFFFFFF, 8 | cpl, 0xB, 1, cpl, not user, 1, user, 1, 0, 0)
        for at in (_DS, _ES, _SS):
            _SEGMENT.pack_into(sregs, at, 0, 0xFFFFFFFF, 16 | cpl, 3, 1, cpl, 1, 1, 0, 1, 0, 0)
        _SEGMENT.pack_into(sregs, _TR, _TASK_AT, _PAGE - 1, 24, 0xB, 1, 0, 0, 0, 0, 0, 0, 0)
        # PE, ET, NE, and for 64 bits WP, PG, PAE, LME, LMA, NXE
        _CONTROL.pack_into(sregs, _CR0, 0x80010031 if user else 0x31, 0, _TABLES_AT, 0x20 if user else 0, 0)
        sregs[_EFER : _EFER + 8] = pack("=Q", 0xD00 if user else 0)
        ioctl(vcpu, _SET_SREGS, bytes(sregs))
        fetch = access.touch is Touch.FETCH
        rip = access.gpa if fetch else self.gpa + _ENTRY[access.touch, access.size]
        ioctl(vcpu, _SET_REGS, _REGS.pack(access.value, access.gpa, 0, _PORT, *[0] * 12, rip, 0x3002))


MODULES: Final = Path("/sys/module")
"""What is loaded, with its parameters."""


def _is_on(module: str, parameter: str) -> bool:
    path = MODULES / module / "parameters" / parameter
    return path.is_file() and path.read_text().strip() in ("Y", "1")


def _loaded(module: str) -> bool:
    return (MODULES / module).is_dir()


def _nested(module: str, parameter: str) -> Callable[[], bool]:
    return lambda: _is_on(module, parameter)


def _shadows() -> bool:
    return (
        _loaded("kvm_pvm")
        or (_loaded("kvm_intel") and not _is_on("kvm_intel", "ept"))
        or (_loaded("kvm_amd") and not _is_on("kvm_amd", "npt"))
    )


def _physical_bits() -> int:
    # MAXPHYADDR; the same line for each CPU
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("address sizes"):
            return int(line.split(":")[1].split()[0])
    return 36  # what CPUID stands for where it says nothing


def _walked(caps: HostCaps) -> HostCaps:
    return replace(caps, max_gfn=Gfn((1 << _physical_bits() - 12) - 1))


def _with_log_of_cpu(caps: HostCaps) -> HostCaps:
    # the buffer of page-modification logging may have to go into the ring at once
    return replace(_walked(caps), ring_reserved=caps.ring_reserved + _PML_ENTRIES * _is_on("kvm_intel", "pml"))


_GUESTS: Final = (
    Guest("kernel", user=False, interpreted=lambda: _loaded("kvm_pvm")),
    Guest("user", user=True, interpreted=lambda: False),
)
"""PVM runs nothing but 64-bit code in user mode on the hardware; its emulator runs the rest."""
EPT: Final = Live(guests=_GUESTS, runs_here=_nested("kvm_intel", "ept"), host=_with_log_of_cpu)
NPT: Final = Live(guests=_GUESTS, runs_here=_nested("kvm_amd", "npt"), host=_walked)
SHADOW: Final = Live(guests=_GUESTS, runs_here=_shadows, host=lambda caps: caps)
