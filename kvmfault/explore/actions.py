"""What host and user space do: the atomic actions of which the kernel makes each event of a scenario."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Final, NamedTuple, TypeAlias, cast

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.values import SlotFlush
from kvmfault.explore.world import Blocked, Explored
from kvmfault.scenario import events
from kvmfault.scenario.fields import error_name
from kvmfault.scenario.meaning import bits_to_clear, change_guest_map, change_host, place, slot_request
from kvmfault.types import Gfn, Gpa, Gva, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot_change import Stage

__all__ = [
    "Action",
    "Done",
    "Spans",
    "age",
    "ask",
    "begin_change",
    "change",
    "clear_bits",
    "collect",
    "end_change",
    "flush",
    "flush_and_unlock",
    "harvest",
    "mark",
    "prefault",
    "range_end",
    "range_start",
    "remap_guest",
    "report",
    "reset",
    "slot_flush",
    "stage",
    "store",
    "track",
    "zap",
]

Spans: TypeAlias = tuple[tuple[Gfn, Gfn], ...]


class Done(NamedTuple):
    """An action of an event: its name, what the next one has to know, and whether the same action comes again."""

    name: str
    data: Hashable = None
    again: bool = False
    note: str = ""
    refused: str = ""
    """The ioctl's error, which ends the event."""


Action: TypeAlias = Callable[[Explored, events.Event, str, Hashable], Done]
"""What an event does next, given the event, who does it, and what the action before left."""


# MMU notifiers: what the host does to memory.


def range_start(vm: Explored, event: events.Event, who: str, data: Hashable, *, locked: bool = True) -> Done:
    """Under mmu_lock from here to the flush. (kvm_mmu_notifier_invalidate_range_start, kvm_mmu_invalidate_begin)"""
    hva = place(vm, _placed(event))
    spans = [span for span in change_host(vm.host.fork(), _placed(event), hva) if span is not None]
    if not spans:
        return Done("range_start", (hva, ()), note="nothing is mapped there")
    if locked:
        vm.need_lock()  # whatever changes in vm.invalidations does so while no fault holds mmu_lock: see GUARDED
    vm.invalidations.notifier_enters()
    whole = HvaRange(min(s.start for s in spans), max(s.end for s in spans))
    hits = tuple((hit.start, hit.end) for hit in vm.slots.in_hva_range(*whole))
    if hits:
        if locked:
            vm.lock_for_write(who)
        vm.invalidations.begin()
        for start, end in hits:
            vm.invalidations.add(start, end)
    return Done("range_start", (hva, hits))


def zap(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Entries go. (kvm_unmap_gfn_range)"""
    vm.late = True
    _, hits = cast(tuple[Hva, Spans], data)
    for start, end in hits:
        vm.drop(start, end)
    return Done("zap", data)


def flush_and_unlock(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """TLBs follow, and mmu_lock is dropped. (kvm_flush_remote_tlbs)"""
    vm.flush_stale()
    if vm.writer == who:
        vm.writer = None
    return Done("flush", data)


def change(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """The host's own page table changes; frames may be somebody else's from here on."""
    hva, _ = cast(tuple[Hva, Spans], data)
    for _ in change_host(vm.host, _placed(event), hva):
        pass
    return Done(event.do, data)


def range_end(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """(kvm_mmu_notifier_invalidate_range_end, kvm_mmu_invalidate_end)"""
    _, hits = cast(tuple[Hva, Spans], data)
    vm.need_lock()
    if hits:
        vm.invalidations.end()
    if vm.invalidations.active:
        vm.invalidations.notifier_leaves()
    return Done("range_end")


def _placed(event: events.Event) -> events.Host | events.Back:
    assert isinstance(event, events.Host | events.Back)
    return event


def age(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Without a flush. (kvm_age_gfn)"""
    assert isinstance(event, events.Age)
    vm.need_lock()
    start = vm.hva_of(event.gpa)
    young = vm.age(HvaRange(start, Hva(start + event.size)), test_only=event.test_only)
    return Done("age", note="young" if young else "old")


# Memslots.


def ask(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Judge the request. (kvm_set_memory_region)"""
    assert isinstance(event, events.SetSlot | events.DeleteSlot)
    ended = vm.slots.begin(slot_request(vm, event))
    if ended is not None and ended.errno:
        return Done("request", refused=str(ended))
    old, new = vm.slots.changing
    if old is not None and not (new is not None and new.logs_dirty):  # user space does not want to know any more
        logging, unreported = vm.written.logging - {old.number}, vm.written.unreported
        left = frozenset(page for page in unreported if page[0] != old.number)
        vm.written = vm.written._replace(logging=logging, unreported=left)
    return Done("request")


_STAGES: Final = {
    Stage.PUBLISH_INVALID: "publish INVALID",
    Stage.SETTLE_INVALID: "readers left",
    Stage.FLUSH: "zap slot",
    Stage.PREPARE: "prepare",
    Stage.PUBLISH: "publish",
    Stage.SETTLE: "readers left",
    Stage.REVERT: "publish old",
    Stage.COMMIT: "commit",
}


def stage(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """The next stage of the change. (kvm_set_memslot)"""
    now = vm.slots.next_stage
    if now is None:
        return Done("return", data)
    if now.waits_for_invalidations and vm.invalidations.active:
        raise Blocked
    if now.waits_for_readers:
        vm.end_grace()
    old, new = vm.slots.changing
    note = ""
    if now is Stage.FLUSH:
        vm.need_lock()
        vm.late = True
        if vm.target.policy.slot_flush is SlotFlush.TABLE:
            vm.clear_tables()
        elif old is not None:
            vm.drop(old.base_gfn, old.end_gfn)
    if now is Stage.COMMIT:
        vm.need_lock()
        vm.late = True
    if now is Stage.PUBLISH:
        vm.slot_published(old, new)
    ended = vm.slots.step(vm.host)
    if now.waits_for_invalidations:
        vm.begin_grace()
    if now is Stage.COMMIT:
        vm.slot_changed(old, new)
        vm.change_userfault(old, new)
    if ended is not None and ended.errno:
        note = f"refused: {ended}"
    logging = now is Stage.COMMIT and new is not None and new.logs_dirty
    following = ("logs", new.number) if logging and new is not None else data
    return Done(_STAGES[now], following, again=vm.slots.next_stage is not None and now is not Stage.FLUSH, note=note)


def slot_flush(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """TLBs follow what the last stage changed in the table; then what is left of the change."""
    vm.flush_stale()
    if vm.slots.next_stage is None:
        active = frozenset(s.number for space in vm.slots.active for s in space.slots() if s.logs_dirty)
        if vm.written.logging != active:
            vm.written = vm.written._replace(logging=active)
    return Done("flush")


# The dirty log.


def collect(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Bits are taken and pages protected, under mmu_lock. (kvm_get_dirty_log_protect)"""
    assert isinstance(event, events.GetLog)
    vm.need_lock()
    vm.late = True
    answer = vm.get_dirty_log(event.slot)
    if answer.errno:
        return Done("take bits", refused=error_name(answer.errno))
    pages = () if vm.log.manual else tuple((event.slot, page) for page in answer.pages)
    vm.telling(pages)
    return Done("take bits", pages, note=f"pages {list(answer.pages)}")


def clear_bits(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """(kvm_clear_dirty_log_protect)"""
    assert isinstance(event, events.ClearLog)
    vm.need_lock()
    vm.late = True
    before = vm.log.pages(event.slot)
    errno = vm.clear_dirty_log(event.slot, event.first, event.count, bits_to_clear(event))
    if errno:
        return Done("clear bits", refused=error_name(errno))
    cleared = tuple((event.slot, page) for page in before if page not in vm.log.pages(event.slot))
    vm.telling(cleared)
    return Done("clear bits", cleared)


def report(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """TLBs follow, outside the lock; then user space reads the pages that it was told of."""
    vm.flush_stale()
    vm.told(cast(tuple[tuple[int, int], ...], data))
    return Done("flush")


def harvest(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """User space reads a ring."""
    assert isinstance(event, events.HarvestRing)
    entries = vm.harvest_ring(event.vcpu)
    return Done("harvest", note=f"{len(entries)} entries")


def reset(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Pages that were read are protected again, under mmu_lock. (kvm_dirty_ring_reset)"""
    vm.need_lock()
    vm.late = True
    read = tuple((e.slot, e.offset) for vcpu in vm.vcpus for e in vcpu.ring if e.harvested)
    vm.reset_rings()
    vm.telling(read)
    return Done("reset", read)


# Memory that user space gives in other ways.


def _spans(vm: Explored, event: events.Event) -> Spans:
    if isinstance(event, events.Convert):
        return tuple(vm._in_slots(event.gpa >> vm.page_shift, event.gpa + event.size >> vm.page_shift))
    assert isinstance(event, events.PunchHole)
    return tuple(vm._bound_to(event.memfd, event.offset, event.size))


def begin_change(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """(kvm_pre_set_memory_attributes, kvm_gmem_invalidate_begin)"""
    spans = _spans(vm, event)
    if spans:
        vm.lock_for_write(who)
        vm.late = True
        vm._begin(list(spans))
        if isinstance(event, events.Convert):
            vm.mixing += spans
    return Done("begin, zap", spans)


def store(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Attributes are stored, or pages leave the file: without mmu_lock."""
    if isinstance(event, events.Convert):
        first, last = event.gpa >> vm.page_shift, event.gpa + event.size >> vm.page_shift
        (vm.private.add if event.private else vm.private.discard)(first, last)
        return Done("store attributes", data)
    assert isinstance(event, events.PunchHole)
    vm.replace_memfd_pages(event.memfd, event.offset, event.size)
    return Done("drop pages", data)


def end_change(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """(kvm_mmu_invalidate_end)"""
    spans = cast(Spans, data)
    if spans:
        vm.need_lock()
        vm._end(list(spans))
        if isinstance(event, events.Convert):
            vm.mixing = tuple(span for span in vm.mixing if span not in spans)
    return Done("end")


def mark(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """User space writes its bitmap; the kernel knows nothing of it."""
    assert isinstance(event, events.Mark)
    for first, last in event.pages:
        vm.set_userfault(event.slot, first, last + 1 - first, wanted=event.wanted)
    return Done("set bits" if event.wanted else "clear bits")


def track(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """(__kvm_write_track_add_gfn)"""
    assert isinstance(event, events.Track)
    vm.need_lock()
    vm.late = True
    vm.track_writes(Gfn(event.gpa >> vm.page_shift))
    return Done("write-protect")


def flush(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """TLBs follow."""
    vm.flush_stale()
    return Done("flush")


def prefault(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """All of it at once, while the vCPU is in user space: both need vcpu->mutex. (KVM_PRE_FAULT_MEMORY)"""
    assert isinstance(event, events.Prefault)
    if not vm.of_vcpu("idle", event.vcpu):
        raise Blocked
    answer = vm.prefault(event.gpa, event.size, vcpu=event.vcpu)
    vm.unlock()
    vm.vcpu_part("marks", frozenset())
    address = Gpa(event.gpa & -4096)
    asked = Access(gpa=address, gva=Gva(address), offset=0, read=True, final=True, cause=Cause.MISSING, prefetch=True)
    vm.vcpu_part("fault", asked)
    return Done("prefault", note=f"error {answer.errno}" if answer.errno else "")


def remap_guest(vm: Explored, event: events.Event, who: str, data: Hashable) -> Done:
    """Nobody tells the kernel."""
    assert isinstance(event, events.GuestMap)
    change_guest_map(vm, event)
    return Done("write entry")
