"""Device accesses: BADI decoded as KVM does, and how the answer reaches the register (kvm_complete_mmio_read).

A load that KVM does not know, such as an atomic or a vector one, is an address error of the guest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from arch.loongarch.registers import BADI, ZERO
from kvmfault.contract.outcome import Completion, MmioAccess
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Ports
from kvmfault.contract.values import SignExtension
from kvmfault.types import U64, Gpa


class Decoded(NamedTuple):
    """A load or store of one general register."""

    size: int
    signed: bool
    register: int


_SIZES: Final = (1, 2, 4, 8)
LD, ST, LDU = 0xA0, 0xA4, 0xA8
"""Opcodes of ten bits (31:22) of ld.b, st.b and ld.bu; those of the larger sizes follow."""
_LDX, _STX, _LDXU = 0x7000, 0x7020, 0x7040
"""Opcodes of seventeen bits (31:15) of ldx.b, stx.b and ldx.bu; those of the larger sizes follow in steps of 8."""
_LDPTR_W, _STPTR_W, _LDPTR_D, _STPTR_D = 0x24, 0x25, 0x26, 0x27
"""Opcodes of eight bits (31:24)."""


def _opcodes(first: int, step: int, indexed: int, *, sizes: int, signed: bool) -> dict[int, tuple[int, bool]]:
    # first and indexed: the opcode of 10 bits and of 17, by whose 17 bits all are found
    found: dict[int, tuple[int, bool]] = {}
    for n, size in enumerate(_SIZES[:sizes]):
        found |= {(first + n) << 7 | low: (size, signed) for low in range(1 << 7)}
        found[indexed + n * step] = (size, signed)
    return found


def _pointers(word: int, double: int) -> dict[int, tuple[int, bool]]:
    both = ((word, 4), (double, 8))
    return {opcode << 9 | low: (size, True) for opcode, size in both for low in range(1 << 9)}


_LOADS: Final = (
    _opcodes(LD, 8, _LDX, sizes=4, signed=True)
    | _opcodes(LDU, 8, _LDXU, sizes=3, signed=False)
    | _pointers(_LDPTR_W, _LDPTR_D)
)
_STORES: Final = _opcodes(ST, 8, _STX, sizes=4, signed=True) | _pointers(_STPTR_W, _STPTR_D)
"""Opcode of seventeen bits -> (bytes, the load extends the sign). Shorter opcodes stand for all that begin so."""


def decode(instruction: int, *, write: bool) -> Decoded | None:
    """The load or store that *instruction* is, or None: KVM knows no such one. (kvm_emu_mmio_read, _write)

    >>> decode(0x28800085, write=False)  # ld.w $a1, $a0, 0
    Decoded(size=4, signed=True, register=5)
    """
    found = (_STORES if write else _LOADS).get(instruction >> BADI["OPCODE"].lo)
    return None if found is None else Decoded(*found, instruction & BADI["RD"].mask)


def instruction(size: int, register: int, *, write: bool, signed: bool) -> int:
    """A plain load or store of *size* bytes, address in $a0. The load of 8 bytes exists with sign only."""
    base = ST if write else LD if signed or size == 8 else LDU
    return base + _SIZES.index(size) << 22 | 4 << BADI["RJ"].lo | register


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
