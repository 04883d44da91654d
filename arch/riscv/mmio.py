"""Device accesses: what HTINST describes, and how the answer reaches the register (kvm_riscv_vcpu_mmio_return)."""

from __future__ import annotations

from typing import Final

from arch.riscv.registers import ZERO
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Completion, MmioAccess
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Ports
from kvmfault.contract.values import SignExtension
from kvmfault.types import U64, Gpa


def access_and_completion(vm: Ports, fault: MmioFault, gpa: Gpa, policy: Policy) -> tuple[MmioAccess, Completion]:
    """The access that HTINST describes at *gpa*; data are little-endian whatever the guest does."""
    size, number = fault.mmio_size or 1, fault.mmio_register or 0
    data = b""
    if fault.is_write:
        data = (vm.register(number) & (1 << 8 * size) - 1).to_bytes(size, "little")
    access = MmioAccess(gpa, size, fault.is_write, data)
    convert = _CONVERT[policy.mmio_sign_extension]
    return access, Completion(access, number, fault.mmio_sign_extend, fault.mmio_wide, convert, ZERO)


def _extended(done: Completion, value: int) -> int:
    bits = 8 * done.access.size
    return value | (U64 << bits & U64 if done.sign_extend and value >> bits - 1 & 1 else 0)


def _cut(done: Completion, value: int) -> int:
    return value


_CONVERT: Final = {SignExtension.KEPT: _extended, SignExtension.LOST: _cut}
