"""Which kernel function calls which accessor of arm64's kvm_emulate.h: facts, read from the sources of Linux 6.17.

6.17 is the kernel of August 2025, the one that the discussion looked at. ``since`` names the release that brought a
function of the abort path that 6.12 does not have. Functions that ask only about the guest's configuration
(vcpu_has_nv, is_hyp_ctxt) or are handed the ESR (kvm_inject_nested, __get_fault_info) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

VERSION: Final = "6.17"


@dataclass(frozen=True, slots=True)
class Caller:
    """A kernel function that asks accessors about the vCPU's last exit. *uses*: the accessors, each once."""

    name: str
    file: str
    uses: tuple[str, ...]
    since: str = ""


def _callers(file: str, *rows: str) -> Iterable[Caller]:
    """One row is ``name[@since]: accessor accessor ...``; ``V:`` stands for ``kvm_vcpu_``."""
    for row in rows:
        head, _, rest = row.partition(": ")
        name, _, since = head.partition("@")
        yield Caller(name, file, tuple(word.replace("V:", "kvm_vcpu_") for word in rest.split()), since)


CALLERS: Final[tuple[Caller, ...]] = (
    *_callers(
        "mmu.c",
        "kvm_handle_guest_abort: V:get_esr V:get_hfar V:get_fault_ipa V:abt_issea V:trap_is_iabt V:trap_get_class "
        "V:trap_get_fault V:abt_iss1tw V:dabt_is_cm kvm_is_write_fault vcpu_pc kvm_incr_pc",
        "user_mem_abort: V:trap_get_perm_fault_granule kvm_is_write_fault V:trap_is_exec_fault",
        "gmem_abort@6.18: kvm_is_write_fault V:trap_is_exec_fault",
    ),
    *_callers(
        "mmio.c",
        "io_mem_abort: V:get_esr V:get_hfar V:dabt_isvalid V:dabt_iss_nisv_sanitized V:dabt_iswrite V:dabt_get_as "
        "V:dabt_get_rd vcpu_get_reg vcpu_pc vcpu_data_guest_to_host",
        "kvm_handle_mmio_return: V:dabt_iswrite V:dabt_get_as V:dabt_issext V:dabt_issf V:dabt_get_rd vcpu_set_reg "
        "vcpu_data_host_to_guest kvm_incr_pc",
    ),
    *_callers(
        "nested.c",
        "kvm_s2_handle_perm_fault: V:trap_is_permission_fault V:trap_is_iabt kvm_is_write_fault",
        "kvm_walk_nested_s2: V:get_esr",
        "esr_s2_fault: V:get_esr",
        "kvm_handle_vncr_abort@6.16: V:get_esr V:abt_issea",
        "kvm_translate_vncr@6.16: kvm_is_write_fault",
        "inject_vncr_perm@6.16: V:get_esr",
    ),
    *_callers(
        "inject_fault.c",
        "inject_abt64: V:trap_il_is32bit vcpu_cpsr vcpu_mode_is_32bit",
        "inject_undef64: V:trap_il_is32bit",
        "kvm_inject_size_fault: V:get_hfar V:get_fault_ipa V:trap_is_iabt",
    ),
    *_callers(
        "handle_exit.c",
        "handle_exit_early: V:get_esr V:get_disr",
        "handle_trap_exceptions: kvm_condition_valid kvm_incr_pc",
        "kvm_get_exit_handler: V:get_esr",
        "handle_hvc: V:get_esr V:hvc_get_imm vcpu_get_reg vcpu_pc",
        "handle_smc: V:hvc_get_imm vcpu_set_reg kvm_incr_pc",
        "kvm_handle_wfx: V:get_esr V:sys_get_rt vcpu_get_reg vcpu_pc vcpu_mode_priv guest_hyp_wfx_traps_enabled "
        "kvm_incr_pc",
        "kvm_handle_guest_debug: V:get_esr vcpu_cpsr",
        "kvm_handle_fpasimd: V:get_esr",
        "handle_sve: V:get_esr",
        "kvm_handle_ptrauth: V:get_esr",
        "kvm_handle_eret: V:get_esr",
        "handle_svc: V:get_esr",
        "handle_other: V:get_esr",
        "kvm_handle_unknown_ec: V:get_esr",
    ),
    *_callers(
        "emulate-nested.c",
        "triage_sysreg_trap: V:get_esr vcpu_pc",
        "__forward_traps: V:get_esr",
        "kvm_emulate_nested_eret: V:get_esr vcpu_pc vcpu_cpsr",
    ),
    *_callers(
        "sys_regs.c",
        "kvm_handle_sys_reg: V:get_esr V:sys_get_rt vcpu_get_reg vcpu_set_reg",
        "kvm_handle_cp_64: V:get_esr V:sys_get_rt vcpu_get_reg vcpu_set_reg",
        "kvm_handle_cp_32: V:sys_get_rt vcpu_get_reg vcpu_set_reg",
        "kvm_handle_cp15_32: V:get_esr",
        "kvm_handle_cp14_32: V:get_esr",
        "kvm_handle_cp10_id: V:get_esr V:sys_get_rt vcpu_set_reg",
        "kvm_emulate_cp15_id_reg: V:sys_get_rt vcpu_set_reg",
        "unhandled_cp_access: V:trap_get_class vcpu_pc vcpu_cpsr",
    ),
    *_callers("hypercalls.c", "kvm_prepare_hypercall_exit: V:get_esr V:trap_il_is32bit"),
    *_callers("guest.c", "__kvm_arm_vcpu_set_events: V:get_hfar"),
    *_callers("pauth.c", "kvm_auth_eretax: V:get_esr", "corrupt_addr: V:get_esr"),
    *_callers(
        "hyp/include/hyp/switch.h",
        "__fixup_guest_exit: V:trap_get_class",
        "kvm_hyp_handle_exit: V:trap_get_class",
        "kvm_hyp_handle_fpsimd: V:trap_get_class",
        "kvm_hyp_handle_dabt_low: V:trap_is_translation_fault V:dabt_isvalid V:abt_issea V:abt_iss1tw",
        "handle_tx2_tvm: V:get_esr V:sys_get_rt vcpu_get_reg",
        "handle_ampere1_tcr: V:get_esr V:sys_get_rt vcpu_get_reg",
        "kvm_handle_cntxct: V:get_esr V:sys_get_rt vcpu_set_reg",
    ),
    *_callers(
        "hyp/vhe/switch.c",
        "kvm_hyp_handle_timer: V:get_esr V:sys_get_rt vcpu_set_reg",
        "kvm_hyp_handle_tlbi_el2: V:get_esr V:sys_get_rt vcpu_get_reg",
        "kvm_hyp_handle_cpacr_el1: V:get_esr V:sys_get_rt vcpu_get_reg vcpu_set_reg",
        "kvm_hyp_handle_zcr_el2: V:get_esr",
        "kvm_hyp_handle_eret: V:get_esr",
    ),
    *_callers("hyp/nvhe/sys_regs.c", "kvm_handle_pvm_sysreg: V:get_esr V:sys_get_rt vcpu_get_reg vcpu_set_reg"),
    *_callers(
        "hyp/aarch32.c",
        "kvm_condition_valid32: V:trap_get_class V:get_condition vcpu_cpsr",
        "kvm_skip_instr32: V:trap_il_is32bit vcpu_pc vcpu_cpsr",
    ),
    *_callers(
        "hyp/vgic-v2-cpuif-proxy.c",
        "__vgic_v2_perform_cpuif_access: V:get_hfar V:get_fault_ipa V:dabt_iswrite V:dabt_get_as V:dabt_get_rd "
        "vcpu_get_reg vcpu_set_reg",
    ),
    *_callers(
        "hyp/vgic-v3-sr.c",
        "__vgic_v3_perform_cpuif_access: V:get_esr V:sys_get_rt vcpu_mode_is_32bit kvm_condition_valid",
        "__vgic_v3_get_group: V:get_esr",
    ),
)
"""Without the accessors themselves, which are in BUILT_FROM."""

BUILT_FROM: Final[tuple[Caller, ...]] = tuple(
    _callers(
        "kvm_emulate.h",
        "kvm_is_write_fault: V:abt_iss1tw V:trap_is_permission_fault V:trap_is_iabt V:dabt_iswrite",
        "kvm_vcpu_trap_is_exec_fault: V:trap_is_iabt V:abt_iss1tw",
        "kvm_vcpu_trap_is_iabt: V:trap_get_class",
        "kvm_vcpu_abt_issea: V:trap_get_fault",
        "guest_hyp_wfx_traps_enabled: V:get_esr",
        "kvm_condition_valid: vcpu_mode_is_32bit",
        "vcpu_data_guest_to_host: V:is_be",
        "vcpu_data_host_to_guest: V:is_be",
        "kvm_vcpu_is_be: vcpu_cpsr vcpu_mode_is_32bit vcpu_mode_priv",
        "vcpu_mode_priv: vcpu_cpsr vcpu_mode_is_32bit",
        "vcpu_mode_is_32bit: vcpu_cpsr",
    )
)
"""Accessors that are built from others. (All others that read the syndrome call kvm_vcpu_get_esr.)"""

NEEDS_VCPU: Final[Mapping[str, str]] = {
    "vcpu_get_reg": "general registers",
    "vcpu_set_reg": "general registers (written)",
    "vcpu_pc": "PC",
    "vcpu_cpsr": "PSTATE",
    "vcpu_mode_is_32bit": "PSTATE",
    "vcpu_mode_priv": "PSTATE",
    "kvm_vcpu_is_be": "PSTATE, SCTLR_EL1",
    "vcpu_data_guest_to_host": "PSTATE, SCTLR_EL1",
    "vcpu_data_host_to_guest": "PSTATE, SCTLR_EL1",
    "kvm_incr_pc": "pending-exception flags (written)",
    "kvm_condition_valid": "PSTATE, and ESR",
    "guest_hyp_wfx_traps_enabled": "PSTATE, HCR_EL2, and ESR",
}
"""Accessors that no fault register answers, with what they read instead. Stated, for they are outside this model."""

READ_DIRECTLY: Final[Mapping[str, str]] = {
    "__fixup_guest_exit": "writes ESR",
    "__populate_fault_info": "ESR; writes FAR and HPFAR",
    "kvm_hyp_handle_mops": "ESR",
    "kvm_hyp_handle_impdef": "writes ESR",
    "kvm_handle_guest_debug": "FAR",
    "kvm_inject_s2_fault": "FAR, HPFAR",
}
"""Functions that go to ``vcpu->arch.fault`` without an accessor, and for which register."""

ALREADY: Final = ("kvm_vcpu_trap_is_translation_fault", "kvm_vcpu_trap_is_permission_fault")
"""Accessors whose ESR form esr.h had already, and which kvm_handle_guest_abort and hyp/fault.h use in that form."""

ESR_FORM: Final[Mapping[str, str]] = {
    "kvm_vcpu_trap_get_class": "esr_trap_get_class",
    "kvm_vcpu_trap_get_fault": "esr_fsc_get_fault",
    "kvm_vcpu_trap_is_iabt": "esr_trap_is_iabt",
    "kvm_vcpu_trap_is_exec_fault": "esr_abt_is_exec_fault",
    "kvm_vcpu_trap_is_permission_fault": "esr_fsc_is_permission_fault",
    "kvm_vcpu_trap_is_translation_fault": "esr_fsc_is_translation_fault",
    "kvm_vcpu_abt_issea": "esr_abt_is_sea",
    "kvm_vcpu_abt_iss1tw": "esr_abt_is_s1ptw",
    "kvm_vcpu_dabt_iswrite": "esr_dabt_is_write",
    "kvm_vcpu_dabt_is_cm": "esr_dabt_is_cm",
    "kvm_is_write_fault": "esr_abt_is_write_fault",
}
"""The ESR form that an accessor has got since, by the name it was merged under for 7.4."""

ORDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "the abort path first": ("kvm_handle_guest_abort", "user_mem_abort", "gmem_abort"),
    "mmio.c first": ("io_mem_abort", "kvm_handle_mmio_return"),
    "nested.c first": ("kvm_s2_handle_perm_fault", "kvm_handle_vncr_abort", "kvm_translate_vncr"),
    "the hypervisor first": (
        "__fixup_guest_exit",
        "kvm_hyp_handle_dabt_low",
        "kvm_condition_valid32",
        "__vgic_v2_perform_cpuif_access",
    ),
}
"""Named beginnings of an order, by one caller of each step; each is completed in the best way."""
