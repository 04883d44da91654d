"""What a fault of the toy tells: an expression for each fact, a Gap with its reason where the hardware is silent."""

from __future__ import annotations

from typing import Final

from kvmfault.algebra.expr import NEVER
from kvmfault.algebra.layout import ZERO
from kvmfault.contract.accessors import Accessors, Definition, Gap
from kvmfault_toy.registers import ADDR, CALLER, CAUSE

_NO_GVA: Final = Gap("the toy reports the guest-physical address only")
_NO_USER: Final = Gap("the toy does not report the privilege level")
_NO_LEVEL: Final = Gap("the toy does not report where its walk ended")
_NO_WALK: Final = Gap("the toy does not tell an access to a guest table from any other")
_NO_MMIO: Final = Gap("the toy does not describe the instruction")

_present = CAUSE["PRESENT"].is_set
_write = CAUSE["WRITE"].is_set
_fetch = CAUSE["FETCH"].is_set

REACHABLE: Final = ~(_write & _fetch)

FACTS: Final[Definition] = Accessors(
    syndrome=CAUSE.field_at(7, 0),
    gpa_valid=CALLER["ADDR_GIVEN"].is_set,
    gpa_page=ADDR["PAGE"] << 12,
    gpa_offset_valid=CALLER["ADDR_GIVEN"].is_set,
    gpa_offset_bits=ADDR["OFFSET"],
    gva_valid=_NO_GVA,
    gva_bits=ZERO,
    is_read=~_write & ~_fetch,
    is_write=_write,
    is_exec=_fetch,
    is_user=_NO_USER,
    is_translation=~_present,
    is_permission=_present,
    is_access_flag=NEVER,
    is_reserved=NEVER,
    is_address_size=NEVER,
    is_external_abort=NEVER,
    granule_valid=_NO_LEVEL,
    granule_bytes=ZERO,
    is_table_walk=_NO_WALK,
    is_final=_NO_WALK,
    is_protection_key=NEVER,
    is_shadow_stack=NEVER,
    is_cache_op=NEVER,
    is_private=NEVER,
    is_prefetch=CALLER["PREFETCH"].is_set,
    mmio_valid=_NO_MMIO,
    mmio_bytes=ZERO,
    mmio_register_number=ZERO,
    mmio_sign_extend=_NO_MMIO,
    mmio_wide=_NO_MMIO,
    mmio_ordered=_NO_MMIO,
)
