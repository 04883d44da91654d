"""SPTE formats: EPT, NPT and shadow long mode, with the bits that KVM keeps in the entries.

One class; the formats differ by masks. NPT and shadow tables are the processor's long-mode format, so they
share one set. Checked bit for bit against entries that real kernels installed (tests/data/x86_sptes_*.txt).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from kvmfault.contract.format import PROTS, Entry, Kind, Level, Memory, R, W, X
from kvmfault.types import Gpa, Hpa

_PRESENT: Final = 1 << 11
"""SPTE_MMU_PRESENT_MASK: KVM's own "present"; hardware permissions may all be taken away for access tracking."""
_BLOCK: Final = 1 << 7
_WRITE: Final = 1 << 1
_ADDRESS: Final = (1 << 52) - (1 << 12)
_AD_TYPE: Final = 3 << 52
_AD_DISABLED: Final = 1 << 52
_AD_WRPROT: Final = 2 << 52
_SAVED_R, _SAVED_X = 1 << 54, 1 << 56
_FROZEN: Final = 0x5A0
_GENERATION_LOW: Final = 0xFF << 3
_GENERATION_HIGH: Final = 0x7FF << 52
_GENERATION_BITS: Final = 19
_L1TF_SHIFT: Final = 5
TAG_SUPERVISOR: Final = 1
"""Tag of a leaf that user mode may not use: the guest's own tables say so."""
TAG_NESTED: Final = 2
"""Tag of a leaf for a nested guest where a page-modification log runs: its dirty bit would log the wrong address."""

PAGE_SIZES: Final = {12: "PG_LEVEL_4K", 21: "PG_LEVEL_2M", 30: "PG_LEVEL_1G", 39: "PG_LEVEL_512G", 48: "PG_LEVEL_256T"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpteBits:
    """Where a processor's table format and KVM's use of it put things."""

    always: int
    """Set in every present entry."""
    read: int
    """Set to grant anything; bit 0 alone decides whether it is granted."""
    execute: int
    no_execute: int
    accessed: int
    dirty: int
    host_writable: int
    mmu_writable: int
    memory_mask: int
    memory: Mapping[Memory, int]
    tracks_access: bool
    """Without hardware A/D bits, R and X are moved to saved bits so that the next access faults."""
    mmio_mask: int
    mmio_value: int
    mmio_write: int
    mmio_read: int
    """Bits of an MMIO entry that keep the access that was allowed; 0: not kept."""
    user: int = 0
    """Bit that admits user accesses, where the format has one."""


_EPT: Final = SpteBits(
    always=1 << 63,  # suppress #VE
    read=1 << 0,
    execute=1 << 2,
    no_execute=0,
    accessed=1 << 8,
    dirty=1 << 9,
    host_writable=1 << 57,
    mmu_writable=1 << 58,
    memory_mask=0xF << 3,
    # type in 5:3; write-back comes with "ignore the guest's PAT" (vmx_get_mt_mask)
    memory={Memory.NORMAL: 6 << 3 | 1 << 6, Memory.DEVICE: 0, Memory.NONCACHEABLE: 1 << 3},
    tracks_access=True,
    mmio_mask=1 << 63 | 7,
    mmio_value=6,  # writable and executable but not readable: a misconfiguration
    mmio_write=0,
    mmio_read=0,
)
_LONG_MODE: Final = SpteBits(
    always=0,
    read=1 << 2 | 1 << 0,
    execute=0,
    no_execute=1 << 63,
    accessed=1 << 5,
    dirty=1 << 6,
    host_writable=1 << 9,
    mmu_writable=1 << 10,
    memory_mask=0,
    memory=dict.fromkeys(Memory, 0),
    tracks_access=False,
    mmio_mask=1 << 51 | 1,
    mmio_value=1 << 51 | 1,  # a reserved address bit
    mmio_write=_WRITE,
    mmio_read=1 << 2,
    user=1 << 2,
)
_EPT_TYPES: Final = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}


def _levels(count: int) -> tuple[Level, ...]:
    shifts = range(12 + 9 * (count - 1), 11, -9)
    return tuple(Level(PAGE_SIZES[s], s, 9, leaf=s <= 30) for s in shifts)


@dataclass(frozen=True, slots=True)
class SpteFormat:
    """A Stage2Format over one set of bits. ``perm_mask`` is 0: x86 compares whole entries."""

    bits: SpteBits
    levels: tuple[Level, ...] = _levels(4)
    hardware_ad: bool = True
    """The CPU sets accessed and dirty bits; else KVM tracks both by permissions."""
    l1tf_mask: int = 0
    """Five address bits set in MMIO entries of hosts that mitigate L1TF (shadow_nonpresent_or_rsvd_mask)."""
    name: str = "4k"
    page_shift: int = 12
    perm_mask: int = 0
    empty: int = 1 << 63
    """SHADOW_NONPRESENT_VALUE: suppresses #VE for TDX, NPT has it too; 0 on kernels before 6.11."""

    @property
    def gpa_bits(self) -> int:
        """48 with four levels, 57 with five."""
        return self.levels[0].shift + self.levels[0].index_bits

    @property
    def break_before_make(self) -> bool:
        """No: entries are exchanged by compare-and-swap, and the TLBs flushed afterwards."""
        return False

    @property
    def old_faults(self) -> bool:
        """No: the CPU sets the accessed bit, or ignores it."""
        return False

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """A present leaf is dropped and flushed before another frame takes its place. Kernel: handle_changed_spte."""
        if self.kind(old, shift) is not Kind.LEAF or self.kind(new, shift) is not Kind.LEAF:
            return None
        if self.hpa(old, shift) == self.hpa(new, shift):
            return None
        return "a present leaf is replaced by a leaf of another frame; drop and flush it first (handle_changed_spte)"

    def with_hardware_ad(self, hardware: bool) -> SpteFormat:
        """See Stage2Format. Kernel: kvm_ad_enabled."""
        return self if hardware is self.hardware_ad else replace(self, hardware_ad=hardware)

    def kind(self, desc: int, shift: int) -> Kind:
        """See Stage2Format. Kernel: is_mmio_spte, is_shadow_present_pte, is_last_spte."""
        if desc & self.bits.mmio_mask == self.bits.mmio_value:
            return Kind.MMIO
        if not desc & _PRESENT:
            return Kind.EMPTY
        return Kind.LEAF if shift == self.page_shift or desc & _BLOCK else Kind.TABLE

    def hpa(self, desc: int, shift: int) -> Hpa:
        """See Stage2Format. Kernel: spte_to_pfn."""
        block = self.kind(desc, shift) is Kind.LEAF
        return Hpa(desc & _ADDRESS & (-(1 << shift) if block else -1))

    def prot(self, desc: int) -> int:
        """See Stage2Format; nothing while the entry is access-tracked."""
        b = self.bits
        executable = desc & b.execute if b.execute else desc & 1 and not desc & b.no_execute
        return (R if desc & 1 else 0) | (W if desc & _WRITE else 0) | (X if executable else 0)

    def table(self, hpa: Hpa, shift: int) -> int:
        """See Stage2Format. Kernel: make_nonleaf_spte."""
        b = self.bits
        used = b.accessed if self.hardware_ad else _AD_DISABLED
        return b.always | _PRESENT | hpa | b.read | _WRITE | b.execute | used

    def leaf(
        self,
        shift: int,
        hpa: Hpa,
        prot: int,
        memory: Memory,
        *,
        young: bool,
        host_writable: bool,
        tag: int = 0,
        dirty: bool = True,
    ) -> int:
        """See Stage2Format; *tag*: TAG_SUPERVISOR, TAG_NESTED. Kernel: make_spte.

        A writable entry is made dirty, whatever the access was; before 6.13 not where it replaces one that had the W
        bit: a writable leaf, a table, or an MMIO entry of NPT.
        """
        b = self.bits
        desc = b.always | _PRESENT | hpa & _ADDRESS | b.memory[memory]
        desc |= (_BLOCK if shift > self.page_shift else 0) | (b.host_writable if host_writable else 0)
        desc |= b.read if prot & R or (prot and not b.execute) else 0
        desc |= b.execute if prot & X else b.no_execute
        if prot & W:
            desc |= _WRITE | b.mmu_writable
        if not self.hardware_ad:
            desc |= _AD_DISABLED
        else:
            desc |= b.accessed | (b.dirty if dirty and prot & W else 0) | (_AD_WRPROT if tag & TAG_NESTED else 0)
        if tag & TAG_SUPERVISOR:
            desc = self.with_user(desc, False)
        return desc if young else self.with_young(desc, False)

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int:
        """See Stage2Format. Kernel: make_mmio_spte, generation_mmio_spte_mask."""
        b, mask = self.bits, self.l1tf_mask
        kept = (b.mmio_write if prot & W else 0) | (b.mmio_read if prot & R else 0)
        moved = (gpa & mask) << _L1TF_SHIFT
        low, high = generation & 0xFF, generation >> 8 & 0x7FF
        return b.mmio_value | kept | gpa & _ADDRESS & ~mask | mask | moved | low << 3 | high << 52

    def mmio_generation_bits(self) -> int:
        """19: a wrap drops all entries (kvm_mmu_invalidate_mmio_sptes)."""
        return _GENERATION_BITS

    def add_prot(self, desc: int, prot: int) -> int:
        """See Stage2Format; KVM's x86 path installs a new entry instead."""
        b = self.bits
        desc |= (b.read if prot & R else 0) | (b.execute if prot & X else 0)
        if prot & X:
            desc &= ~b.no_execute
        if prot & W:
            desc |= _WRITE | b.host_writable | b.mmu_writable
        return desc

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """See Stage2Format. Kernel: wrprot_gfn_range, spte_write_protect for dirty logging; write_protect_gfn."""
        return desc & ~(_WRITE | self.bits.mmu_writable if for_good else _WRITE)

    def fix_write(self, desc: int) -> int | None:
        """See Stage2Format. Kernel: is_mmu_writable_spte in fast_page_fault."""
        return desc | _WRITE if desc & self.bits.mmu_writable else None

    def is_young(self, desc: int) -> bool:
        """See Stage2Format. Kernel: is_accessed_spte."""
        return not self._is_tracked(desc) if _ad_disabled(desc) else bool(desc & self.bits.accessed)

    def with_young(self, desc: int, young: bool) -> int:
        """See Stage2Format. Kernel: mark_spte_for_access_track, restore_acc_track_spte."""
        b = self.bits
        if not _ad_disabled(desc):
            return desc | b.accessed if young else desc & ~b.accessed
        if not b.tracks_access or young is self.is_young(desc):
            return desc
        if young:
            saved = (b.read if desc & _SAVED_R else 0) | (b.execute if desc & _SAVED_X else 0)
            return desc & ~(_SAVED_R | _SAVED_X) | saved
        saved = (_SAVED_R if desc & b.read else 0) | (_SAVED_X if desc & b.execute else 0)
        return desc & ~(b.read | _WRITE | b.execute) | saved

    def clear_dirty(self, desc: int) -> int:
        """See Stage2Format. Kernel: spte_ad_need_write_protect in clear_dirty_gfn_range, __rmap_clear_dirty."""
        return desc & ~_WRITE if desc & _AD_TYPE else desc & ~self.bits.dirty

    def is_dirty(self, desc: int) -> bool:
        """See Stage2Format. Kernel: is_dirty_spte."""
        return bool(desc & (_WRITE if _ad_disabled(desc) else self.bits.dirty))

    def set_dirty(self, desc: int) -> int:
        """See Stage2Format."""
        return desc if _ad_disabled(desc) else self.with_dirty(desc, True)

    def with_dirty(self, desc: int, dirty: bool) -> int:
        """The leaf with the dirty bit set or cleared (clear_dirty_gfn_range; the CPU's own write)."""
        return desc | self.bits.dirty if dirty else desc & ~self.bits.dirty

    def with_user(self, desc: int, user: bool) -> int:
        """The leaf as the guest's own tables give it: for user mode too, or for the supervisor only. Nested tables
        are walked as user accesses, so theirs always admit both."""
        return desc | self.bits.user if user else desc & ~self.bits.user

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """See Stage2Format. Kernel: make_huge_page_split_spte."""
        child = desc | index << child_shift
        return child & ~_BLOCK if child_shift == self.page_shift else child

    def _is_tracked(self, desc: int) -> bool:
        return self.bits.tracks_access and not desc & (self.bits.read | _WRITE | self.bits.execute)

    def entry(self, desc: int, shift: int) -> Entry:
        """See Stage2Format. Total: any 64-bit value is explained."""
        kind = self.kind(desc, shift)
        if kind is Kind.MMIO:
            return self._mmio_entry(desc)
        if kind is Kind.EMPTY:
            return Entry(kind=kind, value=desc, notes=_empty_notes(desc))
        b = self.bits
        leaf = kind is Kind.LEAF
        return Entry(
            kind=kind,
            value=desc,
            hpa=self.hpa(desc, shift),
            prot=PROTS[self.prot(desc)],
            memory=_memory(b, desc) if leaf else None,
            accessed=self.is_young(desc),
            dirty=leaf and self.is_dirty(desc),
            host_writable=bool(desc & b.host_writable) if leaf else None,
            mmu_writable=bool(desc & b.mmu_writable) if leaf else None,
            notes=tuple(self._notes(desc, shift, leaf)),
        )

    def _mmio_entry(self, desc: int) -> Entry:
        b, mask = self.bits, self.l1tf_mask
        address = desc & _ADDRESS & ~b.mmio_value
        gpa = address & ~mask & ~(mask << _L1TF_SHIFT) | address >> _L1TF_SHIFT & mask
        prot = (R if desc & b.mmio_read else 0) | (W if desc & b.mmio_write else 0)
        low, high = (desc & _GENERATION_LOW) >> 3, (desc & _GENERATION_HIGH) >> 52
        top = gpa.bit_length()
        notes = []
        if not mask and 36 <= top <= 46 and gpa >> top - _L1TF_SHIFT == 0x1F:
            plain = gpa & (1 << top - _L1TF_SHIFT) - 1
            notes.append(f"on a host that mitigates L1TF, bits {top - 1}:{top - 5} are marks and the gpa is {plain:#x}")
        return Entry(
            kind=Kind.MMIO,
            value=desc,
            prot=PROTS[prot],
            gpa=Gpa(gpa),
            generation=high << 8 | low,
            notes=tuple(notes),
        )

    def _notes(self, desc: int, shift: int, leaf: bool) -> list[str]:
        b = self.bits
        notes = []
        if leaf and shift > 30:
            notes.append(f"reserved: a {PAGE_SIZES.get(shift, hex(1 << shift))} entry cannot be a leaf")
        if desc & _AD_TYPE == _AD_DISABLED:
            notes.append("hardware A/D bits are off for this entry")
        if desc & _AD_TYPE == _AD_WRPROT:
            notes.append("write-protected for dirty logging even with PML (maps memory for a nested guest)")
        if leaf and _ad_disabled(desc) and self._is_tracked(desc):
            notes.append("access-tracked: permissions are saved in bits 54 and 56, the next access faults")
        if leaf and desc & b.mmu_writable and not desc & _WRITE:
            notes.append("write-protected; a write may be fixed without the lock")
        if b.user and not desc & b.user:
            notes.append("supervisor only")
        if b.memory_mask and leaf:
            pat = "guest PAT ignored" if desc & 1 << 6 else "guest PAT applies"
            notes.append(f"memory type {_EPT_TYPES.get(desc >> 3 & 7, 'reserved')}, {pat}")
        rest = desc & ~self._named(shift, leaf)
        return [*notes, f"bits {rest:#x} mean nothing to KVM"] if rest else notes

    def _named(self, shift: int, leaf: bool) -> int:
        b = self.bits
        named = b.always | _PRESENT | _ADDRESS | b.read | _WRITE | b.execute | b.no_execute | b.accessed | _AD_TYPE
        if leaf:
            named |= b.dirty | b.host_writable | b.mmu_writable | b.memory_mask
            named |= (_BLOCK if shift > self.page_shift else 0) | (_SAVED_R | _SAVED_X if b.tracks_access else 0)
        return named


def _ad_disabled(desc: int) -> bool:
    return desc & _AD_TYPE == _AD_DISABLED


def _memory(b: SpteBits, desc: int) -> Memory | None:
    # NPT keeps no type: the guest's PAT and the host's MTRRs decide
    found = [memory for memory, bits in b.memory.items() if b.memory_mask and desc & b.memory_mask == bits]
    return found[0] if found else None


def _empty_notes(desc: int) -> tuple[str, ...]:
    rest = desc & ~(1 << 63)
    if rest == _FROZEN:
        return ("frozen: another vCPU is changing it",)
    return (f"not present: bit 11 is clear; bits {rest:#x} mean nothing to KVM",) if rest else ()


EPT_4K: Final = SpteFormat(_EPT)
EPT_4K_NO_AD: Final = SpteFormat(_EPT, hardware_ad=False)
EPT_4K_5LEVEL: Final = SpteFormat(_EPT, _levels(5))
NPT_4K: Final = SpteFormat(_LONG_MODE)
NPT_4K_5LEVEL: Final = SpteFormat(_LONG_MODE, _levels(5))
SHADOW_4K: Final = SpteFormat(_LONG_MODE)
"""Four-level long mode. 32-bit and PAE guests are shadowed by the same entries at the lower levels."""
