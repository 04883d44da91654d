"""A hypervisor in a guest writes one of its registers, which are in memory: the abort, its translation, and a race.

The same steps as for any fault sample the sequence, find the slot, obtain the page and test for invalidations. What
comes of it is kept for the vCPU and never enters the second-stage table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from arch.arm64.vncr import Vncr, VncrWalk, handle_vncr_abort
from kvmfault import Gfn, Gpa, Hva, Vm, backend
from kvmfault.contract.ports import GuestTranslation, Memslot, Pin
from kvmfault.replay.verdict import outcome_text

GPA: Final = 0x4000_0000
HVA: Final = 0x7F00_0000_0000
SIZE: Final = 1 << 20
WRITE: Final = 0x9600_2047
"""Data abort from the current exception level, VNCR, write, translation at level 3."""


class Raced(Vm):
    """A VM whose memory is replaced once, right after a page of it was obtained."""

    raced = False

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        """See Ports."""
        got = super().pin(slot, gfn, hva, write=write, nowait=nowait, interruptible=interruptible)
        if not self.raced:
            self.raced = True
            self.back(HVA, SIZE)
        return got


def own_table(va: int) -> VncrWalk:
    """The hypervisor's own first stage maps its register page to the start of memory, at level 2."""
    return VncrWalk(GuestTranslation(Gpa(GPA), 1 << 21, level=2))


def read_only(va: int) -> VncrWalk:
    """The same, read-only."""
    walk = own_table(va)
    return replace(walk, page=replace(walk.page, writable=False))


def main() -> None:
    for kernel in ("6.12", "7.4"):
        target = backend(f"arm64@{kernel}")
        fault = target.decode(ESR_EL2=WRITE)
        for name, walk in (("writable", own_table), ("read-only", read_only)):
            vm = Raced(target)
            vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE)
            vcpu = Vncr(0x7000, walk)
            for _ in range(2):
                run = handle_vncr_abort(target, vm, fault, vcpu)
                last = run.steps[-1].because if run.steps else "this kernel has no handler"
                print(f"{kernel:<5} {name:<10} {outcome_text(run.outcome):<16} {last}")


if __name__ == "__main__":
    main()
