"""Step 2 of the recipe: geometry and descriptors of a second-stage format, one entry at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from random import Random
from typing import Final, NamedTuple

from kvmfault.contract.format import PROTS, Entry, Kind, Memory, R, Stage2Format, W, X
from kvmfault.types import Gpa, Hpa

__all__ = ["FRAME", "Leaf", "changes", "descriptors", "entries", "geometry", "leaves", "pieces"]

FRAME: Final = 0x1_4000_0000
"""Host-physical address of the leaves that are tried, before it is aligned."""
_PAGE_SHIFTS: Final = (12, 14, 16)


class Leaf(NamedTuple):
    """A leaf that a format made, and of what."""

    shift: int
    hpa: Hpa
    prot: int
    memory: Memory
    young: bool
    host: bool
    desc: int

    def __str__(self) -> str:
        old = "young" if self.young else "old"
        host = "writable" if self.host else "read-only"
        return (
            f"leaf of {1 << self.shift:#x} bytes at {self.hpa:#x}, {PROTS[self.prot]}, {self.memory.value}, {old}, "
            f"host {host} ({self.desc:#x})"
        )


def leaves(fmt: Stage2Format) -> Iterator[Leaf]:
    """Leaves of every size, permission that KVM gives (all can be read), memory type, age and host permission."""
    every = product(
        (s for s in fmt.levels if s.leaf), (R, R | W, R | X, R | W | X), Memory, (True, False), (True, False)
    )
    for level, prot, memory, young, host in every:
        if prot & W and not host:
            continue  # KVM maps for writing only what the host lets it write
        hpa = Hpa(FRAME & -(1 << level.shift) or 1 << level.shift)
        desc = fmt.leaf(level.shift, hpa, prot, memory, young=young, host_writable=host, tag=0)
        yield Leaf(level.shift, hpa, prot, memory, young, host, desc)


def geometry(fmt: Stage2Format) -> Iterator[str]:
    """Levels are root first, fit together, and cover the guest-physical space."""
    if fmt.page_shift not in _PAGE_SHIFTS:
        yield f"page_shift is {fmt.page_shift}; pages are 4K, 16K or 64K"
    levels = fmt.levels
    if not levels or levels[-1].shift != fmt.page_shift or not levels[-1].leaf:
        yield "the last level maps pages, and may hold leaves"
        return
    for above, below in pairwise(levels):
        if above.shift != below.shift + below.index_bits:
            yield (
                f"an entry of {above.name} maps 2^{above.shift} bytes, a table of {below.name} "
                f"2^{below.shift + below.index_bits}"
            )
    if fmt.gpa_bits != levels[0].shift + levels[0].index_bits:
        yield f"gpa_bits is {fmt.gpa_bits}; the root table covers 2^{levels[0].shift + levels[0].index_bits} bytes"
    if len({level.name for level in levels}) != len(levels):
        yield "two levels have one name"
    for level in levels:
        if fmt.kind(fmt.empty, level.shift) is not Kind.EMPTY:
            yield f"an empty entry of {level.name} is {fmt.kind(fmt.empty, level.shift).value}"
    same = fmt.with_hardware_ad(True), fmt.with_hardware_ad(False)
    if any((f.levels, f.page_shift, f.gpa_bits) != (levels, fmt.page_shift, fmt.gpa_bits) for f in same):
        yield "with_hardware_ad changes the geometry"


def descriptors(fmt: Stage2Format) -> Iterator[str]:
    """A leaf maps what it was made for and grants what it says; so do tables and MMIO entries."""
    for leaf in leaves(fmt):
        if fmt.kind(leaf.desc, leaf.shift) is not Kind.LEAF:
            yield f"{leaf} is {fmt.kind(leaf.desc, leaf.shift).value}"
        elif fmt.hpa(leaf.desc, leaf.shift) != leaf.hpa:
            yield f"{leaf} maps {fmt.hpa(leaf.desc, leaf.shift):#x}"
        elif fmt.is_young(leaf.desc) is not leaf.young:
            yield f"{leaf} is {'young' if not leaf.young else 'old'}"
        elif (fmt.prot(leaf.desc) ^ leaf.prot) & (leaf.prot if leaf.young or fmt.old_faults else 0) or (
            fmt.prot(leaf.desc) & ~leaf.prot & (W | X)
        ):
            yield f"{leaf} grants {PROTS[fmt.prot(leaf.desc)]}"
    for level in fmt.levels[:-1]:
        table = fmt.table(Hpa(FRAME), level.shift)
        if fmt.kind(table, level.shift) is not Kind.TABLE or fmt.hpa(table, level.shift) != FRAME:
            yield (
                f"table at {FRAME:#x} ({table:#x}): {fmt.kind(table, level.shift).value} in {level.name}, "
                f"at {fmt.hpa(table, level.shift):#x}"
            )
    yield from _mmio(fmt)


def _mmio(fmt: Stage2Format) -> Iterator[str]:
    bits = fmt.mmio_generation_bits()
    for gpa, generation in product((0, FRAME, (1 << min(fmt.gpa_bits, 40)) - 4096), (0, 1, 5, (1 << bits) - 1)):
        desc = fmt.mmio(Gpa(gpa), R | W, generation)
        if (desc is None) is not (bits == 0):
            yield f"mmio gives {desc}, and mmio_generation_bits {bits}"
            return
        if desc is None:
            return
        kept = generation & (1 << bits) - 1
        entry = fmt.entry(desc, fmt.page_shift)
        if entry.kind is not Kind.MMIO or (entry.gpa, entry.generation) != (gpa, kept):
            yield f"MMIO entry for {gpa:#x}, generation {kept} ({desc:#x}) reads {entry}"


def changes(fmt: Stage2Format) -> Iterator[str]:
    """What changes age, permissions or dirty state of a leaf does that and nothing else."""
    for leaf in leaves(fmt):
        for what, problem in (*_ages(fmt, leaf), *_permissions(fmt, leaf), *_writes(fmt, leaf)):
            yield f"{what} of {leaf}: {problem}"


def _moved(fmt: Stage2Format, leaf: Leaf, desc: int) -> bool:
    return fmt.kind(desc, leaf.shift) is not Kind.LEAF or fmt.hpa(desc, leaf.shift) != leaf.hpa


def _ages(fmt: Stage2Format, leaf: Leaf) -> Iterator[tuple[str, str]]:
    old, young = fmt.with_young(leaf.desc, False), fmt.with_young(leaf.desc, True)
    if fmt.is_young(old) or not fmt.is_young(young):
        yield "with_young", "the access flag is not as asked for"
    elif _moved(fmt, leaf, old) or _moved(fmt, leaf, young):
        yield "with_young", "it is no leaf of the same memory any more"
    elif not _undone(fmt, old, young):
        yield "with_young", "setting and clearing the access flag do not undo each other"
    elif fmt.prot(young) & W and not leaf.prot & W:
        yield "with_young", "it became writable"


def _undone(fmt: Stage2Format, old: int, young: int) -> bool:
    # an entry that is old by granting nothing may forget that it was writable
    again = fmt.with_young(old, True)
    same = again == young or (not fmt.prot(old) and fmt.prot(again) == fmt.prot(young) & ~W)
    return same and fmt.with_young(young, False) == old and fmt.with_young(again, False) == old


def _permissions(fmt: Stage2Format, leaf: Leaf) -> Iterator[tuple[str, str]]:
    if not leaf.young:
        return
    for prot in (R, R | W, R | X, R | W | X):
        if prot & W and not leaf.host:
            continue
        more, wanted = fmt.add_prot(leaf.desc, prot), leaf.prot | prot
        if _moved(fmt, leaf, more) or (fmt.prot(more) ^ wanted) & (W | X) or wanted & R & ~fmt.prot(more):
            yield f"add_prot {PROTS[prot]}", f"it grants {PROTS[fmt.prot(more)]}"
            return


def _writes(fmt: Stage2Format, leaf: Leaf) -> Iterator[tuple[str, str]]:
    for for_good in (False, True):
        bare = fmt.write_protect(leaf.desc, for_good=for_good)
        if fmt.prot(bare) & W or (fmt.prot(bare) ^ fmt.prot(leaf.desc)) & ~W or _moved(fmt, leaf, bare):
            yield "write_protect", f"it grants {PROTS[fmt.prot(bare)]}, at {fmt.hpa(bare, leaf.shift):#x}"
        elif fmt.write_protect(bare, for_good=for_good) != bare:
            yield "write_protect", "doing it twice is not doing it once"
        fixed = fmt.fix_write(bare)
        if fixed is not None and (for_good or not leaf.host):
            yield "fix_write", "it gives write permission that was taken for good, or that the host does not give"
        elif fixed is not None and (not fmt.prot(fmt.with_young(fixed, True)) & W or _moved(fmt, leaf, fixed)):
            yield "fix_write", f"it grants {PROTS[fmt.prot(fixed)]}"
    clean = fmt.clear_dirty(leaf.desc)
    noted = not fmt.prot(clean) & W or (not fmt.is_dirty(clean) and fmt.is_dirty(fmt.set_dirty(clean)))
    if not noted or _moved(fmt, leaf, clean):
        yield "clear_dirty", "the next write to it is not noted"
    if leaf.young and leaf.prot & W and not fmt.is_dirty(fmt.set_dirty(leaf.desc)):
        yield "set_dirty", "it was written, and is not dirty"


def pieces(fmt: Stage2Format) -> Iterator[str]:
    """The pieces of a block map what it mapped. A live change is refused where break-before-make is needed."""
    shifts = [level.shift for level in fmt.levels]
    for leaf in leaves(fmt):
        if leaf.shift == fmt.page_shift:
            continue
        below = max(s for s in shifts if s < leaf.shift)
        for index in (0, 1, (1 << leaf.shift - below) - 1):
            piece = fmt.child_leaf(leaf.desc, leaf.shift, below, index)
            wanted = leaf.hpa + (index << below)
            told = _attributes(fmt.entry(piece, below))
            if fmt.kind(piece, below) is not Kind.LEAF or fmt.hpa(piece, below) != wanted:
                yield f"piece {index} of {leaf} is {fmt.kind(piece, below).value} at {fmt.hpa(piece, below):#x}"
            elif told != _attributes(fmt.entry(leaf.desc, leaf.shift)):
                yield f"piece {index} of {leaf} has other attributes: {told}"
    if fmt.break_before_make:
        yield from _broken_before_made(fmt)


def _attributes(entry: Entry) -> tuple[object, ...]:
    return entry.prot, entry.memory, entry.accessed, entry.dirty, entry.host_writable, entry.mmu_writable


def _broken_before_made(fmt: Stage2Format) -> Iterator[str]:
    for level in (level for level in fmt.levels if level.leaf):
        here, there = (
            fmt.leaf(level.shift, Hpa(n << level.shift), R, Memory.NORMAL, young=True, host_writable=False, tag=0)
            for n in (4, 5)
        )
        if fmt.change_refused(here, there, level.shift) is None:
            yield f"change_refused lets a live leaf of {level.name} map other memory, against break_before_make"
        if fmt.change_refused(fmt.empty, here, level.shift) or fmt.change_refused(here, fmt.empty, level.shift):
            yield f"change_refused refuses to set or to clear an entry of {level.name}"


def entries(fmt: Stage2Format) -> Iterator[str]:
    """Any bits at all can be shown, as what a walk takes them for."""
    dice = Random(3)
    bits = [0, (1 << 64) - 1, *(1 << bit for bit in range(64)), *(dice.getrandbits(64) for _ in range(200))]
    bits += [leaf.desc for leaf in leaves(fmt)] + [fmt.table(Hpa(FRAME), level.shift) for level in fmt.levels[:-1]]
    for level, desc in product(fmt.levels, bits):
        entry, kind = fmt.entry(desc, level.shift), fmt.kind(desc, level.shift)
        if entry.value != desc or entry.kind is not kind:
            yield f"{desc:#x} in {level.name} is {kind.value}, and shown as {entry.kind.value} {entry.value:#x}"
        elif (kind in (Kind.LEAF, Kind.TABLE)) is not (entry.hpa is not None):
            yield f"{desc:#x} in {level.name}: a {kind.value} shown with hpa {entry.hpa}"
        elif kind is Kind.LEAF:
            told = entry.hpa, int(entry.prot), entry.accessed, entry.dirty
            known = entry.value  # a format may note in it what the number alone does not say: the level
            meant = fmt.hpa(known, level.shift), fmt.prot(known), fmt.is_young(known), fmt.is_dirty(known)
            if told != meant:
                yield f"{desc:#x} in {level.name}: shown as {told}, is {meant}"
