"""Registers out of what people paste: KVM's error lines and register dumps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from arch.loongarch.registers import ESTAT

_NUMBER: Final = r"(0x[0-9a-f]{1,16}|[0-9a-f]{8}|[0-9a-f]{16})(?![0-9a-z_])"
_BETWEEN: Final = r"(?:\s*[=:]\s*|\s+)"
_NAMES: Final = {
    "ESTAT": r"(?:csr_)?estat",
    "BADV": r"(?:badv|badvaddr)",
    "BADI": r"(?:badi|inst)",
    "PC": r"(?:pc|era|@)",
}
_PATTERNS: Final = {
    name: re.compile(rf"(?<![0-9a-z_]){spelled}{_BETWEEN}{_NUMBER}", re.IGNORECASE | re.ASCII)
    for name, spelled in _NAMES.items()
}
_ECODE: Final = re.compile(r"(?<![0-9a-z_])ecode\s*[=:]\s*(\d{1,2})(?!\w)", re.IGNORECASE | re.ASCII)
MAX_LINE: Final = 10_000


def paste(line: str) -> Mapping[str, int] | None:
    """The registers that the line names, or None: without ESTAT or its code there is no fault to decode.

    In the line of kvm_fault_ni the code goes before ESTAT, which there is the guest's own.

    >>> paste("ECode: 5 PC=0x120000000 Inst=0x28800085 BadVaddr=0x8001008 ESTAT=0x0")
    {'ESTAT': 327680, 'BADV': 134221832, 'BADI': 679477381, 'PC': 4831838208}
    >>> paste("no register here") is None
    True
    """
    line = line[:MAX_LINE]
    found = {name: int(m[1], 16) for name, p in _PATTERNS.items() if (m := p.search(line))}
    code = _ECODE.search(line)
    if code is not None and int(code[1]) < 64:
        found["ESTAT"] = int(code[1]) << ESTAT["ECODE"].lo
    if found.get("BADI", 0) >> 32:
        del found["BADI"]
    return found if "ESTAT" in found else None
