"""A frame number where a frame number belongs, and plain arithmetic on it."""

from kvmfault.types import Gfn, Gpa


def slot_offset(base: Gfn, gfn: Gfn) -> int:
    return gfn - base


pages: int = slot_offset(Gfn(0x40000), Gfn(0x40010))
gfn: Gfn = Gfn(Gpa(0x4000_0000) >> 12)
