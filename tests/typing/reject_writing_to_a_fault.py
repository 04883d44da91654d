"""A fault is input: what the path finds out belongs into Progress, never back into the fault."""

from kvmfault import Gpa, PageFault, Raw, Snapshot


def change(captured: Snapshot, raw: Raw, fault: PageFault) -> None:
    captured.is_write = True  # error: Property "is_write" defined in "Accessors" is read-only
    captured.gpa_page = Gpa(0x1000)  # error: Property "gpa_page" defined in "Accessors" is read-only
    raw.is_exec = False  # error: Property "is_exec" defined in "View" is read-only
    raw.of = (0,)  # error: Property "of" defined in "View" is read-only
    fault.is_private = True  # error: Property "is_private" defined in "PageFault" is read-only
    captured.is_new = True  # error: "Accessors[bool, int]" has no attribute "is_new"
