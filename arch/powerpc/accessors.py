"""The kernel's own names for what it asks of the registers: DSISR_* of asm/reg.h, and what the fault path uses."""

from __future__ import annotations

from typing import Final

from arch.powerpc.facts import canary, fetch, store
from arch.powerpc.registers import ASDR, HDAR, HDSISR, INST, INST_X
from kvmfault.contract.backend import Named

_s = HDSISR
_BAD_32S: Final = _s["BAD_DIRECT_ST"].is_set | _s["BADACCESS"].is_set | _s["BAD_EXT_CTRL"].is_set
bad_fault: Final = (
    _BAD_32S
    | _s["ATTR_CONFLICT"].is_set
    | _s["UNSUPP_MMU"].is_set
    | _s["PRTABLE"].is_set
    | _s["ICSWX_NO_CT"].is_set
    | _s["BAD_COPYPASTE"].is_set
    | _s["BAD_AMO"].is_set
    | _s["BAD_CI_LDST"].is_set
)
"""DSISR_BAD_FAULT_64S."""
_X_FORM: Final = INST["OPCD"].is_(31)

ACCESSORS: Final[Named] = {
    "fault_dsisr": _s.field_at(31, 0),
    "fault_dar": HDAR["EA"],
    "fault_gpa": ASDR["GRA"] << 12,
    "DSISR_NOHPTE": _s["NOHPTE"],
    "DSISR_ATTR_CONFLICT": _s["ATTR_CONFLICT"],
    "DSISR_NOEXEC_OR_G": _s["NOEXEC_OR_G"],
    "DSISR_PROTFAULT": _s["PROTFAULT"],
    "DSISR_BADACCESS": _s["BADACCESS"],
    "DSISR_ISSTORE": _s["ISSTORE"],
    "DSISR_KEYFAULT": _s["KEYFAULT"],
    "DSISR_UNSUPP_MMU": _s["UNSUPP_MMU"],
    "DSISR_SET_RC": _s["SET_RC"],
    "DSISR_PRTABLE_FAULT": _s["PRTABLE"],
    "DSISR_BAD_FAULT_32S": _BAD_32S,
    "DSISR_BAD_FAULT_64S": bad_fault,
    "HDSISR_CANARY": canary,
    "writing": store,
    "is_hisi": fetch,
    "instruction_is_store": (_X_FORM & INST_X.field_at(8, 8).is_set) | (~_X_FORM & INST.field_at(28, 28).is_set),
}
