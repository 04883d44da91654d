"""Bugs that KVM had, by the title of the commit that fixed each. No other command of kvmfault runs any of this."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Final, cast

from kvmfault.contract.access import Access
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, W
from kvmfault.contract.outcome import Completion, Exit, Outcome
from kvmfault.contract.ports import MapResult, Memslot, Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.values import (
    DirtyMark,
    ExecGrant,
    InvalidSlot,
    LoggedSize,
    Prefault,
    Unbacked,
)
from kvmfault.explore import actions
from kvmfault.explore.applies import merges, remembers_mmio, walk_reads, walk_writes
from kvmfault.explore.barriers import WITHOUT_BARRIERS, area_only, sample
from kvmfault.explore.mutant import Mutant, after, instead, without
from kvmfault.explore.world import Explored, SeenVcpu
from kvmfault.path import lookup
from kvmfault.path.run import BoundPath, Step
from kvmfault.scenario import events
from kvmfault.types import Gfn, Gpa, Pfn
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.memslots import UPDATING

__all__ = ["BY_NAME", "MUTANTS", "area_only", "make_pages", "sample"]

# The sequence protocol.


def _sample_int(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    outcome = lookup.snapshot(vm, fault, at)
    at.seq = (at.seq + (1 << 31) & 0xFFFF_FFFF) - (1 << 31) & 0xFFFF_FFFF_FFFF_FFFF
    return outcome


def _end_without_sequence(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    done = actions.range_end(vm, event, who, data)
    vm.invalidations.seq -= bool(cast("tuple[object, tuple[object, ...]]", data)[1])
    return done


def _unlock_only(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    vm.take_stale()
    return actions.flush_and_unlock(vm, event, who, data)._replace(name="no flush")


def _report_only(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    vm.take_stale()
    return actions.report(vm, event, who, data)._replace(name="no flush")


def _protect_first(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    assert isinstance(event, events.GetLog)
    vm.need_lock()
    bits = vm.log.fork()
    actions.collect(vm, event, who, data)
    vm.log = bits
    return actions.Done("protect")


def _take_bits(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    assert isinstance(event, events.GetLog)
    pages = tuple((event.slot, page) for page in vm.log.pages(event.slot))
    bitmap = vm.log.bitmap(event.slot) or FrameSet()
    for _, page in pages:
        bitmap.discard(page)
    vm.told(pages)
    return actions.Done("take bits", note=f"pages {[page for _, page in pages]}")


_NOTIFY: Final = (actions.range_start, actions.zap, actions.flush_and_unlock, actions.change, actions.range_end)


def _instead_of(old: actions.Action, new: actions.Action) -> tuple[actions.Action, ...]:
    return tuple(new if action is old else action for action in _NOTIFY)


def _of_host(does: tuple[actions.Action, ...]) -> Mapping[type, tuple[actions.Action, ...]]:
    return {events.Host: does, events.Back: does}


# Memslots.


def _invalid_is_none(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    outcome = lookup.lookup(vm, fault, at)
    if at.slot is not None and at.slot.invalid:
        at.slot, at.logged, at.backed = None, False, False
    return outcome


def _find_unmarked(self: Explored, gfn: Gfn) -> Memslot | None:
    found = self.slots.find(gfn, self.vcpu.as_id)
    old, _ = self.slots.changing
    return old if found is not None and found.invalid else found


def _note_at_once(self: Explored, gfn: Gfn, gva: int | None) -> None:
    generation = self.slots.generation(0)
    if generation & UPDATING:  # there is one number, which changes as the new set is published
        generation = (generation & ~UPDATING) + self.caps.nr_address_spaces
    self.vcpu.mmio = self.vcpu.mmio.noted(gfn, gva, generation, self.page_shift)


# Dirty logging and sizes.


def _emulate_silently(self: Explored, gpa: Gpa, size: int, wanted: Access, data: int) -> tuple[Outcome, ...] | None:
    vars(self)["_silent"] = bool(wanted.read and wanted.write)
    try:
        return Explored.emulate(self, gpa, size, wanted, data)
    finally:
        vars(self)["_silent"] = False


def _mark_unless_silent(self: Explored, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
    if not vars(self).get("_silent"):
        Explored.mark_dirty(self, slot, gfn, pfn)


def _keep_blocks(
    self: Explored,
    gpa: Gpa,
    size: int,
    pfn: Pfn,
    prot: int,
    memory: Memory,
    *,
    host_writable: bool,
    young: bool,
    tag: int,
) -> MapResult | int:
    leaf = self.table.leaf(gpa)
    if leaf is not None and 1 << leaf.shift > size:
        return MapResult.UNCHANGED
    return Explored.map(self, gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)


def _map_unflushed(
    self: Explored,
    gpa: Gpa,
    size: int,
    pfn: Pfn,
    prot: int,
    memory: Memory,
    *,
    host_writable: bool,
    young: bool,
    tag: int,
) -> MapResult | int:
    self.late = True
    result = Explored.map(self, gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
    self.take_stale()
    return result


def _any_block(self: Explored, slot: Memslot, gfn: Gfn, size: int) -> bool:
    return super(Explored, self).block_allowed(slot, gfn, size)


def _track_writable(self: Explored, gfn: Gfn) -> None:
    self.tracked.add(gfn)
    for table, start, end in self.tables_over(gfn, gfn + 1):
        if any(self.format.prot(leaf.desc) & W for leaf in table.in_range(start, end)):
            table.write_protect(start, end, for_good=True)
    self.flush_stale()


def _put_unflushed(self: Explored, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
    self.late = True
    result = Explored.map_mmio(self, at, gpa, prot)
    self.take_stale()
    return result


def make_pages(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Table pages are short once: tables in use are taken. (make_mmu_pages_available)"""
    if (explored := cast(Explored, vm)).spare:
        explored.spare -= 1
        explored.retire()
    return None


def _by_registers(vm: Explored, bound: BoundPath, left: Exit) -> Completion | None:
    # decode what the fault registers hold now
    now = cast(Access, vm.of_vcpu("fault", cast(SeenVcpu, vm.vcpu).number))
    progress = Progress(bound.policy, bound.joints)
    progress.at = progress.gpa = Gpa(now.gpa or 0)
    for joint in bound.joints.decode_mmio:
        outcome = joint(vm, vm.target.encode(now).fault, progress)
        if isinstance(outcome, Exit):
            return outcome.completion
    return None


# What a fault says.


def _walk_is_write(fault: MmioFault) -> bool:
    return fault.is_write or fault.is_table_walk


def _write_unless_walk(fault: MmioFault) -> bool:
    return fault.is_write and not (fault.is_table_walk and fault.is_permission)


def _fetch_or_walk(fault: MmioFault) -> bool:
    return fault.is_exec or (fault.is_table_walk and fault.is_permission)


MUTANTS: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="sequence-after-area",
        about="the sequence was sampled when the host's areas were unlocked again: a block of an old size was mapped",
        scenario="remap",
        applies=lambda target: target.policy.area_sizes is not None,
        changes=(instead("snapshot", area_only), after("snapshot", Step("sample", sample))),
    ),
    Mutant(
        name="sequence-in-int",
        about="the sampled sequence was kept in an int: after 2^31 invalidations it never equals the current one",
        scenario="sequence_wrap",
        changes=(instead("snapshot", _sample_int),),
    ),
    Mutant(
        name="no-recheck",
        about="the page was looked up without mmu_lock, and not looked at again under it",
        scenario="migrate",
        changes=(without("stale"),),
    ),
    Mutant(
        name="end-without-sequence",
        about="an invalidation that begins and ends between look-up and lock left no trace",
        scenario="migrate",
        actions=_of_host(_instead_of(actions.range_end, _end_without_sequence)),
    ),
    Mutant(
        name="zap-without-flush",
        about="the note that a flush is due was lost, and the invalidation ended without one",
        scenario="migrate",
        actions=_of_host(_instead_of(actions.flush_and_unlock, _unlock_only)),
    ),
    Mutant(
        name="invalid-slot-as-none",
        about="a slot that is being deleted was no slot: an entry of MMIO took the place of a present one",
        scenario="slot_delete",
        applies=lambda target: target.policy.invalid_slot is InvalidSlot.RETRY and not target.shadows,
        changes=(instead("lookup", _invalid_is_none),),
    ),
    Mutant(
        name="invalid-slot-mapped",
        about="a slot that is being deleted was used like any other, also after its mappings were dropped",
        scenario="slot_delete",
        ports={"find_slot": _find_unmarked},
    ),
    Mutant(
        name="mmio-generation-once",
        about="one generation number for new slots and for readers of the old: a decision was tagged with the next one",
        scenario="slot_create",
        applies=remembers_mmio,
        ports={"note_mmio": _note_at_once},
    ),
    Mutant(
        name="exchange-not-marked",
        about="an emulated atomic instruction wrote to memory and left no mark in the dirty log",
        scenario="track",
        applies=lambda target: target.policy.write_tracking,
        ports={"emulate": _emulate_silently, "mark_dirty": _mark_unless_silent},
    ),
    Mutant(
        name="block-stays",
        about="a read-only block stayed where dirty logging wants pages: the write faulted for ever",
        scenario="log_block",
        applies=lambda target: merges(target) and target.policy.logged_size is LoggedSize.PAGE,
        ports={"map": _keep_blocks},
    ),
    Mutant(
        name="walk-is-write",
        about="every fault on a walk of the guest's tables was a write, also where they are in read-only memory",
        scenario="walks",
        applies=lambda target: target.policy.unbacked is Unbacked.LEAVE and walk_reads(target),
        misread={"is_write": _walk_is_write},
    ),
    Mutant(
        name="walk-is-fetch",
        about="the walk of a fetch was taken for the fetch: the table was made executable, not writable",
        scenario="walks",
        applies=lambda target: target.policy.exec_grant is ExecGrant.ON_FETCH and walk_writes(target),
        misread={"is_write": _write_unless_walk, "is_exec": _fetch_or_walk},
    ),
    Mutant(
        name="protect-without-flush",
        about="pages were protected, and TLBs kept what allowed writes: they were missing from the log",
        scenario="log_get",
        actions={events.GetLog: (actions.collect, _report_only)},
    ),
    Mutant(
        name="protect-before-swap",
        about="pages were protected before the bitmap was swapped: a write between the two was forgotten",
        scenario="log_get",
        applies=lambda target: target.policy.dirty_mark is not DirtyMark.ON_HARVEST,  # there nothing is swapped
        actions={events.GetLog: (_protect_first, actions.flush, _take_bits)},
    ),
    Mutant(
        name="sequence-refreshed",
        about="the sequence was sampled again after the attribute was checked: its change in between went unnoticed",
        scenario="convert",
        applies=lambda target: target.has_private,
        changes=(after("check_private", Step("sample", sample)),),
    ),
    Mutant(
        name="track-skips-protected",
        about="a page that was protected for the dirty log already was not protected for good as a guest's table",
        scenario="track_logged",
        applies=lambda target: target.policy.write_tracking and not target.shadows,
        ports={"track_writes": _track_writable},
    ),
    Mutant(
        name="mmio-over-present",
        about="user space had changed a guest's table: an entry of MMIO took the place of one that stayed in TLBs",
        scenario="guest_map",
        applies=lambda target: target.shadows,
        ports={"map_mmio": _put_unflushed},
    ),
    Mutant(
        name="stale-before-reclaim",
        about="making table pages available retired the very table that the fault then mapped into",
        scenario="migrate",
        applies=lambda target: target.shadows,
        changes=(after("stale", Step("make_pages", make_pages)),),
    ),
    Mutant(
        name="mmio-generation-of-first-space",
        about="what a vCPU in another address space remembered as MMIO had the generation of the first one's slots",
        scenario="slot_create_smm",
        applies=lambda target: remembers_mmio(target) and target.backend.host(target.format).nr_address_spaces > 1,
        ports={"mmio_space": lambda self: 0},
    ),
    Mutant(
        name="completion-by-registers",
        about="what fault registers held was used after it was no longer that fault's; here to finish a device access",
        scenario="completion",
        applies=lambda target: bool(target.joints.decode_mmio) and target.policy.prefault is Prefault.OFFERED,
        complete=_by_registers,
    ),
    Mutant(
        name="block-while-mixing",
        about="a fault beside pages that are being converted mapped a block over them",
        scenario="convert_block",
        applies=lambda target: target.has_private,
        ports={"block_allowed": _any_block},
    ),
    Mutant(
        name="merge-without-break",
        about="pages were merged into a block, and TLBs that held a page met the block",
        scenario="log_stop",
        applies=lambda target: target.format.break_before_make and bool(target.policy.fit_sizes),
        ports={"map": _map_unflushed},
    ),
    *WITHOUT_BARRIERS,
)
"""All of them; the commits that fixed them are in fixes.toml, since titles name architectures."""
BY_NAME: Final[Mapping[str, Mutant]] = {mutant.name: mutant for mutant in MUTANTS}
