"""Device accesses: what the instruction in BADI is, and how the answer reaches the register.

Kernel: kvm_emu_mmio_read, kvm_emu_mmio_write, kvm_complete_mmio_read.
"""

from __future__ import annotations

from typing import Final

from arch.loongarch.instructions import Decoded
from arch.loongarch.registers import ZERO
from kvmfault.contract.outcome import Completion, MmioAccess
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Ports
from kvmfault.contract.values import SignExtension
from kvmfault.types import U64, Gpa


def access_and_completion(
    vm: Ports, decoded: Decoded, gpa: Gpa, policy: Policy, *, write: bool
) -> tuple[MmioAccess, Completion]:
    """The access at *gpa*, little-endian; KVM does not look at its alignment."""
    data = b""
    if write:
        data = (vm.register(decoded.register) & (1 << 8 * decoded.size) - 1).to_bytes(decoded.size, "little")
    access = MmioAccess(gpa, decoded.size, write, data)
    convert = _CONVERT[policy.mmio_sign_extension]
    signed = decoded.signed and not write
    return access, Completion(access, decoded.register, signed, True, convert, ZERO)


def _extended(done: Completion, value: int) -> int:
    bits = 8 * done.access.size
    return value | (U64 << bits & U64 if done.sign_extend and value >> bits - 1 & 1 else 0)


def _cut(done: Completion, value: int) -> int:
    return value


_CONVERT: Final = {SignExtension.KEPT: _extended, SignExtension.LOST: _cut}
