"""Tracepoints of arm64 KVM (arch/arm64/kvm/trace_arm.h). The vCPU is the task: no event carries its number.

kvm_guest_fault calls ESR_EL2 ``hsr`` and FAR_EL2 ``hxfar``; its ``ipa`` is the page that HPFAR_EL2 gives. It comes
after the external aborts and addresses beyond the limits were sorted out: those leave a kvm_exit alone.
"""

from __future__ import annotations

from typing import Final

from arch.arm64.codes import CLASSES
from arch.arm64.registers import HPFAR_EL2
from arch.common import COMMON
from kvmfault.algebra.expr import Word
from kvmfault.algebra.layout import join
from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints, Words, recorded, words

_EXITS: Final = words("ret", IRQ=0, SERROR=1, TRAP=2, HYP_GONE=0xBADCA11)
_IS_WRITE: Final = words("is_write", read=0, write=1)
_TIMER: Final = "CTL: {ctl:x} CVAL: {cval:x} arch_timer_ctx_index: {timer_idx:i}"

TRACEPOINTS: Final[Tracepoints] = {
    **COMMON,
    "kvm_guest_fault": Tracepoint(
        Role.FAULT,
        ("ipa {ipa:x}, hsr {hsr:x}, hxfar {hxfar:x}, pc {vcpu_pc:x}",),
        "vcpu_pc:x hsr:x hxfar:x ipa:x",
        registers={
            "ESR_EL2": recorded("hsr"),
            "FAR_EL2": recorded("hxfar"),
            # 6.12 lets reserved bits of HPFAR_EL2 through to the top of the address
            "HPFAR_EL2": join(Word((), HPFAR_EL2["NS"].mask), recorded("ipa", 55, 12) << HPFAR_EL2["FIPA"].lo),
        },
    ),
    "kvm_exit": Tracepoint(
        Role.EXIT,
        ("{ret:w}: HSR_EC: {esr_ec:x} ({:w}), PC: {vcpu_pc:x}",),
        "ret:i esr_ec:x vcpu_pc:x",
        {"ret": _EXITS, "esr_ec": Words("esr_ec", {name: {"esr_ec": code} for code, name in CLASSES.items()})},
        told_by=("ret", "esr_ec"),
    ),
    "kvm_entry": Tracepoint(Role.ENTRY, ("PC: {vcpu_pc:x}",)),
    "kvm_access_fault": Tracepoint(Role.YOUNG, ("IPA: {ipa:x}",), address=recorded("ipa") << 0),
    "kvm_mmio_nisv": Tracepoint(
        Role.UNDECODED,
        ("ipa {ipa:x}, esr {esr:x}, far {far:x}, pc {vcpu_pc:x}",),
        "vcpu_pc:x esr:x far:x ipa:x",
        address=recorded("ipa") << 0,
    ),
    "kvm_hvc_arm64": Tracepoint(None, ("HVC at {vcpu_pc:x} (r0: {r0:x}, imm: {imm:x})",)),
    "kvm_wfx_arm64": Tracepoint(
        None,
        ("guest executed wf>c< at: {:w}", "guest executed {is_wfe:w} at: {vcpu_pc:x}"),  # trace-cmd knows no %c
        "vcpu_pc:x is_wfe:d",
        {"is_wfe": words("is_wfe", wfi=0, wfe=1)},
    ),
    "kvm_handle_sys_reg": Tracepoint(None, ("HSR {hsr:x}",)),
    "kvm_sys_access": Tracepoint(
        None,
        ("PC: {vcpu_pc:x} {:w} ({Op0:d},{Op1:d},{CRn:d},{CRm:d},{Op2:d}) {is_write:w}",),
        "vcpu_pc:x is_write:d name:x Op0:d Op1:d CRn:d CRm:d Op2:d",
        {"is_write": _IS_WRITE},
    ),
    # names are pointers in the event; trace-cmd shows them as such, the kernel the text there
    "kvm_arm_set_dreg32": Tracepoint(None, ("{name:x}: {value:x}", "{:w}: {value:x}"), "name:x value:x"),
    "kvm_arm_setup_debug": Tracepoint(
        None, ("vcpu: 0x{vcpu:x}, flags: {guest_debug:x}", "vcpu: {:w}, flags: {guest_debug:x}"), "vcpu:x guest_debug:x"
    ),
    "kvm_arm_clear_debug": Tracepoint(None, ("flags: {guest_debug:x}",)),
    "kvm_timer_save_state": Tracepoint(None, (_TIMER,)),
    "kvm_timer_restore_state": Tracepoint(None, (_TIMER,)),
    "kvm_timer_update_irq": Tracepoint(None, ("VCPU: {vcpu_id:d}, IRQ {irq:d}, level {level:i}",)),
    "kvm_get_timer_map": Tracepoint(
        None,
        ("VCPU: {vcpu_id:d}, dv: {direct_vtimer:i}, dp: {direct_ptimer:i}, ev: {emul_vtimer:i}, ep: {emul_ptimer:i}",),
    ),
}
