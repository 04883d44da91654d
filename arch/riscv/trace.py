"""Tracepoints of RISC-V KVM (arch/riscv/kvm/trace.h). An exit has all registers of a fault.

The vCPU is the task: no event carries its number.
"""

from __future__ import annotations

from typing import Final

from arch.common import COMMON
from arch.riscv.registers import CODES, INSTRUCTION, LOAD, STORE
from kvmfault.algebra.expr import Pred
from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints, Words, recorded

_IS_FAULT: Final[Pred] = recorded("scause").one_of((INSTRUCTION, LOAD, STORE))
_CAUSES: Final = Words("scause", {name.replace(" ", "_"): {"scause": code} for code, name in CODES.items()})

TRACEPOINTS: Final[Tracepoints] = {
    **COMMON,
    "kvm_exit": Tracepoint(
        Role.EXIT,
        ("SEPC:{sepc:x}, SCAUSE:{scause:x}, STVAL:{stval:x}, HTVAL:{htval:x}, HTINST:{htinst:x}",),
        "sepc:x scause:x stval:x htval:x htinst:x",
        {"scause": _CAUSES},
        registers={
            "SCAUSE": recorded("scause"),
            "STVAL": recorded("stval"),
            "HTVAL": recorded("htval"),
            "HTINST": recorded("htinst"),
        },
        when=_IS_FAULT,
        told_by=("scause",),
    ),
    "kvm_entry": Tracepoint(Role.ENTRY, ("PC: {pc:x}",)),
}
