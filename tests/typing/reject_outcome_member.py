"""A member that an outcome does not have, or only some outcomes have."""

from kvmfault import Exit, Fixed, Inject, Outcome


def look(outcome: Outcome, fixed: Fixed) -> object:
    fixed.errno  # error: "Fixed" has no attribute "errno"
    Fixed(4096)  # error: Missing positional argument "prot" in call to "Fixed"
    Inject("dabt")  # error: Missing positional argument "address" in call to "Inject"
    Exit("mmio")  # error: Argument 1 to "Exit" has incompatible type "str"; expected "Reason"
    return outcome.size  # error: has no attribute "size"
