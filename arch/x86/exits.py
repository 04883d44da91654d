"""Exit reasons of VMX and SVM by the names that the kernel's trace events and trace-cmd's plugin print.

Sources: Intel SDM, "VMX Basic Exit Reasons"; AMD APM, "SVM Intercept Codes"; the kernel's spelling. The two vendors'
names differ, so a name tells the vendor (``isa``) too.
"""

from __future__ import annotations

from typing import Final

from kvmfault.contract.tracepoints import Words

VMX, SVM = 1, 2
"""kvm_exit.isa."""


def _numbered(text: str) -> dict[str, int]:
    # "name name @48 name": consecutive numbers, @ sets the next one, - leaves one out
    names, at = {}, 0
    for word in text.split():
        if word[0] == "@":
            at = int(word[1:], 16)
            continue
        if word != "-":
            names[word] = at
        at += 1
    return names


_VMX: Final = _numbered(
    "EXCEPTION_NMI EXTERNAL_INTERRUPT TRIPLE_FAULT INIT_SIGNAL SIPI_SIGNAL - - INTERRUPT_WINDOW NMI_WINDOW TASK_SWITCH "
    "CPUID - HLT INVD INVLPG RDPMC RDTSC - VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST VMREAD VMRESUME VMWRITE VMOFF VMON "
    "CR_ACCESS DR_ACCESS IO_INSTRUCTION MSR_READ MSR_WRITE INVALID_STATE MSR_LOAD_FAIL - MWAIT_INSTRUCTION "
    "MONITOR_TRAP_FLAG - MONITOR_INSTRUCTION PAUSE_INSTRUCTION MCE_DURING_VMENTRY - TPR_BELOW_THRESHOLD APIC_ACCESS "
    "EOI_INDUCED GDTR_IDTR LDTR_TR EPT_VIOLATION EPT_MISCONFIG INVEPT RDTSCP PREEMPTION_TIMER INVVPID WBINVD XSETBV "
    "APIC_WRITE RDRAND INVPCID VMFUNC ENCLS RDSEED PML_FULL XSAVES XRSTORS - - UMWAIT TPAUSE LOADIWKEY "
    "@4a BUS_LOCK NOTIFY SEAMCALL TDCALL @54 MSR_READ_IMM MSR_WRITE_IMM"
)
_EXCEPTIONS: Final = _numbered("DE DB - BP OF BR UD NM DF - TS NP SS GP PF - MF AC MC XF")
_SVM: Final = {
    **_numbered(
        "read_cr0 - read_cr2 read_cr3 read_cr4 @8 read_cr8 @10 write_cr0 - write_cr2 write_cr3 write_cr4 @18 write_cr8 "
        "@20 read_dr0 read_dr1 read_dr2 read_dr3 read_dr4 read_dr5 read_dr6 read_dr7 "
        "@30 write_dr0 write_dr1 write_dr2 write_dr3 write_dr4 write_dr5 write_dr6 write_dr7 "
        "@60 interrupt nmi smi init vintr cr0_sel_write read_idtr read_gdtr read_ldtr read_rt write_idtr write_gdtr "
        "write_ldtr write_rt rdtsc rdpmc pushf popf cpuid rsm iret swint invd pause hlt invlpg invlpga io msr "
        "task_switch ferr_freeze shutdown vmrun hypercall vmload vmsave stgi clgi skinit rdtscp icebp wbinvd monitor "
        "mwait - xsetbv - write_efer_trap write_cr0_trap @94 write_cr4_trap @98 write_cr8_trap @a2 invpcid "
        "@a5 buslock idle-halt @400 npf avic_incomplete_ipi avic_unaccelerated_access vmgexit "
        "@80000001 vmgexit_mmio_read vmgexit_mmio_write vmgexit_nmi_complete vmgexit_ap_hlt_loop vmgexit_ap_jump_table "
        "@80000010 vmgexit_page_state_change vmgexit_guest_request vmgexit_ext_guest_request vmgexit_ap_creation "
        "@8000fffd vmgexit_hypervisor_feature @ffffffff invalid_guest_state"
    ),
    **{f"{name} excp": 0x40 + number for name, number in _EXCEPTIONS.items()},
}
# where the plugin of trace-cmd does not just write EXIT_ before the kernel's name in capitals
_PLUGIN_VMX: Final = {"PENDING_INTERRUPT": 7}
_PLUGIN_SVM: Final = {
    **{f"EXIT_EXCP_{name}": 0x40 + number for name, number in _EXCEPTIONS.items()},
    **{f"EXIT_{name}": number for name, number in _numbered(
        "@60 INTR @66 IDTR_READ GDTR_READ LDTR_READ TR_READ IDTR_WRITE GDTR_WRITE LDTR_WRITE TR_WRITE @7b IOIO "
        "@81 VMMCALL @8c MWAIT_COND @ffffffff ERR"
    ).items()},
}  # fmt: skip

EXIT_REASONS: Final = Words(
    "exit_reason",
    {
        word: {"exit_reason": number, "isa": isa}
        for isa, names in (
            (VMX, _VMX),
            (SVM, _SVM),
            (VMX, _PLUGIN_VMX),
            (SVM, {f"EXIT_{word.upper()}": number for word, number in _SVM.items()}),
            (SVM, _PLUGIN_SVM),
        )
        for word, number in names.items()
    },
    {"FAILED_VMENTRY": 1 << 31, "ENCLAVE_MODE": 1 << 27},
)
"""Words of kvm_exit.exit_reason."""
