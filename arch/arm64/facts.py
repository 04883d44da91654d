"""The facts of a guest abort, as expressions over the registers.

Status codes count as KVM's own predicates do (esr_fsc_is_*): the codes of level -2, which came with 128-bit
descriptors, are in none of them.
"""

from __future__ import annotations

from typing import Final

from arch.arm64.codes import (
    ACCESS_FLAG,
    ADDRESS_SIZE,
    DATA_ONLY,
    EXTERNAL,
    EXTERNAL_WALK,
    IABT_LOW,
    PARITY,
    PARITY_WALK,
    PERMISSION,
    STATUS,
    TRANSLATION,
    known,
)
from arch.arm64.registers import ESR_EL2, FAR_EL2, HPFAR_EL2, KVM
from kvmfault.algebra.expr import Pred, Word
from kvmfault.contract.accessors import Accessors, Definition, Gap
from kvmfault.contract.format import Stage2Format

FSC: Final = ESR_EL2["FSC"]
S1PTW: Final = ESR_EL2["S1PTW"].is_set
WNR: Final = ESR_EL2["WnR"].is_set
FNV: Final = ESR_EL2["FnV"].is_set
ISV: Final = ESR_EL2["ISV"].is_set
iabt: Final = ESR_EL2["EC"].is_(IABT_LOW)
translation: Final = FSC.one_of(known(TRANSLATION))
permission: Final = FSC.one_of(known(PERMISSION))
access_flag: Final = FSC.one_of(known(ACCESS_FLAG))
address_size: Final = FSC.one_of(known(ADDRESS_SIZE))
external_walk: Final = FSC.one_of(known(EXTERNAL_WALK))
parity_walk: Final = FSC.one_of(known(PARITY_WALK))
external: Final = FSC.one_of((EXTERNAL, *known(EXTERNAL_WALK), PARITY, *known(PARITY_WALK)))
# A stage-1 walk that fails on permission wanted to update a table; one that finds no entry only read it.
write: Final = (S1PTW & permission) | (~S1PTW & ~iabt & WNR)
fetch: Final = iabt & ~S1PTW
far_invalid: Final = FSC.is_(EXTERNAL) & FNV
unsafe_to_translate: Final = external_walk | parity_walk | far_invalid
"""Neither HPFAR_EL2 nor a translation of FAR_EL2 gives the address (fault_is_safe_to_translate, negated)."""

PAGE_612: Final[Word] = HPFAR_EL2.field_at(63, 4) << 12
"""Page address as 6.12 reads it: reserved bits 55:48 end up in the address."""
PAGE_74: Final[Word] = HPFAR_EL2["FIPA"] << 12


def level_shift(page_shift: int, level: int) -> int:
    """log2 of the bytes that an entry of *level* maps. (ARM64_HW_PGTABLE_LEVEL_SHIFT)"""
    return (page_shift - 3) * (4 - level) + 3


def granules(page_shift: int) -> dict[int, int]:
    """Status code -> bytes, for the codes that name the level of an entry. A size beyond 64 bits does not exist."""
    named = {**TRANSLATION, **ACCESS_FLAG, **PERMISSION}
    sizes = {code: level_shift(page_shift, level) for code, level in named.items() if level >= -1}
    return {code: 1 << shift for code, shift in sizes.items() if shift < 64}


def definition(fmt: Stage2Format, page: Word) -> Definition:
    """The facts, with the page address that a kernel version reads from HPFAR_EL2."""
    granule = granules(fmt.page_shift)
    gpa_valid = KVM["HPFAR_GIVEN"].is_set & ~unsafe_to_translate
    far_given: Pred = KVM["FAR_GIVEN"].is_set
    return Accessors(
        syndrome=ESR_EL2.field_at(63, 0),
        gpa_valid=gpa_valid,
        gpa_page=page,
        # for a fault on a walk FAR holds the address being translated, not that of the table
        gpa_offset_valid=gpa_valid & far_given & ~S1PTW,
        gpa_offset_bits=FAR_EL2.field_at(11, 0),
        gva_valid=far_given & ~far_invalid,
        gva_bits=FAR_EL2["VA"],
        is_read=~write & ~fetch,
        is_write=write,
        is_exec=fetch,
        is_user=Gap("the exception level of the guest is in SPSR_EL2, not in the syndrome"),
        is_translation=translation,
        is_permission=permission,
        is_access_flag=access_flag,
        is_reserved=Gap("an entry with reserved bits is reported like a missing one"),
        is_address_size=address_size,
        is_external_abort=external,
        granule_valid=FSC.one_of(tuple(granule)),
        granule_bytes=FSC.table(granule),
        is_table_walk=S1PTW,
        is_final=~S1PTW,
        is_protection_key=ESR_EL2["Overlay"].is_set,
        is_shadow_stack=ESR_EL2["GCS"].is_set,
        is_cache_op=ESR_EL2["CM"].is_set,
        is_private=KVM["PRIVATE"].is_set,
        is_prefetch=KVM["PREFETCH"].is_set,
        mmio_valid=ISV,
        mmio_bytes=ESR_EL2["SAS"].table({0: 1, 1: 2, 2: 4, 3: 8}),
        mmio_register_number=ESR_EL2["SRT"],
        mmio_sign_extend=ESR_EL2["SSE"].is_set,
        mmio_wide=ESR_EL2["SF"].is_set,
        mmio_ordered=ESR_EL2["AR"].is_set,
    )


def _reachable() -> Pred:
    walks = (TRANSLATION, ACCESS_FLAG, PERMISSION, ADDRESS_SIZE, EXTERNAL_WALK, PARITY_WALK)
    on_walk = FSC.one_of(tuple(code for levels in walks for code in known(levels)))
    only_par = (0x3D, 0x3E)
    defined = FSC.one_of(tuple(code for code in STATUS if code not in only_par))
    ec, cm = ESR_EL2["EC"], ESR_EL2["CM"].is_set
    instruction = ec.one_of((0x20, 0x21)) & ~ISV & ~cm & ~WNR & ~FSC.one_of(tuple(DATA_ONLY))
    data = ec.one_of((0x24, 0x25)) & (~cm | WNR) & (~ISV | (~S1PTW & ~external))
    return (instruction | data) & defined & (~FNV | FSC.is_(EXTERNAL)) & (~S1PTW | on_walk)


REACHABLE: Final = _reachable()
"""Syndromes that hardware gives for an abort: reserved bits 0, FnV only where it is defined, a cache operation
reported as a write, an instruction described only when it is the one that faulted."""
