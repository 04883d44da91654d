"""Mapping size as the vectors write it: ``python -m tests.kernel.x86_hugepage < lines``.

A line is ``key=value ...`` with the keys of the hugepage vectors: levels are PG_LEVEL_* (1 is 4K, 2 is 2M, 3 is 1G; 4
and 5 are tables, and cut to hw), dis2m and dis1g a veto by lpage_info, slotflags bit 0 dirty logging. A key that is
missing is 0; max and hw are then 1G, host is 4K. Bits 63:52 of pfn are the errors of kvm_pfn_t: such a frame is no
page. Its answer is one JSON object. A bad line ends the run with status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from arch.x86 import SHADOW
from arch.x86.joints import huge_page_disallowed
from arch.x86.pferr import FETCH
from arch.x86.registers import KVM
from kvmfault.contract.format import Memory, Stage2Format
from kvmfault.contract.ports import GuestTranslation, MapResult, Memslot, Pin, PinError
from kvmfault.contract.target import Target
from kvmfault.errors import KvmfaultError
from kvmfault.path.run import BoundPath, bind
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import MemslotFlag
from tests.kernel.scripted_x86 import X86Ports, level, size
from tests.kernel.words import ANY, FRAME, WORD, keys

_LEVELS: Final = range(1, 6)
ALLOWED: Final[Mapping[str, range]] = {
    **dict.fromkeys(("exec", "nxwa", "dis2m", "dis1g", "private", "slotflags"), ANY),
    **dict.fromkeys(("max", "host"), _LEVELS),
    "hw": range(1, 4),
    "gfn": FRAME,
    "pfn": WORD,
}
"""What each key may be."""
_DEFAULTS: Final[Mapping[str, int]] = {**dict.fromkeys(ALLOWED, 0), "max": 3, "hw": 3, "host": 1}
_MISALIGNED: Final = 1000
_TARGET: Final = Target(SHADOW, "4k", "6.12")
"""Shadow paging: only there the largest size comes in from outside, as that of the guest's own block."""


class SizePorts(X86Ports):
    """The guest's and the host's blocks, and the vetoes, are what the keys say."""

    def __init__(self, fmt: Stage2Format, keys: Mapping[str, int]) -> None:
        private = keys["private"]
        super().__init__(
            fmt, {"slot": 5 if private else 1, "hasprv": private, "attr": private}, small_exec=bool(keys["nxwa"])
        )
        self.sizes = keys
        self.limit = size(min(keys["max"], keys["hw"]))
        self.mapped = (size(1), Pfn(keys["pfn"]))
        self.got = Pin(self.mapped[1], writable=True)
        if keys["pfn"] not in FRAME:
            self.got = Pin(None, PinError.FAULT)
        if self.slot is not None and keys["slotflags"] & 1:
            self.slot = replace(self.slot, flags=self.slot.flags | MemslotFlag.LOG_DIRTY)

    def walk_guest(self, gpa: Gpa) -> GuestTranslation:
        return GuestTranslation(gpa, self.limit)

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        return self.got

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        return self.got._replace(max_size=self.limit)

    def mapping_size(self, hva: Hva) -> int:
        return size(self.sizes["host"])

    def block_allowed(self, slot: Memslot, gfn: Gfn, size: int) -> bool:
        return not self.sizes[{2: "dis2m", 3: "dis1g"}[level(size)]]

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        self.mapped = (size, pfn)
        return MapResult.FIXED


def run(script: Mapping[str, int], path: BoundPath | None = None) -> dict[str, int]:
    """The answer to one scripted fault, on *path* or that of 6.12."""
    said = {**_DEFAULTS, **script}
    fault = _TARGET.decode(
        ERROR_CODE=FETCH if said["exec"] else 0,
        CR2=said["gfn"] << 12,
        KVM=KVM["PRIVATE"].mask if said["private"] else 0,
    )
    vm = SizePorts(_TARGET.format, said)
    at = (path or bind(_TARGET)).handle(vm, fault).progress
    mapped, pfn = vm.mapped
    return {
        "req": level(at.wanted or size(1)),
        "goal": level(mapped),
        "disallowed": int(huge_page_disallowed(fault, vm)),
        "pfn": pfn,
        "bug": _MISALIGNED * bool((said["gfn"] ^ said["pfn"]) & (mapped >> 12) - 1),
    }


def parse(line: str) -> dict[str, int]:
    """``key=value`` pairs. Raises ValueError saying what is wrong."""
    return keys(line.split(), ALLOWED, 0)


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
