"""Device accesses: what the syndrome describes, and how the answer reaches the register (mmio.c).

A completion keeps all it needs: by the next KVM_RUN the fault registers may hold another fault.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Completion, MmioAccess
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Ports
from kvmfault.contract.values import SignExtension
from kvmfault.types import U64, Gpa

_U32: Final = (1 << 32) - 1


def access_and_completion(vm: Ports, fault: MmioFault, gpa: Gpa, policy: Policy) -> tuple[MmioAccess, Completion]:
    """The access that the syndrome describes (ISV = 1) at *gpa*, byte exact; KVM splits none, whatever it crosses.

    Kernel: io_mem_abort; the completion is kvm_handle_mmio_return.
    """
    size, register = fault.mmio_size or 1, fault.mmio_register or 0
    data = b""
    if fault.is_write:
        value = vm.register(register) & (1 << 8 * size) - 1
        data = value.to_bytes(size, "big" if vm.facts.big_endian else "little")
    access = MmioAccess(gpa, size, fault.is_write, data)
    convert = _CONVERT[policy.mmio_sign_extension, vm.facts.big_endian]
    return access, Completion(access, register, fault.mmio_sign_extend, fault.mmio_wide, convert)


def _swapped(value: int, size: int) -> int:
    return int.from_bytes((value & (1 << 8 * size) - 1).to_bytes(size, "little"), "big")


def _extended(done: Completion, value: int) -> int:
    bits = 8 * done.access.size
    if done.sign_extend and bits < 64 and value >> bits - 1 & 1:
        value |= U64 << bits & U64
    return value


def _convert_lost(done: Completion, value: int, *, big_endian: bool) -> int:
    # 6.12 converts the byte order last, which also cuts the value to the access size again.
    value = _extended(done, value)
    if not done.wide:
        value &= _U32
    size = done.access.size
    return _swapped(value, size) if big_endian else value & (1 << 8 * size) - 1


def _convert_kept(done: Completion, value: int, *, big_endian: bool) -> int:
    # fixed in 2026: byte order, then sign, then register width
    value = _extended(done, _swapped(value, done.access.size) if big_endian else value)
    return value if done.wide else value & _U32


_CONVERT: Final[dict[tuple[SignExtension, bool], Callable[[Completion, int], int]]] = {
    (rule, big_endian): partial(convert, big_endian=big_endian)
    for rule, convert in ((SignExtension.LOST, _convert_lost), (SignExtension.KEPT, _convert_kept))
    for big_endian in (False, True)
}
