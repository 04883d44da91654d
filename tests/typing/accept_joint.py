"""A joint of one's own, and a backend's table of them."""

from kvmfault import Joints, MmioFault, Outcome, Ports, Retry
from kvmfault.contract.progress import Progress


def refuse_private(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    return Retry("not now") if fault.is_private and vm.is_private(at.gfn) else None


mine: Joints = Joints(screen=(refuse_private,))
