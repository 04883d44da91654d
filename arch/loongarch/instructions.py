"""Loads and stores that KVM emulates for device accesses, by opcode (kvm_emu_mmio_read, kvm_emu_mmio_write).

A load that KVM does not know, such as an atomic or a vector one, is an address error of the guest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from arch.loongarch.registers import BADI


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
_PTR_AT, _IMMEDIATE_AT, _INDEXED_AT = 24, 22, 15


def _all_sizes(immediate: int, indexed: int, *, sizes: int, signed: bool) -> dict[tuple[int, int], tuple[int, bool]]:
    found = {}
    for n, size in enumerate(_SIZES[:sizes]):
        found[_IMMEDIATE_AT, immediate + n] = found[_INDEXED_AT, indexed + 8 * n] = (size, signed)
    return found


_LOADS: Final = {
    **_all_sizes(LD, _LDX, sizes=4, signed=True),
    **_all_sizes(LDU, _LDXU, sizes=3, signed=False),
    (_PTR_AT, _LDPTR_W): (4, True),
    (_PTR_AT, _LDPTR_D): (8, True),
}
_STORES: Final = {
    **_all_sizes(ST, _STX, sizes=4, signed=True),
    (_PTR_AT, _STPTR_W): (4, True),
    (_PTR_AT, _STPTR_D): (8, True),
}
"""(lowest bit of the opcode, opcode) -> (bytes, a load extends the sign)."""


def decode(instruction: int, *, write: bool) -> Decoded | None:
    """The load or store that *instruction* is, or None: KVM knows no such one.

    >>> decode(0x28800085, write=False)  # ld.w $a1, $a0, 0
    Decoded(size=4, signed=True, register=5)
    """
    known = _STORES if write else _LOADS
    for low in (_IMMEDIATE_AT, _INDEXED_AT, _PTR_AT):
        found = known.get((low, instruction >> low))
        if found is not None:
            return Decoded(*found, instruction & BADI["RD"].mask)
    return None


def instruction(size: int, register: int, *, write: bool, signed: bool) -> int:
    """A plain load or store of *size* bytes, address in $a0. The load of 8 bytes exists with sign only."""
    base = ST if write else LD if signed or size == 8 else LDU
    return base + _SIZES.index(size) << _IMMEDIATE_AT | 4 << BADI["RJ"].lo | register
