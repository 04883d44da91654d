"""The facts of an exit for a guest-physical address, as expressions over the registers.

A page that KVM made old is invalid for hardware, so it looks like a missing one. The instruction is in BADI, but its
size and register lie at places that depend on the opcode: KVM decodes it (arch/loongarch/instructions.py).
"""

from __future__ import annotations

from typing import Final

from arch.loongarch.registers import BADI, BADV, ESTAT, KVM, PC, PIF, PIL, PIS, PME, PNR, PNX, PPI
from kvmfault.algebra.expr import NEVER
from kvmfault.algebra.layout import ZERO, join
from kvmfault.contract.accessors import Accessors, Definition, Gap

_CODE: Final = ESTAT["ECODE"]
handled_read: Final = _CODE.one_of((PIL, PIF))
handled_write: Final = _CODE.one_of((PIS, PME))
"""Codes with a handler: kvm_handle_read_fault and kvm_handle_write_fault; all others are kvm_fault_ni here."""
fetch: Final = _CODE.one_of((PIF, PNX))
_INSTRUCTION: Final = "BADI holds the instruction, which KVM decodes by itself (kvm_emu_mmio_read, kvm_emu_mmio_write)"
_WALK: Final = "the guest walks its tables with instructions, whose accesses are reported like any other"

FACTS: Final[Definition] = Accessors(
    syndrome=join(ESTAT.field_at(30, 16) << 48, BADI.field_at(31, 0)),
    gpa_valid=KVM["BADV_GIVEN"].is_set,
    gpa_page=BADV["PAGE"] << 12,
    gpa_offset_valid=KVM["BADV_GIVEN"].is_set,
    gpa_offset_bits=BADV["OFFSET"],
    gva_valid=fetch & KVM["PC_GIVEN"].is_set,
    gva_bits=PC["PC"],
    is_read=_CODE.one_of((PIL, PNR)),
    is_write=handled_write,
    is_exec=fetch,
    is_user=Gap("the privilege level is in PRMD, at which KVM does not look"),
    is_translation=_CODE.one_of((PIL, PIS, PIF)),
    is_permission=_CODE.one_of((PME, PNR, PNX, PPI)),
    is_access_flag=Gap("KVM makes a page old by clearing V, so it is reported like a missing one"),
    is_reserved=NEVER,
    is_address_size=NEVER,
    is_external_abort=NEVER,
    granule_valid=Gap("the size of the page, or the level at which the walk ended, is not reported"),
    granule_bytes=ZERO,
    is_table_walk=Gap(_WALK),
    is_final=Gap(_WALK),
    is_protection_key=NEVER,
    is_shadow_stack=NEVER,
    is_cache_op=NEVER,
    is_private=NEVER,
    is_prefetch=KVM["PREFETCH"].is_set,
    mmio_valid=Gap(_INSTRUCTION),
    mmio_bytes=ZERO,
    mmio_register_number=ZERO,
    mmio_sign_extend=Gap(_INSTRUCTION),
    mmio_wide=Gap(_INSTRUCTION),
    mmio_ordered=Gap(_INSTRUCTION),
)

REACHABLE: Final = _CODE.one_of((PIL, PIS, PIF, PME, PNR, PNX)) & ESTAT["ESUBCODE"].is_(0)
"""Page exceptions of the second stage, which asks for no privilege; none of them has a subcode."""
