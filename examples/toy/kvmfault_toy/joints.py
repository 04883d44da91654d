"""What no policy can say: a fetch from where no memory is goes back to the guest."""

from __future__ import annotations

from typing import Final

from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Inject, Outcome
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress


def refuse_fetch(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Code cannot be fetched from where no memory is: the guest gets a bus error."""
    if not fault.is_exec:
        return None
    return Inject("bus error", fault.kvm_get_fault_gpa() or 0, why="a fetch, and no memory there")


JOINTS: Final = Joints(reject_unbacked=(refuse_fetch,))
