"""A question that a PageFault does not answer: names of one architecture, or of the path's progress."""

from kvmfault import PageFault


def look(fault: PageFault) -> object:
    fault.esr  # error: "PageFault" has no attribute "esr"
    fault.gfn  # error: "PageFault" has no attribute "gfn"
    fault.gpa  # error: "PageFault" has no attribute "gpa"
    fault.error_code  # error: "PageFault" has no attribute "error_code"
    fault.mmio_size  # error: "PageFault" has no attribute "mmio_size"
    return fault.is_wrote  # error: "PageFault" has no attribute "is_wrote"
