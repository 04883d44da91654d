"""Values of the exception class (EC) and of the fault status code (DFSC, IFSC), and words for them.

Sources: Arm ARM, ESR_EL2; kernel arch/arm64/include/asm/esr.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

IABT_LOW, IABT_CUR, DABT_LOW, DABT_CUR = 0x20, 0x21, 0x24, 0x25
"""Exception classes of aborts; "low": taken from a lower EL, hence the guest."""

CLASSES: Final = {
    0x00: "unknown reason",
    0x01: "WFI, WFE, WFIT or WFET",
    0x03: "MCR or MRC to CP15 (AArch32)",
    0x04: "MCRR or MRRC to CP15 (AArch32)",
    0x05: "MCR or MRC to CP14 (AArch32)",
    0x06: "LDC or STC to CP14 (AArch32)",
    0x07: "SVE, SIMD or floating point",
    0x08: "VMRS (AArch32)",
    0x09: "pointer authentication",
    0x0A: "an instruction without a class of its own (LS64 and others)",
    0x0C: "MRRC to CP14 (AArch32)",
    0x0D: "branch target",
    0x0E: "illegal execution state",
    0x11: "SVC (AArch32)",
    0x12: "HVC (AArch32)",
    0x13: "SMC (AArch32)",
    0x14: "MSRR or MRRS, or 128-bit system instruction",
    0x15: "SVC",
    0x16: "HVC",
    0x17: "SMC",
    0x18: "MSR, MRS or system instruction",
    0x19: "SVE",
    0x1A: "ERET",
    0x1B: "TSTART",
    0x1C: "pointer authentication failure",
    0x1D: "SME",
    0x1E: "granule protection check",
    0x1F: "implementation defined, to EL3",
    0x20: "instruction abort from a lower EL",
    0x21: "instruction abort from the current EL",
    0x22: "PC alignment",
    0x24: "data abort from a lower EL",
    0x25: "data abort from the current EL",
    0x26: "SP alignment",
    0x27: "memory copy or set",
    0x28: "floating-point exception (AArch32)",
    0x2C: "floating-point exception",
    0x2D: "guarded control stack",
    0x2F: "SError",
    0x30: "breakpoint from a lower EL",
    0x31: "breakpoint from the current EL",
    0x32: "software step from a lower EL",
    0x33: "software step from the current EL",
    0x34: "watchpoint from a lower EL",
    0x35: "watchpoint from the current EL",
    0x38: "BKPT (AArch32)",
    0x3A: "vector catch (AArch32)",
    0x3C: "BRK",
    0x3D: "profiling",
}


def _levels(what: str, codes: Mapping[int, int]) -> dict[int, str]:
    return {code: f"{what}, level {level}" for code, level in codes.items()}


# Levels below 0 (LPA2, D128) got whatever codes were free: there is no formula for them.
ADDRESS_SIZE: Final = {0x00: 0, 0x01: 1, 0x02: 2, 0x03: 3, 0x29: -1, 0x2C: -2}
TRANSLATION: Final = {0x04: 0, 0x05: 1, 0x06: 2, 0x07: 3, 0x2B: -1, 0x2A: -2}
ACCESS_FLAG: Final = {0x08: 0, 0x09: 1, 0x0A: 2, 0x0B: 3}
PERMISSION: Final = {0x0C: 0, 0x0D: 1, 0x0E: 2, 0x0F: 3}
EXTERNAL_WALK: Final = {0x14: 0, 0x15: 1, 0x16: 2, 0x17: 3, 0x13: -1, 0x12: -2}
PARITY_WALK: Final = {0x1C: 0, 0x1D: 1, 0x1E: 2, 0x1F: 3, 0x1B: -1}
GRANULE_PROTECTION_WALK: Final = {0x24: 0, 0x25: 1, 0x26: 2, 0x27: 3, 0x23: -1, 0x22: -2}
"""Status code -> level, for each kind of fault that names one."""
EXTERNAL, PARITY, TLB_CONFLICT, EXCLUSIVE_ATOMIC = 0x10, 0x18, 0x30, 0x35
"""Status codes without a level that the model refers to."""
DATA_ONLY: Final = {
    0x11: "tag check",
    0x21: "alignment",
    0x34: "lockdown (implementation defined)",
    0x35: "unsupported exclusive or atomic access",
}

STATUS: Final = {
    **_levels("address size", ADDRESS_SIZE),
    **_levels("translation", TRANSLATION),
    **_levels("access flag", ACCESS_FLAG),
    **_levels("permission", PERMISSION),
    **_levels("external abort on a table walk", EXTERNAL_WALK),
    **_levels("parity or ECC error on a table walk", PARITY_WALK),
    **_levels("granule protection on a table walk", GRANULE_PROTECTION_WALK),
    **DATA_ONLY,
    EXTERNAL: "external abort, not on a table walk",
    PARITY: "parity or ECC error, not on a table walk",
    0x28: "granule protection, not on a table walk",
    TLB_CONFLICT: "TLB conflict",
    0x31: "unsupported atomic hardware update",
    0x3D: "section domain (only in PAR_EL1)",
    0x3E: "page domain (only in PAR_EL1)",
}
"""DFSC and IFSC: words for every code that is not reserved."""


def known(levels: Mapping[int, int]) -> tuple[int, ...]:
    """The codes of one kind of fault that KVM recognises: levels -1 to 3."""
    return tuple(code for code, level in levels.items() if level >= -1)
