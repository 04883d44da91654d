"""Odd register values in words. They decode all the same: hardware, emulators and old kernels do send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.riscv.facts import REACHABLE, fetch_code, interrupt, load_code, store, transformed
from arch.riscv.registers import HTINST, KVM, REGISTERS, SCAUSE
from kvmfault.algebra.expr import Pred

_FAULT: Final = (fetch_code | load_code | store) & ~interrupt
RULES: Final[tuple[tuple[Pred, str], ...]] = (
    (interrupt, "an interrupt of the host is no fault: KVM resumes the guest"),
    (~_FAULT & ~interrupt, "this code is no guest-page fault: facts about one mean nothing"),
    (_FAULT & fetch_code & transformed, "HTINST describes loads and stores, not the fetch that failed"),
    (
        _FAULT & ~fetch_code & ~REACHABLE,
        "HTINST is neither 0, a pseudoinstruction, nor a transformed load or store",
    ),
    (_FAULT & ~KVM["HTVAL_GIVEN"].is_set, "without HTVAL there is no guest-physical address"),
)


def unusual(registers: Mapping[str, int]) -> tuple[str, ...]:
    """What is odd about these registers, one sentence each; empty where nothing is."""
    notes = []
    for register in REGISTERS:
        stray = registers.get(register.name, 0) & register.reserved
        if stray and register in (SCAUSE, HTINST):
            notes.append(f"{register.name}: bits {stray:#x} are set, so KVM's comparisons of the whole value fail")
        elif stray:
            notes.append(f"{register.name}: reserved bits {stray:#x} are set")
    return (*notes, *(text for rule, text in RULES if rule.on(registers)))
