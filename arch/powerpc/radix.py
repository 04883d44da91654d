"""The partition-scoped radix tree: descriptors as Power ISA has them, with the bits that Linux keeps in them.

Sources: Power ISA Book III, radix tree page directory and page table entries; book3s/64/pgtable.h and radix.h
(_PAGE_*, RADIX_*_INDEX_SIZE). KVM copies the entry of the host's own tree and adds to it
(kvmppc_book3s_instantiate_page).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, W, X
from kvmfault.types import Gpa, Hpa

VALID, LEAF = 1 << 63, 1 << 62
EXEC, WRITE, READ, PRIVILEGED, SAO = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
DIRTY, ACCESSED = 1 << 7, 1 << 8
_MEMORY_MASK: Final = 3 << 4
_MEMORY: Final = {Memory.NORMAL: 0, Memory.DEVICE: 2 << 4, Memory.NONCACHEABLE: 3 << 4}
_MEMORY_OF: Final = {bits: memory for memory, bits in _MEMORY.items()}
_FRAME: Final = (1 << 57) - (1 << 12)
_NEXT: Final = (1 << 60) - (1 << 8)
_NEXT_SIZE: Final = 0x1F
_NOTES: Final = {
    PRIVILEGED: "privileged: KVM copies it from the host's own entry",
    1 << 61: "software bit 61: being changed, invalid to hardware for now",
    1 << 11: "software: soft dirty",
    1 << 10: "software: special, no struct page",
    1 << 9: "software: device memory map",
}


@dataclass(frozen=True, slots=True)
class Radix:
    """One format. ``perm_mask`` is 0: an entry is the same only if all of it is (kvmppc_create_pte)."""

    name: str
    page_shift: int
    levels: tuple[Level, ...]
    perm_mask: int = 0
    empty: int = 0
    break_before_make: bool = True
    """A leaf is removed and flushed before a table or another leaf takes its place (kvmppc_unmap_pte)."""
    old_faults: bool = True
    """Where hardware cannot set the reference bit it interrupts with SET_RC."""

    @property
    def gpa_bits(self) -> int:
        """52: 13 bits of the root, and 39 below (RADIX_PGTABLE_EADDR_SIZE)."""
        return self.levels[0].shift + self.levels[0].index_bits

    def with_hardware_ad(self, hardware: bool) -> Radix:
        """The same: without it KVM sets reference and change bits for the guest (kvmppc_hv_handle_set_rc)."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """A live leaf may gain and lose bits, but not change its size or frame in one step."""
        if not (old & VALID and new & VALID) or self.kind(old, shift) is Kind.EMPTY:
            return None
        if self.kind(old, shift) is not self.kind(new, shift):
            what = "its size"
        elif self.hpa(old, shift) != self.hpa(new, shift):
            what = "its output address"
        else:
            return None
        return f"{what} may only change through an invalid entry and a TLB invalidation (PTE_BITS_MUST_MATCH)"

    def kind(self, desc: int, shift: int) -> Kind:
        """See Stage2Format. A leaf where KVM has none, or a directory at the last level, translates nothing."""
        if not desc & VALID:
            return Kind.EMPTY
        if desc & LEAF:
            return Kind.LEAF if any(level.leaf and level.shift == shift for level in self.levels) else Kind.EMPTY
        return Kind.EMPTY if shift == self.page_shift else Kind.TABLE

    def hpa(self, desc: int, shift: int) -> Hpa:
        """See Stage2Format."""
        return Hpa(desc & _NEXT if self.kind(desc, shift) is Kind.TABLE else desc & _FRAME & -(1 << shift))

    def prot(self, desc: int) -> int:
        """R, W, X bits; bit values differ from the library's."""
        return (R if desc & READ else 0) | (W if desc & WRITE else 0) | (X if desc & EXEC else 0)

    def table(self, hpa: Hpa, shift: int) -> int:
        """A directory entry holds how many bits the next table is indexed by (pud_populate, pmd_populate)."""
        below = next((level.index_bits for level in self.levels if level.shift < shift), 0)
        return VALID | hpa & _NEXT | below

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
        """See Stage2Format. A writable leaf is made dirty, whatever the access was."""
        desc = VALID | LEAF | hpa & _FRAME | _MEMORY[memory] | (ACCESSED if young else 0)
        desc |= (READ if prot & R else 0) | (EXEC if prot & X else 0)
        return desc | (WRITE | (DIRTY if dirty else 0) if prot & W else 0)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """None: KVM leaves MMIO of radix guests unmapped."""
        return None

    def mmio_generation_bits(self) -> int:
        """0: there are no MMIO entries."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """The leaf with permissions added; write permission comes with the change bit."""
        desc |= (READ if prot & R else 0) | (EXEC if prot & X else 0)
        return desc | WRITE | DIRTY if prot & W else desc

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """The leaf without write permission. Nothing remembers that it had it."""
        return desc & ~WRITE

    def fix_write(self, desc: int) -> int | None:
        """None: KVM asks the host again for every fault that wants to write."""
        return None

    def is_young(self, desc: int) -> bool:
        """The reference bit."""
        return bool(desc & ACCESSED)

    def with_young(self, desc: int, young: bool) -> int:
        """The leaf with the reference bit set or cleared (kvm_age_radix)."""
        return desc | ACCESSED if young else desc & ~ACCESSED

    def is_dirty(self, desc: int) -> bool:
        """The change bit."""
        return bool(desc & DIRTY)

    def clear_dirty(self, desc: int) -> int:
        """The leaf without change bit: the next write sets it again (kvm_radix_test_clear_dirty)."""
        return desc & ~DIRTY

    def set_dirty(self, desc: int) -> int:
        """The leaf as the CPU leaves it after a write."""
        return desc | DIRTY if desc & WRITE else desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """See Stage2Format; KVM itself splits no block, it drops it."""
        return desc + (index << child_shift)

    def entry(self, desc: int, shift: int) -> Entry:
        """See Stage2Format. Total: any 64-bit value is explained."""
        kind = self.kind(desc, shift)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc, notes=tuple(self._empty_notes(desc, shift)))
        if kind is Kind.TABLE:
            return Entry(kind=kind, value=desc, hpa=self.hpa(desc, shift), notes=tuple(self._table_notes(desc, shift)))
        return Entry(
            kind=kind,
            value=desc,
            hpa=self.hpa(desc, shift),
            prot=PROTS[self.prot(desc)],
            memory=_MEMORY_OF.get(desc & _MEMORY_MASK),
            accessed=self.is_young(desc),
            dirty=self.is_dirty(desc),
            notes=tuple(self._leaf_notes(desc, shift)),
        )

    def _empty_notes(self, desc: int, shift: int) -> list[str]:
        if desc & VALID:
            what = "this level has no leaves" if desc & LEAF else "the last level has no directory"
            return [f"reserved: {what}"]
        return [f"invalid, other bits {desc:#x}"] if desc else []

    def _table_notes(self, desc: int, shift: int) -> list[str]:
        size = desc & _NEXT_SIZE
        expected = self.table(Hpa(0), shift) & _NEXT_SIZE
        notes = [f"the next table is indexed by {size} bits; here it has {expected}"] if size != expected else []
        rest = desc & ~(VALID | _NEXT | _NEXT_SIZE)
        return [*notes, f"bits {rest:#x} set: reserved or software's"] if rest else notes

    def _leaf_notes(self, desc: int, shift: int) -> list[str]:
        notes = []
        if desc & _MEMORY_MASK == SAO:
            notes.append("strong access ordering")
        known = VALID | LEAF | _FRAME & -(1 << shift) | EXEC | WRITE | READ | DIRTY | ACCESSED | _MEMORY_MASK
        rest = desc & ~known
        for bit, meaning in _NOTES.items():
            if rest & bit:
                notes.append(meaning)
                rest &= ~bit
        return [*notes, f"bits {rest:#x} set: reserved or ignored"] if rest else notes


def _levels(page_shift: int) -> tuple[Level, ...]:
    return (
        Level("PGD", 39, 13, False),
        Level("PUD", 30, 9, True),
        Level("PMD", 21, 9, True),
        Level("PTE", page_shift, 21 - page_shift, True),
    )


FORMATS: Final = {fmt.name: fmt for fmt in (Radix("64k", 16, _levels(16)), Radix("4k", 12, _levels(12)))}
"""By name, the page size of most distributions first."""
