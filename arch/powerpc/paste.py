"""Registers out of what people paste: KVM's log lines, the dump of a vCPU, debugger output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from arch.powerpc.registers import HDSI, HDSISR, HISI, HISI_WRITE, SRR1_BITS

_NUMBER: Final = r"(?:0x)?([0-9a-f]{1,16})(?![0-9a-z_])"
_BETWEEN: Final = r"(?:\s*[=:]\s*|\s+)"
_NAMES: Final = {
    "TRAP": "(?:trap|vector)",
    "HDSISR": "(?:h?dsisr|fault_dsisr)",
    "HDAR": "(?:h?dar|fault_dar|ea)",
    "ASDR": "(?:asdr|fault_gpa|gpa)",
    "INST": "(?:last_inst|inst|heir)",
    "PC": "(?:pc|hsrr0|nip)",
    "HSRR1": "hsrr1",
}
_PATTERNS: Final = {
    name: re.compile(rf"(?<![0-9a-z_]){spelled}{_BETWEEN}{_NUMBER}", re.IGNORECASE | re.ASCII)
    for name, spelled in _NAMES.items()
}
MAX_LINE: Final = 10_000
_WIDTHS: Final = {"TRAP": 16, "HDSISR": 32, "INST": 32}


def paste(line: str) -> Mapping[str, int] | None:
    """The registers that the line names, or None: without DSISR, or HSRR1 of vector 0xe20, there is no fault to decode.

    KVM prints numbers of its registers in hexadecimal, with 0x or without.

    >>> paste("KVM: Got radix HV page fault with DSISR=46000000")
    {'HDSISR': 1174405120}
    >>> paste("trap=0xe20 | pc=0xc000000000010000 | hsrr1=0x40000000")
    {'TRAP': 3616, 'HDAR': 13835058055282229248, 'HDSISR': 1073741824}
    >>> paste("no register here") is None
    True
    """
    found = {name: int(m[1], 16) for name, p in _PATTERNS.items() if (m := p.search(line[:MAX_LINE]))}
    found = {name: value for name, value in found.items() if not value >> _WIDTHS.get(name, 64)}
    counter, srr1 = found.pop("PC", None), found.pop("HSRR1", None)
    if found.get("TRAP") == HISI and "HDSISR" not in found and srr1 is not None:
        if counter is not None:
            found.setdefault("HDAR", counter)
        found["HDSISR"] = srr1 & SRR1_BITS | (HDSISR["ISSTORE"].mask if srr1 & HISI_WRITE else 0)
    if "HDSISR" not in found or found.get("TRAP", HDSI) not in (HDSI, HISI):
        return None
    return found
