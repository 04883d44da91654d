"""The fault path as the vectors write it: ``python -m tests.kernel.x86_path < lines``.

A line is ``key=value ...`` with the keys of the path vectors (``err`` is the PFERR code, hexadecimal with 0x); its
answer one JSON object. The codes are those of nested paging; PRIVATE (bit 49) is what the caller added. A bad line
ends the run with status 2. A pre-fault that has to be tried again, which the kernel does for ever, is answered once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from errno import ENOENT
from typing import Final

from arch.x86 import NPT
from arch.x86.pferr import npf_registers
from kvmfault.contract.outcome import (
    Emulate,
    Error,
    Exit,
    Fixed,
    MemoryFault,
    Outcome,
    Retry,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.target import Target
from kvmfault.errors import KvmfaultError
from kvmfault.path.run import BoundPath, bind
from tests.kernel.scripted_x86 import GFN, X86Ports
from tests.kernel.words import ANY, ERRNO, WORD, keys

ALLOWED: Final[Mapping[str, range]] = {
    "err": WORD,
    **dict.fromkeys(("prefetch", "hasprv", "attr", "swp", "wtrack", "ad"), ANY),
    "slot": range(6),
    **dict.fromkeys(("fast", "map"), range(1, 7)),
    **dict.fromkeys(("topup", "gmem"), ERRNO),
    "pfn": range(10),
    **dict.fromkeys(("apf", "apfdup", "apfset", "apicv", "l2", "invpfn", "invlock", "obsolete", "root"), ANY),
    "inprog": ANY,
    **dict.fromkeys(("rs", "re", "maxgfn"), WORD),
    **dict.fromkeys(("mmiocache", "cachehit", "samerip", "unprot", "reinj"), ANY),
    "walk": range(4),
}
"""What each key may be: kinds of slot, page and entry by number, results as RET_PF_* or minus an errno."""
RET_PF: Final[Mapping[type[Outcome], str]] = {
    Retry: "RETRY",
    Emulate: "EMULATE",
    WriteProtected: "WRITE_PROTECTED",
    Fixed: "FIXED",
    Spurious: "SPURIOUS",
}
EMULTYPE_PF, EMULTYPE_ALLOW_RETRY_PF = 0x40, 0x8
_TARGET: Final = Target(NPT, "4k", "6.12")


def run(script: Mapping[str, int], path: BoundPath | None = None) -> dict[str, object]:
    """The answer to one scripted fault, on *path* or that of 6.12."""
    prefetch = bool(script.get("prefetch", 0))
    fault = _TARGET.decode(**npf_registers(script["err"], prefetch=prefetch), EXITINFO2=GFN << 12)
    vm = X86Ports(_TARGET.format, script)
    done = (path or bind(_TARGET)).handle(vm, fault)
    outcome = done.outcome
    emulated = isinstance(outcome, Emulate) and not prefetch
    if emulated:
        vm.events.append("emulate")
    allow_retry = isinstance(outcome, Emulate) and outcome.allow_retry
    memory_fault = outcome.detail if isinstance(outcome, Exit) and isinstance(outcome.detail, MemoryFault) else None
    return {
        "rc": _return_code(outcome, prefetch),
        "ret_pf": "none" if done.machinery is None else vm.bug or _ret_pf(done.machinery),
        "exit_reason": outcome.reason.value if isinstance(outcome, Exit) else 0,
        "mem_fault_flags": hex(memory_fault.flags if memory_fault else 0),
        "mem_fault_gpa": hex(memory_fault.gpa if memory_fault else 0),
        "sigbus": len(vm.signals),
        "emulated": int(emulated),
        "emul_type": hex(emulated and EMULTYPE_PF | (EMULTYPE_ALLOW_RETRY_PF if allow_retry else 0)),
        "warn": len(vm.warnings) + vm.invalidations.warnings,
        "trace": vm.events or ["-"],
    }


def _return_code(outcome: Outcome, prefetch: bool) -> int:
    # what the vectors recorded: the result of kvm_mmu_page_fault, or of the pre-fault call
    if isinstance(outcome, Error | Exit) and outcome.errno:
        return -outcome.errno
    if prefetch:
        return -ENOENT if isinstance(outcome, Emulate) else 0
    return 1


def _ret_pf(outcome: Outcome) -> str:
    if isinstance(outcome, Error | Exit):
        return str(-outcome.errno)
    return RET_PF[type(outcome)]


def parse(line: str) -> dict[str, int]:
    """``key=value`` pairs. Raises ValueError saying what is wrong."""
    found = keys(line.split(), ALLOWED, 0)
    if "err" not in found:
        raise ValueError("no err=CODE")
    return found


def answers(lines: Iterable[str], path: BoundPath | None = None) -> Iterator[str]:
    """The answer to each line. Raises ValueError with the number of a bad line."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield json.dumps(run(parse(line), path))
        except (ValueError, KvmfaultError) as error:
            raise ValueError(f"line {number}: {error}") from error


def main() -> int:
    """Answer standard input."""
    try:
        for answer in answers(sys.stdin):
            print(answer)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
