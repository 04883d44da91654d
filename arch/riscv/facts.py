"""The facts of a guest-page fault, as expressions over the registers.

A store is whatever has the code of one, also the read of a guest table that a store needs: gstage_page_fault looks at
the code alone. Hardware does not say why translation failed, nor at which level.
"""

from __future__ import annotations

from typing import Final

from arch.riscv.registers import (
    HTINST,
    HTVAL,
    INSTRUCTION,
    KVM,
    LOAD,
    OP_AMO,
    OP_LOAD,
    OP_LOAD_FP,
    OP_STORE,
    OP_STORE_FP,
    SCAUSE,
    STORE,
    STVAL,
)
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred, Word
from kvmfault.algebra.layout import join
from kvmfault.contract.accessors import Accessors, Definition, Gap

_CODE: Final = SCAUSE["CODE"]
_OPCODE, _FUNCT3 = HTINST["OPCODE"], HTINST["FUNCT3"]
interrupt: Final = SCAUSE["INTERRUPT"].is_set
fetch_code: Final = _CODE.is_(INSTRUCTION)
load_code: Final = _CODE.is_(LOAD)
store: Final = _CODE.is_(STORE)
transformed: Final = HTINST["TRANSFORMED"].is_set
walk: Final = ~transformed & _FUNCT3.one_of((2, 3))
"""Pseudoinstructions: 0x2000 and 0x2020 of RV32, 0x3000 and 0x3020 of RV64."""
_walk_writes: Final = walk & _OPCODE.is_(OP_STORE)
fetch: Final = fetch_code & ~walk
described: Final = transformed & (
    (load_code & _OPCODE.is_(OP_LOAD) & _FUNCT3.one_of(range(7)))
    | (store & _OPCODE.is_(OP_STORE) & _FUNCT3.one_of(range(4)))
)
"""A load or store that kvm_riscv_vcpu_mmio_load or _store knows; bits 1:0 are not compared (INSN_16BIT_MASK)."""
SIZES: Final = {0: 1, 1: 2, 2: 4, 3: 8, 4: 1, 5: 2, 6: 4}
"""FUNCT3 of LB, LH, LW, LD, LBU, LHU, LWU, and of the stores -> bytes."""
# A transformed load has 0 in RS2, a transformed store in RD: so this OR is exact although the two overlap.
_register: Final = Word((*HTINST["RD"].terms, *HTINST["RS2"].terms))
fault_addr: Final = join(HTVAL.field_at(61, 0) << 2, STVAL.field_at(1, 0))
"""As gstage_page_fault has it. For a fault on a walk the low two bits are not those of the table's entry."""

FACTS: Final[Definition] = Accessors(
    syndrome=join(HTINST.field_at(31, 0) << 32, SCAUSE["INTERRUPT"] << 31, _CODE),
    gpa_valid=KVM["HTVAL_GIVEN"].is_set,
    gpa_page=HTVAL["PAGE"] << 12,
    gpa_offset_valid=KVM["HTVAL_GIVEN"].is_set & KVM["STVAL_GIVEN"].is_set & ~walk,
    gpa_offset_bits=join(HTVAL["OFFSET"] << 2, STVAL.field_at(1, 0)),
    gva_valid=KVM["STVAL_GIVEN"].is_set,
    gva_bits=STVAL["VA"],
    is_read=load_code | (fetch_code & walk) | (walk & ~_walk_writes),
    is_write=store,
    is_exec=fetch,
    is_user=Gap("the privilege level is in HSTATUS.SPVP, at which KVM does not look"),
    is_translation=Gap("a missing entry and one that forbids the access have the same code"),
    is_permission=Gap("a missing entry and one that forbids the access have the same code"),
    is_access_flag=Gap("an entry with A clear is reported like a missing one"),
    is_reserved=Gap("an entry with reserved bits is reported like a missing one"),
    is_address_size=Gap("an address beyond the table is reported like a missing entry"),
    is_external_abort=NEVER,
    granule_valid=Gap("the level at which translation ended is not reported"),
    granule_bytes=Word((), 0),
    is_table_walk=walk,
    is_final=~walk,
    is_protection_key=NEVER,
    is_shadow_stack=NEVER,
    is_cache_op=NEVER,
    is_private=NEVER,
    is_prefetch=KVM["PREFETCH"].is_set,
    mmio_valid=described,
    mmio_bytes=_FUNCT3.table(SIZES),
    mmio_register_number=_register,
    mmio_sign_extend=load_code & _FUNCT3.one_of(range(3)),
    mmio_wide=ALWAYS,
    mmio_ordered=NEVER,
)


def _reachable() -> Pred:
    plain = HTINST["FUNCT7"].is_(0)
    instruction = transformed & (
        (load_code & _OPCODE.one_of((OP_LOAD, OP_LOAD_FP)) & plain & HTINST["RS2"].is_(0))
        | (store & _OPCODE.one_of((OP_STORE, OP_STORE_FP)) & plain & HTINST["RD"].is_(0))
        | ((load_code | store) & _OPCODE.is_(OP_AMO) & HTINST["WIDTH"].is_set)
    )
    empty = ~transformed & HTINST["WIDTH"].is_(0) & HTINST["RD"].is_(0) & HTINST.field_at(31, 15).is_(0)
    nothing = empty & _FUNCT3.is_(0) & _OPCODE.is_(0)
    pseudo = empty & _FUNCT3.is_(3) & _OPCODE.one_of((OP_LOAD, OP_STORE))
    return ~interrupt & (fetch_code | load_code | store) & (instruction | nothing | pseudo)


REACHABLE: Final = _reachable()
"""Guest-page faults as an RV64 hart reports them: fetches without an instruction, fields that a transformed instruction
does not keep 0."""
