"""What real kernels did with each recorded fault: which function they called, with which address, size and permissions.

The recordings have probes at kvm_handle_guest_abort and at the functions that it calls. Whether a slot covers the
address, the frame and the host's block size are taken from them; the decision is the library's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from arch.arm64 import BACKEND
from kvmfault.contract.format import Memory, W
from kvmfault.contract.outcome import Error, Exit, Inject, MmioAccess, UndecodedMmio
from kvmfault.contract.ports import MapResult, Memslot, Pin
from kvmfault.contract.target import Target
from kvmfault.path.run import bind
from kvmfault.trace.pattern import Pattern
from kvmfault.trace.text import read_fields
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import MemslotFlag
from tests.conftest import recordings
from tests.kernel.scripted import ScriptedPorts

PROBES: Final = {
    "guest_abort": Pattern(assigned="esr:x far:x hpfar:x"),
    "guest_abort_ret": Pattern(assigned="ret:d"),
    "s2_map": Pattern(assigned="addr:x size:x phys:x prot:x"),
    "s2_relax": Pattern(assigned="addr:x prot:x"),
    "s2_mkyoung": Pattern(assigned="addr:x"),
    "s2_wrprotect": Pattern(assigned="addr:x"),
    "io_mem_abort": Pattern(assigned="ipa:x"),
    "inject_dabt": Pattern(assigned="addr:x"),
    "inject_pabt": Pattern(assigned="addr:x"),
}
Call = tuple[str, dict[str, int]]
MAPS: Final = ("s2_map", "s2_relax", "s2_mkyoung")


def faults(path: Path) -> Iterator[tuple[dict[str, int], list[Call], bool]]:
    """Registers of each fault, what was called for it, and whether anything was write-protected before (logging)."""
    open_: dict[int, tuple[dict[str, int], list[Call]]] = {}
    logging = False
    for event, fields in read_fields(str(path), PROBES):
        numbers = dict(fields.numbers)
        if event.name == "s2_wrprotect":
            logging = True
        elif event.name == "guest_abort":
            open_[event.pid] = numbers, []
        elif event.name == "guest_abort_ret":
            if event.pid in open_:
                yield *open_.pop(event.pid), logging
        elif event.pid in open_:
            open_[event.pid][1].append((event.name, numbers))


class Surroundings(ScriptedPorts):
    """One slot over everything, or none; the host gives what the recorded call says."""

    def __init__(self, target: Target) -> None:
        super().__init__(target.format, BACKEND.vm)
        self.backed = self.logged = False
        self.real: dict[str, int] = {}
        self.calls: list[Call] = []

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        flags = MemslotFlag.LOG_DIRTY if self.logged else MemslotFlag(0)
        npages = 1 << 52 - self.page_shift
        slot = Memslot(
            id=0, as_id=0, base_gfn=Gfn(0), npages=npages, hva=Hva(0), flags=flags, page_shift=self.page_shift
        )
        return slot if self.backed else None

    def mapping_size(self, hva: Hva) -> int:
        return self.real.get("size", 1 << self.page_shift)

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        pages = self.mapping_size(hva) >> self.page_shift
        first = self.real.get("phys", 0) >> self.page_shift
        return Pin(Pfn(first + gfn % pages), writable=write or bool(self.real.get("prot", W) & W))

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult:
        phys = pfn << self.page_shift
        self.calls.append(("s2_map", {"addr": gpa, "size": size, "phys": phys, "prot": prot}))
        return MapResult.FIXED

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        self.calls.append(("s2_relax", {"addr": gpa, "prot": prot}))
        return MapResult.FIXED

    def repair_young(self, gpa: Gpa) -> None:
        self.calls.append(("s2_mkyoung", {"addr": gpa}))


def target_of(folder: str) -> Target:
    """The page size and address layout of the host that was recorded."""
    name = "16k" if folder.startswith("c-16k") else "4k-lpa2" if folder.startswith("a-") else "4k"
    return Target(BACKEND, name, "6.12")


@pytest.mark.parametrize("path", recordings("arm64/*/aux.txt.gz"))
def test_calls_what_the_kernel_called(path: Path) -> None:
    target = target_of(path.parent.name)
    page = 1 << target.format.page_shift
    seen: Counter[str] = Counter()
    for registers, real, logging in faults(path):
        if not real:
            seen["nothing"] += 1  # lost a race, or could not get the page: the recording does not tell why
            continue
        vm = Surroundings(target)
        vm.backed = real[0][0] in MAPS
        vm.real = next((fields for name, fields in real if name in ("s2_map", "s2_relax")), {})
        fault = target.decode(**{f"{name.upper()}_EL2": value for name, value in registers.items()})
        # a permission fault of a block that ends in a page: only logging does that
        vm.logged = logging and fault.is_permission and (fault.granule or 0) > page and real[0][0] == "s2_map"
        outcome = bind(target).resolve(vm, fault)
        match outcome:
            case Exit(detail=MmioAccess(gpa=gpa) | UndecodedMmio(gpa=gpa)):
                vm.calls.append(("io_mem_abort", {"ipa": gpa}))
            case Error() if not vm.backed:
                vm.calls.append(("io_mem_abort", {"ipa": (fault.kvm_get_fault_gpa() or 0) + (fault.gpa_offset or 0)}))
            case Inject(what, address):
                vm.calls.append((f"inject_{what}", {"addr": address}))
        assert vm.calls == real, (hex(fault.syndrome), outcome)
        seen[real[0][0]] += 1
    assert seen["s2_map"] > 100
