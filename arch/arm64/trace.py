"""Tracepoints of arm64 KVM (arch/arm64/kvm/trace_arm.h). The vCPU is the task: no event carries its number.

kvm_guest_fault calls ESR_EL2 ``hsr`` and FAR_EL2 ``hxfar``; its ``ipa`` is the page that HPFAR_EL2 gives. It comes
after the external aborts and addresses beyond the limits were sorted out: those leave a kvm_exit alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.arm64.encode import hpfar
from arch.common import COMMON
from kvmfault.contract.tracepoints import Fields, Role, Tracepoint, Tracepoints


def guest_fault(event: Fields, last_exit: Fields) -> Mapping[str, int] | None:
    """Registers of a kvm_guest_fault; None where a field is missing or is no number."""
    hsr, hxfar, ipa = event.get("hsr"), event.get("hxfar"), event.get("ipa")
    if isinstance(hsr, int) and isinstance(hxfar, int) and isinstance(ipa, int):
        return {"ESR_EL2": hsr, "FAR_EL2": hxfar, "HPFAR_EL2": hpfar(ipa & _IPA_MASK)}
    return None


_IPA_MASK: Final = (1 << 56) - 1  # 6.12 lets reserved bits of HPFAR_EL2 through to the top of the address

TRACEPOINTS: Final[Tracepoints] = {
    **COMMON,
    "kvm_guest_fault": Tracepoint(
        Role.FAULT,
        ("ipa {ipa:x}, hsr {hsr:x}, hxfar {hxfar:x}, pc {vcpu_pc:x}",),
        "vcpu_pc:x hsr:x hxfar:x ipa:x",
        guest_fault,
    ),
    "kvm_exit": Tracepoint(
        Role.EXIT, ("{ret:w}: HSR_EC: {esr_ec:x} ({class:w}), PC: {vcpu_pc:x}",), "ret:w esr_ec:x vcpu_pc:x", told_by=("ret", "esr_ec")
    ),
    "kvm_entry": Tracepoint(Role.ENTRY, ("PC: {vcpu_pc:x}",), "vcpu_pc:x"),
}
