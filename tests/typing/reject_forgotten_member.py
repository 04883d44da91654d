"""A definition that leaves a fact out: the fault path would stop with an AttributeError at the first write."""

from kvmfault import Definition
from kvmfault.algebra.expr import Pred, Word
from kvmfault.contract.accessors import Accessors


def define(p: Pred, w: Word) -> Definition:
    return Accessors(  # error: Missing named argument "is_write" for "Accessors"
        syndrome=w,
        gpa_valid=p,
        gpa_page=w,
        gpa_offset_valid=p,
        gpa_offset_bits=w,
        gva_valid=p,
        gva_bits=w,
        is_read=p,
        is_exec=p,
        is_user=p,
        is_translation=p,
        is_permission=p,
        is_access_flag=p,
        is_reserved=p,
        is_address_size=p,
        is_external_abort=p,
        granule_valid=p,
        granule_bytes=w,
        is_table_walk=p,
        is_final=p,
        is_protection_key=p,
        is_shadow_stack=p,
        is_cache_op=p,
        is_private=p,
        is_prefetch=p,
        mmio_valid=p,
        mmio_bytes=w,
        mmio_register_number=w,
        mmio_sign_extend=p,
        mmio_wide=p,
        mmio_ordered=p,
    )
