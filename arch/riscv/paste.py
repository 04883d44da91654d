"""Registers out of what people paste: KVM's error lines, trace lines, QEMU and debugger dumps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_NUMBER: Final = r"(0x[0-9a-f]{1,16}|[0-9a-f]{8}|[0-9a-f]{16})(?![0-9a-z_])"
_PATTERNS: Final = {
    name: re.compile(rf"(?<![0-9a-z_]){name}(?:\s*[=:]\s*|\s+){_NUMBER}", re.IGNORECASE | re.ASCII)
    for name in ("SCAUSE", "STVAL", "HTVAL", "HTINST")
}
MAX_LINE: Final = 10_000


def paste(line: str) -> Mapping[str, int] | None:
    """The registers that the line names, or None: without SCAUSE there is no fault to decode.

    >>> paste("SCAUSE=0x17 STVAL=0x1008 HTVAL=0x4000402 HTINST=0xb52023")
    {'SCAUSE': 23, 'STVAL': 4104, 'HTVAL': 67109890, 'HTINST': 11870243}
    >>> paste("no register here") is None
    True
    """
    found = {name: int(m[1], 16) for name, p in _PATTERNS.items() if (m := p.search(line[:MAX_LINE]))}
    return found if "SCAUSE" in found else None
