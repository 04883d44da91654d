"""Odd register values in words. They decode all the same: hardware, emulators and old kernels do send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.loongarch.facts import handled_read, handled_write
from arch.loongarch.instructions import decode
from arch.loongarch.registers import BADI, ESTAT, KVM, REGISTERS
from kvmfault.algebra.expr import Pred

_PAGE: Final = ESTAT["ECODE"].one_of(range(1, 8))
RULES: Final[tuple[tuple[Pred, str], ...]] = (
    (~_PAGE, "this code is no page exception: facts about one mean nothing"),
    (_PAGE & ~ESTAT["ESUBCODE"].is_(0), "page exceptions have no subcode"),
    (_PAGE & ~(handled_read | handled_write), "KVM has no handler for this code: the guest gets INE"),
    (_PAGE & ~KVM["BADV_GIVEN"].is_set, "without BADV there is no guest-physical address"),
)


def unusual(registers: Mapping[str, int]) -> tuple[str, ...]:
    """What is odd about these registers, one sentence each; empty where nothing is. BADI is told in words."""
    notes = []
    for register in REGISTERS:
        stray = registers.get(register.name, 0) & register.reserved
        if stray:
            notes.append(f"{register.name}: reserved bits {stray:#x} are set")
    word = registers.get("BADI", 0)
    if word and (handled_read | handled_write).on(registers):
        found = decode(word, write=handled_write.on(registers))
        what = f"{found.size} bytes, register {found.register}" if found else "nothing that KVM emulates for a device"
        notes.append(f"{BADI.name}: {what}")
    return (*notes, *(text for rule, text in RULES if rule.on(registers)))
