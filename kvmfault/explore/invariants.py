"""What must hold in every state, whoever acts in whatever order.

Each is a function of the VM: None, or what breaks it. Others are judged where they happen: ``memory-answers`` when a
fault ends, ``refused`` by the model, ``progress`` and ``deadlock`` by the search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from kvmfault.contract.format import Kind, W
from kvmfault.contract.ports import Memslot
from kvmfault.contract.values import DirtyMark
from kvmfault.explore.world import Explored
from kvmfault.machine.state import MEMFD_MEMORY
from kvmfault.types import Gfn, Gpa, Pfn

__all__ = [
    "INVARIANTS",
    "NAMES",
    "break_before_make",
    "lost_write",
    "marked_mapped",
    "outside_slot",
    "private_and_shared",
    "reaches_old_page",
    "stale_tlb",
    "warning",
    "writable_protected",
]

NAMES: Final[Mapping[str, str]] = {
    "reaches-old-page": "after memory changed, neither an entry nor a TLB leads to the frame of before",
    "writable-protected": "no entry allows writes to what is read-only, tracked, or shared until written",
    "lost-write": "what the guest wrote in a logged slot is marked, or was reported, or its vCPU is about to mark it",
    "outside-slot": "no entry and no TLB translates what no slot covers",
    "private-and-shared": "a frame's entries lead to the memory of its kind: private or shared",
    "break-before-make": "where the architecture wants it, no TLB holds one translation while the table has another",
    "stale-tlb": "with mmu_lock free and no flush outstanding, TLBs hold nothing that the table does not allow",
    "marked-mapped": "a page that user space marked before it asked for userfault exits is not mapped",
    "warning": "the kernel warns of nothing",
    "refused": "nothing is done that hardware or the kernel's own rules forbid: an entry of MMIO over a present one",
    "memory-answers": "an access to memory that is there from the fault's begin to its end is no device access",
    "completion": "a device access is finished as it began, whatever faulted meanwhile",
    "progress": "a fault that nobody disturbs any more ends",
    "deadlock": "somebody can always go on until all have ended",
}
"""Every invariant and what it says."""


class _Translation(NamedTuple):
    """What an entry or a TLB makes of one page."""

    gpa: Gpa
    pfn: Pfn
    writable: bool
    where: str


def _entries(vm: Explored) -> Iterator[_Translation]:
    fmt = vm.format
    for leaf in vm.own_table.entries():
        if fmt.kind(leaf.desc, leaf.shift) is Kind.LEAF:
            pfn, writable = Pfn(fmt.hpa(leaf.desc, leaf.shift) >> vm.page_shift), bool(fmt.prot(leaf.desc) & W)
            yield from _pages(vm, leaf.gpa, leaf.shift, pfn, writable, "an entry")


def _cached(vm: Explored) -> Iterator[_Translation]:
    for number, vcpu in enumerate(vm.vcpus):
        for one in vcpu.tlb.entries():
            yield from _pages(vm, one.gpa, one.shift, one.pfn, bool(one.prot & W), f"the TLB of vcpu{number}")


def _pages(vm: Explored, first: Gpa, shift: int, pfn: Pfn, writable: bool, where: str) -> Iterator[_Translation]:
    stop = first + (1 << shift)
    inside = {gpa for gpa in vm.watched if first <= gpa < stop}
    for gpa in sorted(inside | {first, Gpa(stop - (1 << vm.page_shift))}):
        yield _Translation(gpa, Pfn(pfn + (gpa - first >> vm.page_shift)), writable, where)


def _both(vm: Explored) -> Iterator[_Translation]:
    yield from _entries(vm)
    yield from _cached(vm)


def _slot(vm: Explored, gpa: Gpa) -> Memslot | None:
    for space in vm.slots.active:
        found = space.find(Gfn(gpa >> vm.page_shift))
        if found is not None:
            return found
    return None


def reaches_old_page(vm: Explored) -> str | None:
    """The host gave the old frame to somebody else: kvm_mmu_notifier_invalidate_range_start had to end this."""
    for seen in _both(vm):
        now = vm.frame_now(seen.gpa)
        if now != seen.pfn and vm.slot_at(seen.gpa) is not None:
            has = "no frame" if now is None else f"frame {now:#x}"
            return f"{seen.where} leads {seen.gpa:#x} to frame {seen.pfn:#x}, and the memory has {has}"
    return None


def writable_protected(vm: Explored) -> str | None:
    """Read-only slots, tracked frames, pages that the host shares or protects."""
    for seen in _both(vm):
        if not seen.writable:
            continue
        slot, gfn = _slot(vm, seen.gpa), Gfn(seen.gpa >> vm.page_shift)
        if slot is None:
            continue
        if slot.readonly:
            return f"{seen.where} allows writes to {seen.gpa:#x}, which is read-only"
        if seen.where == "an entry" and vm.target.policy.write_tracking and gfn in vm.tracked:
            return f"{seen.where} allows writes to {seen.gpa:#x}, whose writes are tracked"
        if seen.pfn << vm.page_shift not in MEMFD_MEMORY:
            pin = vm.host.fork().pin(slot.hva_of(gfn), write=False)
            if pin.pfn == seen.pfn and not pin.writable:
                return f"{seen.where} allows writes to {seen.gpa:#x}, whose page is shared or protected"
    return None


def lost_write(vm: Explored) -> str | None:
    """Dirty marking may follow the entry, but nothing is forgotten: the marks of vCPUs on their way count."""
    for slot, page in sorted(vm.written.unreported - vm.written.telling):
        bitmap = vm.log.bitmap(slot)
        if (bitmap is not None and page in bitmap) or _noted_by_entry(vm, slot, page):
            continue
        if vm.log.ring_entries and any(e.slot == slot and e.offset == page for v in vm.vcpus for e in v.ring):
            continue
        if not any((slot, page) in vm.marks(n) for n in range(len(vm.vcpus))):
            return f"page {page} of slot {slot} was written, is not marked, and nobody is about to mark it"
    return None


def _noted_by_entry(vm: Explored, number: int, page: int) -> bool:
    # where the log is gathered from the entries when it is read
    slot = vm.slots.by_id(number & 0xFFFF, number >> 16)
    if vm.target.policy.dirty_mark is not DirtyMark.ON_HARVEST or slot is None:
        return False
    leaf = vm.own_table.leaf(Gpa(slot.base_gfn + page << vm.page_shift))
    return leaf is not None and vm.format.is_dirty(leaf.desc)


def outside_slot(vm: Explored) -> str | None:
    """Deleting a slot unmaps it before its frames stop being its own."""
    for seen in _both(vm):
        if _slot(vm, seen.gpa) is None:
            return f"{seen.where} translates {seen.gpa:#x}, where no slot is"
    return None


def private_and_shared(vm: Explored) -> str | None:
    """A frame has one kind at a time."""
    for seen in _both(vm):
        slot = _slot(vm, seen.gpa)
        if slot is None or slot.gmem is None:
            continue
        from_file = seen.pfn << vm.page_shift in MEMFD_MEMORY
        if from_file != vm.comes_from_file(Gfn(seen.gpa >> vm.page_shift)):
            kinds = ("private", "shared") if from_file else ("shared", "private")
            return f"{seen.where} leads {seen.gpa:#x} to {kinds[0]} memory, and the frame is {kinds[1]}"
    return None


def break_before_make(vm: Explored) -> str | None:
    """A TLB that meets two different valid entries for an address may answer anything."""
    if not vm.format.break_before_make:
        return None
    for number, vcpu in enumerate(vm.vcpus):
        for one in vcpu.tlb.entries():
            leaf = vm.own_table.leaf(one.gpa)
            if leaf is not None:
                mapped = vm.format.hpa(leaf.desc, leaf.shift) + (one.gpa - leaf.gpa) >> vm.page_shift
                if leaf.shift != one.shift or mapped != one.pfn:
                    return f"the TLB of vcpu{number} holds {one.gpa:#x} as it was, and the table has another entry"
    return None


def stale_tlb(vm: Explored) -> str | None:
    """Between a change of the table and its flush TLBs may lag; not when nobody is going to flush."""
    if vm.writer is not None or vm.own_table.stale:
        return None
    fmt = vm.format
    for number, vcpu in enumerate(vm.vcpus):
        for one in vcpu.tlb.entries():
            leaf = vm.own_table.leaf(one.gpa)
            # an entry that the host made old is left to TLBs: its age is a guess anyway
            if leaf is None or one.prot & ~fmt.prot(fmt.with_young(leaf.desc, True)):
                return f"the TLB of vcpu{number} allows at {one.gpa:#x} what the table does not"
    return None


def marked_mapped(vm: Explored) -> str | None:
    """The slot's change to userfault exits is over, and with it every mapping of before."""
    if not vm.userfault or vm.slots.next_stage is not None or vm.own_table.stale:
        return None
    for seen in _both(vm):
        slot = _slot(vm, seen.gpa)
        if slot is not None and slot.userfault and vm.userfault_wanted(slot, Gfn(seen.gpa >> vm.page_shift)):
            return f"{seen.where} translates {seen.gpa:#x}, which user space wants to hear of"
    return None


def warning(vm: Explored) -> str | None:
    """Warnings of the fault path, and misuse of the invalidation protocol."""
    if vm.warnings:
        return vm.warnings[0]
    return "the invalidation protocol was misused" if vm.invalidations.warnings or vm.invalidations.bugged else None


INVARIANTS: Final[Mapping[str, Callable[[Explored], str | None]]] = {
    "private-and-shared": private_and_shared,
    "reaches-old-page": reaches_old_page,
    "writable-protected": writable_protected,
    "lost-write": lost_write,
    "outside-slot": outside_slot,
    "break-before-make": break_before_make,
    "stale-tlb": stale_tlb,
    "marked-mapped": marked_mapped,
    "warning": warning,
}
"""Those that are looked for in every state."""
