"""Registers for an access, however it came about: a fault without a hart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.riscv.facts import SIZES
from arch.riscv.registers import INSTRUCTION, KVM, LOAD, OP_LOAD, OP_STORE, READ_OF_WALK, STORE, WRITE_OF_WALK
from kvmfault.contract.access import Access
from kvmfault.contract.format import Stage2Format

_SIGNED: Final = {size: funct3 for funct3, size in SIZES.items() if funct3 < 4}
_UNSIGNED: Final = {size: funct3 for funct3, size in SIZES.items() if funct3 > 3}
_SAME: Final = "a missing entry, a forbidden access and all else have the same code"

REASONS: Final[Mapping[str, str]] = {
    "gpa": "a guest-page fault always has an address",
    "offset": "its low two bits are those of STVAL, and for a fault on a walk it is not known",
    "gva": "the low two bits of STVAL also are those of the guest-physical address",
    "read": "the code has one kind of access, and a store on a walk of its own tables reads them or writes them",
    "write": "the code has one kind of access; on a walk it is that of the instruction",
    "exec": "the code has one kind of access, and a fault on a walk is no fetch",
    "cause": _SAME,
    "on_walk": "HTINST always says whether it was a walk",
    "final": "what is not made for a walk is to the final address",
    "cache_op": "cache operations are reported as stores",
    "protection_key": "there are none",
    "shadow_stack": "accesses to shadow stacks are reported as stores",
    "private": "a VM has no private memory",
    "prefetch": "a plain bit: somebody waits is the default",
    "size": "HTINST describes loads and stores of 1, 2, 4 or 8 bytes of one register, not fetches or walks",
    "register": "HTINST describes loads and stores of 1, 2, 4 or 8 bytes of one register, not fetches or walks",
    "sign_extend": "only loads of 1, 2 or 4 bytes extend",
    "wide": "registers have 64 bits",
    "ordered": "KVM decodes plain loads and stores",
}


def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """(registers, why a member may come back changed)."""
    walk = access.on_walk is True
    fetch = access.exec is True and not walk
    code = STORE if access.write is True else INSTRUCTION if fetch else LOAD
    registers = {
        "SCAUSE": code,
        "HTINST": _walk(access) if walk else _instruction(access, code),
        "KVM": KVM["PREFETCH"].mask if access.prefetch is True else 0,
    }
    low = access.offset if access.offset is not None and not walk else access.gva
    if access.gva is not None:
        registers["STVAL"] = access.gva & ~3 | (low or 0) & 3
    elif access.offset is not None and not walk:
        registers["STVAL"] = access.offset
    if access.gpa is not None:
        registers["HTVAL"] = (access.gpa | (access.offset or 0)) >> 2
    return registers, REASONS


def _walk(access: Access) -> int:
    return READ_OF_WALK if access.read is not False else WRITE_OF_WALK


def _instruction(access: Access, code: int) -> int:
    # without a description HTINST is 0, as every hart may leave it
    size, number = access.size, access.register
    if size not in _SIGNED or number is None or not 0 <= number < 32 or code == INSTRUCTION:
        return 0
    if code == STORE:
        return transformed(OP_STORE, _SIGNED[size], number)
    signed = access.sign_extend is True or size not in _UNSIGNED
    return transformed(OP_LOAD, (_SIGNED if signed else _UNSIGNED)[size], number)


def transformed(opcode: int, funct3: int, number: int) -> int:
    """HTINST for a load or store of 32 bits of register *number*."""
    return number << (20 if opcode == OP_STORE else 7) | funct3 << 12 | opcode << 2 | 3
