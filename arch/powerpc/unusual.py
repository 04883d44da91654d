"""Odd register values in words. They decode all the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.powerpc.facts import canary, described, fetch, inst_given
from arch.powerpc.instruction import LoadStore, decode
from arch.powerpc.registers import ASDR, HDSI, HDSISR, HISI, INST, REGISTERS, SRR1_BITS, TRAP, inst_layout
from kvmfault.algebra.expr import Pred

_s = HDSISR
RULES: Final[tuple[tuple[Pred, str], ...]] = (
    (~TRAP["VECTOR"].one_of((HDSI, HISI)), "the vector is of no hypervisor storage interrupt: facts mean nothing"),
    (canary & ~fetch, "0x7fff is what KVM puts into HDSISR before it enters the guest: the CPU wrote nothing"),
    (_s["NOHPTE"].is_set & _s["PROTFAULT"].is_set, "a missing entry and a forbidden access exclude each other"),
    (fetch & _s["ISSTORE"].is_set, "a fetch that writes: the reference or change bit could not be updated"),
    (~ASDR.field_at(63, 60).is_(0), "ASDR bits 63:60 are set: KVM clears them"),
)


def unusual(registers: Mapping[str, int]) -> tuple[str, ...]:
    """What is odd about these registers, one sentence each; empty where nothing is."""
    notes = [text for rule, text in RULES if rule.on(registers)]
    for register in REGISTERS:
        layout = inst_layout(registers) if register is INST else register
        stray = registers.get(register.name, 0) & layout.reserved
        if stray and register is not ASDR:
            notes.append(f"{register.name}: reserved bits {stray:#x} are set")
    outside = registers["HDSISR"] & ~(SRR1_BITS | _s["ISSTORE"].mask)
    if fetch.on(registers) and outside:
        notes.append(f"HDSISR: bits {outside:#x} are none that an instruction storage interrupt has")
    if inst_given.on(registers) and not described.on(registers):
        found = decode(registers["INST"])
        if isinstance(found, LoadStore):
            notes.append(f"KVM decodes the instruction: {spell(found)}; a table over one field cannot")
    return tuple(notes)


def spell(found: LoadStore) -> str:
    """A load or store in words."""
    how = ", sign-extended" * found.sign_extend + ", bytes reversed" * found.reverse + ", RA updated" * found.update
    return f"{'store' if found.store else 'load'} of {found.size} bytes, register {found.register}{how}"
