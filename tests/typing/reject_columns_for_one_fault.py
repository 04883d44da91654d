"""A million faults where one is wanted: `if fault.is_write` over an array raises, or asks the first row only."""

from kvmfault import Accessors, PageFault, Raw
from kvmfault.algebra.columns import BoolCol, U64Col


def needs_write(fault: PageFault) -> bool:
    return fault.is_write


def count(faults: Accessors[BoolCol, U64Col], fault: Raw) -> int:
    faults.kvm_get_fault_gpa()  # error: Invalid self argument "Accessors[ndarray
    one: Raw = faults  # error: variable has type "View[tuple[int, ...]]"
    return needs_write(faults)  # error: Argument 1 to "needs_write" has incompatible type "Accessors[ndarray
