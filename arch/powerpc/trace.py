"""Tracepoints of Book3S HV KVM (arch/powerpc/kvm/trace_hv.h).

No event carries the fault of a radix guest: kvm_page_fault_enter and _exit are of guests with a hashed page table,
whose addresses KVM finds in the guest's own entries. An exit tells the vector alone.
"""

from __future__ import annotations

from typing import Final

from arch.common import COMMON
from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints, words

_TRAPS: Final = words(
    "trap",
    SYSTEM_RESET=0x100,
    MACHINE_CHECK=0x200,
    DATA_STORAGE=0x300,
    DATA_SEGMENT=0x380,
    INST_STORAGE=0x400,
    INST_SEGMENT=0x480,
    EXTERNAL=0x500,
    EXTERNAL_LEVEL=0x501,
    EXTERNAL_HV=0x502,
    ALIGNMENT=0x600,
    PROGRAM=0x700,
    FP_UNAVAIL=0x800,
    DECREMENTER=0x900,
    HV_DECREMENTER=0x980,
    SYSCALL=0xC00,
    TRACE=0xD00,
    H_DATA_STORAGE=0xE00,
    H_INST_STORAGE=0xE20,
    H_EMUL_ASSIST=0xE40,
    PERFMON=0xF00,
    ALTIVEC=0xF20,
    VSX=0xF40,
)

TRACEPOINTS: Final[Tracepoints] = {
    **COMMON,
    "kvm_guest_exit": Tracepoint(
        Role.EXIT,
        (
            "VCPU {vcpu_id:i}: trap={trap:w} pc=0x{pc:x} msr=0x{msr:x}, ceded={ceded:i}",
            "VCPU {vcpu_id:i}: trap={trap:x} pc=0x{pc:x} msr=0x{msr:x}, ceded={ceded:i}",
        ),
        "vcpu_id:i trap:x pc:x msr:x ceded:i",
        {"trap": _TRAPS},
        told_by=("trap",),
    ),
    "kvm_guest_enter": Tracepoint(
        Role.ENTRY,
        ("VCPU {vcpu_id:i}: pc=0x{pc:x} pexcp=0x{pending_exceptions:x} ceded={ceded:i}",),
        "vcpu_id:i pc:x pending_exceptions:x ceded:i",
    ),
}
