"""The toy's second-stage table: two levels of 512 entries, so 2M blocks and 4K pages.

Of an entry bits 2:0 are r, w and x, bit 3 marks a table, bit 4 is the access flag, the address is above.
"""

from __future__ import annotations

from typing import Final

from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, W
from kvmfault.types import Gpa, Hpa

TABLE: Final = 1 << 3
YOUNG: Final = 1 << 4


class ToyFormat:
    """Pure functions of descriptors; see kvmfault.contract.format.Stage2Format."""

    name = "4k"
    page_shift = 12
    levels = (Level("block", 21, 9, True), Level("page", 12, 9, True))
    gpa_bits = 30
    empty = 0
    perm_mask = 0
    break_before_make = False
    old_faults = True

    def with_hardware_ad(self, hardware: bool) -> ToyFormat:
        """The same: the CPU never sets the access flag; an old entry faults as if it were not there."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """None: its TLB forgives everything."""
        return None

    def kind(self, desc: int, shift: int) -> Kind:
        """A page cannot be a table."""
        if not desc:
            return Kind.EMPTY
        return Kind.TABLE if desc & TABLE and shift > self.page_shift else Kind.LEAF

    def hpa(self, desc: int, shift: int) -> Hpa:
        """Address bits."""
        return Hpa(desc & -4096)

    def prot(self, desc: int) -> int:
        """The permission bits are the library's own."""
        return desc & 7

    def table(self, hpa: Hpa, shift: int) -> int:
        """An entry that points to a table."""
        return hpa | TABLE

    def leaf(
        self,
        shift: int,
        hpa: Hpa,
        prot: int,
        memory: Memory,
        *,
        young: bool,
        host_writable: bool,
        tag: int,
        dirty: bool = True,
    ) -> int:
        """A leaf."""
        return hpa | prot | (YOUNG if young else 0)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """None: MMIO is left unmapped."""
        return None

    def mmio_generation_bits(self) -> int:
        """0: there are no MMIO entries."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """More permissions."""
        return desc | prot

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """Without W; nothing remembers that it was writable."""
        return desc & ~W

    def fix_write(self, desc: int) -> int | None:
        """None: the host is always asked."""
        return None

    def is_young(self, desc: int) -> bool:
        """The access flag."""
        return bool(desc & YOUNG)

    def with_young(self, desc: int, young: bool) -> int:
        """The access flag set or cleared."""
        return desc | YOUNG if young else desc & ~YOUNG

    def is_dirty(self, desc: int) -> bool:
        """A writable leaf counts as written."""
        return bool(desc & W)

    def clear_dirty(self, desc: int) -> int:
        """Without W: writes are noted by faults."""
        return self.write_protect(desc)

    def set_dirty(self, desc: int) -> int:
        """The same: the CPU marks no writes."""
        return desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """A piece of a block."""
        return desc + (index << child_shift)

    def entry(self, desc: int, shift: int) -> Entry:
        """For people."""
        kind = self.kind(desc, shift)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc)
        if kind is Kind.TABLE:
            return Entry(kind=kind, value=desc, hpa=self.hpa(desc, shift))
        return Entry(
            kind=kind,
            value=desc,
            hpa=self.hpa(desc, shift),
            prot=PROTS[self.prot(desc)],
            accessed=self.is_young(desc),
            dirty=self.is_dirty(desc),
        )
