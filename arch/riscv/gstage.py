"""G-stage tables as KVM builds them: Sv39x4, Sv48x4, Sv57x4, with a root table of four pages.

Sources: RISC-V privileged architecture, "Two-stage address translation"; extensions Svpbmt and Svnapot for bits 63:61;
gstage_map_page, gstage_set_pte, gstage_op_pte of KVM. A and D are always set when an entry is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, W, X
from kvmfault.types import Gpa, Hpa

VALID, READ, WRITE, EXEC = 1 << 0, 1 << 1, 1 << 2, 1 << 3
USER, GLOBAL, ACCESSED, DIRTY = 1 << 4, 1 << 5, 1 << 6, 1 << 7
SOFTWARE: Final = 3 << 8
PPN: Final = (1 << 54) - (1 << 10)
NAPOT: Final = 1 << 63
_RWX: Final = READ | WRITE | EXEC
_PBMT: Final = 3 << 61
_MEMORY_OF: Final = {0: Memory.NORMAL, 1 << 61: Memory.NONCACHEABLE, 2 << 61: Memory.DEVICE}
_KNOWN: Final = VALID | _RWX | USER | GLOBAL | ACCESSED | DIRTY | SOFTWARE | PPN | _PBMT | NAPOT
_ROOT_BITS: Final = 2
"""The root table is four times as large as the others."""


def _levels(count: int) -> tuple[Level, ...]:
    shifts = range(12 + 9 * (count - 1), 11, -9)
    return tuple(Level(f"level {(s - 12) // 9}", s, 9 + (_ROOT_BITS if s == shifts[0] else 0), s <= 30) for s in shifts)


@dataclass(frozen=True, slots=True)
class GStage:
    """One mode of hgatp. *depth*: its levels; KVM puts leaves at the lowest three."""

    name: str
    depth: int
    levels: tuple[Level, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _levels(self.depth))

    @property
    def page_shift(self) -> int:
        """Pages have 4K."""
        return 12

    @property
    def gpa_bits(self) -> int:
        """41, 50 or 59: nine for each level, the page offset, and two more for the root."""
        return 12 + 9 * self.depth + _ROOT_BITS

    @property
    def empty(self) -> int:
        """Descriptor of an empty entry."""
        return 0

    @property
    def perm_mask(self) -> int:
        """0: an entry that differs is written anew (gstage_set_pte)."""
        return 0

    @property
    def break_before_make(self) -> bool:
        """No: entries are exchanged in one step, and flushed after."""
        return False

    @property
    def old_faults(self) -> bool:
        """Yes: a guest-page fault like any other, where the hart does not set A itself (Svade)."""
        return True

    def with_hardware_ad(self, hardware: bool) -> GStage:
        """The same: entries have A and D from the beginning."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """None: any change is allowed, followed by HFENCE.GVMA."""
        return None

    def kind(self, desc: int, shift: int) -> Kind:
        """What the entry is. Reserved combinations, and misaligned blocks, fault like an empty one."""
        if not desc & VALID or desc & (READ | WRITE) == WRITE:
            return Kind.EMPTY
        if desc & _RWX:
            return Kind.EMPTY if desc & _misaligned(shift) else Kind.LEAF
        return Kind.TABLE if shift > 12 else Kind.EMPTY

    def hpa(self, desc: int, shift: int) -> Hpa:
        """Address of the next table, or of the mapped block."""
        address = (desc & PPN) << 2
        return Hpa(address if self.kind(desc, shift) is Kind.TABLE else address & -(1 << shift))

    def prot(self, desc: int) -> int:
        """R, W, X bits; an entry without U is for nobody here, since guests run as users of this stage."""
        if not desc & USER:
            return 0
        return (R if desc & READ else 0) | (W if desc & WRITE else 0) | (X if desc & EXEC else 0)

    def table(self, hpa: Hpa, shift: int) -> int:
        """Entry that points to a table."""
        return hpa >> 2 & PPN | VALID

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
        """A leaf: always readable and with D. The memory type stays that of the address (PBMT 0), whatever is asked."""
        desc = hpa >> 2 & PPN | VALID | READ | USER | DIRTY | (ACCESSED if young else 0)
        return desc | (WRITE if prot & W else 0) | (EXEC if prot & X else 0)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """None: KVM leaves MMIO unmapped here."""
        return None

    def mmio_generation_bits(self) -> int:
        """0: there are no MMIO entries."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """The leaf with these permissions added."""
        return desc | (READ if prot & R else 0) | (WRITE if prot & W else 0) | (EXEC if prot & X else 0)

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """The leaf without W (gstage_op_pte). Nothing remembers that it was writable."""
        return desc & ~WRITE

    def fix_write(self, desc: int) -> int | None:
        """None: KVM asks the host again for every write fault."""
        return None

    def is_young(self, desc: int) -> bool:
        """Whether A is set."""
        return bool(desc & ACCESSED)

    def with_young(self, desc: int, young: bool) -> int:
        """The leaf with A set or cleared (ptep_test_and_clear_young)."""
        return desc | ACCESSED if young else desc & ~ACCESSED

    def is_dirty(self, desc: int) -> bool:
        """A writable leaf counts as written: D is set in every entry, and tells nothing."""
        return bool(desc & WRITE)

    def clear_dirty(self, desc: int) -> int:
        """Write-protected: D is not used to find writes."""
        return self.write_protect(desc)

    def set_dirty(self, desc: int) -> int:
        """The same: D is set already."""
        return desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """The *index*-th piece of a block, attributes kept. (6.12 splits nothing)"""
        return desc + (index << child_shift - 2)

    def entry(self, desc: int, shift: int) -> Entry:
        """The entry for people. Never raises, whatever the bits."""
        kind = self.kind(desc, shift)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc, notes=tuple(_empty_notes(desc)))
        hpa = self.hpa(desc, shift)
        if kind is Kind.TABLE:
            rest = desc & ~(PPN | VALID | SOFTWARE)
            notes = (f"bits {rest:#x} set: reserved in a table entry",) if rest else ()
            return Entry(kind=kind, value=desc, hpa=hpa, notes=notes)
        return Entry(
            kind=kind,
            value=desc,
            hpa=hpa,
            prot=PROTS[self.prot(desc)],
            memory=_MEMORY_OF.get(desc & _PBMT),
            accessed=self.is_young(desc),
            dirty=self.is_dirty(desc),
            notes=tuple(_leaf_notes(desc, shift)),
        )


def _misaligned(shift: int) -> int:
    # the bits of PPN below a block's own
    return (1 << shift - 2) - (1 << 10)


def _empty_notes(desc: int) -> list[str]:
    if desc & VALID:
        if desc & (READ | WRITE) == WRITE:
            return ["reserved: W without R"]
        return ["a misaligned block" if desc & _RWX else "reserved: a page that grants nothing"]
    return [f"invalid, other bits {desc:#x}"] if desc else []


def _leaf_notes(desc: int, shift: int) -> list[str]:
    notes = []
    if not desc & USER:
        notes.append("U is clear: every access faults, guests run as users of this stage")
    if not desc & DIRTY:
        notes.append("D is clear, which KVM never leaves so")
    if desc & GLOBAL:
        notes.append("G is ignored in this stage")
    if desc & NAPOT:
        notes.append("N: one of a naturally aligned run (Svnapot)")
    if desc & _PBMT == _PBMT:
        notes.append("PBMT 3 is reserved")
    rest = desc & ~_KNOWN | desc & SOFTWARE
    return [*notes, f"bits {rest:#x} set: reserved or software's"] if rest else notes


FORMATS: Final = {fmt.name: fmt for fmt in (GStage("sv39x4", 3), GStage("sv48x4", 4), GStage("sv57x4", 5))}
"""By name. KVM uses the largest that the host has (kvm_riscv_gstage_mode_detect)."""
