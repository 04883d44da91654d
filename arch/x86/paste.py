"""Registers out of what people paste: trace lines, "KVM internal error" words, register dumps, exits of KVM_RUN.

The TARGET says how to read a code; nothing is guessed from the number itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Final

from arch.x86.registers import EPT_MISCONFIG, EPT_VIOLATION, KVM
from arch.x86.trace import (
    EPT_TRACEPOINTS,
    MISCONFIG,
    NPF,
    NPT_TRACEPOINTS,
    SHADOW_TRACEPOINTS,
    SVM_PF,
    VIOLATION,
    VMX_PF,
)
from kvmfault.contract.tracepoints import Fields
from kvmfault.trace.claims import Claim, holds
from kvmfault.trace.pattern import Fields as Parsed
from kvmfault.trace.pattern import Pattern

Registers = dict[str, int]
MAX_LINE: Final = 10_000
_EVENT: Final = re.compile(r"\b(kvm_page_fault|kvm_exit):\s+(.*)")
_HEX: Final = r"(?:0[xX])?([0-9a-fA-F]{1,16})\b"
_SUBERROR: Final = re.compile(r"suberror:?\s*3\b.*?extra data(.*)", re.IGNORECASE)
_WORD: Final = re.compile(r"(?<![\w\[])" + _HEX)  # not the index of data[0]
_MEMBER: Final = re.compile(r"\b(flags|gpa)\W{1,4}((?:0x)?[0-9a-f]{1,16})\b", re.IGNORECASE)
_FLAG_PRIVATE: Final = 1 << 3


def ept(line: str) -> Mapping[str, int] | None:
    """Registers of an EPT exit, or None: the line holds none.

    >>> ept("KVM internal error. Suberror: 3, extra data 80000b0e 31 182 bfefc")
    {'EXIT_REASON': 49, 'EXIT_QUALIFICATION': 386, 'GUEST_PHYSICAL_ADDRESS': 786172}
    """
    line = line[:MAX_LINE]
    match _event(line):
        case "kvm_page_fault", fields:
            return _EPT.registers(fields)
        case "kvm_exit", fields if _VIOLATION(fields):
            return {"EXIT_REASON": EPT_VIOLATION, "EXIT_QUALIFICATION": _int(fields, "info1")}
        case "kvm_exit", fields if _MISCONFIG(fields):
            return {"EXIT_REASON": EPT_MISCONFIG}
    if (found := _delivery_error(line)) is not None:
        return found
    return _memory_fault(line, "GUEST_PHYSICAL_ADDRESS") or _named(line, _EPT_NAMES, "EXIT_QUALIFICATION")


def npt(line: str) -> Mapping[str, int] | None:
    """Registers of a nested page fault, or None: the line holds none.

    >>> npt("exit_info1:     0000000100000006 exit_info2:     0000000000180000")
    {'EXITINFO1': 4294967302, 'EXITINFO2': 1572864}
    """
    line = line[:MAX_LINE]
    match _event(line):
        case "kvm_page_fault", fields:
            return _NPT.registers(fields)
        case "kvm_exit", fields if _IS_NPF(fields):
            return {"EXITINFO1": _int(fields, "info1"), "EXITINFO2": _int(fields, "info2")}
    return _memory_fault(line, "EXITINFO2") or _named(line, _NPT_NAMES, "EXITINFO1")


def shadow(line: str) -> Mapping[str, int] | None:
    """Registers of an intercepted #PF, or None: the line holds none.

    >>> shadow("error_code=0x7 cr2=0x7fff12345678")
    {'ERROR_CODE': 7, 'CR2': 140733498807928}
    """
    line = line[:MAX_LINE]
    match _event(line):
        case "kvm_page_fault", fields:
            return _SHADOW.registers(fields)
        # SVM has the code in info1 and CR2 in info2; VMX has CR2 in info1 and the code in a field of its own,
        # which the plugin of trace-cmd does not print
        case "kvm_exit", fields if _SVM_PF(fields):
            return {"ERROR_CODE": _int(fields, "info1"), "CR2": _int(fields, "info2")}
        case "kvm_exit", fields if _VMX_PF(fields):
            code = {"ERROR_CODE": _int(fields, "error_code"), "CR2": _int(fields, "info1")}
            return code if "error_code" in fields else None
    return _named(line, _PF_NAMES, "ERROR_CODE")


_EPT, _NPT, _SHADOW = (
    Claim("", points["kvm_page_fault"], points) for points in (EPT_TRACEPOINTS, NPT_TRACEPOINTS, SHADOW_TRACEPOINTS)
)
_VIOLATION, _MISCONFIG, _IS_NPF, _SVM_PF, _VMX_PF = (
    holds(pred, EPT_TRACEPOINTS["kvm_exit"]) for pred in (VIOLATION, MISCONFIG, NPF, SVM_PF, VMX_PF)
)


@cache
def _pattern(event: str) -> Pattern:
    point = EPT_TRACEPOINTS[event]
    return Pattern.of([point])


def _event(line: str) -> tuple[str, Fields] | None:
    found = _EVENT.search(line)
    if found is None:
        return None
    read = _pattern(found[1]).read(found[2])
    return (found[1], {**read.numbers, **read.words}) if isinstance(read, Parsed) else None


def _int(fields: Fields, name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


def _delivery_error(line: str) -> Registers | None:
    # KVM_INTERNAL_ERROR_DELIVERY_EV: vectoring information, exit reason, qualification, address
    found = _SUBERROR.search(line)
    words = [int(m[1], 16) for m in _WORD.finditer(found[1])] if found else []
    if len(words) < 3 or words[1] & 0xFFFF not in (EPT_VIOLATION, EPT_MISCONFIG):
        return None
    registers = {"EXIT_REASON": words[1], "EXIT_QUALIFICATION": words[2]}
    return registers | ({"GUEST_PHYSICAL_ADDRESS": words[3]} if len(words) > 3 else {})


def _memory_fault(line: str, register: str) -> Registers | None:
    # KVM_EXIT_MEMORY_FAULT tells the page and whether the access was private, not what it was
    if re.search(r"memory_?\s?fault", line, re.IGNORECASE) is None:
        return None
    values = {m[1].lower(): _c_number(m[2]) for m in _MEMBER.finditer(line)}
    if "gpa" not in values:
        return None
    return {register: values["gpa"], "KVM": KVM["PRIVATE"].mask if values.get("flags", 0) & _FLAG_PRIVATE else 0}


def _c_number(text: str) -> int:
    # a dump of the structure prints decimal or 0x...; bare hex is told by its letters
    hexadecimal = text[:2] in ("0x", "0X") or not text.isdigit()
    return int(text, 16 if hexadecimal else 10)


def _named(line: str, names: Mapping[str, str], needed: str) -> Registers | None:
    found = {}
    for register, spelled in names.items():
        if m := re.search(rf"(?<![\w])(?:{spelled})\s*[=:]?\s*{_HEX}", line, re.IGNORECASE):
            found[register] = int(m[1], 16)
    return found if needed in found else None


_EPT_NAMES: Final = {
    "EXIT_REASON": r"exit_?\s?reason|(?<=\s)reason",
    "EXIT_QUALIFICATION": r"(?:exit_?\s?)?qualification",
    "GUEST_PHYSICAL_ADDRESS": r"guest_?\s?physical_?\s?address|gpa",
    "GUEST_LINEAR_ADDRESS": r"guest_?\s?linear_?\s?address|gla|gva",
}
_NPT_NAMES: Final = {"EXITINFO1": r"exit_?info_?1", "EXITINFO2": r"exit_?info_?2"}
_PF_NAMES: Final = {"ERROR_CODE": r"error_?\s?code", "CR2": r"cr2"}
