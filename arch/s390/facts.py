"""The facts of a program interruption, as expressions over its code and the TEID.

A guest has no second stage of its own here: SIE walks KVM's table for every address of the guest, and what fails is
reported to the host as it would be for a process.
"""

from __future__ import annotations

from typing import Final

from arch.s390.registers import (
    ASCE_TYPE,
    DAT,
    GRANULES,
    INT_CODE,
    KVM,
    NON_SECURE_ACCESS,
    PROTECTION,
    SECURE_ACCESS,
    SECURE_VIOLATION,
    TEID,
)
from kvmfault.algebra.expr import NEVER
from kvmfault.algebra.layout import ZERO, join
from kvmfault.contract.accessors import Accessors, Definition, Gap

CODE: Final = INT_CODE["CODE"]
FSI: Final = TEID["FSI"]
_STORE: Final = 1
protection: Final = CODE.is_(PROTECTION)
primary: Final = TEID["AS"].is_(0)
kernel_write: Final = INT_CODE.field_at(15, 0).is_(PROTECTION) | (FSI.is_(_STORE) & KVM["NO_FSI"].is_(0))
"""kvm_s390_cur_gmap_fault_is_write: the code is compared whole, so a protection exception that comes together with a
PER event counts as a write only if FSI says so."""
write: Final = kernel_write | CODE.is_(NON_SECURE_ACCESS)
key_protection: Final = protection & TEID["B60"].is_set & TEID["B61"].is_(0) & TEID["B56"].is_(0)
teid_given: Final = KVM["TEID_GIVEN"].is_set

_NO_GVA: Final = Gap("TEID holds the guest's absolute address; the address that the guest used is not reported")
_NO_PLACE: Final = Gap("an access of the guest's own translation is reported like any other")
_NO_MMIO: Final = Gap("there is no memory-mapped I/O: devices are reached by channel and PCI instructions")

FACTS: Final[Definition] = Accessors(
    syndrome=join(INT_CODE.field_at(15, 0), TEID.field_at(11, 0) << 16),
    gpa_valid=teid_given,
    gpa_page=TEID["ADDR"] << 12,
    gpa_offset_valid=Gap("TEID holds the page only"),
    gpa_offset_bits=ZERO,
    gva_valid=_NO_GVA,
    gva_bits=ZERO,
    is_read=Gap("FSI says fetch for loads and for instructions, and may be unknown", assume=~write),
    is_write=write,
    is_exec=Gap("an instruction fetch is reported like a load; tables of KVM never forbid it"),
    is_user=Gap("the guest's problem state is in its PSW"),
    is_translation=CODE.one_of(tuple(GRANULES)),
    is_permission=protection,
    is_access_flag=Gap("an old entry is invalid, so it is reported like a missing one"),
    is_reserved=Gap("KVM's tables have no such entries: a translation specification would be a bug of KVM"),
    is_address_size=CODE.is_(ASCE_TYPE),
    is_external_abort=Gap("no such interruption: failing memory is a machine check"),
    granule_valid=CODE.one_of(tuple(GRANULES)),
    granule_bytes=CODE.table(GRANULES),
    is_table_walk=_NO_PLACE,
    is_final=_NO_PLACE,
    is_protection_key=key_protection,
    is_shadow_stack=NEVER,
    is_cache_op=NEVER,
    is_private=CODE.is_(NON_SECURE_ACCESS),
    is_prefetch=KVM["PREFETCH"].is_set,
    mmio_valid=_NO_MMIO,
    mmio_bytes=ZERO,
    mmio_register_number=ZERO,
    mmio_sign_extend=_NO_MMIO,
    mmio_wide=_NO_MMIO,
    mmio_ordered=_NO_MMIO,
)

REACHABLE: Final = (
    CODE.one_of((*DAT, SECURE_ACCESS, NON_SECURE_ACCESS, SECURE_VIOLATION))
    & INT_CODE.field_at(15, 10).is_(0)
    & INT_CODE.field_at(8, 8).is_(0)
    & FSI.one_of((0, 1, 2))
    & primary
    & TEID.field_at(9, 8).is_(0)
    & TEID.field_at(6, 4).is_(0)
    & KVM.field_at(63, 3).is_(0)
)
"""What ends SIE as a fault of the guest: codes that KVM expects, in the primary address space, reserved bits 0."""
