"""The kernel's accessors by the kernel's names, in 6.12 and in 7.4 (kvm_emulate.h, esr.h, hyp/fault.h).

Where the kernel has a BUG or gives no value, the accessor is a ``Maybe``. Two answers are no single bit and are
declared bit by bit: from where the hypervisor takes HPFAR_EL2 (``hpfar_source_*``, __get_fault_info), and which
permission a nested guest's own table must give or the fault is forwarded to it (``s2_perm_needs_*``,
kvm_s2_handle_perm_fault).
"""

from __future__ import annotations

from typing import Final

from arch.arm64.capture import sources
from arch.arm64.codes import DABT_CUR, DABT_LOW, EXCLUSIVE_ATOMIC
from arch.arm64.facts import (
    FSC,
    ISV,
    PAGE_74,
    PAGE_612,
    S1PTW,
    WNR,
    access_flag,
    address_size,
    external,
    external_walk,
    fetch,
    granules,
    iabt,
    parity_walk,
    permission,
    translation,
    unsafe_to_translate,
    write,
)
from arch.arm64.registers import DISR_EL1, ESR_EL2, FAR_EL2, HPFAR_EL2
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.algebra.layout import join
from kvmfault.contract.backend import Named
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.values import AddressCapture, DistrustedFaults, RootAddressSize
from kvmfault.types import U64

_ESR: Final = ESR_EL2.field_at(63, 0)
_OFFSET: Final = FAR_EL2.field_at(11, 0)
SANITISED: Final = join(ESR_EL2["CM"] << 8, ESR_EL2["WnR"] << 6, FSC)
"""What user space learns of an access that the syndrome does not describe (kvm_vcpu_dabt_iss_nisv_sanitized)."""
exclusive_atomic: Final = FSC.is_(EXCLUSIVE_ATOMIC)
needs_x: Final = permission & iabt
needs_w: Final = permission & ~iabt & write
needs_r: Final = permission & ~iabt & ~write

_FIELDS: Final[dict[str, Pred | Word | Maybe]] = {
    "ec": ESR_EL2["EC"],
    "il": ESR_EL2["IL"],
    "iss": ESR_EL2.field_at(24, 0),
    "iss2": ESR_EL2.field_at(55, 32),
    "isv": ISV,
    "sas": ESR_EL2["SAS"],
    "sse": ESR_EL2["SSE"],
    "srt": ESR_EL2["SRT"],
    "sf": ESR_EL2["SF"],
    "ar": ESR_EL2["AR"],
    "vncr": ESR_EL2["VNCR"],
    "set": ESR_EL2["SET"],
    "fnv": ESR_EL2["FnV"],
    "ea": ESR_EL2["EA"],
    "cm": ESR_EL2["CM"],
    "s1ptw": ESR_EL2["S1PTW"],
    "wnr": ESR_EL2["WnR"],
    "fsc": FSC,
    "xs": ESR_EL2["Xs"],
    "dirtybit": ESR_EL2["DirtyBit"],
    "overlay": ESR_EL2["Overlay"],
    "assuredonly": ESR_EL2["AssuredOnly"],
    "gcs": ESR_EL2["GCS"],
    "tagaccess": ESR_EL2["TagAccess"],
    "tnd": ESR_EL2["TnD"],
    "hdbssf": ESR_EL2["HDBSSF"],
}

_BOTH: Final[dict[str, Pred | Word | Maybe]] = {
    **_FIELDS,
    "kvm_vcpu_get_esr": _ESR,
    "kvm_vcpu_get_hfar": FAR_EL2["VA"],
    "kvm_vcpu_get_disr": DISR_EL1.field_at(63, 0),
    "kvm_vcpu_get_condition": ESR_EL2.field_at(23, 20).when(ISV),  # bit 24 is CV in the classes that have a condition
    "kvm_vcpu_hvc_get_imm": ESR_EL2.field_at(15, 0),
    "kvm_vcpu_dabt_isvalid": ISV,
    "kvm_vcpu_dabt_iss_nisv_sanitized": SANITISED,
    "kvm_vcpu_dabt_issext": ESR_EL2["SSE"],
    "kvm_vcpu_dabt_issf": ESR_EL2["SF"],
    "kvm_vcpu_dabt_get_rd": ESR_EL2["SRT"],
    "kvm_vcpu_dabt_get_as": ESR_EL2["SAS"].table({0: 1, 1: 2, 2: 4, 3: 8}),
    "kvm_vcpu_abt_iss1tw": S1PTW,
    "kvm_vcpu_dabt_iswrite": WNR,
    "kvm_vcpu_trap_il_is32bit": ESR_EL2["IL"],
    "kvm_vcpu_trap_get_class": ESR_EL2["EC"],
    "kvm_vcpu_trap_is_iabt": iabt,
    "kvm_vcpu_trap_get_fault": FSC,
    "kvm_vcpu_trap_is_permission_fault": permission,
    "kvm_vcpu_trap_is_translation_fault": translation,
    "kvm_vcpu_abt_issea": external,
    "kvm_vcpu_sys_get_rt": ESR_EL2.field_at(9, 5),
    "kvm_is_write_fault": write,
    "esr_is_data_abort": ESR_EL2["EC"].one_of((DABT_LOW, DABT_CUR)),
    "esr_fsc_is_translation_fault": translation,
    "esr_fsc_is_permission_fault": permission,
    "esr_fsc_is_access_flag_fault": access_flag,
    "s2_perm_needs_r": needs_r,
    "s2_perm_needs_w": needs_w,
    "s2_perm_needs_x": needs_x,
}

_NEW: Final[dict[str, Pred | Word | Maybe]] = {
    "esr_fsc_is_addr_sz_fault": address_size,
    "esr_fsc_is_sea_ttw": external_walk,
    "esr_fsc_is_secc_ttw": parity_walk,
    "esr_fsc_is_excl_atomic_fault": exclusive_atomic,
    "esr_fsc_get_fault": FSC,
    "esr_fsc_get_level": ESR_EL2.field_at(1, 0),
    "esr_trap_get_class": ESR_EL2["EC"],
    "esr_trap_is_iabt": iabt,
    "esr_abt_is_s1ptw": S1PTW,
    "esr_abt_is_exec_fault": fetch,
    "esr_abt_is_write_fault": write,
    "esr_abt_is_sea": external,
    "esr_dabt_is_write": WNR,
    "esr_dabt_is_cm": ESR_EL2["CM"],
    "fault_safe_to_translate": ~unsafe_to_translate,
}

_GRANULES: Final = {"granule_4k": 12, "granule_16k": 14, "granule_64k": 16}


def _permission_granule(page_shift: int) -> Word:
    sizes = granules(page_shift)
    return FSC.table({code: size for code, size in sizes.items() if 0x0C <= code <= 0x0F})


def _or_invalid_gpa(page: Word) -> Word:
    # INVALID_GPA is all ones and absorbs what it is joined with, so this OR is exact although the two overlap.
    return Word((*page.terms, *HPFAR_EL2["NS"].table({0: U64}).terms))


def _sources(capture: AddressCapture, distrusted: DistrustedFaults, root: RootAddressSize) -> dict[str, Pred]:
    at, none = sources(capture, distrusted, root, misreports=False)
    at_834220, none_834220 = sources(capture, distrusted, root, misreports=True)
    return {
        "hpfar_source_at": at,
        "hpfar_source_none": none,
        "hpfar_source_834220_at": at_834220,
        "hpfar_source_834220_none": none_834220,
    }


def accessors_612(fmt: Stage2Format) -> Named:
    """Accessors of 6.12."""
    return {
        **_BOTH,
        "kvm_vcpu_get_fault_ipa": PAGE_612,
        "fault_ipa_full": join(PAGE_612, _OFFSET),
        "kvm_vcpu_dabt_is_cm": ESR_EL2["CM"],
        "kvm_vcpu_trap_is_exec_fault": fetch,
        "kvm_vcpu_trap_get_perm_fault_granule": _permission_granule(fmt.page_shift).when(permission),
        **{name: _permission_granule(shift).when(permission) for name, shift in _GRANULES.items()},
        **_sources(AddressCapture.ALL_BUT_PERMISSION, DistrustedFaults.ALL, RootAddressSize.UNKNOWN),
    }


def accessors_74(fmt: Stage2Format) -> Named:
    """Accessors of 7.4. kvm_s2_perm_fault_granule gives 0 where 6.12's predecessor had a BUG."""
    captured = HPFAR_EL2["NS"].is_set
    return {
        **_BOTH,
        **_NEW,
        "kvm_vcpu_get_fault_ipa": _or_invalid_gpa(PAGE_74),
        "fault_ipa_full": join(PAGE_74, _OFFSET).when(captured),
        "kvm_s2_perm_fault_granule": _permission_granule(fmt.page_shift),
        **{name: _permission_granule(shift) for name, shift in _GRANULES.items()},
        **_sources(AddressCapture.WHEN_VALID, DistrustedFaults.TRANSLATION, RootAddressSize.RIGHT),
    }
