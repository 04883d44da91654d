"""What people are shown where code wants a fault: a Gap is an object, and an object counts as true."""

from kvmfault import PageFault, Raw, Target
from kvmfault.contract.accessors import Answers


def needs_write(fault: PageFault) -> bool:
    return fault.is_write


def ask(target: Target, fault: Raw) -> bool:
    answered: Answers = target.answered(fault)
    return needs_write(answered)  # error: Argument 1 to "needs_write" has incompatible type "Accessors[bool | Gap
