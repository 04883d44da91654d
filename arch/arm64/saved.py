"""Where KVM keeps the fault registers of a vCPU: vcpu->arch.fault, written at every exit (kvm_vcpu_fault_info)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.arm64.codes import DABT_LOW, IABT_LOW
from arch.arm64.registers import ESR_EL2
from kvmfault.contract.saved import VcpuMemory

_MEMBERS: Final = {"ESR_EL2": "esr_el2", "FAR_EL2": "far_el2", "HPFAR_EL2": "hpfar_el2", "DISR_EL1": "disr_el1"}
_ABORTS: Final = ESR_EL2["EC"].one_of((DABT_LOW, IABT_LOW))


def saved(vcpu: VcpuMemory) -> Mapping[str, int] | None:
    """The four registers; None where the last exit was no abort of the guest."""
    found = {name: vcpu.number(f"arch.fault.{member}") for name, member in _MEMBERS.items()}
    registers = {name: value for name, value in found.items() if value is not None}
    if "ESR_EL2" not in registers or not _ABORTS.on(registers):
        return None
    return registers
