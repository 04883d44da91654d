"""What no kernel may let happen, looked for after every event of a scenario.

Each is about the second-stage table or a TLB as they are, whatever led to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from kvmfault.contract.format import Kind, W
from kvmfault.contract.values import DirtyMark
from kvmfault.machine.table import Found
from kvmfault.scenario.world import World
from kvmfault.types import Gfn, Gpa, Pfn
from kvmfault.vm.memslot import Memslot

__all__ = ["NAMES", "broken"]

NAMES: Final[Mapping[str, str]] = {
    "entry-without-slot": "an entry maps what no slot covers",
    "writable-readonly": "an entry of a read-only slot allows writes",
    "writable-tracked": "an entry of a page whose writes are tracked allows writes",
    "writable-clean": "an entry of a logged slot allows writes to a page that is not marked dirty",
    "wrong-frame": "an entry maps another frame than the memory has",
    "stale-tlb": "a vCPU can translate what its table does not translate so",
}


def broken(vm: World) -> dict[str, str]:
    """Name -> the first thing that breaks it."""
    found: dict[str, str] = {}
    for leaf in vm.table.entries():
        if vm.format.kind(leaf.desc, leaf.shift) is Kind.LEAF:
            for name, what in _of_leaf(vm, leaf):
                found.setdefault(name, what)
    for name, what in _of_tlbs(vm):
        found.setdefault(name, what)
    return found


def _of_leaf(vm: World, leaf: Found) -> Iterator[tuple[str, str]]:
    slot = vm.slot_at(leaf.gpa)
    last = Gpa(leaf.gpa + (1 << leaf.shift) - (1 << vm.page_shift))
    if slot is None or slot.invalid or vm.slot_at(last) is not slot:
        yield "entry-without-slot", f"{leaf.gpa:#x}"
        return
    prot = vm.format.prot(leaf.desc)
    if prot & W:
        first = Gfn(leaf.gpa >> vm.page_shift)
        pages = range(first, first + (1 << leaf.shift - vm.page_shift))
        if slot.readonly:
            yield "writable-readonly", f"{leaf.gpa:#x}"
        if vm.target.policy.write_tracking and any(g in pages for g in vm.tracked):
            yield "writable-tracked", f"{leaf.gpa:#x}"
        by_entry = vm.target.policy.dirty_mark is DirtyMark.ON_HARVEST
        if slot.logs_dirty and not by_entry and not _dirty(vm, slot, pages):
            yield "writable-clean", f"{leaf.gpa:#x}"
    for gpa in {leaf.gpa, last}:
        mapped = _frame(vm, leaf, gpa)
        now = vm.frame_now(gpa)
        if mapped != now:
            has = "none" if now is None else f"{now:#x}"
            yield "wrong-frame", f"{gpa:#x} goes to frame {mapped:#x}, and the memory has {has}"


def _frame(vm: World, leaf: Found, gpa: Gpa) -> Pfn:
    return Pfn(vm.format.hpa(leaf.desc, leaf.shift) + gpa - leaf.gpa >> vm.page_shift)


def _dirty(vm: World, slot: Memslot, pages: range) -> bool:
    number, base = slot.number, slot.base_gfn
    if vm.log.ring_entries:
        marked = {e.offset for vcpu in vm.every_vcpu() for e in vcpu.ring if e.slot == number}
        return all(g - base in marked for g in pages)
    bitmap = vm.log.bitmap(number)
    return bitmap is not None and bitmap.covers(pages.start - base, pages.stop - base)


def _of_tlbs(vm: World) -> Iterator[tuple[str, str]]:
    for number, vcpu in enumerate(vm.every_vcpu()):
        for cached in vcpu.tlb.entries():
            last = cached.gpa + (1 << cached.shift) - (1 << vm.page_shift)
            for gpa in {cached.gpa, Gpa(last)}:
                leaf = vm.table.leaf(gpa)
                wanted = cached.pfn + (gpa - cached.gpa >> vm.page_shift)
                # aging flushes nothing: where an old leaf grants nothing, a TLB may still know it from before
                grants = vm.format.prot(vm.format.with_young(leaf.desc, True)) if leaf is not None else 0
                if leaf is None or _frame(vm, leaf, gpa) != wanted or cached.prot & ~grants:
                    yield "stale-tlb", f"vCPU {number} still translates {gpa:#x} to frame {wanted:#x}"
