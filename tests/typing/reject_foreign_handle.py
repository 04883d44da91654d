"""A handle read by the accessor functions of another architecture: its registers would be misread without a word."""

from kvmfault import Handle, HandleOps, PageFault, Target


class One:
    """An architecture."""


class Other:
    """Another."""


def read(target: Target, registers: tuple[int, ...]) -> PageFault:
    handle: Handle[One] = Handle(registers)
    ops: HandleOps[Other] = HandleOps(target.ops)
    mine: Handle[Other] = handle  # error: expression has type "Handle[One]", variable has type "Handle[Other]"
    handle.is_write  # error: "Handle[One]" has no attribute "is_write"
    unbound: PageFault = handle  # error: expression has type "Handle[One]", variable has type "PageFault"
    return ops.bind(handle)  # error: Argument 1 to "bind" of "HandleOps" has incompatible type "Handle[One]"
