"""What each of the three backends can say of a fault, and what it cannot.

Reserved-bit faults are ``is_reserved`` and nothing else: KVM gives RSVD precedence (handle_mmio_page_fault),
some CPU models set P with it and some do not, and an EPT misconfiguration has no P at all. So ``is_permission``
is "present and not reserved" and ``is_translation`` "neither present nor reserved": the three never overlap.
"""

from __future__ import annotations

from arch.x86.pferr import entry_present, misconfig, snp_private, violation
from arch.x86.registers import (
    CR2,
    ERROR_CODE,
    EXIT_QUALIFICATION,
    EXITINFO1,
    EXITINFO2,
    GUEST_LINEAR_ADDRESS,
    GUEST_PHYSICAL_ADDRESS,
    KVM,
)
from kvmfault.algebra.expr import NEVER
from kvmfault.algebra.layout import ZERO
from kvmfault.contract.accessors import Accessors, Definition, Gap

_NO_LEVEL = Gap("x86 does not report the level at which a walk of EPT, NPT or shadow tables ended")
_NO_ACCESSED = Gap(
    "no such fault: the CPU sets accessed bits itself; where it does not, KVM makes old entries not present"
)
_NO_SIZE = Gap("no such fault: an address too wide for the CPU is a reserved bit in the entry that holds it")
_NO_EXTERNAL = Gap("no such fault: failing memory is a machine check, another exception")
_NO_CACHE_OP = Gap("not reported: CLFLUSH and friends fault like loads")
_NO_MMIO = Gap("not reported: KVM's emulator fetches and decodes the instruction")


def ept(*, reads_advanced_info: bool) -> Definition:
    """EPT violation and misconfiguration. *reads_advanced_info*: the kernel takes user mode from bit 9."""
    q = EXIT_QUALIFICATION
    gva_valid = violation & q["GVA_IS_VALID"].is_set
    final = gva_valid & q["GVA_TRANSLATED"].is_set
    user = final & q["ADV_USER"].is_set
    return Accessors(
        syndrome=q.field_at(63, 0),
        gpa_valid=KVM["GPA_GIVEN"].is_set,
        gpa_page=GUEST_PHYSICAL_ADDRESS["PAGE"] << 12,
        gpa_offset_valid=KVM["GPA_GIVEN"].is_set,
        gpa_offset_bits=GUEST_PHYSICAL_ADDRESS["OFFSET"],
        gva_valid=gva_valid & KVM["GVA_GIVEN"].is_set,
        gva_bits=GUEST_LINEAR_ADDRESS["LINEAR"],
        is_read=violation & q["ACC_READ"].is_set,
        is_write=violation & q["ACC_WRITE"].is_set,
        is_exec=violation & q["ACC_INSTR"].is_set,
        is_user=Gap(
            "qualification bit 9 says so only on CPUs with advanced exit information; PFERR bit 2 means read here",
            assume=user if reads_advanced_info else NEVER,
        ),
        is_translation=violation & ~entry_present,
        is_permission=violation & entry_present,
        is_access_flag=_NO_ACCESSED,
        is_reserved=misconfig,
        is_address_size=_NO_SIZE,
        is_external_abort=_NO_EXTERNAL,
        granule_valid=_NO_LEVEL,
        granule_bytes=ZERO,
        is_table_walk=gva_valid & ~q["GVA_TRANSLATED"].is_set,
        is_final=final,
        is_protection_key=Gap("protection keys are checked in the guest's own tables; an EPT violation tells no key"),
        is_shadow_stack=violation & q["ACC_SHADOW_STACK"].is_set,
        is_cache_op=_NO_CACHE_OP,
        is_private=KVM["PRIVATE"].is_set,
        is_prefetch=KVM["PREFETCH"].is_set,
        mmio_valid=_NO_MMIO,
        mmio_bytes=ZERO,
        mmio_register_number=ZERO,
        mmio_sign_extend=_NO_MMIO,
        mmio_wide=_NO_MMIO,
        mmio_ordered=_NO_MMIO,
    )


def npt() -> Definition:
    """Nested page fault. Bit 2 is always 1, so "user" is not known; a read is what neither writes nor fetches."""
    e = EXITINFO1
    present, reserved = e["P"].is_set, e["RSVD"].is_set
    write, fetch = e["W"].is_set, e["F"].is_set
    return Accessors(
        syndrome=e.field_at(63, 0),
        gpa_valid=KVM["GPA_GIVEN"].is_set,
        gpa_page=EXITINFO2["PAGE"] << 12,
        gpa_offset_valid=KVM["GPA_GIVEN"].is_set,
        gpa_offset_bits=EXITINFO2["OFFSET"],
        gva_valid=Gap("a nested page fault reports the guest-physical address only"),
        gva_bits=ZERO,
        is_read=~write & ~fetch,
        is_write=write,
        is_exec=fetch,
        is_user=Gap("bit 2 is 1 in every nested page fault: nested tables are walked as user accesses"),
        is_translation=~present & ~reserved,
        is_permission=present & ~reserved,
        is_access_flag=_NO_ACCESSED,
        is_reserved=reserved,
        is_address_size=_NO_SIZE,
        is_external_abort=_NO_EXTERNAL,
        granule_valid=_NO_LEVEL,
        granule_bytes=ZERO,
        is_table_walk=e["WALK"].is_set,
        is_final=e["FINAL"].is_set,
        is_protection_key=Gap("protection keys are checked in the guest's own tables; an NPF tells no key"),
        is_shadow_stack=e["SS"].is_set,
        is_cache_op=_NO_CACHE_OP,
        is_private=KVM["PRIVATE"].is_set | snp_private,
        is_prefetch=KVM["PREFETCH"].is_set,
        mmio_valid=_NO_MMIO,
        mmio_bytes=ZERO,
        mmio_register_number=ZERO,
        mmio_sign_extend=_NO_MMIO,
        mmio_wide=_NO_MMIO,
        mmio_ordered=_NO_MMIO,
    )


def shadow() -> Definition:
    """#PF intercepted for shadow paging: the address is virtual, and bit 2 is user mode."""
    e = ERROR_CODE
    no_gpa = Gap("CR2 is a virtual address; the physical one is known after a walk of the guest's tables")
    no_place = Gap("a #PF does not tell: the CPU walked the shadow table, the guest's own tables take no part")
    present, reserved = e["P"].is_set, e["RSVD"].is_set
    write, fetch = e["W"].is_set, e["F"].is_set
    return Accessors(
        syndrome=e.field_at(63, 0),
        gpa_valid=no_gpa,
        gpa_page=ZERO,
        gpa_offset_valid=no_gpa,
        gpa_offset_bits=ZERO,
        gva_valid=KVM["GVA_GIVEN"].is_set,
        gva_bits=CR2["LINEAR"],
        is_read=~write & ~fetch,
        is_write=write,
        is_exec=fetch,
        is_user=e["U"].is_set,
        is_translation=~present & ~reserved,
        is_permission=present & ~reserved,
        is_access_flag=_NO_ACCESSED,
        is_reserved=reserved,
        is_address_size=_NO_SIZE,
        is_external_abort=_NO_EXTERNAL,
        granule_valid=Gap("the shadow level is not reported; the guest's own is known after the walk of its tables"),
        granule_bytes=ZERO,
        is_table_walk=no_place,
        is_final=no_place,
        is_protection_key=e["PK"].is_set,
        is_shadow_stack=e["SS"].is_set,
        is_cache_op=_NO_CACHE_OP,
        is_private=KVM["PRIVATE"].is_set,
        is_prefetch=KVM["PREFETCH"].is_set,
        mmio_valid=_NO_MMIO,
        mmio_bytes=ZERO,
        mmio_register_number=ZERO,
        mmio_sign_extend=_NO_MMIO,
        mmio_wide=_NO_MMIO,
        mmio_ordered=_NO_MMIO,
    )
