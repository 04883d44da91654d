"""Tables of guest-physical addresses as KVM builds them; the host's TLB refill walks them.

Sources: LoongArch Reference Manual, "Multi-level page table structure supported by page walking"; pgtable-bits.h,
kvm_mmu.h, kvm_map_page, kvm_split_huge of KVM. Where nothing is, the kernel has above the last level the address of an
empty table of its own; here it is 0. KVM_PAGE_WRITEABLE is bit 9 since "LoongArch: KVM: Fix VM migration failure with
PTW enabled" (6.17, and marked for stable kernels); before, bit 8 alone said so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, W, X
from kvmfault.types import Gpa, Hpa

VALID, DIRTY = 1 << 0, 1 << 1
"""V, which KVM clears to make an entry old; D, without which a store is an exception."""
PLV: Final = 3 << 2
MAT: Final = 3 << 4
HUGE, PRESENT, WRITE, WRITEABLE = 1 << 6, 1 << 7, 1 << 8, 1 << 9
"""HUGE above the last level, G there. The last three are software's: WRITE goes with D, WRITEABLE allows both."""
NO_READ, NO_EXEC, RPLV = 1 << 61, 1 << 62, 1 << 63
_MEMORY: Final = {Memory.DEVICE: 0, Memory.NORMAL: 1 << 4, Memory.NONCACHEABLE: 2 << 4}
"""MAT: strongly ordered uncached, coherent cached, weakly ordered uncached."""
_MEMORY_OF: Final = {bits: memory for memory, bits in _MEMORY.items()}
_NAMES: Final = ("pte", "pmd", "pud", "pgd")
_ADDRESS_END: Final = 48
_KNOWN: Final = VALID | DIRTY | PLV | MAT | PRESENT | WRITE | WRITEABLE | NO_READ | NO_EXEC | RPLV


def _levels(page_shift: int, depth: int, gpa_bits: int) -> tuple[Level, ...]:
    bits = page_shift - 3
    made = []
    for number in reversed(range(depth)):
        shift = page_shift + number * bits
        made.append(Level(_NAMES[number], shift, min(bits, gpa_bits - shift), number < 2))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Gpt:
    """One configuration of the host kernel: page size and number of levels.

    *gpa_bits*: the guest's physical address space, as large as the user space of the host's CPU (cpu_vabits).
    """

    name: str
    page_shift: int
    depth: int
    gpa_bits: int = 47
    levels: tuple[Level, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _levels(self.page_shift, self.depth, self.gpa_bits))

    @property
    def empty(self) -> int:
        """Descriptor of an empty entry."""
        return 0

    @property
    def perm_mask(self) -> int:
        """0: an entry that differs is written anew."""
        return 0

    @property
    def break_before_make(self) -> bool:
        """No: entries are exchanged in one step, and flushed after."""
        return False

    @property
    def old_faults(self) -> bool:
        """No: an old entry is an invalid one, and grants nothing."""
        return False

    def with_hardware_ad(self, hardware: bool) -> Gpt:
        """The same: hardware sets neither V nor, as KVM writes its entries, D."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """None: any change is allowed."""
        return None

    def kind(self, desc: int, shift: int) -> Kind:
        """What the entry is. Above the last level all that is not HUGE is the address of a table."""
        if shift > self.page_shift and not desc & HUGE:
            return Kind.TABLE if desc else Kind.EMPTY
        return Kind.LEAF if desc & PRESENT else Kind.EMPTY

    @property
    def _frame(self) -> int:
        return (1 << _ADDRESS_END) - (1 << self.page_shift)

    def hpa(self, desc: int, shift: int) -> Hpa:
        """Address of the next table, or of the mapped block."""
        address = desc & self._frame
        return Hpa(address if self.kind(desc, shift) is Kind.TABLE else address & -(1 << shift))

    def prot(self, desc: int) -> int:
        """R, W, X bits; nothing without V."""
        if not desc & VALID:
            return 0
        return (0 if desc & NO_READ else R) | (W if desc & DIRTY else 0) | (0 if desc & NO_EXEC else X)

    def table(self, hpa: Hpa, shift: int) -> int:
        """The plain address of a table."""
        return hpa & self._frame

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
        """A leaf, always readable. It notes that it may be made dirty where the host allows writes."""
        desc = hpa & self._frame | PRESENT | _MEMORY[memory] | (VALID if young else 0) | (0 if prot & X else NO_EXEC)
        desc |= HUGE if shift > self.page_shift else 0
        return desc | (DIRTY | WRITE if prot & W else 0) | (WRITEABLE if host_writable else 0)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """None: KVM leaves MMIO unmapped here."""
        return None

    def mmio_generation_bits(self) -> int:
        """0: there are no MMIO entries."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """The leaf with these permissions added."""
        desc |= DIRTY | WRITE if prot & W else 0
        desc &= ~(NO_READ if prot & R else 0)
        return desc & ~(NO_EXEC if prot & X else 0)

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """The leaf without D (kvm_mkclean_pte); unless *for_good* it stays known that it may have it."""
        return desc & ~(DIRTY | WRITE | (WRITEABLE if for_good else 0))

    def fix_write(self, desc: int) -> int | None:
        """With D where that is noted as allowed (kvm_map_page_fast)."""
        return desc | DIRTY | WRITE if desc & WRITEABLE else None

    def is_young(self, desc: int) -> bool:
        """Whether V is set (kvm_pte_young)."""
        return bool(desc & VALID)

    def with_young(self, desc: int, young: bool) -> int:
        """The leaf with V set or cleared (kvm_pte_mkyoung, kvm_pte_mkold)."""
        return desc | VALID if young else desc & ~VALID

    def is_dirty(self, desc: int) -> bool:
        """Whether D is set (kvm_pte_dirty): KVM marks the page when it sets it."""
        return bool(desc & DIRTY)

    def clear_dirty(self, desc: int) -> int:
        """Without D: the next write faults."""
        return self.write_protect(desc)

    def set_dirty(self, desc: int) -> int:
        """The same: stores go only where D is set already."""
        return desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """The *index*-th piece of a block, attributes kept (kvm_split_huge)."""
        return (desc if child_shift > self.page_shift else desc & ~HUGE) + (index << child_shift)

    def entry(self, desc: int, shift: int) -> Entry:
        """The entry for people. Never raises, whatever the bits."""
        kind = self.kind(desc, shift)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc, notes=(f"not present, other bits {desc:#x}",) if desc else ())
        hpa = self.hpa(desc, shift)
        if kind is Kind.TABLE:
            rest = desc & ~self._frame
            notes = (f"bits {rest:#x} set: none that KVM sets, or a kernel address: the empty table",) if rest else ()
            return Entry(kind=kind, value=desc, hpa=hpa, notes=notes)
        return Entry(
            kind=kind,
            value=desc,
            hpa=hpa,
            prot=PROTS[self.prot(desc)],
            memory=_MEMORY_OF.get(desc & MAT),
            accessed=self.is_young(desc),
            dirty=self.is_dirty(desc),
            mmu_writable=bool(desc & WRITEABLE),
            notes=tuple(self._notes(desc, shift)),
        )

    def _notes(self, desc: int, shift: int) -> list[str]:
        notes = []
        if bool(desc & DIRTY) != bool(desc & WRITE):
            notes.append("D and bit 8 differ, which KVM sets and clears together")
        if desc & MAT == MAT:
            notes.append("MAT 3 is reserved")
        rest = desc & ~(_KNOWN | self._frame & -(1 << shift) | (HUGE if shift > self.page_shift else 0))
        return [*notes, f"bits {rest:#x} set: reserved, software's, or a misaligned block"] if rest else notes


FORMATS: Final = {fmt.name: fmt for fmt in (Gpt("4k", 12, 4), Gpt("16k", 14, 3), Gpt("64k", 16, 3))}
"""By page size: 4K with four levels, 16K with three as distributions have it, 64K with three."""
