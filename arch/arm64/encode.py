"""Registers for an access, however it came about: a fault without a vCPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.arm64.codes import ACCESS_FLAG, DABT_LOW, EXTERNAL, IABT_LOW, PERMISSION, TLB_CONFLICT, TRANSLATION
from arch.arm64.facts import granules
from arch.arm64.registers import ESR_EL2, HPFAR_EL2, KVM, compose
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Stage2Format

_SIZES: Final = {1: 0, 2: 1, 4: 2, 8: 3}
_WITHOUT_LEVEL: Final = {Cause.EXTERNAL: EXTERNAL, Cause.ADDRESS_SIZE: 0x00, Cause.OTHER: TLB_CONFLICT}
_WITH_LEVEL: Final = {Cause.ACCESS_FLAG: ACCESS_FLAG, Cause.PERMISSION: PERMISSION}
_EXTERNAL_ON_WALK: Final = 0x14

REASONS: Final[Mapping[str, str]] = {
    "gpa": "HPFAR_EL2 holds 56 bits of address, and is not valid for an external abort on a walk",
    "offset": "it is the low end of FAR_EL2, which for a fault on a walk is another address",
    "gva": "FAR_EL2 also has to give the page offset; its other bits are made up, or another address",
    "read": "the syndrome has one bit: a write, or else a read",
    "write": "a fetch is no write, and an access of a table walk is a write exactly if permission failed",
    "exec": "an access of a table walk, or a write, is no fetch",
    "cause": "there is no status code for it: an entry with reserved bits is reported like a missing one",
    "on_walk": "S1PTW always says whether it was a walk",
    "final": "what is not made for a walk is to the final address",
    "granule": "the status code names the nearest level of this page size, and only some codes name one",
    "cache_op": "CM is one bit: no is the default",
    "protection_key": "Overlay is one bit: no is the default",
    "shadow_stack": "GCS is one bit: no is the default",
    "private": "a plain bit: shared is the default",
    "prefetch": "a plain bit: somebody waits is the default",
    "size": "the syndrome describes loads and stores of 1, 2, 4 or 8 bytes of one register",
}


def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """(registers, why a member may come back changed). HPFAR_EL2 carries bit 63, the mark of a valid one since 6.15."""
    walk = access.on_walk is True
    fetch = access.exec is True and not walk
    described = access.size in _SIZES and access.register is not None and 0 <= access.register < 32 and not fetch
    mmio = _described(access) if described else {}
    registers = {
        "ESR_EL2": compose(
            ESR_EL2,
            EC=IABT_LOW if fetch else DABT_LOW,
            IL=1,
            # WnR is set for every cache operation; on a walk it does not decide what was tried
            WnR=(access.write is True or (walk and access.cache_op is True)) and not fetch,
            CM=access.cache_op is True,
            S1PTW=walk,
            Overlay=access.protection_key is True,
            GCS=access.shadow_stack is True,
            FSC=_status(access, walk, fmt),
            **mmio,
        ),
        "KVM": compose(KVM, PRIVATE=access.private is True, PREFETCH=access.prefetch is True),
    }
    if access.gva is not None or (access.offset is not None and not walk):
        registers["FAR_EL2"] = _far(access, walk)
    if access.gpa is not None and access.gpa >> 56 == 0:
        registers["HPFAR_EL2"] = hpfar(access.gpa)
    return registers, REASONS


def hpfar(gpa: int) -> int:
    """HPFAR_EL2 as KVM saves it for a fault at *gpa* (bytes, below 2**56)."""
    return compose(HPFAR_EL2, NS=1, FIPA=gpa >> 12)


def _described(access: Access) -> dict[str, int]:
    return {
        "ISV": 1,
        "SAS": _SIZES[access.size or 1],
        "SRT": access.register or 0,
        "SSE": access.sign_extend is True,
        "SF": access.wide is True,
        "AR": access.ordered is True,
    }


def _far(access: Access, walk: bool) -> int:
    if access.gva is None:
        return access.offset or 0
    if access.offset is None or walk:
        return access.gva
    return access.gva & ~0xFFF | access.offset


def _status(access: Access, walk: bool, fmt: Stage2Format) -> int:
    cause = access.cause
    if cause is Cause.EXTERNAL and walk:
        return _EXTERNAL_ON_WALK
    if cause in _WITHOUT_LEVEL:
        return _WITHOUT_LEVEL[cause]
    codes = _WITH_LEVEL.get(cause, TRANSLATION) if cause is not None else TRANSLATION
    sizes = {size: code for code, size in granules(fmt.page_shift).items() if code in codes}
    wanted = access.granule or 1 << fmt.page_shift
    return sizes[max((size for size in sizes if size <= wanted), default=min(sizes))]
