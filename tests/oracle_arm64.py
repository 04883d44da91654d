"""The arm64 facts and accessors a second time, in plain if and else.

Written from descriptions of the registers and of KVM's functions, not from arch/arm64: it shares no constant with it.
`facts` and `accessors` take raw registers and return every answer by name.
"""

from __future__ import annotations

from dataclasses import dataclass

U64 = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Inputs:
    """One fault. The two ``given`` say whether FAR_EL2 and HPFAR_EL2 were captured at all."""

    esr: int
    far: int = 0
    hpfar: int = 0
    far_given: bool = True
    hpfar_given: bool = True
    private: bool = False
    prefetch: bool = False
    disr: int = 0


def bit(word: int, number: int) -> bool:
    return (word >> number) % 2 == 1


def bits(word: int, high: int, low: int) -> int:
    return (word >> low) % (1 << high - low + 1)


def status(esr: int) -> int:
    return esr % 64


def is_permission(esr: int) -> bool:
    return 12 <= status(esr) <= 15


def is_translation(esr: int) -> bool:
    code = status(esr)
    if code == 43:  # level -1
        return True
    return 4 <= code <= 7


def is_access_flag(esr: int) -> bool:
    return 8 <= status(esr) <= 11


def is_address_size(esr: int) -> bool:
    code = status(esr)
    return code <= 3 or code == 41


def is_external_on_walk(esr: int) -> bool:
    return 19 <= status(esr) <= 23


def is_parity_on_walk(esr: int) -> bool:
    return 27 <= status(esr) <= 31


def is_external(esr: int) -> bool:
    code = status(esr)
    if code in (16, 24):
        return True
    return is_external_on_walk(esr) or is_parity_on_walk(esr)


def is_fetch_class(esr: int) -> bool:
    return bits(esr, 31, 26) == 0b100000


def is_write(esr: int) -> bool:
    """kvm_is_write_fault."""
    if bit(esr, 7):
        return is_permission(esr)
    if is_fetch_class(esr):
        return False
    return bit(esr, 6)


def is_fetch(esr: int) -> bool:
    """kvm_vcpu_trap_is_exec_fault."""
    if bit(esr, 7):
        return False
    return is_fetch_class(esr)


def far_is_invalid(esr: int) -> bool:
    if status(esr) != 16:
        return False
    return bit(esr, 10)


def no_address(esr: int) -> bool:
    if is_external_on_walk(esr) or is_parity_on_walk(esr):
        return True
    return far_is_invalid(esr)


def level_size(page_shift: int, level: int) -> int:
    size = 1 << page_shift
    for _ in range(3 - level):
        size *= 1 << page_shift - 3  # the entries of one table, of 8 bytes each
    return size


def granule(esr: int, page_shift: int) -> int | None:
    """Bytes of the level that the status names; None where it names none, or the size does not exist."""
    code = status(esr)
    if code == 43:
        size = level_size(page_shift, -1)
    elif 4 <= code <= 15:
        size = level_size(page_shift, code % 4)
    else:
        return None
    return size if size <= U64 else None


def page_612(hpfar: int) -> int:
    return (hpfar // 16 * 16 * 256) % 2**64


def page_74(hpfar: int) -> int:
    return bits(hpfar, 47, 4) * 4096


def facts(fault: Inputs, page_shift: int, new: bool) -> dict[str, int | None]:
    """Every fact of the contract; None for a value whose validity fact is false, and for what is no arm64 fact."""
    esr = fault.esr
    walk = bit(esr, 7)
    gpa = page_74(fault.hpfar) if new else page_612(fault.hpfar)
    gpa_valid = fault.hpfar_given and not no_address(esr)
    offset_valid = gpa_valid and fault.far_given and not walk
    gva_valid = fault.far_given and not far_is_invalid(esr)
    size = granule(esr, page_shift)
    described = bit(esr, 24)
    return {
        "syndrome": esr,
        "gpa_valid": gpa_valid,
        "gpa_page": gpa if gpa_valid else None,
        "gpa_offset_valid": offset_valid,
        "gpa_offset_bits": fault.far % 4096 if offset_valid else None,
        "gva_valid": gva_valid,
        "gva_bits": fault.far if gva_valid else None,
        "is_read": not (is_write(esr) or is_fetch(esr)),
        "is_write": is_write(esr),
        "is_exec": is_fetch(esr),
        "is_user": None,
        "is_translation": is_translation(esr),
        "is_permission": is_permission(esr),
        "is_access_flag": is_access_flag(esr),
        "is_reserved": None,
        "is_address_size": is_address_size(esr),
        "is_external_abort": is_external(esr),
        "granule_valid": size is not None,
        "granule_bytes": size,
        "is_table_walk": walk,
        "is_final": not walk,
        "is_protection_key": bit(esr, 38),
        "is_shadow_stack": bit(esr, 40),
        "is_cache_op": bit(esr, 8),
        "is_private": fault.private,
        "is_prefetch": fault.prefetch,
        "mmio_valid": described,
        "mmio_bytes": 2 ** bits(esr, 23, 22) if described else None,
        "mmio_register_number": bits(esr, 20, 16) if described else None,
        "mmio_sign_extend": bit(esr, 21),
        "mmio_wide": bit(esr, 15),
        "mmio_ordered": bit(esr, 14),
    }


def needed_permission(esr: int) -> str:
    """What a nested guest's own entry must allow, or the permission fault is forwarded; "" for other faults."""
    if not is_permission(esr):
        return ""
    if is_fetch_class(esr):
        return "x"
    return "w" if is_write(esr) else "r"


def hpfar_is_valid(esr: int, erratum: bool) -> bool:
    """Since 6.15: hardware wrote HPFAR_EL2 for this fault."""
    if is_translation(esr):
        return not erratum
    if is_access_flag(esr) or is_address_size(esr):
        return True
    return bit(esr, 7) and is_permission(esr)


def hpfar_source(esr: int, new: bool, erratum: bool) -> int:
    """0: the register; 1: FAR_EL2 translated again; 2: there is no address."""
    if new:
        if hpfar_is_valid(esr, erratum):
            return 0
        return 2 if no_address(esr) else 1
    if bit(esr, 7):
        return 0
    return 1 if erratum or is_permission(esr) else 0


def accessors(fault: Inputs, page_shift: int, new: bool) -> dict[str, int | None]:
    """The kernel's accessors of 6.12 or 7.4; None where it would BUG or there is no value."""
    esr, far, hpfar = fault.esr, fault.far, fault.hpfar
    need = needed_permission(esr)

    def permission_granule(shift: int) -> int | None:
        if not is_permission(esr):
            return 0 if new else None
        return level_size(shift, esr % 4)

    answers: dict[str, int | None] = {
        "ec": bits(esr, 31, 26),
        "il": bit(esr, 25),
        "iss": esr % 2**25,
        "iss2": bits(esr, 55, 32),
        "isv": bit(esr, 24),
        "sas": bits(esr, 23, 22),
        "sse": bit(esr, 21),
        "srt": bits(esr, 20, 16),
        "sf": bit(esr, 15),
        "ar": bit(esr, 14),
        "vncr": bit(esr, 13),
        "set": bits(esr, 12, 11),
        "fnv": bit(esr, 10),
        "ea": bit(esr, 9),
        "cm": bit(esr, 8),
        "s1ptw": bit(esr, 7),
        "wnr": bit(esr, 6),
        "fsc": status(esr),
        "xs": bits(esr, 36, 32),
        "dirtybit": bit(esr, 37),
        "overlay": bit(esr, 38),
        "assuredonly": bit(esr, 39),
        "gcs": bit(esr, 40),
        "tagaccess": bit(esr, 41),
        "tnd": bit(esr, 42),
        "hdbssf": bit(esr, 43),
        "kvm_vcpu_get_esr": esr,
        "kvm_vcpu_get_hfar": far,
        "kvm_vcpu_get_disr": fault.disr,
        "kvm_vcpu_get_condition": bits(esr, 23, 20) if bit(esr, 24) else None,
        "kvm_vcpu_hvc_get_imm": esr % 65536,
        "kvm_vcpu_dabt_isvalid": bit(esr, 24),
        "kvm_vcpu_dabt_iss_nisv_sanitized": bit(esr, 8) * 256 + bit(esr, 6) * 64 + status(esr),
        "kvm_vcpu_dabt_issext": bit(esr, 21),
        "kvm_vcpu_dabt_issf": bit(esr, 15),
        "kvm_vcpu_dabt_get_rd": bits(esr, 20, 16),
        "kvm_vcpu_dabt_get_as": 2 ** bits(esr, 23, 22),
        "kvm_vcpu_abt_iss1tw": bit(esr, 7),
        "kvm_vcpu_dabt_iswrite": bit(esr, 6),
        "kvm_vcpu_trap_il_is32bit": bit(esr, 25),
        "kvm_vcpu_trap_get_class": bits(esr, 31, 26),
        "kvm_vcpu_trap_is_iabt": is_fetch_class(esr),
        "kvm_vcpu_trap_get_fault": status(esr),
        "kvm_vcpu_trap_is_permission_fault": is_permission(esr),
        "kvm_vcpu_trap_is_translation_fault": is_translation(esr),
        "kvm_vcpu_abt_issea": is_external(esr),
        "kvm_vcpu_sys_get_rt": bits(esr, 9, 5),
        "kvm_is_write_fault": is_write(esr),
        "esr_is_data_abort": bits(esr, 31, 26) in (36, 37),
        "esr_fsc_is_translation_fault": is_translation(esr),
        "esr_fsc_is_permission_fault": is_permission(esr),
        "esr_fsc_is_access_flag_fault": is_access_flag(esr),
        "s2_perm_needs_r": need == "r",
        "s2_perm_needs_w": need == "w",
        "s2_perm_needs_x": need == "x",
        "granule_4k": permission_granule(12),
        "granule_16k": permission_granule(14),
        "granule_64k": permission_granule(16),
        "hpfar_source_at": hpfar_source(esr, new, erratum=False) == 1,
        "hpfar_source_none": hpfar_source(esr, new, erratum=False) == 2,
        "hpfar_source_834220_at": hpfar_source(esr, new, erratum=True) == 1,
        "hpfar_source_834220_none": hpfar_source(esr, new, erratum=True) == 2,
    }
    if not new:
        answers |= {
            "kvm_vcpu_get_fault_ipa": page_612(hpfar),
            "fault_ipa_full": page_612(hpfar) + far % 4096,
            "kvm_vcpu_dabt_is_cm": bit(esr, 8),
            "kvm_vcpu_trap_is_exec_fault": is_fetch(esr),
            "kvm_vcpu_trap_get_perm_fault_granule": permission_granule(page_shift),
        }
        return answers
    answers |= {
        "kvm_vcpu_get_fault_ipa": page_74(hpfar) if bit(hpfar, 63) else U64,
        "fault_ipa_full": page_74(hpfar) + far % 4096 if bit(hpfar, 63) else None,
        "kvm_s2_perm_fault_granule": permission_granule(page_shift),
        "esr_fsc_is_addr_sz_fault": is_address_size(esr),
        "esr_fsc_is_sea_ttw": is_external_on_walk(esr),
        "esr_fsc_is_secc_ttw": is_parity_on_walk(esr),
        "esr_fsc_is_excl_atomic_fault": status(esr) == 53,
        "esr_fsc_get_fault": status(esr),
        "esr_fsc_get_level": esr % 4,
        "esr_trap_get_class": bits(esr, 31, 26),
        "esr_trap_is_iabt": is_fetch_class(esr),
        "esr_abt_is_s1ptw": bit(esr, 7),
        "esr_abt_is_exec_fault": is_fetch(esr),
        "esr_abt_is_write_fault": is_write(esr),
        "esr_abt_is_sea": is_external(esr),
        "esr_dabt_is_write": bit(esr, 6),
        "esr_dabt_is_cm": bit(esr, 8),
        "fault_safe_to_translate": not no_address(esr),
    }
    return answers
