"""The kernel's own questions about an x86 fault, under its own names, for ``prove`` and ``decode``.

``PFERR_*`` are the bits of the error code as the fault path sees it. ``pferr`` is that code before KVM adds
PFERR_PRIVATE_ACCESS; under EPT it exists for violations only, a misconfiguration is PFERR_RSVD alone.
"""

from __future__ import annotations

from typing import Final

from arch.x86 import pferr
from arch.x86.registers import ERROR_CODE, EXIT_QUALIFICATION, EXITINFO1, KVM
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred
from kvmfault.algebra.layout import Register
from kvmfault.contract.backend import Named

_COMMON: Final = {
    "PRESENT": "P",
    "WRITE": "W",
    "USER": "U",
    "RSVD": "RSVD",
    "FETCH": "F",
    "PK": "PK",
    "SHSTK": "SS",
    "SGX": "SGX",
    "GUEST_RMP": "RMP",
}
_NESTED: Final = _COMMON | {
    "GUEST_FINAL": "FINAL",
    "GUEST_PAGE": "WALK",
    "GUEST_ENC": "ENC",
    "GUEST_SIZEM": "SIZEM",
    "GUEST_VMPL": "VMPL",
}


def ept(*, reads_advanced_info: bool) -> Named:
    """Accessors of an EPT exit; bit 2 is a read, or user mode on kernels that read the advanced information."""
    q, is_violation = EXIT_QUALIFICATION, pferr.violation
    gva = is_violation & q["GVA_IS_VALID"].is_set
    final = gva & q["GVA_TRANSLATED"].is_set
    bits = {
        "PRESENT": is_violation & pferr.entry_present,
        "WRITE": is_violation & q["ACC_WRITE"].is_set,
        "USER": final & q["ADV_USER"].is_set if reads_advanced_info else is_violation & q["ACC_READ"].is_set,
        "RSVD": pferr.misconfig,
        "FETCH": is_violation & q["ACC_INSTR"].is_set,
        "GUEST_FINAL": final,
        "GUEST_PAGE": gva & ~q["GVA_TRANSLATED"].is_set,
        "PRIVATE_ACCESS": KVM["PRIVATE"].is_set,
    }
    code = pferr.VIOLATION_ADVANCED if reads_advanced_info else pferr.VIOLATION
    return {
        "pferr": code.when(is_violation),
        **{f"PFERR_{name}": bit for name, bit in bits.items()},
        "ept_violation": is_violation,
        "ept_misconfig": pferr.misconfig,
        # What hardware tells and KVM does not look at, or only where noted.
        "advanced_info_applies": final,
        "advanced_user": final & q["ADV_USER"].is_set,
        "advanced_writable": final & q["ADV_WRITABLE"].is_set,
        "advanced_nx": final & q["ADV_NX"].is_set,
        "nmi_unblocked": is_violation & q["NMI_UNBLOCKING"].is_set,
        "user_executable": is_violation & q["USER_EXECUTABLE"].is_set,
        "supervisor_shadow_stack": is_violation & q["SSS_ENTRY"].is_set,
        "paging_verification": is_violation & q["PAGING_VERIFICATION"].is_set,
        "asynchronous": is_violation & q["ASYNCHRONOUS"].is_set,
        **_questions(bits, ALWAYS),
    }


def npt() -> Named:
    """Accessors of a nested page fault."""
    bits = _bits(EXITINFO1, _NESTED) | {"PRIVATE_ACCESS": KVM["PRIVATE"].is_set | pferr.snp_private}
    return {
        "pferr": pferr.NPF,
        **{f"PFERR_{name}": bit for name, bit in bits.items()},
        "hardware_synthetic": EXITINFO1["SYNTHETIC"].one_of((1, 2, 3)),  # KVM warns, and clears them
        "rmp_handler": EXITINFO1["RMP"].is_set,  # asked after any successful fault, encrypted guest or not
        **_questions(bits, ALWAYS),
    }


def shadow() -> Named:
    """Accessors of an intercepted #PF."""
    bits = _bits(ERROR_CODE, _COMMON) | {"PRIVATE_ACCESS": KVM["PRIVATE"].is_set}
    return {
        "pferr": pferr.PF,
        **{f"PFERR_{name}": bit for name, bit in bits.items()},
        "upper_half": ~ERROR_CODE["UPPER"].is_(0),  # KVM warns, and drops it
        **_questions(bits, NEVER),
    }


def _bits(register: Register, names: dict[str, str]) -> dict[str, Pred]:
    return {name: register[field].is_set for name, field in names.items()}


def _questions(bits: dict[str, Pred], is_tdp: Pred) -> dict[str, Pred]:
    present, write, reserved = bits["PRESENT"], bits["WRITE"], bits["RSVD"]
    return {
        "is_tdp": is_tdp,
        # page_fault_can_be_fast, apart from the private attribute: with and without hardware A/D bits
        "can_be_fast_ad": ~reserved & present & write,
        "can_be_fast_no_ad": ~reserved & (~present | write),
        "write_to_guest_page_table": present & write & bits.get("GUEST_PAGE", NEVER),
    }
