"""A shape that answers only some questions: neutral code would find out at run time which."""

from kvmfault import Gpa, PageFault


class Partial:
    is_write = True

    def kvm_get_fault_gpa(self) -> Gpa | None:
        return Gpa(0)


class Unsure:
    """Would answer None, which passes `if not fault.is_exec` silently."""

    is_exec: bool | None = None


def take(fault: PageFault) -> bool:
    return fault.is_exec


take(Partial())  # error: Argument 1 to "take" has incompatible type "Partial"; expected "PageFault"
take(Unsure())  # error: Argument 1 to "take" has incompatible type "Unsure"; expected "PageFault"
