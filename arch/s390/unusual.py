"""Odd register values in words. They decode all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.s390.facts import CODE, FSI, primary, protection
from arch.s390.registers import ADDRESSING, DAT, INT_CODE, KVM, REGISTERS, TEID
from kvmfault.algebra.expr import Pred

_given: Final = KVM["TEID_GIVEN"].is_set
RULES: Final[tuple[tuple[Pred, str], ...]] = (
    (CODE.is_(0), "no program interruption: KVM lets the guest run on"),
    (
        ~CODE.one_of((0, *DAT, 0x3D, 0x3E, 0x3F)),
        "a code that KVM does not expect here: it marks the VM as broken and sends a SIGSEGV",
    ),
    (~primary, "not the primary address space: KVM marks the VM as broken"),
    (FSI.is_(3), "FSI 3 is reserved"),
    (
        protection & ~INT_CODE.field_at(15, 7).is_(0) & ~FSI.is_(1),
        "KVM compares the whole code with 4, so it takes this protection exception for a read",
    ),
    (
        protection & _given & TEID["B61"].is_(0) & TEID["B60"].is_(0) & TEID["B56"].is_(0),
        "bits 56, 60 and 61 (7, 3, 2 here) are 0: without enhanced suppression the address means nothing",
    ),
)
assert ADDRESSING not in DAT


def unusual(registers: Mapping[str, int]) -> tuple[str, ...]:
    """What is odd about these registers, one sentence each; empty where nothing is."""
    notes = [text for rule, text in RULES if rule.on(registers)]
    for register in REGISTERS:
        stray = registers.get(register.name, 0) & register.reserved
        if stray:
            notes.append(f"{register.name}: reserved bits {stray:#x} are set")
    return tuple(notes)
