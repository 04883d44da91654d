"""Where KVM keeps what an exit told: the VMCB is memory; of a VMCS only what KVM copied out of it.

Kernels that run TDX guests keep the exit in the member vt of struct vcpu_vmx, older ones in the structure itself. The
guest-physical address of an EPT violation is in the VMCS alone, so it is not among these registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.x86.registers import EPT_MISCONFIG, EPT_VIOLATION
from kvmfault.contract.saved import VcpuMemory

_VMX: Final = "vcpu_vmx"
_CONTROL: Final = "vmcb.control"
_NPF: Final = 0x400
_INTERCEPTED_PF: Final = 0x40 + 14
"""SVM_EXIT_EXCP_BASE and the vector of #PF."""


def _vmx(vcpu: VcpuMemory, member: str) -> int | None:
    found = vcpu.number(f"vt.{member}", _VMX)
    return vcpu.number(member, _VMX) if found is None else found


def ept(vcpu: VcpuMemory) -> Mapping[str, int] | None:
    """Exit reason and qualification (vmx_get_exit_qual), if the last exit was an EPT violation or misconfiguration."""
    reason = _vmx(vcpu, "exit_reason.full")
    if reason is None or reason & 0xFFFF not in (EPT_VIOLATION, EPT_MISCONFIG):
        return None
    registers = {"EXIT_REASON": reason & 0xFFFF_FFFF}
    qualification = _vmx(vcpu, "exit_qualification")
    if reason & 0xFFFF == EPT_VIOLATION:
        if qualification is None:
            return None
        registers["EXIT_QUALIFICATION"] = qualification
    return registers


def _svm(vcpu: VcpuMemory, exit_code: int, error: str, address: str) -> Mapping[str, int] | None:
    code = vcpu.number(f"{_CONTROL}.exit_code", "vcpu_svm")
    info = [vcpu.number(f"{_CONTROL}.exit_info_{number}", "vcpu_svm") for number in (1, 2)]
    if code != exit_code or info[0] is None or info[1] is None:
        return None
    return {error: info[0], address: info[1]}


def npt(vcpu: VcpuMemory) -> Mapping[str, int] | None:
    """EXITINFO1 and EXITINFO2, if the last exit was a nested page fault."""
    return _svm(vcpu, _NPF, "EXITINFO1", "EXITINFO2")


def shadow(vcpu: VcpuMemory) -> Mapping[str, int] | None:
    """Error code and CR2 of an intercepted #PF on AMD. On Intel the error code is in the VMCS alone: None."""
    return _svm(vcpu, _INTERCEPTED_PF, "ERROR_CODE", "CR2")
