"""Stage-2 tables as KVM builds them: VMSAv8-64 descriptors, and a geometry with concatenated root tables.

Sources: Arm ARM, "VMSAv8-64 translation table format descriptors"; kvm_pgtable.h and pgtable.c (KVM_PTE_*,
stage2_set_prot_attr, kvm_init_valid_leaf_pte, stage2_pte_needs_update), stage2_pgtable_levels.
Memory types are those without FEAT_S2FWB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from arch.arm64.facts import level_shift
from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, W, X
from kvmfault.errors import LayoutError
from kvmfault.types import Gpa, Hpa

VALID, TYPE = 1 << 0, 1 << 1
"""TYPE: a table, or at the last level a page; 0: a block."""
MEMATTR_MASK = 0xF << 2
S2AP_R, S2AP_W, AF = 1 << 6, 1 << 7, 1 << 10
SH_INNER = 3 << 8
NT, DBM, CONTIGUOUS, XN = 1 << 16, 1 << 51, 1 << 52, 1 << 54
XNX = 1 << 53
"""Only with FEAT_XNX, which KVM uses since 7.0: execution differs between EL1 and EL0."""
TAG_SHIFT = 55
TAG_MASK = 3 << TAG_SHIFT
"""Of the software bits 58:55: the level of a nested guest's own entry (kvm_encode_nested_level)."""
_MEMORY: Final = {Memory.NORMAL: 0xF << 2, Memory.NONCACHEABLE: 0x5 << 2, Memory.DEVICE: 0x1 << 2}
_MEMORY_OF: Final = {bits: memory for memory, bits in _MEMORY.items()}
_SHAREABLE: Final = {0: "non-shareable", 1: "reserved shareability", 2: "outer shareable", 3: "inner shareable"}
_LEAF_BITS: Final = VALID | TYPE | MEMATTR_MASK | S2AP_R | S2AP_W | AF | XN
_LEAF_NOTES: Final = {
    DBM: "DBM: hardware may give the write permission back",
    CONTIGUOUS: "contiguous: one of a run that may share a TLB entry",
    XNX: "bit 53: with FEAT_XNX execution differs between EL1 and EL0",
    NT: "nT: the block may not be cached in a TLB",
}
_ALL_ADDRESSES: Final = (1 << 52) - 1
OWNER_MASK, LOCKED = 0xFF << 2, 1 << 10
"""Of an invalid entry: the component of pKVM that owns the page, and a break-before-make under way."""
CONCATENATED = 4
"""log2 of the root tables that may stand side by side."""


def _levels(page_shift: int, ipa_bits: int) -> tuple[Level, ...]:
    root = 4 - max(2, (ipa_bits - CONCATENATED - 4) // (page_shift - 3))
    first_block = 1 if page_shift == 12 else 2  # KVM_PGTABLE_MIN_BLOCK_LEVEL: 1G, 32M, 512M
    made = []
    for level in range(root, 4):
        shift = level_shift(page_shift, level)
        bits = ipa_bits - shift if level == root else page_shift - 3
        made.append(Level(f"L{level}", shift, bits, level >= first_block))
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Stage2:
    """One format: page size, address layout and size of the guest's address space.

    *ipa_bits*: size of the guest-physical space that one table covers (kvm_s2_mmu, VTCR_EL2.T0SZ). *lpa2*: 52-bit
    addresses with pages of 4K or 16K, as KVM uses them on every host that has them (kvm_lpa2_is_enabled).
    Raises LayoutError where the two do not go together.
    """

    name: str
    page_shift: int
    ipa_bits: int = 48
    lpa2: bool = False
    levels: tuple[Level, ...] = field(init=False, repr=False, compare=False)
    """Root first. The root is as low as 16 tables side by side allow, but not the last level."""

    def __post_init__(self) -> None:
        limit = 52 if self.lpa2 or self.page_shift == 16 else 48
        if self.page_shift not in (12, 14, 16) or not 32 <= self.ipa_bits <= limit:
            raise LayoutError(f"{self.name}: {self.ipa_bits} bits of IPA; pages of 4K, 16K, 64K take 32 to {limit}")
        if self.lpa2 and self.page_shift == 16:
            raise LayoutError(f"{self.name}: LPA2 is about pages of 4K and 16K")
        object.__setattr__(self, "levels", _levels(self.page_shift, self.ipa_bits))

    @property
    def gpa_bits(self) -> int:
        """Guest-physical addresses of more bits are not translated by this table."""
        return self.ipa_bits

    @property
    def empty(self) -> int:
        """Descriptor of an empty entry."""
        return 0

    @property
    def perm_mask(self) -> int:
        """Permissions: an entry that differs only there is not replaced (stage2_pte_needs_update)."""
        return S2AP_R | S2AP_W | XN | XNX

    @property
    def break_before_make(self) -> bool:
        """Yes: two live translations of one address may meet in a TLB (Arm ARM, "Using break-before-make")."""
        return True

    @property
    def old_faults(self) -> bool:
        """Yes: an access flag fault."""
        return True

    def with_hardware_ad(self, hardware: bool) -> Stage2:
        """The same: without such a CPU an old entry faults, and KVM sets the flag."""
        return self

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """Break-before-make is needed to change size, output address or memory type of a live entry."""
        if not (old & VALID and new & VALID) or self.kind(old, shift) is Kind.EMPTY:
            return None
        if self.kind(old, shift) is not self.kind(new, shift):
            what = "its size"
        elif self.hpa(old, shift) != self.hpa(new, shift):
            what = "its output address"
        elif self.kind(old, shift) is Kind.LEAF and (old ^ new) & (MEMATTR_MASK | (0 if self.lpa2 else SH_INNER)):
            what = "its memory type"
        else:
            return None
        return f"break-before-make: {what} may only change through an invalid entry and a TLB flush"

    def _is_block_level(self, shift: int) -> bool:
        # by the architecture; KVM uses fewer: 512G (4K), 64G (16K) and 4T (64K) need 52-bit addresses
        top = {12: 39 if self.lpa2 else 30, 14: 36 if self.lpa2 else 25, 16: 42}[self.page_shift]
        return self.page_shift < shift <= top

    def kind(self, desc: int, shift: int) -> Kind:
        """What the descriptor is. Reserved combinations fault like an empty entry."""
        if not desc & VALID:
            return Kind.EMPTY
        if shift == self.page_shift:
            return Kind.LEAF if desc & TYPE else Kind.EMPTY
        if desc & TYPE:
            return Kind.TABLE
        return Kind.LEAF if self._is_block_level(shift) else Kind.EMPTY

    def _address(self, desc: int, shift: int) -> int:
        low = desc & ((1 << 48) - (1 << shift))
        if self.page_shift == 16:
            return low | (desc >> 12 & 0xF) << 48
        if self.lpa2:
            return low | desc & 3 << 48 | (desc >> 8 & 3) << 50
        return low

    def _with_address(self, hpa: int) -> int:
        low = hpa & ((1 << 48) - (1 << self.page_shift))
        if self.page_shift == 16:
            return low | (hpa >> 48 & 0xF) << 12
        if self.lpa2:
            return low | hpa & 3 << 48 | (hpa >> 50 & 3) << 8
        return low

    def hpa(self, desc: int, shift: int) -> Hpa:
        """Address of the next table, or of the mapped block."""
        return Hpa(self._address(desc, self.page_shift if self.kind(desc, shift) is Kind.TABLE else shift))

    def prot(self, desc: int) -> int:
        """R, W, X bits; with FEAT_XNX bit 53 moves X between EL1 and EL0, which is not told apart here."""
        return (R if desc & S2AP_R else 0) | (W if desc & S2AP_W else 0) | (0 if desc & XN else X)

    def table(self, hpa: Hpa, shift: int) -> int:
        """Descriptor that points to a table (kvm_set_table_pte)."""
        return self._with_address(hpa) | TYPE | VALID

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
        """Descriptor of a leaf. With LPA2 the shareability bits hold address bits, and VTCR_EL2 the shareability."""
        desc = self._with_address(hpa) | _MEMORY[memory] | VALID
        desc |= TYPE if shift == self.page_shift else 0
        desc |= 0 if self.lpa2 else SH_INNER
        desc |= AF if young else 0
        desc |= (S2AP_R if prot & R else 0) | (S2AP_W if prot & W else 0) | (0 if prot & X else XN)
        return desc | tag << TAG_SHIFT & TAG_MASK

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """None: KVM leaves MMIO unmapped here."""
        return None

    def mmio_generation_bits(self) -> int:
        """0: there are no MMIO entries."""
        return 0

    def add_prot(self, desc: int, prot: int) -> int:
        """The leaf with these permissions added (kvm_pgtable_stage2_relax_perms)."""
        desc |= (S2AP_R if prot & R else 0) | (S2AP_W if prot & W else 0)
        return desc & ~(XN | XNX) if prot & X else desc

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """The leaf without S2AP_W (kvm_pgtable_stage2_wrprotect). Nothing remembers that it was writable."""
        return desc & ~S2AP_W

    def fix_write(self, desc: int) -> int | None:
        """None: KVM asks the host again for every write fault."""
        return None

    def is_young(self, desc: int) -> bool:
        """Whether the access flag is set."""
        return bool(desc & AF)

    def with_young(self, desc: int, young: bool) -> int:
        """The leaf with the access flag set or cleared (kvm_pgtable_stage2_mkyoung, _test_clear_young)."""
        return desc | AF if young else desc & ~AF

    def is_dirty(self, desc: int) -> bool:
        """A writable leaf counts as written: KVM marks its page when it maps it."""
        return bool(desc & S2AP_W)

    def clear_dirty(self, desc: int) -> int:
        """Write-protected: hardware notes no writes."""
        return self.write_protect(desc)

    def set_dirty(self, desc: int) -> int:
        """The same: KVM does not let the CPU mark stage-2 entries dirty."""
        return desc

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """The *index*-th piece of a block, attributes kept (kvm_pgtable_stage2_create_unlinked)."""
        block = self._address(desc, shift)
        attributes = desc & ~self._with_address(_ALL_ADDRESSES) & ~TYPE
        kind = TYPE if child_shift == self.page_shift else 0
        return attributes | self._with_address(block + (index << child_shift)) | kind

    def entry(self, desc: int, shift: int) -> Entry:
        """The descriptor for people. Never raises, whatever the bits."""
        kind = self.kind(desc, shift)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc, notes=tuple(self._empty_notes(desc, shift)))
        if kind is Kind.TABLE:
            return Entry(kind=kind, value=desc, hpa=self.hpa(desc, shift), notes=tuple(self._table_notes(desc)))
        return Entry(
            kind=kind,
            value=desc,
            hpa=self.hpa(desc, shift),
            prot=PROTS[self.prot(desc)],
            memory=_MEMORY_OF.get(desc & MEMATTR_MASK),
            accessed=self.is_young(desc),
            dirty=self.is_dirty(desc),
            notes=tuple(self._leaf_notes(desc, shift)),
        )

    def _empty_notes(self, desc: int, shift: int) -> list[str]:
        if desc & VALID:
            last = shift == self.page_shift
            return ["reserved: a page has bit 1 set" if last else "reserved: this level has no blocks"]
        notes = [f"owned by component {(desc & OWNER_MASK) >> 2} of pKVM"] if desc & OWNER_MASK else []
        if desc & LOCKED:
            notes.append("locked: another walker replaces it (break-before-make)")
        rest = desc & ~(OWNER_MASK | LOCKED)
        return [*notes, f"invalid, other bits {rest:#x}"] if rest else notes

    def _table_notes(self, desc: int) -> list[str]:
        rest = desc & ~(self._with_address(_ALL_ADDRESSES) | TYPE | VALID)
        return [f"bits {rest:#x} set: ignored or reserved in a table entry"] if rest else []

    def _leaf_notes(self, desc: int, shift: int) -> list[str]:
        notes = []
        if desc & MEMATTR_MASK not in _MEMORY_OF:
            notes.append(f"memory attributes {(desc & MEMATTR_MASK) >> 2:#x}: none that KVM uses without FWB")
        if not self.lpa2 and desc & SH_INNER != SH_INNER:
            notes.append(f"{_SHAREABLE[desc >> 8 & 3]}; KVM maps inner shareable")
        if desc & TAG_MASK:
            notes.append(f"software bits 56:55: the nested guest's own entry is at level {desc >> TAG_SHIFT & 3}")
        rest = desc & ~(self._with_address(_ALL_ADDRESSES & -(1 << shift)) | _LEAF_BITS | TAG_MASK)
        rest &= ~(0 if self.lpa2 else SH_INNER)
        for bit, meaning in _LEAF_NOTES.items():
            if rest & bit and (bit != NT or shift > self.page_shift):
                notes.append(meaning)
                rest &= ~bit
        return [*notes, f"bits {rest:#x} set: reserved, ignored or software's"] if rest else notes


FORMATS: Final = {
    fmt.name: fmt
    for fmt in (
        Stage2("4k", 12),
        Stage2("16k", 14),
        Stage2("64k", 16, 52),
        Stage2("4k-lpa2", 12, 52, lpa2=True),
        Stage2("16k-lpa2", 14, 52, lpa2=True),
    )
}
"""By name, each with the largest IPA space it allows. A VM gets 40 bits by default: ``replace(fmt, ipa_bits=40)``."""
