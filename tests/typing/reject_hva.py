"""A user-space address for a guest's: both are bytes, and the fault would be resolved in the wrong address space."""

from kvmfault.types import Gpa, Hva


def is_below_4g(gpa: Gpa) -> bool:
    return gpa < 1 << 32


is_below_4g(Hva(0x7F00_0000_0000))  # error: incompatible type "Hva"; expected "Gpa"
