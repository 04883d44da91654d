"""An address for a frame number: the look-up would ask for a frame 4096 times too high and find no slot."""

from kvmfault.types import Gfn, Gpa


def slot_offset(base: Gfn, gfn: Gfn) -> int:
    return gfn - base


slot_offset(Gfn(0x40000), Gpa(0x4001_0000))  # error: Argument 2 to "slot_offset" has incompatible type "Gpa"
gfn: Gfn = Gpa(0x4000_0000)  # error: expression has type "Gpa", variable has type "Gfn"
plain: Gfn = 0x40000  # error: expression has type "int", variable has type "Gfn"
