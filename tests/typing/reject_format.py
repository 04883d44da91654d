"""A table format that lacks a method: the first aged page would end in an AttributeError."""

from kvmfault import Stage2Format
from kvmfault.contract.format import Kind, Level
from kvmfault.types import Hpa


class Partial:
    name = "4k"
    page_shift = 12
    levels = (Level("page", 12, 9, True),)
    gpa_bits = 21
    empty = 0
    perm_mask = 0
    break_before_make = False
    old_faults = False

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        return None

    def kind(self, desc: int, shift: int) -> Kind:
        return Kind.EMPTY

    def hpa(self, desc: int, shift: int) -> Hpa:
        return Hpa(0)


fmt: Stage2Format = Partial()  # error: expression has type "Partial", variable has type "Stage2Format"
