"""The toy's trace event, and its registers in lines that people paste."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints, recorded

TRACEPOINTS: Final[Tracepoints] = {
    "toy_fault": Tracepoint(
        Role.FAULT,
        ("cause {cause:x} addr {addr:x}",),
        registers={"CAUSE": recorded("cause", 7, 0), "ADDR": recorded("addr")},
    ),
}
_LINE: Final = re.compile(r"\bcause[ =]0x([0-9a-f]{1,2})\b(?:.{0,20}?\baddr[ =]0x([0-9a-f]{1,16})\b)?")


def paste(line: str) -> Mapping[str, int] | None:
    """Registers out of a log line such as ``toy: cause=0x6 addr=0x1018``."""
    found = _LINE.search(line[:1000])
    if found is None:
        return None
    registers = {"CAUSE": int(found[1], 16)}
    if found[2]:
        registers["ADDR"] = int(found[2], 16)
    return registers
