"""Registers for an access, however it came about: a fault without a vCPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.s390.registers import (
    ASCE_TYPE,
    GRANULES,
    INT_CODE,
    KVM,
    NON_SECURE_ACCESS,
    PAGE,
    PROTECTION,
    SECURE_ACCESS,
    TEID,
)
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Stage2Format

_CODES: Final = {
    Cause.PERMISSION: PROTECTION,
    Cause.ADDRESS_SIZE: ASCE_TYPE,
    Cause.OTHER: SECURE_ACCESS,
}
_OF_GRANULE: Final = {size: code for code, size in GRANULES.items()}
_STORE, _FETCH = 1 << TEID["FSI"].lo, 2 << TEID["FSI"].lo

REASONS: Final[Mapping[str, str]] = {
    "gpa": "TEID holds the page's address, 64 bits",
    "write": "TEID tells it with the address; a page that is not secure yet has to be writable",
    "cause": "there is no code for it: an old entry is reported like a missing one",
    "granule": "the code names the nearest level, and only translation exceptions name one",
    "cache_op": "there is none",
    "protection_key": "only protection exceptions tell, with the address",
    "shadow_stack": "there is none",
    "private": "only an access to a page that is not secure yet tells",
    "prefetch": "a plain bit: somebody waits is the default",
}


def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """(registers, why a member may come back changed)."""
    code = _code(access)
    detail = _STORE if access.write is True else _FETCH
    if code == PROTECTION:
        detail |= TEID["B60" if access.protection_key is True else "B61"].mask
        if access.write is not True:
            code |= INT_CODE["PER"].mask  # the one way in which KVM takes it for a read
    registers = {"INT_CODE": code, "KVM": KVM["PREFETCH"].mask if access.prefetch is True else 0}
    if access.gpa is not None and access.gpa >> 64 == 0:
        registers["TEID"] = access.gpa & TEID["ADDR"].mask | detail
    return registers, REASONS


def _code(access: Access) -> int:
    if access.private is True:
        return NON_SECURE_ACCESS
    if access.cause in _CODES:
        return _CODES[access.cause]
    wanted = access.granule or 1 << 12
    return _OF_GRANULE[max((size for size in _OF_GRANULE if size <= wanted), default=GRANULES[PAGE])]
