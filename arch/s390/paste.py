"""Registers out of what people paste: KVM's log lines and debug features, oopses, debugger output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_NUMBER: Final = r"(?:0x)?([0-9a-f]{1,16})(?![0-9a-z_])"
_BETWEEN: Final = r"(?:\s*[=:,]\s*|\s+)"
_NAMES: Final = {
    "INT_CODE": r"(?:gmap_int_code|int[ _-]?code|program interrupt(?:ion)?(?: code)?|pgm(?:[ _]code)?|pic)",
    "TEID": r"(?:gmap_teid|teid|trans_exc_code|failing address)",
}
_PATTERNS: Final = {
    name: re.compile(rf"(?<![0-9a-z_]){spelled}{_BETWEEN}{_NUMBER}", re.IGNORECASE | re.ASCII)
    for name, spelled in _NAMES.items()
}
_VIOLATION: Final = re.compile(r"secure storage violation \((?:0x)?([0-9a-f]{1,4})\)", re.IGNORECASE)
MAX_LINE: Final = 10_000


def paste(line: str) -> Mapping[str, int] | None:
    """The registers that the line names, or None: without a code there is no fault to decode. Numbers are hexadecimal.

    >>> paste("Unexpected program interrupt 0x38, TEID 0x0000000040001400")
    {'INT_CODE': 56, 'TEID': 1073746944}
    >>> paste("Secure storage violation (3f) in task: qemu, pid 7")
    {'INT_CODE': 63}
    >>> paste("no register here") is None
    True
    """
    line = line[:MAX_LINE]
    found = {name: int(m[1], 16) for name, p in _PATTERNS.items() if (m := p.search(line))}
    other = _VIOLATION.search(line)
    if other is not None:
        found.setdefault("INT_CODE", int(other[1], 16))
    return found if found.get("INT_CODE", 1 << 16) < 1 << 16 else None
