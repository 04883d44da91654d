"""Stage2Format: geometry and descriptor bits of one second-stage page-table format.

The model keeps real descriptors, so an entry can be decoded and a table compared with a kernel's. Levels
are exchanged as the shift of what one entry maps (12 = 4K, 21 = 2M, ...): architectures number them in
opposite directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntFlag
from typing import TYPE_CHECKING, Final, Protocol

from kvmfault.types import Gpa, Hpa

__all__ = [
    "PROTS",
    "Entry",
    "Kind",
    "Level",
    "Memory",
    "Prot",
    "R",
    "Stage2Format",
    "W",
    "X",
    "block_sizes",
    "level_of",
    "size_text",
    "watch_writes",
]


class Prot(IntFlag):
    """What an entry lets the guest do. The values are the indexes of PROTS."""

    X = 1
    W = 2
    R = 4

    def __str__(self) -> str:
        return "".join(c if self & p else "-" for c, p in (("r", Prot.R), ("w", Prot.W), ("x", Prot.X)))


PROTS: Final = tuple(Prot(i) for i in range(8))
"""The eight Prots by value: an index costs a tenth of an IntFlag call on the hot path."""
X, W, R = 1, 2, 4


class Memory(Enum):
    """Memory type asked for in a mapping."""

    if not TYPE_CHECKING:  # a key of the formats' tables on every map: the one of Enum is written in Python
        __hash__ = object.__hash__

    NORMAL = "normal"
    NONCACHEABLE = "non-cacheable"
    DEVICE = "device"


class Kind(Enum):
    """What an entry is."""

    EMPTY = "empty"
    TABLE = "table"
    LEAF = "leaf"
    MMIO = "mmio"
    """Not a mapping: remembers that the frame is MMIO, with the memslot generation."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the table. *name* is the architecture's; *shift* log2 of the bytes one entry maps."""

    name: str
    shift: int
    index_bits: int
    """log2 of the entries of one table at this level, root concatenation included."""
    leaf: bool
    """Whether KVM may put a leaf here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A descriptor taken apart. *notes* are words for bits that the other members do not tell."""

    kind: Kind
    value: int
    hpa: Hpa | None = None
    """Next table or mapped block; None for the other kinds."""
    prot: Prot = PROTS[0]
    memory: Memory | None = None
    accessed: bool = False
    dirty: bool = False
    host_writable: bool | None = None
    """The host mapping allows writes; None where the format does not keep it."""
    mmu_writable: bool | None = None
    """KVM may make the entry writable without looking again; None where the format does not keep it."""
    gpa: Gpa | None = None
    """MMIO entries: the remembered frame's address."""
    generation: int | None = None
    """MMIO entries: low bits of the memslot generation."""
    notes: tuple[str, ...] = ()


class Stage2Format(Protocol):
    """One format. Pure functions of descriptors; all addresses in bytes; a *shift* is one of ``levels``."""

    @property
    def name(self) -> str:
        """Name used in a TARGET, e.g. ``16k``."""
        ...

    @property
    def page_shift(self) -> int:
        """log2 of the host's page size: 12, 14 or 16."""
        ...

    @property
    def levels(self) -> tuple[Level, ...]:
        """Root first, pages last."""
        ...

    @property
    def gpa_bits(self) -> int:
        """Guest-physical addresses of more bits are not translated by this table."""
        ...

    @property
    def empty(self) -> int:
        """Descriptor of an empty entry."""
        ...

    @property
    def perm_mask(self) -> int:
        """Bits in which an existing entry may differ from a new one and still count as the same mapping."""
        ...

    @property
    def break_before_make(self) -> bool:
        """A live entry is made invalid and flushed from every TLB before another takes its place (arm64); else
        entries are exchanged in one step."""
        ...

    @property
    def old_faults(self) -> bool:
        """An access through a leaf without its access flag faults, where the CPU does not set it by itself (arm64).
        x86 has no such flag then: an old leaf grants nothing."""
        ...

    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        """Why *old* may not become *new* in one step while CPUs walk the table, or None: it may. Both are entries of
        this level. arm64: break-before-make; x86: what handle_changed_spte takes for a bug."""
        ...

    def with_hardware_ad(self, hardware: bool) -> Stage2Format:
        """This format as KVM uses it where the CPU sets accessed and dirty bits itself, or does not."""
        ...

    def kind(self, desc: int, shift: int) -> Kind:
        """What the descriptor is at this level."""
        ...

    def hpa(self, desc: int, shift: int) -> Hpa:
        """Address of the next table, or of the mapped block."""
        ...

    def prot(self, desc: int) -> int:
        """R, W, X bits that the leaf grants to the guest."""
        ...

    def table(self, hpa: Hpa, shift: int) -> int:
        """Descriptor that points to a table, for an entry of the level *shift*."""
        ...

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
        """Descriptor of a leaf. *host_writable*: the pin allows writes, even if *prot* does not. *tag*: software bits
        that the caller keeps in the entry (level of the guest's own stage 2), 0 for none. *dirty*: marked as written
        where *prot* allows writes, and the format has such a mark."""
        ...

    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int | None:
        """Entry that remembers MMIO, or None: the format has none."""
        ...

    def mmio_generation_bits(self) -> int:
        """How many low bits of the generation an MMIO entry keeps (0: the format has none)."""
        ...

    def add_prot(self, desc: int, prot: int) -> int:
        """The leaf with these permissions added."""
        ...

    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        """The leaf without write permission, remembering what is needed to give it back, unless *for_good*."""
        ...

    def fix_write(self, desc: int) -> int | None:
        """The leaf made writable again without asking the host, or None: not allowed."""
        ...

    def is_young(self, desc: int) -> bool:
        """Whether the leaf's access flag is set."""
        ...

    def with_young(self, desc: int, young: bool) -> int:
        """The leaf with the access flag set or cleared."""
        ...

    def is_dirty(self, desc: int) -> bool:
        """Whether the leaf is marked written."""
        ...

    def clear_dirty(self, desc: int) -> int:
        """The leaf marked as not written, so that the next write is noted: by hardware if it does so for this leaf,
        else by a fault, for which it loses write permission."""
        ...

    def set_dirty(self, desc: int) -> int:
        """The writable leaf after a write, as the CPU leaves it; the same where the CPU marks no writes."""
        ...

    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        """The *index*-th piece of a block, as a leaf one level down with the same attributes."""
        ...

    def entry(self, desc: int, shift: int) -> Entry:
        """The descriptor for people and tests."""
        ...


def watch_writes(fmt: Stage2Format, desc: int, shift: int, *, hardware_log: bool) -> int:
    """The leaf as dirty logging wants it: the next write to its memory is noted.

    *hardware_log*: the CPU logs the pages whose dirty bits it sets. A block loses write permission all the same: its
    pages are to be mapped one by one. Kernel: kvm_mmu_slot_apply_flags, kvm_arch_mmu_enable_log_dirty_pt_masked.
    """
    if not hardware_log:
        return fmt.write_protect(desc)
    desc = fmt.clear_dirty(desc)
    return desc if shift == fmt.page_shift else fmt.write_protect(desc)


def size_text(size: int) -> str:
    """``2M`` for 0x200000; hex where it is no round size."""
    for shift, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return f"{size:#x}" if size else "0"


def level_of(fmt: Stage2Format, size: int) -> Level:
    """The level whose entries map *size* bytes. Raises ValueError naming the sizes there are."""
    for level in fmt.levels:
        if 1 << level.shift == size:
            return level
    sizes = ", ".join(f"{1 << level.shift:#x}" for level in fmt.levels)
    raise ValueError(f"{fmt.name} has no level of {size:#x} bytes; it has {sizes}")


def block_sizes(fmt: Stage2Format) -> tuple[int, ...]:
    """Sizes in bytes that a leaf can map, smallest first."""
    return tuple(sorted(1 << level.shift for level in fmt.levels if level.leaf))
