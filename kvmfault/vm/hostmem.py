"""The user address space under the guest: areas, the few pages that differ from their area, and what a pin answers.

Memory of the model does not grow with the size of an area: a frame is the area's base plus the offset. The base is
congruent to the user address modulo the area's huge page, so that huge mappings fit.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Final, NamedTuple

from kvmfault.errors import ModelError
from kvmfault.types import Hva, Pfn
from kvmfault.vm.area import HUGETLB, AreaKind, HvaRange, Pin, PinError, Vma
from kvmfault.vm.ranges import RangeTable

__all__ = ["HostMemory", "PageState"]

_ZERO_PAGE: Final = Pfn(1)
_FIRST_FREE: Final = Pfn(0x100000)


class PageState(Enum):
    """How one page (of a hugetlb area: one huge page) differs from its area."""

    PRESENT = "present"
    """Only its frame is another one."""
    COW = "cow"
    """Mapped read-only until written: the zero page, or shared after fork."""
    ABSENT = "absent"
    """Allowed but not present: a pin has to wait for I/O."""
    MISSING = "missing"
    """Registered with userfaultfd and not supplied yet: whoever needs it waits for user space."""
    PROTECTED = "write-protected"
    """By userfaultfd: read as it is, and a write waits for user space."""
    POISONED = "poisoned"


_OVERRULES: Final = {
    PageState.PRESENT: (PageState.PRESENT,),
    PageState.COW: (PageState.PRESENT, PageState.COW),
    PageState.ABSENT: (PageState.PRESENT, PageState.COW, PageState.ABSENT),
    PageState.MISSING: (PageState.PRESENT, PageState.COW, PageState.ABSENT, PageState.PROTECTED),
    PageState.PROTECTED: (PageState.PRESENT, PageState.COW),
    PageState.POISONED: tuple(PageState),
}
"""What a page may be to become that: poison stays, and what is not present cannot be shared."""


class _Page(NamedTuple):
    state: PageState
    pfn: Pfn
    """Frame of the page, or of the first page of the huge page."""


_FAULT: Final = Pin(None, PinError.FAULT)
_RO_FAULT: Final = Pin(None, PinError.RO_FAULT)
_HWPOISON: Final = Pin(None, PinError.HWPOISON)
_SIGPENDING: Final = Pin(None, PinError.SIGPENDING)
_NEEDS_IO: Final = Pin(None, PinError.NEEDS_IO)
_WAITS: Final = Pin(None, PinError.WAITS)


_NOWHERE: Final = Vma(start=Hva(0), end=Hva(0), kind=AreaKind.ANON, pfn=Pfn(0), page_shift=12, block=1 << 12)
_new: Final = tuple.__new__


class HostMemory:
    """The areas of one process, with what happened to single pages.

    Operations that change what the host maps return the user addresses that its MMU notifier would name (None:
    nothing was mapped there). They do not run the invalidation protocol: the caller does. ModelError for a request that
    no host could carry out.
    """

    __slots__ = ("_areas", "_last", "_next_pfn", "_pages", "_split", "page_shift", "thp_size")

    def __init__(self, page_shift: int = 12, *, thp_size: int = 0) -> None:
        self.page_shift: int = page_shift
        self.thp_size: int = thp_size or 1 << 2 * page_shift - 3
        """Bytes of a transparent huge page; by default what a table of one page of 8-byte entries maps."""
        self._areas: RangeTable[Vma] = RangeTable()
        self._last = _NOWHERE  # the area found last: a fault looks it up three times
        self._pages: Mapping[int, _Page] = {}  # by first address; replaced whole, never changed in place
        self._split: frozenset[int] = frozenset()  # first addresses of blocks that are mapped by pages
        self._next_pfn = _FIRST_FREE

    # What the fault path asks.

    def vma(self, hva: Hva) -> Vma | None:
        """The area that contains *hva*, or None. O(log n). (vma_lookup)"""
        vma = self._last
        return vma if vma.start <= hva < vma.end else self._find(hva)

    def _find(self, hva: Hva) -> Vma | None:
        vma = self._areas.find(hva)
        self._last = vma or _NOWHERE
        return vma

    def areas(self, start: Hva, end: Hva) -> tuple[Vma, ...]:
        """Areas that share an address with ``[start, end)``, by rising address."""
        return self._areas.overlapping(start, end)

    def pin(
        self, hva: Hva, *, write: bool, nowait: bool = False, interruptible: bool = False, signalled: bool = False
    ) -> Pin:
        """Resolve *hva* to a frame, as a fault that may use a writable mapping even for a read.

        *nowait*: answer NEEDS_IO rather than wait. *interruptible*: give up with SIGPENDING where it would wait while a
        signal is pending (*signalled*). A pin acts on memory as the access would: it brings an absent page in, and a
        write breaks copy-on-write. Not modelled: frames that refuse a reference. (hva_to_pfn)
        """
        vma: Vma | None = self._last
        if vma is None or not vma.start <= hva < vma.end:
            vma = self._find(hva)
        if vma is None:
            return _FAULT
        if self._pages:
            page = self._pages.get(hva & -vma.unit)
            if page is not None:
                return self._pin_page(vma, hva, page, write, nowait, interruptible and signalled)
        if not vma.readonly:
            # Pin(...) itself, but without the Python-level constructor of a NamedTuple: a third of the pin's time
            pfn = vma.pfn + ((hva - vma.start) >> self.page_shift)
            return _new(Pin, (pfn, None, True, vma.device, None, None, 0))
        if write:
            return _RO_FAULT if vma.kind is AreaKind.PFNMAP else _FAULT
        return Pin(vma.pfn_at(hva), None, False, vma.device)

    def mapping_size(self, hva: Hva) -> int:
        """Bytes of the leaf by which the host maps *hva*; 0 if none. (host_pfn_mapping_level, get_user_mapping_size)"""
        vma: Vma | None = self._last
        if vma is None or not vma.start <= hva < vma.end:
            vma = self._find(hva)
        if vma is None:
            return 0
        if self._pages:
            page = self._pages.get(hva & -vma.unit)
            if page is not None and page.state in (PageState.ABSENT, PageState.POISONED, PageState.MISSING):
                return 0
        return vma.unit if vma.unit == vma.block else self._leaf(vma, hva)

    # What happens to memory.

    def back(
        self,
        hva: Hva,
        size: int,
        kind: AreaKind = AreaKind.ANON,
        *,
        readonly: bool = False,
        tags: bool = False,
        any_uncached: bool = False,
        device: bool | None = None,
        cacheable: bool = False,
        block: int | None = None,
        pfn: Pfn | None = None,
    ) -> HvaRange | None:
        """Map an area of *size* bytes at *hva*, in place of what was there.

        *block*: huge page of a PFNMAP area (default: a page). *device*: default true for PFNMAP only. *pfn*: frame of
        the first page; default: free frames, congruent to *hva*.
        """
        page = 1 << self.page_shift
        if kind is AreaKind.HUGETLB_1G and self.page_shift == 16 and self.thp_size > HUGETLB[AreaKind.HUGETLB_2M]:
            raise ModelError("a host with 64K pages has no huge pages of 1G")
        if block is not None and kind is not AreaKind.PFNMAP:
            raise ModelError(f"block is for pfnmap areas; a {kind.value} area has its own")
        block = block or HUGETLB.get(kind) or (self.thp_size if kind is AreaKind.THP else page)
        if block < page or block & (block - 1):
            raise ModelError(f"block {block:#x} is not a power of two of at least a page, {page:#x}")
        if pfn is not None and (pfn - (hva >> self.page_shift)) * page % block:
            if kind is not AreaKind.PFNMAP:
                raise ModelError(f"frame {pfn:#x} is not aligned as hva {hva:#x} is, by {block:#x}")
            block = page  # such a device is mapped by pages
        self._check(hva, size, block if kind in HUGETLB else page)
        old = self.unback(hva, size)
        vma = Vma(
            start=hva,
            end=Hva(hva + size),
            kind=kind,
            pfn=self._allocate(hva, size, block) if pfn is None else pfn,
            page_shift=self.page_shift,
            block=block,
            readonly=readonly,
            tags=tags,
            any_uncached=any_uncached,
            device=kind is AreaKind.PFNMAP if device is None else device,
            cacheable=cacheable,
        )
        self._last = _NOWHERE
        self._areas = self._areas.splice(vma.start, vma.end, ((vma.start, vma.end, vma),))
        return old

    def unback(self, hva: Hva, size: int) -> HvaRange | None:
        """Unmap *size* bytes at *hva*; areas that reach out of the range keep the rest."""
        self._check(hva, size, 1 << self.page_shift)
        start, end = hva, Hva(hva + size)
        met = self._areas.overlapping(start, end)
        for vma in met:
            if (max(start, vma.start) | min(end, vma.end)) & (vma.unit - 1):
                raise ModelError(f"{start:#x}-{end:#x} cuts a {vma.kind.value} page")
        rest = [vma for vma in met if vma.start < start for vma in [replace(vma, end=start)]]
        rest += [replace(vma, start=end, pfn=vma.pfn_at(end)) for vma in met if vma.end > end]
        self._last = _NOWHERE
        self._areas = self._areas.splice(start, end, tuple((vma.start, vma.end, vma) for vma in rest))
        self._forget(start, end)
        return HvaRange(max(start, met[0].start), min(end, met[-1].end)) if met else None

    def poison(self, hva: Hva) -> HvaRange:
        """The memory at *hva* fails for good (memory_failure); a hugetlb page as a whole."""
        return self._override(hva, 1, PageState.POISONED)

    def evict(self, hva: Hva, size: int = 1) -> HvaRange:
        """The pages that *size* bytes at *hva* touch leave memory: the next pin waits for I/O and gets other frames."""
        return self._override(hva, size, PageState.ABSENT)

    def make_cow(self, hva: Hva, size: int = 1, *, zero: bool = False) -> HvaRange:
        """The pages that *size* bytes at *hva* touch are shared until written, with their frame, or *zero*'s."""
        return self._override(hva, size, PageState.COW, _ZERO_PAGE if zero else None)

    def make_missing(self, hva: Hva, size: int = 1) -> HvaRange:
        """The pages that *size* bytes at *hva* touch are dropped, and user space will supply them (UFFDIO_REGISTER
        for missing pages, then MADV_DONTNEED)."""
        return self._override(hva, size, PageState.MISSING)

    def write_protect(self, hva: Hva, size: int = 1) -> HvaRange:
        """Writes to the pages that *size* bytes at *hva* touch wait for user space (UFFDIO_WRITEPROTECT)."""
        return self._override(hva, size, PageState.PROTECTED)

    def supply(self, hva: Hva, size: int = 1) -> None:
        """User space answers for the pages that *size* bytes at *hva* touch: a missing one gets a frame, a protected
        one may be written (UFFDIO_COPY, UFFDIO_WRITEPROTECT with mode 0). Invalidates nothing: nothing was mapped
        that is not now."""
        at = hva
        while at < hva + size:
            vma = self._need(at)
            unit = at & -vma.unit
            page = self._pages.get(unit)
            if page is not None and page.state is PageState.MISSING:
                self._move(vma, unit)
            elif page is not None and page.state is PageState.PROTECTED:
                self._pages = {**self._pages, unit: _Page(PageState.PRESENT, page.pfn)}
            at = Hva(unit + vma.unit)

    def break_cow(self, hva: Hva) -> HvaRange:
        """Somebody other than the guest writes to the shared page at *hva*: it gets a frame of its own. (do_wp_page)"""
        vma = self._need(hva)
        unit = hva & -vma.unit
        page = self._pages.get(unit)
        if page is None or page.state is not PageState.COW or vma.readonly:
            raise ModelError(f"{hva:#x} is not a page that a write would copy")
        return self._move(vma, unit)

    def migrate(self, hva: Hva) -> HvaRange:
        """The page at *hva* moves to another frame with its content (compaction, NUMA balancing). (migrate_pages)"""
        vma = self._need(hva)
        page = self._pages.get(hva & -vma.unit)
        if page is not None and page.state is not PageState.PRESENT:
            raise ModelError(f"{hva:#x} is {page.state.value}: only a present page of its own can move")
        moved = self._override(hva, 1, PageState.PRESENT)
        self._move(vma, hva & -vma.unit)
        return moved

    def split(self, hva: Hva) -> HvaRange:
        """The huge mapping around *hva* is replaced by pages (__split_huge_pmd)."""
        vma = self._need(hva)
        size = self._leaf(vma, hva)
        if size == vma.unit:
            raise ModelError(f"{hva:#x} is not mapped by a block that can be split")
        start = hva & -size
        self._split |= {start}
        return HvaRange(Hva(start), Hva(start + size))

    def collapse(self, hva: Hva) -> HvaRange:
        """The pages of the split THP block around *hva* are copied into one huge page, the area's own (khugepaged)."""
        vma = self._need(hva)
        start = hva & -vma.block
        if vma.kind is not AreaKind.THP or start not in self._split:
            raise ModelError(f"{hva:#x} is not in a split block")
        end = start + vma.block
        if any(page.state is PageState.POISONED for at, page in self._pages.items() if start <= at < end):
            raise ModelError(f"block {start:#x} has a poisoned page")
        self._forget(Hva(start), Hva(end))
        return HvaRange(Hva(start), Hva(end))

    # Copies.

    def fork(self) -> HostMemory:
        """An independent copy, in constant time."""
        new = HostMemory(self.page_shift, thp_size=self.thp_size)
        new._areas, new._pages, new._split = self._areas, self._pages, self._split
        new._next_pfn = self._next_pfn
        return new

    def key(self) -> Hashable:
        """All state, hashable; equal keys behave alike."""
        return self.page_shift, self._areas.items(), frozenset(self._pages.items()), self._split, self._next_pfn

    # Inside.

    def _pin_page(self, vma: Vma, hva: Hva, page: _Page, write: bool, nowait: bool, signal: bool) -> Pin:
        special = vma.kind is AreaKind.PFNMAP
        if write and vma.readonly:
            return _RO_FAULT if special and page.state is not PageState.ABSENT else _FAULT
        unit = hva & -vma.unit
        writable, invalidated = not vma.readonly, None
        match page.state:
            case PageState.POISONED:
                return _HWPOISON
            case PageState.ABSENT:
                if nowait and not special:
                    return _NEEDS_IO
                if signal and not special:
                    return _SIGPENDING
                self._move(vma, unit)
            case PageState.MISSING | PageState.PROTECTED if write or page.state is PageState.MISSING:
                return _NEEDS_IO if nowait else _SIGPENDING if signal else _WAITS
            case PageState.PROTECTED:
                writable = False
            case PageState.COW if write:
                invalidated = self._move(vma, unit)
            case PageState.COW:
                writable = False
            case PageState.PRESENT:
                pass
        pfn = self._pages[unit].pfn + ((hva - unit) >> self.page_shift)
        return Pin(Pfn(pfn), None, writable, vma.device, invalidated)

    def _leaf(self, vma: Vma, hva: Hva) -> int:
        if vma.unit == vma.block or (vma.fits(hva) and hva & -vma.block not in self._split):
            return vma.block
        return vma.unit

    def _override(self, hva: Hva, size: int, state: PageState, pfn: Pfn | None = None) -> HvaRange:
        # Every page that [hva, hva + size) touches becomes *state*; blocks around them are split. The answer spans the
        # leaves that were mapped.
        at, end = hva, hva + size
        pages, split = dict(self._pages), set(self._split)
        first = last = -1
        while at < end:
            vma = self._need(at)
            if vma.kind is AreaKind.PFNMAP and state is not PageState.ABSENT:
                raise ModelError(f"{at:#x} is in a pfnmap area, whose frames are not the host's to change")
            unit, leaf = at & -vma.unit, self._leaf(vma, at)
            if first < 0:
                first = at & -leaf
            last = (at & -leaf) + leaf
            if leaf > vma.unit:
                split.add(at & -leaf)
            was = pages.get(unit, _Page(PageState.PRESENT, vma.pfn_at(Hva(unit))))
            if was.state in _OVERRULES[state]:
                pages[unit] = _Page(state, was.pfn if pfn is None else pfn)
            at = Hva(unit + vma.unit)
        self._pages, self._split = pages, frozenset(split)
        return HvaRange(Hva(first), Hva(last))

    def _move(self, vma: Vma, unit: int) -> HvaRange:
        # The page gets a frame of its own and is present. A device's frames do not change.
        device = vma.kind is AreaKind.PFNMAP
        pfn = self._pages[unit].pfn if device else self._allocate(Hva(unit), vma.unit, vma.unit)
        self._pages = {**self._pages, unit: _Page(PageState.PRESENT, pfn)}
        return HvaRange(Hva(unit), Hva(unit + vma.unit))

    def _allocate(self, hva: Hva, size: int, block: int) -> Pfn:
        # Free frames, congruent to hva modulo block: the first frame number at or after the next free one that is.
        frames = block >> self.page_shift
        pfn = self._next_pfn + ((hva >> self.page_shift) - self._next_pfn) % frames
        self._next_pfn = Pfn(pfn + (size >> self.page_shift))
        return Pfn(pfn)

    def _forget(self, start: Hva, end: Hva) -> None:
        if self._pages or self._split:
            self._pages = {at: page for at, page in self._pages.items() if not start <= at < end}
            self._split = frozenset(at for at in self._split if not start <= at < end)

    def _need(self, hva: Hva) -> Vma:
        vma = self._areas.find(hva)
        if vma is None:
            raise ModelError(f"nothing is mapped at {hva:#x}")
        return vma

    def _check(self, hva: Hva, size: int, unit: int) -> None:
        if hva < 0 or size <= 0 or (hva | size) & (unit - 1):
            raise ModelError(f"{size:#x} bytes at {hva:#x} are not whole units of {unit:#x} bytes")
