"""Registers of a guest-page fault taken to HS-mode, and words for their values.

Source: RISC-V privileged architecture, "Hypervisor" extension. HTINST is declared as a transformed load or store has
it; where bit 0 is 0 it holds nothing, or a pseudoinstruction.
"""

from __future__ import annotations

from typing import Final

from kvmfault.algebra.layout import Register, register

INSTRUCTION, LOAD, STORE = 20, 21, 23
"""Exception codes of guest-page faults."""

CODES: Final = {
    0: "instruction address misaligned",
    1: "instruction access fault",
    2: "illegal instruction",
    3: "breakpoint",
    4: "load address misaligned",
    5: "load access fault",
    6: "store or AMO address misaligned",
    7: "store or AMO access fault",
    8: "environment call from U-mode or VU-mode",
    9: "environment call from HS-mode",
    10: "environment call from VS-mode",
    11: "environment call from M-mode",
    12: "instruction page fault",
    13: "load page fault",
    15: "store or AMO page fault",
    16: "double trap",
    18: "software check",
    19: "hardware error",
    INSTRUCTION: "instruction guest-page fault",
    LOAD: "load guest-page fault",
    22: "virtual instruction",
    STORE: "store or AMO guest-page fault",
}
OP_LOAD, OP_LOAD_FP, OP_STORE, OP_STORE_FP, OP_AMO = 0x00, 0x01, 0x08, 0x09, 0x0B

SCAUSE: Final = register(
    "SCAUSE",
    64,
    "RISC-V privileged architecture, scause and its values after trap",
    {"CODE": CODES, "INTERRUPT": {1: "an interrupt of the host"}},
    INTERRUPT=63,
    CODE=(5, 0),
)
STVAL: Final = register("STVAL", 64, "RISC-V privileged architecture, stval: guest-virtual address", VA=(63, 0))
HTVAL: Final = register(
    "HTVAL", 64, "RISC-V hypervisor extension, htval: guest-physical address >> 2", PAGE=(61, 10), OFFSET=(9, 0)
)
HTINST: Final = register(
    "HTINST",
    64,
    "RISC-V hypervisor extension, transformed instruction or pseudoinstruction for trapping loads and stores",
    {
        "OPCODE": {OP_LOAD: "LOAD", OP_LOAD_FP: "LOAD-FP", OP_STORE: "STORE", OP_STORE_FP: "STORE-FP", OP_AMO: "AMO"},
        "WIDTH": {0: "of 16 bits before it was transformed", 1: "of 32 bits"},
        "TRANSFORMED": {0: "no instruction, or a pseudoinstruction", 1: "the trapping instruction"},
    },
    FUNCT7=(31, 25),
    RS2=(24, 20),
    OFFSET=(19, 15),
    FUNCT3=(14, 12),
    RD=(11, 7),
    OPCODE=(6, 2),
    WIDTH=1,
    TRANSFORMED=0,
)
ZERO: Final = 0
"""x0 reads as zero and drops what is written."""
READ_OF_WALK, WRITE_OF_WALK = 0x3000, 0x3020
"""Pseudoinstructions of RV64: the fault was on a read, or a write, of the guest's own table."""

KVM: Final = register(
    "KVM",
    64,
    "not hardware: what the caller or the recording adds to the fault",
    PREFETCH=1,
    STVAL_GIVEN=2,
    HTVAL_GIVEN=3,
)

REGISTERS: Final[tuple[Register, ...]] = (SCAUSE, STVAL, HTVAL, HTINST, KVM)
