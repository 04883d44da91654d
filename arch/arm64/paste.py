"""Registers out of what people paste: KVM's log lines, oopses, QEMU and debugger dumps, trace lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from arch.arm64.encode import hpfar
from kvmfault.types import U64

_NUMBER: Final = r"(0x[0-9a-f]{1,16}|[0-9a-f]{8}|[0-9a-f]{16})(?![0-9a-z_])"
_BETWEEN: Final = r"(?:\s*[=:]\s*|\s+)(?:0x[0-9a-f]{1,2}/)?"  # QEMU prints the class first: ESR 0x25/0x96000046
# A name must stand alone: FAR is also the end of HPFAR, and ESR_EL1 is another register (but reads alike).
_NAMES: Final = {
    "ESR_EL2": r"(?:esr(?:_el[12])?|hsr|syndrome)",
    "FAR_EL2": r"(?:far(?:_el[12])?|hxfar)",
    "HPFAR_EL2": r"hpfar(?:_el2)?",
    "IPA": r"(?:ipa|fault_ipa)",
}
_PATTERNS: Final = {
    name: re.compile(rf"(?<![0-9a-z_]){spelled}{_BETWEEN}{_NUMBER}", re.IGNORECASE | re.ASCII)
    for name, spelled in _NAMES.items()
}
MAX_LINE: Final = 10_000


def paste(line: str) -> Mapping[str, int] | None:
    """The registers that the line names, or None: without an ESR there is no fault to decode.

    >>> paste("kvm [1234]: Unsupported FSC: EC=0x24 xFSC=0x21 ESR_EL2=0x92000061")
    {'ESR_EL2': 2449473633}
    >>> paste("no register here") is None
    True
    """
    found = {name: int(m[1], 16) for name, p in _PATTERNS.items() if (m := p.search(line[:MAX_LINE]))}
    ipa = found.pop("IPA", None)
    if "ESR_EL2" not in found:
        return None
    if ipa is not None and ipa >> 56 == 0:
        found.setdefault("HPFAR_EL2", hpfar(ipa))
    return {name: value & U64 for name, value in found.items()}
