"""Registers of a hypervisor storage interrupt, as Book3S HV KVM saves them for a vCPU.

HDSISR and HDAR are those of a data storage interrupt (0xe00). For an instruction storage interrupt (0xe20) there are
none: KVM makes them of HSRR1 and of the guest's program counter (kvmppc_handle_exit_hv), and so do we.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvmfault.algebra.layout import Register, register

HDSI, HISI = 0xE00, 0xE20
"""Vectors of the two interrupts (BOOK3S_INTERRUPT_H_DATA_STORAGE, _H_INST_STORAGE)."""
NO_ZERO_REGISTER: Final = 32
"""All 32 general registers hold values."""
CANARY: Final = 0x7FFF
"""What KVM puts into HDSISR before it enters the guest: some CPUs interrupt without writing it (HDSISR_CANARY)."""
SRR1_BITS: Final = 0x582E_0000
"""Bits of HSRR1 that mean the same as in HDSISR (DSISR_SRR1_MATCH_64S)."""
HISI_WRITE: Final = 0x1_0000
"""Bit of HSRR1: the reference or change bit could not be updated, so the entry had to be written (HSRR1_HISI_WRITE)."""

TRAP: Final = register(
    "TRAP",
    16,
    "Power ISA Book III, interrupt vectors; vcpu->arch.trap",
    {"VECTOR": {HDSI: "hypervisor data storage", HISI: "hypervisor instruction storage"}},
    VECTOR=(15, 0),
)
HDSISR: Final = register(
    "HDSISR",
    32,
    "Power ISA Book III, HDSISR; DSISR_* of asm/reg.h (for 0xe20 made of HSRR1 by KVM)",
    BAD_DIRECT_ST=31,
    NOHPTE=30,
    ATTR_CONFLICT=29,
    NOEXEC_OR_G=28,
    PROTFAULT=27,
    BADACCESS=26,
    ISSTORE=25,
    DABRMATCH=22,
    KEYFAULT=21,
    BAD_EXT_CTRL=20,
    UNSUPP_MMU=19,
    SET_RC=18,
    PRTABLE=17,
    ICSWX_NO_CT=14,
    BAD_COPYPASTE=3,
    BAD_AMO=2,
    BAD_CI_LDST=1,
)
HDAR: Final = register("HDAR", 64, "Power ISA Book III, HDAR (for 0xe20 the guest's program counter)", EA=(63, 0))
ASDR: Final = register("ASDR", 64, "Power ISA Book III, ASDR, guest real address", GRA=(59, 12))
INST: Final = register(
    "INST",
    32,
    "Power ISA Book I, D and DS forms; the instruction that KVM fetches from the guest (vcpu->arch.last_inst)",
    OPCD=(31, 26),
    RT=(25, 21),
    RA=(20, 16),
    D=(15, 2),
    XO=(1, 0),
)
INST_X: Final = register(
    "INST",
    32,
    "Power ISA Book I, X form",
    OPCD=(31, 26),
    RT=(25, 21),
    RA=(20, 16),
    RB=(15, 11),
    XO=(10, 1),
    Rc=0,
)
KVM: Final = register(
    "KVM",
    64,
    "not hardware: what the caller or the recording adds to the fault",
    PREFETCH=0,
    EA_GIVEN=1,
    GPA_GIVEN=2,
    INST_GIVEN=3,
)

REGISTERS: Final = (TRAP, HDSISR, HDAR, ASDR, INST, KVM)


def inst_layout(registers: Mapping[str, int]) -> Register:
    """How the instruction reads: opcode 31 has the X form."""
    return INST_X if INST["OPCD"].on(registers) == 31 else INST
