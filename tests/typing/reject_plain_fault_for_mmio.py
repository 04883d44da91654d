"""A fault of an architecture that does not describe the instruction, where the instruction is emulated from it."""

from kvmfault import MmioFault, PageFault


def load_size(fault: MmioFault) -> int:
    return fault.mmio_size or 0


def emulate(fault: PageFault) -> int:
    return load_size(fault)  # error: Argument 1 to "load_size" has incompatible type "PageFault"; expected "MmioFault"
