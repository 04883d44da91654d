"""Odd register values in words. They decode all the same: hardware, emulators and old kernels do send them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.arm64.codes import (
    ADDRESS_SIZE,
    DABT_CUR,
    DABT_LOW,
    DATA_ONLY,
    EXTERNAL,
    EXTERNAL_WALK,
    GRANULE_PROTECTION_WALK,
    IABT_CUR,
    IABT_LOW,
    STATUS,
    TRANSLATION,
)
from arch.arm64.facts import FNV, ISV, S1PTW, WNR
from arch.arm64.registers import ESR_EL2, HPFAR_EL2, KVM, REGISTERS, esr_layout
from kvmfault.algebra.expr import Pred

_FSC, _CM = ESR_EL2["FSC"], ESR_EL2["CM"].is_set
_ABORT: Final = ESR_EL2["EC"].one_of((IABT_LOW, IABT_CUR, DABT_LOW, DABT_CUR))
_FETCH: Final = ESR_EL2["EC"].one_of((IABT_LOW, IABT_CUR))
_DATA: Final = _ABORT & ~_FETCH
_DESCRIBES: Final = ~ESR_EL2.field_at(23, 14).is_(0)
_LEVEL_2: Final = tuple(
    code
    for levels in (TRANSLATION, ADDRESS_SIZE, EXTERNAL_WALK, GRANULE_PROTECTION_WALK)
    for code, level in levels.items()
    if level == -2
)
RULES: Final[tuple[tuple[Pred, str], ...]] = (
    (ESR_EL2["EC"].is_(IABT_CUR), "EC 0x21 is an abort of the hypervisor itself; KVM does not take it for a fetch"),
    (ESR_EL2["EC"].is_(DABT_CUR) & ESR_EL2["VNCR"].is_set, "an access through VNCR_EL2: KVM handles it elsewhere"),
    (_ABORT & ~_FSC.one_of(tuple(STATUS)), "the status code is reserved"),
    (_ABORT & _FSC.one_of(_LEVEL_2), "level -2 exists only with 128-bit descriptors; KVM does not recognise the code"),
    (_FETCH & _FSC.one_of(tuple(DATA_ONLY)), "the status code is defined for data aborts only"),
    (_ABORT & FNV & ~_FSC.is_(EXTERNAL), "FnV (bit 10) has a meaning only with status 0x10"),
    (_DATA & ~ISV & _DESCRIBES, "ISV = 0, so bits 23:14 mean nothing; KVM's accessors read them all the same"),
    (_DATA & ISV & S1PTW, "ISV = 1 on a table walk: the walk is not the instruction"),
    (_DATA & _CM & ~WNR, "a cache operation is normally reported with WnR = 1"),
    (
        KVM["HPFAR_GIVEN"].is_set & ~HPFAR_EL2.field_at(55, 48).is_(0),
        "HPFAR_EL2 bits 55:48 are reserved, but 6.12 lets them into the address",
    ),
)


def unusual(registers: Mapping[str, int]) -> tuple[str, ...]:
    """What is odd about these registers, one sentence each; empty where nothing is."""
    notes = []
    if not _ABORT.on(registers):
        ec = ESR_EL2["EC"]
        value = ec.on(registers)
        notes.append(f"EC {value:#x} ({ec.meanings.get(value, 'reserved')}) is no abort: facts about one mean nothing")
    for register in REGISTERS:
        layout = esr_layout(registers) if register is ESR_EL2 else register
        stray = registers.get(register.name, 0) & layout.reserved
        if stray:
            notes.append(f"{register.name}: reserved bits {stray:#x} are set")
    return (*notes, *(text for rule, text in RULES if rule.on(registers)))
