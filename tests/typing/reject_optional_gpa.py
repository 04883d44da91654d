"""An address that hardware did not report: arithmetic on None, or gpa 0 taken for none."""

from kvmfault import Gfn, PageFault


def frame(fault: PageFault) -> Gfn:
    return Gfn(fault.kvm_get_fault_gpa() >> 12)  # error: Unsupported operand types for >> ("None" and "int")


def end(fault: PageFault) -> int:
    return fault.gpa_offset + 8  # error: Unsupported operand types for + ("None" and "int")
