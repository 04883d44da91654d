"""A joint that takes or gives something else than the path passes and understands."""

from kvmfault import Joints, MmioFault, Outcome, PageFault, Ports
from kvmfault.contract.progress import Progress


def too_few(vm: Ports, fault: MmioFault) -> Outcome | None:
    return None


def says_yes(vm: Ports, fault: MmioFault, at: Progress) -> bool:
    return fault.is_write


def general(vm: Ports, fault: PageFault, at: Progress) -> Outcome | None:
    return None


Joints(screen=(general,))  # asks less than it may: fine
Joints(screen=(too_few,))  # error: expected "tuple[Callable[[Ports, MmioFault, Progress]
Joints(repair=(says_yes,))  # error: expected "tuple[Callable[[Ports, MmioFault, Progress]
Joints(screen=general)  # error: expected "tuple[Callable[[Ports, MmioFault, Progress]
Joints(conclude=(general,))  # error: expected "tuple[Conclude, ...]"
