"""A second-stage table of real descriptors, for any Stage2Format.

Tables are shared between forks and copied when one of them writes (an owner token per fork), so a fork
costs nothing and a change copies one table per level.

What a change makes wrong in the vCPUs' TLBs is noted in ``stale``; who holds the table has to flush it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Final

from kvmfault.contract.format import Kind, Memory, Stage2Format, W, block_sizes, watch_writes
from kvmfault.contract.ports import MapResult, Repair
from kvmfault.errors import ModelError
from kvmfault.machine.table import Found, Removed, TablePage
from kvmfault.types import Gpa, Hpa, Pfn

__all__ = ["Stage2"]

_FIXED, _UNCHANGED, _ABSENT = MapResult.FIXED, MapResult.UNCHANGED, MapResult.ABSENT
_TABLES_AT: Final = 1 << 40
"""Host-physical address of the first table page: away from the frames of host memory."""


class Stage2:
    """Map, change and walk. Each call is what one vCPU does under mmu_lock, one compare-and-swap per entry."""

    __slots__ = (
        "_levels", "_next_hpa", "_owner", "_root", "_sizes", "format", "marks_rewritten", "split_blocks", "stale",
    )  # fmt: skip

    def __init__(self, fmt: Stage2Format, *, split_blocks: bool, marks_rewritten: bool = True) -> None:
        self.format: Stage2Format = fmt
        self.marks_rewritten: bool = marks_rewritten
        """A writable leaf over an entry that was writable is marked dirty again."""
        self.split_blocks: bool = split_blocks
        """Mapping a piece of a block keeps the other pieces (else they are dropped and fault again)."""
        self.stale: list[tuple[Gpa, Gpa]] = []
        """Addresses ``[start, end)`` whose cached translations are wrong until they are flushed; see ``take_stale``."""
        self._levels = tuple((level.shift, (1 << level.index_bits) - 1) for level in fmt.levels)
        self._sizes = block_sizes(fmt)
        self._owner = object()
        self._next_hpa = _TABLES_AT
        self._root = self._new_table()

    def _new_table(self) -> TablePage:
        table = TablePage(Hpa(self._next_hpa), self._owner)
        self._next_hpa += 1 << self.format.page_shift
        return table

    # Reading.

    def walk(self, gpa: Gpa) -> Found:
        """The entry at which translation of *gpa* ends: a leaf, an MMIO entry, or an empty one."""
        table = self._root
        for shift, mask in self._levels:
            index = gpa >> shift & mask
            child = table.children.get(index)
            if child is None:
                return Found(Gpa(gpa & -(1 << shift)), shift, table.entries.get(index, self.format.empty))
            table = child
        raise ModelError("a table descriptor at the last level")

    def leaf(self, gpa: Gpa) -> Found | None:
        """The leaf over *gpa*, or None."""
        found = self.walk(gpa)
        return found if self.format.kind(found.desc, found.shift) is Kind.LEAF else None

    def entries(self) -> Iterator[Found]:
        """Every leaf and MMIO entry, by address."""
        yield from self._entries(self._root, 0, 0)

    def _entries(self, table: TablePage, depth: int, base: int) -> Iterator[Found]:
        shift, _ = self._levels[depth]
        for index in sorted(table.entries.keys() | table.children.keys()):
            gpa = base | index << shift
            child = table.children.get(index)
            if child is not None:
                yield from self._entries(child, depth + 1, gpa)
            elif table.entries[index] != self.format.empty:
                yield Found(Gpa(gpa), shift, table.entries[index])

    def tables(self) -> int:
        """Table pages in use."""
        return 1 + sum(1 for _ in self._root.below(self._levels))

    # Writing.

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult:
        """Install a leaf of *size* bytes over *gpa*; a size that no leaf has is mapped from *gpa* on by those that fit.

        ModelError for a size that is not of whole pages.
        """
        fmt = self.format
        if size not in self._sizes:
            return self._map_run(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
        shift = size.bit_length() - 1
        table, index = self._descend(gpa, shift)
        entries = table.entries
        old = entries.get(index)
        dirty = old is None or self.marks_rewritten or not fmt.prot(old) & W
        hpa = Hpa(pfn << fmt.page_shift)
        new = fmt.leaf(shift, hpa, prot, memory, young=young, host_writable=host_writable, tag=tag, dirty=dirty)
        if old is not None and index not in table.children:
            if old == new:
                return _UNCHANGED
            mask = fmt.perm_mask
            if mask and (old ^ new) & ~mask == 0 and fmt.kind(old, shift) is Kind.LEAF:
                return _UNCHANGED  # same mapping: permissions are relaxed by the fault that needs them
        if old is not None:
            self._replace(gpa, shift, old, new)
            table.children.pop(index, None)
        entries[index] = new
        return _FIXED

    def _replace(self, gpa: Gpa, shift: int, old: int, new: int) -> None:
        # KVM puts a leaf where something is: what that takes, and what is never done
        fmt = self.format
        if fmt.kind(old, shift) not in (Kind.LEAF, Kind.TABLE):
            return
        refused = fmt.change_refused(old, new, shift)
        if refused is not None and not fmt.break_before_make:
            raise ModelError(f"entry at {gpa & -(1 << shift):#x}: {refused}")
        if fmt.break_before_make or fmt.kind(old, shift) is Kind.TABLE or fmt.prot(old) & ~fmt.prot(new):
            self._note_stale(gpa, shift)

    def _note_stale(self, gpa: Gpa, shift: int) -> None:
        start = gpa & -(1 << shift)
        self.stale.append((Gpa(start), Gpa(start + (1 << shift))))

    def take_stale(self) -> list[tuple[Gpa, Gpa]]:
        """What has to be flushed since this was last asked for."""
        stale, self.stale = self.stale, []
        return stale

    def _map_run(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult:
        page = 1 << self.format.page_shift
        if size <= 0 or size % page:
            raise ModelError(f"{size:#x} bytes are not whole pages of {page:#x}")
        result, end = _UNCHANGED, gpa + size
        while gpa < end:
            frame = pfn * page
            step = max(s for s in self._sizes if s == page or (s <= end - gpa and not (gpa | frame) % s))
            done = self.map(gpa, step, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
            result = _FIXED if done is _FIXED else result
            gpa, pfn = Gpa(gpa + step), Pfn(pfn + step // page)
        return result

    def put(self, gpa: Gpa, size: int, desc: int) -> MapResult:
        """Write a descriptor as it is (an MMIO entry, a recorded one) at the level of *size* bytes.

        ModelError: there is no such level, or what is there may not be replaced by it while the guest runs (see
        ``Stage2Format.change_refused``): unmap and flush first.
        """
        shift = size.bit_length() - 1
        table, index = self._descend(gpa, shift)
        old = table.entries.get(index, self.format.empty)
        if old == desc and index not in table.children:
            return _UNCHANGED
        refused = self.format.change_refused(old, desc, shift)
        if refused is not None:
            raise ModelError(f"entry at {gpa & -size:#x}: {refused}")
        if self.format.kind(old, shift) in (Kind.LEAF, Kind.TABLE):
            self._note_stale(gpa, shift)
        table.children.pop(index, None)
        table.entries[index] = desc
        return _FIXED

    def _descend(self, gpa: Gpa, target: int) -> tuple[TablePage, int]:
        # to the table that holds entries of 1 << target bytes, owned by this fork, created where missing
        owner = self._owner
        table = self._root
        if table.owner is not owner:
            self._root = table = table.copy(owner)
        for shift, mask in self._levels:
            index = gpa >> shift & mask
            if shift == target:
                return table, index
            child = table.children.get(index)
            if child is None:
                child = self._grow(table, index, shift, gpa)
            elif child.owner is not owner:
                child = table.children[index] = child.copy(owner)
            table = child
        raise ModelError(f"no level of {self.format.name} maps {1 << target:#x} bytes")

    def _grow(self, table: TablePage, index: int, shift: int, gpa: Gpa, *, splitting: bool = False) -> TablePage:
        fmt = self.format
        child = self._new_table()
        old = table.entries.get(index)
        if old is not None and fmt.kind(old, shift) is Kind.LEAF:
            if self.split_blocks or splitting:
                child_shift = next(s for s, _ in self._levels if s < shift)
                for i in range(1 << shift - child_shift):
                    child.entries[i] = fmt.child_leaf(old, shift, child_shift, i)
            if fmt.break_before_make or not child.entries:
                self._note_stale(gpa, shift)  # the pieces translate as the block did, but for the rule
        table.entries[index] = fmt.table(child.hpa, shift)
        table.children[index] = child
        return child

    def grow_for_fetch(self, gpa: Gpa) -> None:
        """Make the table pages that mapping a page at *gpa* needs, and note that a fetch needed those that are new."""
        first_new = self._next_hpa
        self._descend(gpa, self.format.page_shift)
        for _, table in self._root.way(self._levels, gpa):
            table.for_fetch |= table.hpa >= first_new

    def made_for_fetch(self, gpa: Gpa, size: int) -> bool:
        """Whether the table page under *gpa* that stands for a block of *size* was made by ``grow_for_fetch``."""
        return any(table.for_fetch for shift, table in self._root.way(self._levels, gpa) if 1 << shift == size)

    def _update(self, found: Found, desc: int) -> None:
        table, index = self._descend(found.gpa, found.shift)
        table.entries[index] = desc

    def relax(self, gpa: Gpa, prot: int) -> MapResult:
        """Add permissions to the leaf over *gpa*; ABSENT if there is none."""
        found = self.leaf(gpa)
        if found is None:
            return _ABSENT
        self._update(found, self.format.add_prot(found.desc, prot))
        return _FIXED

    def make_young(self, gpa: Gpa) -> bool:
        """Set the access flag of the leaf over *gpa*; False: no leaf."""
        found = self.leaf(gpa)
        if found is not None:
            self._update(found, self.format.with_young(found.desc, True))
        return found is not None

    def fix_fast(self, gpa: Gpa, *, write: bool, execute: bool, logged: bool) -> Repair:
        """Repair the leaf over *gpa* without the lock: give back write permission or the access flag.

        A block in a logged slot stays as it is. Kernel: fast_page_fault.
        """
        fmt = self.format
        found = self.leaf(gpa)
        if found is None:
            return Repair.NOT_HERE
        prot = fmt.prot(found.desc)
        wanted = 1 if execute else 2 if write else 4
        if prot & wanted:
            return Repair.SPURIOUS
        # without any permission it is old where the CPU sets no accessed bit
        new: int | None = found.desc if prot else fmt.with_young(found.desc, True)
        if write and new is not None and not prot & 2:
            if logged and found.shift > fmt.page_shift:
                return Repair.NOT_HERE
            new = fmt.fix_write(new)
        if new is None or new == found.desc or not fmt.prot(new) & wanted:
            return Repair.NOT_HERE
        self._update(found, new)
        return Repair.FIXED

    # What invalidation and logging do to a range; a block that is only partly inside is affected whole.

    def unmap(self, start: Gpa, end: Gpa, *, tables: bool = False) -> Removed:
        """Drop every entry that maps an address in ``[start, end)``, and tables left empty.

        Empty tables that a fetch made only go with *tables*: blocks may not take their place. (tdp_mmu_zap_leafs)
        """
        found = list(self.in_range(start, end))
        for entry in found:
            table, index = self._descend(entry.gpa, entry.shift)
            del table.entries[index]
            if not table.entries:
                self._drop_empty(entry.gpa, tables)
        leaves = [e for e in found if self.format.kind(e.desc, e.shift) is Kind.LEAF]
        for entry in leaves:
            self._note_stale(entry.gpa, entry.shift)
        return Removed(len(leaves), sum(1 << e.shift for e in leaves))

    def _drop_empty(self, gpa: Gpa, for_fetch: bool) -> None:
        # every table on the way belongs to this fork: _descend was there
        way: list[tuple[TablePage, int]] = []
        table: TablePage | None = self._root
        for shift, mask in self._levels:
            if table is None:
                break
            way.append((table, gpa >> shift & mask))
            table = table.children.get(way[-1][1])
        for (above, index), (below, _) in zip(way[-2::-1], way[:0:-1], strict=True):
            if below.entries or (below.for_fetch and not for_fetch):
                break
            del above.entries[index], above.children[index]

    def write_protect(self, start: Gpa, end: Gpa, *, for_good: bool = False) -> int:
        """Take write permission from every leaf in the range; the number changed. See Stage2Format.write_protect."""
        changed = 0
        for entry in list(self.in_range(start, end)):
            if self.format.kind(entry.desc, entry.shift) is Kind.LEAF:
                desc = self.format.write_protect(entry.desc, for_good=for_good)
                if desc != entry.desc:
                    self._update(entry, desc)
                    self._note_stale(entry.gpa, entry.shift)
                    changed += 1
        return changed

    def watch_writes(self, start: Gpa, end: Gpa, *, hardware_log: bool) -> None:
        """The next write to each page in the range will be noticed, by a fault or by the CPU's own log."""
        for entry in list(self.in_range(start, end)):
            if self.format.kind(entry.desc, entry.shift) is Kind.LEAF:
                desc = watch_writes(self.format, entry.desc, entry.shift, hardware_log=hardware_log)
                if desc != entry.desc:
                    self._update(entry, desc)
                    self._note_stale(entry.gpa, entry.shift)

    def set_dirty(self, gpa: Gpa) -> bool:
        """The guest writes through the leaf over *gpa*; whether its dirty state was not set before."""
        found = self.leaf(gpa)
        desc = self.format.set_dirty(found.desc) if found is not None else 0
        if found is not None and desc != found.desc:
            self._update(found, desc)
            return True
        return False

    def split(self, start: Gpa, end: Gpa) -> int:
        """Replace every block in the range by pages that map the same; the number of blocks split, at any level.

        Kernel: tdp_mmu_split_huge_page, kvm_pgtable_stage2_split.
        """
        count = 0
        blocks = [e for e in self.in_range(start, end) if e.shift > self.format.page_shift]
        while blocks:
            block = blocks.pop()
            if self.format.kind(block.desc, block.shift) is Kind.LEAF:
                table, index = self._descend(block.gpa, block.shift)
                self._grow(table, index, block.shift, block.gpa, splitting=True)
                inside = self.in_range(block.gpa, Gpa(block.gpa + (1 << block.shift)))
                blocks += [e for e in inside if e.shift > self.format.page_shift]
                count += 1
        return count

    def age(self, start: Gpa, end: Gpa, *, test_only: bool) -> bool:
        """Whether any leaf in the range was used; clears their access flags unless *test_only*."""
        used = False
        for entry in list(self.in_range(start, end)):
            if self.format.kind(entry.desc, entry.shift) is Kind.LEAF and self.format.is_young(entry.desc):
                used = True
                if not test_only:
                    self._update(entry, self.format.with_young(entry.desc, False))
        return used

    def in_range(self, start: Gpa, end: Gpa) -> Iterator[Found]:
        """Every leaf and MMIO entry that covers an address in ``[start, end)``; costs what is mapped there."""
        if start < end:
            yield from self._in_range(self._root, 0, 0, start, end)

    def _in_range(self, table: TablePage, depth: int, base: int, start: int, end: int) -> Iterator[Found]:
        shift, mask = self._levels[depth]
        first = max(0, start - base) >> shift
        last = min(max(0, end - 1 - base) >> shift, mask)
        # a sparse table is scanned by its entries, a short range by its indexes
        wanted = range(first, last + 1)
        indexes = wanted if len(wanted) < len(table.entries) else sorted(i for i in table.entries if i in wanted)
        for index in indexes:
            gpa = base | index << shift
            child = table.children.get(index)
            if child is not None:
                yield from self._in_range(child, depth + 1, gpa, start, end)
                continue
            desc = table.entries.get(index)
            if desc is not None and desc != self.format.empty:
                yield Found(Gpa(gpa), shift, desc)

    def clear(self) -> None:
        """Retire the whole table: a new root. (kvm_mmu_zap_all_fast; kvm_free_stage2_pgd)"""
        self._root = self._new_table()
        self.stale.append((Gpa(0), Gpa(1 << 64)))

    # Copies.

    def fork(self) -> Stage2:
        """An independent copy in constant time."""
        new = Stage2.__new__(Stage2)
        new.format, new.split_blocks, new.marks_rewritten = self.format, self.split_blocks, self.marks_rewritten
        new._levels, new._sizes = self._levels, self._sizes
        new._root, new._next_hpa = self._root, self._next_hpa
        new.stale = list(self.stale)
        new._owner, self._owner = object(), object()  # neither owns the shared tables any more
        return new

    def key(self) -> Hashable:
        """All entries, hashable. Addresses of table pages take no part: they are an accident of order."""
        marked = ((shift, gpa) for shift, gpa, table in self._root.below(self._levels) if table.for_fetch)
        return frozenset(self.entries()), frozenset(marked)
