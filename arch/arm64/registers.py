"""Registers of a guest abort at EL2: layouts, and words for their values.

ESR_EL2 is declared once as a data abort has it; the other declarations say how the same bits read in other
exception classes. Facts use the data abort's names, as KVM's accessors use one set of masks for every class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.arm64.codes import CLASSES, DABT_CUR, DABT_LOW, IABT_CUR, IABT_LOW, STATUS
from kvmfault.algebra.layout import Register, register

_SET: Final = {0: "recoverable", 2: "uncontainable", 3: "restartable"}

ESR_EL2: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, ISS encoding for an exception from a Data Abort",
    {
        "EC": CLASSES,
        "IL": {0: "16-bit instruction", 1: "32-bit instruction"},
        "SAS": {0: "byte", 1: "halfword", 2: "word", 3: "doubleword"},
        "SRT": {31: "zero register"},
        "SET": _SET,
        "FSC": STATUS,
    },
    HDBSSF=43,
    TnD=42,
    TagAccess=41,
    GCS=40,
    AssuredOnly=39,
    Overlay=38,
    DirtyBit=37,
    Xs=(36, 32),
    EC=(31, 26),
    IL=25,
    ISV=24,
    SAS=(23, 22),
    SSE=21,
    SRT=(20, 16),
    SF=15,
    AR=14,
    VNCR=13,
    SET=(12, 11),
    FnV=10,
    EA=9,
    CM=8,
    S1PTW=7,
    WnR=6,
    FSC=(5, 0),
)

ESR_IABT: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, ISS encoding for an exception from an Instruction Abort",
    {"EC": CLASSES, "SET": _SET, "FSC": STATUS},
    AssuredOnly=39,
    Overlay=38,
    DirtyBit=37,
    EC=(31, 26),
    IL=25,
    SET=(12, 11),
    FnV=10,
    EA=9,
    S1PTW=7,
    FSC=(5, 0),
)

ESR_SYS64: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, ISS encoding for MSR, MRS, or System instruction execution in AArch64 state",
    {"EC": CLASSES, "Direction": {0: "write (MSR)", 1: "read (MRS)"}},
    EC=(31, 26),
    IL=25,
    Op0=(21, 20),
    Op2=(19, 17),
    Op1=(16, 14),
    CRn=(13, 10),
    Rt=(9, 5),
    CRm=(4, 1),
    Direction=0,
)

ESR_IMM16: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, ISS encoding for HVC, SMC, SVC, BRK or BKPT instruction execution",
    {"EC": CLASSES},
    EC=(31, 26),
    IL=25,
    imm16=(15, 0),
)

ESR_WFX: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, ISS encoding for a WF* instruction",
    {"EC": CLASSES, "RV": {0: "no register", 1: "register RN"}, "TI": {0: "WFI", 1: "WFE", 2: "WFIT", 3: "WFET"}},
    EC=(31, 26),
    IL=25,
    CV=24,
    COND=(23, 20),
    RN=(9, 5),
    RV=2,
    TI=(1, 0),
)

ESR_CONDITIONAL: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, what the ISS encodings of AArch32 coprocessor and floating-point traps have in common",
    {"EC": CLASSES},
    EC=(31, 26),
    IL=25,
    CV=24,
    COND=(23, 20),
    ISS=(19, 0),
)

ESR_SERROR: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2, ISS encoding for an SError exception",
    {
        "EC": CLASSES,
        "AET": {0: "uncontainable", 1: "unrecoverable", 2: "restartable", 3: "recoverable", 6: "corrected"},
        "DFSC": {0x00: "uncategorised", 0x11: "asynchronous SError"},
    },
    EC=(31, 26),
    IL=25,
    IDS=24,
    IESB=13,
    AET=(12, 10),
    EA=9,
    DFSC=(5, 0),
)

ESR_OTHER: Final = register(
    "ESR_EL2",
    64,
    "Arm ARM, ESR_EL2",
    {"EC": CLASSES},
    ISS2=(55, 32),
    EC=(31, 26),
    IL=25,
    ISS=(24, 0),
)

FAR_EL2: Final = register("FAR_EL2", 64, "Arm ARM, FAR_EL2, Fault Address Register (EL2)", VA=(63, 0))

HPFAR_EL2: Final = register(
    "HPFAR_EL2",
    64,
    "Arm ARM, HPFAR_EL2, Hypervisor IPA Fault Address Register",
    {"NS": {1: "non-secure; in KVM's saved copy since 6.15: the register was valid"}},
    NS=63,
    FIPA=(47, 4),
)

DISR_EL1: Final = register(
    "DISR_EL1",
    64,
    "Arm ARM, DISR_EL1, Deferred Interrupt Status Register",
    {"AET": ESR_SERROR["AET"].meanings, "DFSC": ESR_SERROR["DFSC"].meanings},
    A=31,
    IDS=24,
    AET=(12, 10),
    EA=9,
    DFSC=(5, 0),
)

KVM: Final = register(
    "KVM",
    64,
    "not hardware: what the VM, the caller or the recording adds to the fault",
    PRIVATE=0,
    PREFETCH=1,
    FAR_GIVEN=2,
    HPFAR_GIVEN=3,
)

REGISTERS: Final = (ESR_EL2, FAR_EL2, HPFAR_EL2, DISR_EL1, KVM)
ORDER: Final = tuple(r.name for r in REGISTERS)

_LAYOUTS: Final[Mapping[int, Register]] = {
    **dict.fromkeys((DABT_LOW, DABT_CUR), ESR_EL2),
    **dict.fromkeys((IABT_LOW, IABT_CUR), ESR_IABT),
    0x01: ESR_WFX,
    **dict.fromkeys((0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x0C, 0x13), ESR_CONDITIONAL),
    **dict.fromkeys((0x11, 0x12, 0x15, 0x16, 0x17, 0x38, 0x3C), ESR_IMM16),
    0x18: ESR_SYS64,
    0x2F: ESR_SERROR,
}


def esr_layout(registers: Mapping[str, int]) -> Register:
    """How ESR_EL2 reads in its exception class."""
    return _LAYOUTS.get(ESR_EL2["EC"].on(registers), ESR_OTHER)


def compose(layout: Register, **fields: int) -> int:
    """The register with these fields set and all other bits 0. ValueError if a value does not fit its field."""
    word = 0
    for name, value in fields.items():
        f = layout[name]
        if value < 0 or value >> f.width:
            raise ValueError(f"{layout.name}.{name}: {value:#x} does not fit {f.width} bits")
        word |= value << f.lo
    return word
