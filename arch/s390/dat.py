"""DAT tables of a guest, as gmap builds them: hardware's bits, and those that KVM keeps in the entries.

Sources: z/Architecture Principles of Operation, region-, segment- and page-table entries; arch/s390/kvm/dat.h (union
pte, union crste) of 7.0 and later. Before that the page tables were those of the host process itself, with the same
bits. Segments of 1M are mapped only where the VMM asked (KVM_CAP_S390_HPAGE_1M), regions of 2G never.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, W, X
from kvmfault.types import Gpa, Hpa


@dataclass(frozen=True, slots=True)
class Bits:
    """Where one kind of leaf has its bits. The others are software's."""

    invalid: int
    special: int
    writable: int
    dirty: int
    young: int


PROTECT, NO_EXECUTE = 1 << 9, 1 << 8
"""DAT protection and instruction-execution protection, in every leaf. KVM never asks for the second."""
PAGE: Final = Bits(1 << 10, 1 << 6, 1 << 5, 1 << 3, 1 << 2)
LARGE: Final = Bits(1 << 5, 1 << 15, 1 << 14, 1 << 12, 1 << 11)
SOFT_DIRTY, PRESENT = 1 << 1, 1 << 0
FORMAT_CONTROL: Final = 1 << 10
"""Of a region- or segment-table entry: it maps memory itself."""
_CRST_INVALID: Final = 1 << 5
_TYPE: Final = 3 << 2
_LENGTH: Final = 3
_TYPES: Final = {20: 0, 31: 1, 42: 2, 53: 3}
"""Shift of a level -> table type of its entries."""
_PAGE_SHIFT: Final = 12
EMPTY_PAGE: Final = PAGE.invalid


class Large(int):
    """A segment- or region-table entry that maps memory: its bits are elsewhere than a page's.

    Functions of a leaf are not told its level, and a page's invalid bit is a segment's format control: the number alone
    does not say which it is.
    """

    __slots__ = ()


def _bits(desc: int) -> Bits:
    return LARGE if isinstance(desc, Large) else PAGE


def _like(desc: int, value: int) -> int:
    return Large(value) if isinstance(desc, Large) else value


def empty_entry(shift: int) -> int:
    """What the kernel has in an empty entry of this level (_PTE_EMPTY, _CRSTE_EMPTY)."""
    return EMPTY_PAGE if shift == _PAGE_SHIFT else _CRST_INVALID | _TYPES[shift] << 2


@dataclass(frozen=True, slots=True)
class Dat:
    """One format. ``empty`` is the value of an empty page-table entry; the other levels' is ``empty_entry``."""

    name: str
    levels: tuple[Level, ...]
    page_shift: int = _PAGE_SHIFT
    perm_mask: int = 0
    empty: int = EMPTY_PAGE
    break_before_make: bool = True
    """Entries are exchanged by instructions that also purge the TLBs (IPTE, CRDTE)."""
    old_faults: bool = False
    """An old entry is invalid: it grants nothing."""

    @property
    def gpa_bits(self) -> int:
        """53 with a region-second table as root, 42 with a region-third one."""
        return self.levels[0].shift + self.levels[0].index_bits

    def with_hardware_ad(self, hardware: bool) -> Dat:
        """The same: KVM tracks both by permissions (referenced and changed are bits of storage keys)."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """A leaf of another frame is not overwritten: the fault is tried again. (EAGAIN of _gmap_link)"""
        if self.kind(old, shift) is not Kind.LEAF or self.kind(new, shift) is not Kind.LEAF:
            return None
        if self.hpa(old, shift) == self.hpa(new, shift):
            return None
        return "a present leaf gives way to another frame only after it was removed (EAGAIN of _gmap_link)"

    def kind(self, desc: int, shift: int) -> Kind:
        """See Stage2Format. An entry that is only invalid because it is old is a leaf."""
        if shift == self.page_shift:
            return Kind.LEAF if desc & PRESENT else Kind.EMPTY
        if desc & FORMAT_CONTROL:
            return Kind.LEAF if desc & PRESENT and shift in (20, 31) else Kind.EMPTY
        return Kind.EMPTY if desc & _CRST_INVALID else Kind.TABLE

    def hpa(self, desc: int, shift: int) -> Hpa:
        """See Stage2Format. A page table is 2K, so its address has one bit more than other tables'."""
        if self.kind(desc, shift) is Kind.TABLE:
            return Hpa(desc & -(1 << (11 if shift == 20 else 12)) & _U64)
        return Hpa(desc & -(1 << shift) & _U64)

    def prot(self, desc: int) -> int:
        """R, W, X bits; nothing while the entry is invalid. No entry that is valid forbids reads."""
        if desc & _bits(desc).invalid:
            return 0
        return R | (0 if desc & PROTECT else W) | (0 if desc & NO_EXECUTE else X)

    def table(self, hpa: Hpa, shift: int) -> int:
        """See Stage2Format. Region tables are as long as they can be (_crste_fc0)."""
        return hpa | _TYPES.get(shift, 0) << 2 | (_LENGTH if shift > 20 else 0)

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
        """See Stage2Format. What is not dirty is protected, so that the first write is noticed. (_pte, _crste_fc1)"""
        page = shift == self.page_shift
        b = PAGE if page else LARGE
        desc = hpa | PRESENT | (b.writable if host_writable or prot & W else 0)
        desc |= b.dirty | SOFT_DIRTY if prot & W else PROTECT
        desc |= 0 if prot & X else NO_EXECUTE
        desc |= b.special if memory is Memory.DEVICE else 0
        return self.with_young(desc if page else Large(desc | FORMAT_CONTROL | _TYPES[shift] << 2), young)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """None: there is no memory-mapped I/O."""
        return None

    def mmio_generation_bits(self) -> int:
        """0: there are no such entries."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """The leaf with permissions added; write permission makes it dirty."""
        b = _bits(desc)
        desc = _like(desc, desc & ~NO_EXECUTE) if prot & X else desc
        return _like(desc, desc & ~PROTECT | b.writable | b.dirty | SOFT_DIRTY) if prot & W else desc

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """The protected leaf; a minor fault gives the permission back, unless *for_good*."""
        return _like(desc, (desc | PROTECT) & ~(_bits(desc).writable if for_good else 0))

    def fix_write(self, desc: int) -> int | None:
        """See Stage2Format. (_gmap_handle_minor_pte_fault)"""
        b = _bits(desc)
        return _like(desc, desc & ~PROTECT | b.dirty | SOFT_DIRTY) if desc & b.writable else None

    def is_young(self, desc: int) -> bool:
        """KVM's own mark."""
        return bool(desc & _bits(desc).young)

    def with_young(self, desc: int, young: bool) -> int:
        """The leaf made valid; or old: invalid, protected, and no more dirty to the host. (gmap_clear_young_pte)"""
        b = _bits(desc)
        if young:
            return _like(desc, desc & ~b.invalid | b.young)
        return _like(desc, (desc | b.invalid | PROTECT) & ~(b.young | b.dirty))

    def is_dirty(self, desc: int) -> bool:
        """Written since the log was last read (soft dirty)."""
        return bool(desc & SOFT_DIRTY)

    def clear_dirty(self, desc: int) -> int:
        """The protected leaf, not written. (__pte_test_and_clear_softdirty)"""
        return _like(desc, (desc | PROTECT) & ~SOFT_DIRTY)

    def set_dirty(self, desc: int) -> int:
        """The same: an entry that may be written is marked before the write."""
        return desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """See Stage2Format. (dat_split_crste)"""
        if child_shift != self.page_shift:
            return Large(desc + (index << child_shift) & ~_TYPE | _TYPES[child_shift] << 2)
        page = (desc & -(1 << shift)) + (index << child_shift) | desc & (PROTECT | NO_EXECUTE | SOFT_DIRTY | PRESENT)
        for of, to in zip(_moved(LARGE), _moved(PAGE), strict=True):
            page |= to if desc & of else 0
        return page

    def entry(self, desc: int, shift: int) -> Entry:
        """See Stage2Format. Total: any 64-bit value is explained."""
        kind = self.kind(desc, shift)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc, notes=tuple(_empty_notes(desc, shift)))
        if kind is Kind.TABLE:
            return Entry(kind=kind, value=desc, hpa=self.hpa(desc, shift), notes=tuple(self._table_notes(desc, shift)))
        leaf = desc if shift == self.page_shift else Large(desc)
        return Entry(
            kind=kind,
            value=leaf,
            hpa=self.hpa(leaf, shift),
            prot=PROTS[self.prot(leaf)],
            accessed=self.is_young(leaf),
            dirty=self.is_dirty(leaf),
            host_writable=bool(leaf & _bits(leaf).writable),
            mmu_writable=bool(leaf & _bits(leaf).writable),
            notes=tuple(_leaf_notes(leaf, shift)),
        )

    def _table_notes(self, desc: int, shift: int) -> list[str]:
        notes = [f"protected: nothing below may be written: DAT protection {PROTECT:#x}"] if desc & PROTECT else []
        if desc & _TYPE != _TYPES[shift] << 2:
            notes.append(f"table type {desc >> 2 & 3}; entries of this level have {_TYPES[shift]}")
        known = self.hpa(desc, shift) | PROTECT | _TYPE | (_LENGTH if shift > 20 else 0)
        rest = desc & ~known
        return [*notes, f"bits {rest:#x} set: an offset, common-region control, or software's"] if rest else notes


_U64: Final = (1 << 64) - 1


def _moved(b: Bits) -> tuple[int, ...]:
    return b.invalid, b.special, b.writable, b.dirty, b.young


def _empty_notes(desc: int, shift: int) -> list[str]:
    if desc in (EMPTY_PAGE, empty_entry(shift)):
        return []
    token, parameter = desc >> 48, desc >> 32 & 0xFFFF
    if token == 1:
        return [f"a token: an access gets program interruption {parameter:#x}"]
    return [f"invalid, other bits {desc & ~empty_entry(shift):#x}"]


def _leaf_notes(desc: int, shift: int) -> list[str]:
    b = _bits(desc)
    notes = []
    if shift == 31:
        notes.append("KVM maps no regions of 2G")
    if desc & b.invalid:
        notes.append("old: invalid until the next access makes it young")
    elif desc & PROTECT and desc & b.writable:
        notes.append("protected; a write is repaired without asking the host")
    if desc & b.dirty:
        notes.append("dirty for the host")
    if desc & b.special:
        notes.append("special: no struct page")
    large = FORMAT_CONTROL | _TYPE if shift > _PAGE_SHIFT else 0
    known = -(1 << shift) & _U64 | large | b.invalid | b.special | b.writable | b.dirty | b.young
    rest = desc & ~(known | PROTECT | NO_EXECUTE | SOFT_DIRTY | PRESENT)
    return [*notes, f"bits {rest:#x} set: keys, notifications or reserved"] if rest else notes


_P, _S = Level("page", 12, 8, True), Level("segment", 20, 11, True)
_R3, _R2 = Level("region3", 31, 11, False), Level("region2", 42, 11, False)

FORMATS: Final = {fmt.name: fmt for fmt in (Dat("4k", (_R2, _R3, _S, _P)), Dat("4k-region3", (_R3, _S, _P)))}
"""By name; what differs is the table that the ASCE designates. A guest of more than 8P or less than 2G has one level
more or less (gmap_limit_to_type)."""
