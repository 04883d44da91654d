"""Registers of an exit for an address that the second stage does not translate, and words for their values.

Source: LoongArch Reference Manual, volume 1, control and status registers. BADV holds the guest-physical address, PC
what the vCPU keeps of ERA: the guest-virtual address of the instruction.
"""

from __future__ import annotations

from typing import Final

from kvmfault.algebra.layout import Register, register

PIL, PIS, PIF, PME, PNR, PNX, PPI, ADE, INE = 0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x8, 0xD
"""Exception codes; the kernel calls the first seven TLBL, TLBS, TLBI, TLBM, TLBNR, TLBNX, TLBPE."""
ADEF, ADEM = 0, 1
"""Subcodes of ADE: on a fetch, on a load or store."""

CODES: Final = {
    0x00: "interrupt",
    PIL: "page invalid, load",
    PIS: "page invalid, store",
    PIF: "page invalid, fetch",
    PME: "page not dirty, store",
    PNR: "page not readable",
    PNX: "page not executable",
    PPI: "page privilege",
    ADE: "address error",
    0x09: "address alignment",
    0x0A: "bound check",
    0x0B: "system call",
    0x0C: "breakpoint",
    INE: "instruction does not exist",
    0x0E: "instruction privilege",
    0x0F: "floating point disabled",
    0x10: "LSX disabled",
    0x11: "LASX disabled",
    0x12: "floating point",
    0x13: "watchpoint",
    0x14: "binary translation disabled",
    0x15: "binary translation",
    0x16: "guest sensitive privileged resource",
    0x17: "hypervisor call",
    0x18: "guest control register",
}

ESTAT: Final = register(
    "ESTAT",
    64,
    "LoongArch Reference Manual, ESTAT, exception status",
    {"ECODE": CODES},
    ESUBCODE=(30, 22),
    ECODE=(21, 16),
    MSGINT=14,
    IS=(12, 0),
)
BADV: Final = register(
    "BADV",
    64,
    "LoongArch Reference Manual, BADV; here a guest-physical address",
    PAGE=(63, 12),
    OFFSET=(11, 0),
)
BADI: Final = register(
    "BADI",
    32,
    "LoongArch Reference Manual, BADI, the instruction that caused the exception",
    OPCODE=(31, 15),
    MIDDLE=(14, 10),
    RJ=(9, 5),
    RD=(4, 0),
)
PC: Final = register("PC", 64, "struct kvm_vcpu_arch, pc: ERA when the guest was left", PC=(63, 0))
KVM: Final = register(
    "KVM",
    64,
    "not hardware: what the caller or the recording adds to the fault",
    PREFETCH=1,
    BADV_GIVEN=2,
    PC_GIVEN=3,
)
REGISTERS: Final[tuple[Register, ...]] = (ESTAT, BADV, BADI, PC, KVM)
ZERO: Final = 0
"""r0 reads as zero and drops what is written."""
