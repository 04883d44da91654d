"""Registers from an Access, for each backend, and why what cannot be said is lost.

The way back is checked by whoever calls (``Target.encode`` reads the result again), so nothing here has to
be exact about its losses; it has to pick the registers that hardware would have produced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.x86.registers import (
    EPT_MISCONFIG,
    EPT_VIOLATION,
    ERROR_CODE,
    EXIT_QUALIFICATION,
    EXITINFO1,
    KVM,
)
from kvmfault.algebra.layout import Field
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import Stage2Format

_CAUSES: Final = {
    Cause.ACCESS_FLAG: "x86 has no such fault: an old entry is marked by hardware or is not present",
    Cause.ADDRESS_SIZE: "x86 reports an address that is too wide as a reserved bit",
    Cause.EXTERNAL: "failing memory is a machine check on x86, not a page fault",
    Cause.OTHER: "x86 knows missing, permission and reserved only",
}
_MISCONFIG: Final = "an EPT misconfiguration reports the address and nothing else"
_READ_TOO: Final = "the error code does not tell a read that comes with a write"


def ept(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """EXIT_REASON, EXIT_QUALIFICATION, the two addresses. A reserved cause becomes a misconfiguration."""
    registers = {"KVM": _synthetic(access)}
    if access.gpa is not None:
        registers["GUEST_PHYSICAL_ADDRESS"] = access.gpa | (access.offset or 0)
    if access.cause is Cause.RESERVED:
        registers |= {"EXIT_REASON": EPT_MISCONFIG, "EXIT_QUALIFICATION": 0}
        silent = ("read", "write", "exec", "gva", "on_walk", "final", "shadow_stack")
        return registers, dict.fromkeys(silent, _MISCONFIG)
    q = EXIT_QUALIFICATION
    read = not (access.write or access.exec) if access.read is None else access.read
    code = _bits(q["ACC_READ"], read) | _bits(q["ACC_WRITE"], access.write) | _bits(q["ACC_INSTR"], _fetches(access))
    if access.cause is Cause.PERMISSION:
        code |= _entry_that_forbids(access)
    # A virtual address with no word on the walk comes from hardware that hides its walks: the final access.
    unknown = access.on_walk is None and access.final is None and access.gva is not None
    final = access.final or unknown
    if access.on_walk or final:
        code |= q["GVA_IS_VALID"].mask | _bits(q["GVA_TRANSLATED"], not access.on_walk)
        if access.gva is not None:
            registers["GUEST_LINEAR_ADDRESS"] = access.gva
    code |= _bits(q["ACC_SHADOW_STACK"], access.shadow_stack)
    registers |= {"EXIT_REASON": EPT_VIOLATION, "EXIT_QUALIFICATION": code}
    return registers, _reasons(access, {"gva": "the qualification places no virtual address with this access"})


def _entry_that_forbids(access: Access) -> int:
    q = EXIT_QUALIFICATION
    grants = (
        (q["READABLE"], access.read),
        (q["WRITABLE"], access.write),
        (q["EXECUTABLE"], access.exec),
    )
    code = sum(field.mask for field, wanted in grants if not wanted)
    # an entry without permissions is no entry; and KVM has no writable entry that cannot be read
    if access.read:
        code &= ~q["WRITABLE"].mask
    return code or q["READABLE"].mask


def npt(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """EXITINFO1 and EXITINFO2."""
    e = EXITINFO1
    code = _error_code(access) | e["U"].mask
    code |= _bits(e["WALK"], access.on_walk) | _bits(e["FINAL"], access.final and not access.on_walk)
    registers = {"KVM": _synthetic(access), "EXITINFO1": code}
    if access.gpa is not None:
        registers["EXITINFO2"] = access.gpa | (access.offset or 0)
    return registers, _reasons(access, {"read": _READ_TOO})


def shadow(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
    """ERROR_CODE and CR2."""
    e = ERROR_CODE
    code = _error_code(access) | _bits(e["U"], access.user) | _bits(e["PK"], access.protection_key)
    registers = {"KVM": _synthetic(access), "ERROR_CODE": code}
    if access.gva is not None:
        registers["CR2"] = access.gva
    return registers, _reasons(access, {"read": _READ_TOO})


def _error_code(access: Access) -> int:
    e = ERROR_CODE  # EXITINFO1 has the same low half
    present = access.cause in (Cause.PERMISSION, Cause.RESERVED)
    return (
        _bits(e["P"], present)
        | _bits(e["RSVD"], access.cause is Cause.RESERVED)
        | _bits(e["W"], access.write)
        | _bits(e["F"], _fetches(access))
        | _bits(e["SS"], access.shadow_stack)
    )


def _fetches(access: Access) -> bool:
    return access.exec is True and access.write is not True  # no processor reports a fetch that writes


def _synthetic(access: Access) -> int:
    return _bits(KVM["PRIVATE"], access.private) | _bits(KVM["PREFETCH"], access.prefetch)


def _bits(field: Field, wanted: bool | None) -> int:
    return field.mask if wanted else 0


def _reasons(access: Access, reasons: Mapping[str, str]) -> Mapping[str, str]:
    why = _CAUSES.get(access.cause) if access.cause is not None else "x86 has to name a cause"
    reasons = {**reasons, "exec": "no processor reports a fetch that writes"} if access.exec else reasons
    return {**reasons, "cause": why} if why else reasons
