"""Registers for an access, however it came about: a fault without a vCPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.powerpc.registers import ASDR, HDSI, HDSISR, HISI, KVM
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Stage2Format

_CAUSES: Final = {Cause.PERMISSION: "PROTFAULT", Cause.ACCESS_FLAG: "SET_RC", Cause.RESERVED: "UNSUPP_MMU"}
_LOADS: Final = {1: 34 << 26, 2: 40 << 26, 4: 32 << 26, 8: 58 << 26}
_SIGNED: Final = {2: 42 << 26, 4: 58 << 26 | 2}
_STORES: Final = {1: 38 << 26, 2: 44 << 26, 4: 36 << 26, 8: 62 << 26}
_CACHE_OP: Final = 31 << 26 | 86 << 1

REASONS: Final[Mapping[str, str]] = {
    "gpa": "ASDR holds bits 59:12 of the guest real address",
    "offset": "it is the low end of HDAR, which for an access to the guest's tables is another address",
    "gva": "HDAR also gives the page offset; its other bits are made up, or another address",
    "read": "what neither stores nor fetches is a load",
    "write": "a plain bit: no is the default",
    "exec": "an access to the guest's tables is no fetch",
    "cause": "there is no bit for it",
    "on_walk": "a plain bit: no is the default",
    "final": "what is not made for a walk is to the final address",
    "cache_op": "the instruction would have to be known, and be cache maintenance",
    "protection_key": "a plain bit: no is the default",
    "shadow_stack": "there is none",
    "prefetch": "a plain bit: somebody waits is the default",
    "size": "the plain forms describe a load or store of 1, 2, 4 or 8 bytes of one of 32 registers",
    "register": "the plain forms name one of 32 registers, and cache maintenance names none",
    "sign_extend": "loads that sign-extend have 2 or 4 bytes, and lwa is told from ld by its last bits only",
    "wide": "registers are 64 bits wide",
    "ordered": "no load or store of this kind orders others",
}


def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """(registers, why a member may come back changed)."""
    walk = access.on_walk is True
    fetch = access.exec is True and not walk
    bits = {
        _cause(access.cause, fetch): True,
        "ISSTORE": access.write is True,
        "PRTABLE": walk,
        "KEYFAULT": access.protection_key is True,
    }
    registers = {
        "TRAP": HISI if fetch else HDSI,
        "HDSISR": sum(HDSISR[name].mask for name, on in bits.items() if on),
        "KVM": KVM["PREFETCH"].mask if access.prefetch is True else 0,
    }
    if access.gva is not None:
        at_page = access.gva & ~0xFFF
        registers["HDAR"] = access.gva if access.offset is None or walk else at_page | access.offset
    elif access.offset is not None and not walk:
        registers["HDAR"] = access.offset
    if access.gpa is not None and access.gpa >> 60 == 0:
        registers["ASDR"] = access.gpa & ASDR["GRA"].mask
    if (word := _instruction(access, fetch)) is not None:
        registers["INST"] = word
    return registers, REASONS


def _cause(cause: Cause | None, fetch: bool) -> str:
    if cause is Cause.OTHER:
        return "NOEXEC_OR_G" if fetch else "BADACCESS"
    return _CAUSES.get(cause, "NOHPTE") if cause is not None else "NOHPTE"


def _instruction(access: Access, fetch: bool) -> int | None:
    if access.cache_op is True:
        return _CACHE_OP
    number = access.register
    if fetch or access.size not in _LOADS or number is None or not 0 <= number < 32:
        return None
    loads = _SIGNED if access.sign_extend is True and access.size in _SIGNED else _LOADS
    return (_STORES if access.write is True else loads)[access.size] | number << 21
