"""Registers for an access, however it came about: a fault without a vCPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.loongarch.instructions import instruction
from arch.loongarch.registers import ESTAT, KVM, PIF, PIL, PIS, PME, PNR, PNX, PPI
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Stage2Format

_ONE: Final = "the code has one kind of access"
REASONS: Final[Mapping[str, str]] = {
    "gpa": "BADV always is the address",
    "offset": "BADV has all bits of the address",
    "gva": "only of a fetch it is known: the program counter",
    "read": f"{_ONE}; one that fails for its privilege does not tell which",
    "write": f"{_ONE}; one that fails for its privilege does not tell which",
    "exec": f"{_ONE}; one that fails for its privilege does not tell which",
    "cause": "there are codes for an invalid page, and for one that forbids the access",
    "cache_op": "cache operations trap as such, with no address",
    "protection_key": "there are none",
    "shadow_stack": "there are none",
    "private": "a VM has no private memory",
    "prefetch": "a plain bit: somebody waits is the default",
}
_MISSING: Final = {"write": PIS, "exec": PIF, "read": PIL}
_FORBIDDEN: Final = {"write": PME, "exec": PNX, "read": PNR}


def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """(registers, why a member may come back changed). BADI gets a plain load or store, which is not told back.

    A store to an entry without D is the one that KVM can handle of those that an entry forbids, and what the guest's
    own accesses meet here; a load or fetch that finds no V finds an invalid page.
    """
    kinds = [name for name, on in (("write", access.write), ("exec", access.exec), ("read", access.read)) if on]
    if access.cause is Cause.PERMISSION:
        code = _FORBIDDEN[kinds[0]] if kinds else PPI
    else:
        code = _MISSING[kinds[0]] if kinds else PIL
    registers = {
        "ESTAT": code << ESTAT["ECODE"].lo,
        "BADI": _instruction(access),
        "KVM": KVM["PREFETCH"].mask if access.prefetch is True else 0,
    }
    if access.gpa is not None:
        registers["BADV"] = access.gpa | (access.offset or 0)
    if access.gva is not None and code in (PIF, PNX):
        registers["PC"] = access.gva
    return registers, REASONS


def _instruction(access: Access) -> int:
    size, number = access.size, access.register
    if size not in (1, 2, 4, 8) or number is None or not 0 <= number < 32:
        return 0
    return instruction(size, number, write=access.write is True, signed=access.sign_extend is True)
