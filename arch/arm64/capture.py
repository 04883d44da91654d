"""From where the hypervisor has the faulting guest-physical address (__get_fault_info in hyp/fault.h)."""

from __future__ import annotations

from functools import cache
from typing import Final

from arch.arm64.codes import ADDRESS_SIZE, GRANULE_PROTECTION_WALK
from arch.arm64.facts import FSC, S1PTW, access_flag, permission, translation, unsafe_to_translate
from kvmfault.algebra.expr import NEVER, Pred
from kvmfault.contract.values import AddressCapture, DistrustedFaults, RootAddressSize

_OF_LEVELS: Final = tuple(code for code, level in ADDRESS_SIZE.items() if level >= 0)
_BY_LEVEL: Final = {level: code for code, level in ADDRESS_SIZE.items()}
_MISTAKEN: Final = next(code for code, level in GRANULE_PROTECTION_WALK.items() if level == 1)
"""0x25, which the header of 6.16 gave to an address-size fault at level -1."""
_ROOT_CODES: Final = {
    RootAddressSize.UNKNOWN: (),
    RootAddressSize.MISTAKEN: (_MISTAKEN,),
    RootAddressSize.RIGHT: (_BY_LEVEL[-1],),
}


@cache
def sources(
    capture: AddressCapture, distrusted: DistrustedFaults, root: RootAddressSize, *, misreports: bool
) -> tuple[Pred, Pred]:
    """(faults whose address comes from translating FAR_EL2 again, faults that have none); HPFAR_EL2 gives the others.

    *misreports*: the CPU has erratum 834220.
    """
    if not misreports:
        distrusted = DistrustedFaults.NONE
    if capture is AddressCapture.GIVEN:
        return NEVER, NEVER
    if capture is AddressCapture.ALL_BUT_PERMISSION:
        again = {
            DistrustedFaults.NONE: permission,
            DistrustedFaults.TRANSLATION: permission | translation,
            DistrustedFaults.ALL: ~NEVER,
        }[distrusted]
        return ~S1PTW & again, NEVER
    address_size = FSC.one_of((*_OF_LEVELS, *_ROOT_CODES[root]))
    valid = {
        DistrustedFaults.NONE: translation | access_flag | (S1PTW & permission) | address_size,
        DistrustedFaults.TRANSLATION: access_flag | (S1PTW & permission) | address_size,
        DistrustedFaults.ALL: S1PTW & (translation | access_flag | permission | address_size),
    }[distrusted]
    return ~valid & ~unsafe_to_translate, ~valid & unsafe_to_translate
