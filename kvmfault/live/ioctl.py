"""Numbers and layouts of KVM's user interface, as far as a script needs them. (include/uapi/linux/kvm.h)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from struct import Struct
from typing import Final

from kvmfault.vm.caps import HostCaps

__all__ = [
    "API_VERSION",
    "ATTRIBUTES",
    "CAP",
    "CHECK_EXTENSION",
    "CLEAR_DIRTY_LOG",
    "CLEAR_LOG",
    "CREATE_MEMFD",
    "CREATE_VCPU",
    "CREATE_VM",
    "DIRTY_LOG",
    "ENABLE_CAP",
    "EXIT_DATA",
    "EXIT_REASON",
    "GET_API_VERSION",
    "GET_DIRTY_LOG",
    "GET_VCPU_MMAP_SIZE",
    "MEMFD",
    "MEMORY_FAULT",
    "MMIO",
    "MMIO_DATA",
    "PREFAULT",
    "PRE_FAULT",
    "REGION",
    "REGION2",
    "RESET_DIRTY_RINGS",
    "RING_DIRTY",
    "RING_ENTRY",
    "RING_HARVESTED",
    "RING_PAGE",
    "RUN",
    "SET_ATTRIBUTES",
    "SET_REGION",
    "SET_REGION2",
    "UNDECODED",
    "Extension",
    "told",
]

_KVM: Final = 0xAE << 8
_WRITE, _READ = 1 << 30, 2 << 30

API_VERSION: Final = 12
GET_API_VERSION: Final = _KVM | 0x00
CREATE_VM: Final = _KVM | 0x01
CHECK_EXTENSION: Final = _KVM | 0x03
GET_VCPU_MMAP_SIZE: Final = _KVM | 0x04
CREATE_VCPU: Final = _KVM | 0x41
RUN: Final = _KVM | 0x80
RESET_DIRTY_RINGS: Final = _KVM | 0xC7

REGION: Final = Struct("=IIQQQ")
"""slot, flags, guest_phys_addr, memory_size, userspace_addr"""
REGION2: Final = Struct("=IIQQQQI116x")
"""As REGION, guest_memfd_offset, guest_memfd"""
DIRTY_LOG: Final = Struct("=I4xQ")
"""slot, address of the bitmap"""
CLEAR_LOG: Final = Struct("=IIQQ")
"""slot, num_pages, first_page, address of the bitmap"""
CAP: Final = Struct("=IIQQQQ64x")
"""cap, flags, four arguments"""
ATTRIBUTES: Final = Struct("=QQQQ")
"""address, size, attributes, flags"""
MEMFD: Final = Struct("=QQ48x")
"""size, flags"""
PREFAULT: Final = Struct("=QQQ40x")
"""gpa, size, flags"""


def _request(number: int, argument: Struct, direction: int) -> int:
    return direction | argument.size << 16 | _KVM | number


GET_DIRTY_LOG: Final = _request(0x42, DIRTY_LOG, _WRITE)
SET_REGION: Final = _request(0x46, REGION, _WRITE)
SET_REGION2: Final = _request(0x49, REGION2, _WRITE)
ENABLE_CAP: Final = _request(0xA3, CAP, _WRITE)
CLEAR_DIRTY_LOG: Final = _request(0xC0, CLEAR_LOG, _WRITE | _READ)
SET_ATTRIBUTES: Final = _request(0xD2, ATTRIBUTES, _WRITE)
CREATE_MEMFD: Final = _request(0xD4, MEMFD, _WRITE | _READ)
PRE_FAULT: Final = _request(0xD5, PREFAULT, _WRITE | _READ)


class Extension(IntEnum):
    """KVM_CAP_*: what KVM_CHECK_EXTENSION is asked, or ENABLE_CAP given."""

    NR_MEMSLOTS = 10
    READONLY_MEM = 81
    MULTI_ADDRESS_SPACE = 118
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    DIRTY_LOG_RING_ACQ_REL = 223
    USER_MEMORY2 = 231
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    PRE_FAULT_MEMORY = 236
    GUEST_MEMFD_FLAGS = 244


def told(usual: HostCaps, ask: Callable[[Extension], int]) -> HostCaps:
    """*usual* with what a KVM tells of itself; *ask* is KVM_CHECK_EXTENSION."""
    e = Extension
    return replace(
        usual,
        nr_user_slots=ask(e.NR_MEMSLOTS),
        nr_address_spaces=ask(e.MULTI_ADDRESS_SPACE) or 1,
        readonly_slots=bool(ask(e.READONLY_MEM)),
        region2=bool(ask(e.USER_MEMORY2)),
        guest_memfd=bool(ask(e.GUEST_MEMFD)),
        guest_memfd_files=bool(ask(e.GUEST_MEMFD)),
        memfd_flags=ask(e.GUEST_MEMFD_FLAGS),
        memory_attributes=bool(ask(e.MEMORY_ATTRIBUTES)),
    )


# struct kvm_run

EXIT_REASON: Final = 8
"""Offset of the reason."""
EXIT_DATA: Final = 32
"""Offset of the union whose member the reason chooses."""
MMIO: Final = Struct("=Q8sIB")
"""phys_addr, data, len, is_write"""
MMIO_DATA: Final = EXIT_DATA + 8
MEMORY_FAULT: Final = Struct("=QQQ")
"""flags, gpa, size"""
UNDECODED: Final = Struct("=QQ")
"""syndrome, address"""

RING_PAGE: Final = 64
"""Page of a vCPU's mapping where its dirty ring begins. (KVM_DIRTY_LOG_PAGE_OFFSET)"""
RING_ENTRY: Final = Struct("=IIQ")
"""flags, slot, page of the slot"""
RING_DIRTY: Final = 1
RING_HARVESTED: Final = 2
