"""What happens meanwhile: invalidations and slot changes between the steps, and the two kernels' ways to notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from kvmfault.contract.outcome import Emulate, Error, Exit, Fixed, Outcome, Reason, Retry
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot_change import Stage
from kvmfault.vm.memslot_request import ChangeKind, MemslotRequest
from tests.worlds import ALL, ARM, GPA, HVA, ONE_OF_EACH, SIZE, Watched, fault, leaf, permission, world

PAGE: Final = HvaRange(Hva(HVA), Hva(HVA + 4096))
ELSEWHERE: Final = HvaRange(Hva(HVA + (1 << 24)), Hva(HVA + (1 << 24) + 4096))


def migrate(vm: Watched) -> None:
    """The page under GPA moves, with a whole notifier call."""
    vm.invalidate(vm.host.migrate(Hva(HVA)))


def invalidate_elsewhere(vm: Watched) -> None:
    vm.invalidate(ELSEWHERE)


def begin(span: HvaRange) -> Callable[[Watched], None]:
    """A notifier call that starts, unmaps, and has not ended."""

    def begun(vm: Watched) -> None:
        (hit,) = vm.slots.in_hva_range(span.start, span.end)
        vm.invalidations.begin()
        vm.invalidations.add(hit.start, hit.end)
        vm.table.unmap(Gpa(hit.start << vm.page_shift), Gpa(hit.end << vm.page_shift))

    return begun


def end(vm: Watched) -> None:
    vm.invalidations.end()


# An invalidation in the middle.


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("when", ["pin", "lock"])
def test_a_page_that_moves_while_it_is_looked_up_is_not_mapped(target: str, when: str) -> None:
    vm = world(target)
    before = vm.host.pin(Hva(HVA), write=True).pfn
    vm.meanwhile[when] = migrate
    assert isinstance(vm.resolve(fault(target, "write")), Retry)
    assert leaf(vm, GPA) is None
    assert vm.log.pages(0) == ()
    assert vm.events[-1] == "release"
    assert isinstance(vm.resolve(fault(target, "write")), Fixed)
    now = vm.host.pin(Hva(HVA), write=True).pfn
    assert now != before
    assert vm.format.hpa(vm.table.walk(Gpa(GPA)).desc, 12) >> 12 == now


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("when", ["find_slot", "topup"])
def test_what_is_over_before_the_sample_does_not_matter(target: str, when: str) -> None:
    vm = world(target)
    vm.meanwhile[when] = migrate
    assert isinstance(vm.resolve(fault(target, "write")), Fixed)
    assert vm.format.hpa(vm.table.walk(Gpa(GPA)).desc, 12) >> 12 == vm.host.pin(Hva(HVA), write=True).pfn


@pytest.mark.parametrize("target", ALL)
def test_an_ended_invalidation_of_another_page_counts_too(target: str) -> None:
    # the sequence knows no frames
    vm = world(target)
    vm.meanwhile["pin"] = invalidate_elsewhere
    assert isinstance(vm.resolve(fault(target, "write")), Retry)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("when", ["find_slot", "pin", "lock"])
def test_a_running_invalidation_of_this_page(target: str, when: str) -> None:
    vm = world(target)
    vm.meanwhile[when] = begin(PAGE)
    assert isinstance(vm.resolve(fault(target, "write")), Retry)
    assert leaf(vm, GPA) is None
    end(vm)
    assert isinstance(vm.resolve(fault(target, "write")), Fixed)


@pytest.mark.parametrize("target", ALL)
def test_a_running_invalidation_of_another_page_stops_only_who_does_not_look_at_frames(target: str) -> None:
    vm = world(target)
    vm.meanwhile["pin"] = begin(ELSEWHERE)
    outcome = vm.resolve(fault(target, "write"))
    assert isinstance(outcome, Fixed if target.startswith("x86") else Retry)


@pytest.mark.parametrize("target", ALL)
def test_what_is_given_up_before_the_costly_part(target: str) -> None:
    vm = world(target)
    begin(PAGE)(vm)
    vm.events.clear()
    assert isinstance(vm.resolve(fault(target, "write")), Retry)
    assert any(e.startswith("pin") for e in vm.events) is target.startswith("arm64")
    again = world(target)
    again.meanwhile["pin"] = begin(PAGE)
    again.events.clear()
    again.resolve(fault(target, "write"))
    assert ("lock" in again.events) is target.startswith("arm64")  # x86 looks again behind the pin


@pytest.mark.parametrize("target", ALL)
def test_a_whole_invalidation_behind_the_lock_cannot_happen_but_one_before_it_is_seen(target: str) -> None:
    vm = world(target, "thp")
    vm.resolve(fault(target, "read"))
    assert leaf(vm, GPA) is not None
    vm.meanwhile["lock"] = lambda vm: vm.invalidate(vm.host.back(Hva(HVA), 1 << 21))
    assert isinstance(vm.resolve(permission(target, "exec", granule=1 << 21)), Retry)
    assert leaf(vm, GPA) is None  # relaxing did not bring it back


@pytest.mark.parametrize("target", ALL)
def test_memory_that_goes_away_while_it_is_looked_up(target: str) -> None:
    vm = world(target)
    vm.meanwhile["pin"] = lambda vm: vm.invalidate(vm.host.unback(Hva(HVA), SIZE))
    assert vm.resolve(fault(target, "write")) == Error(14)  # the pin finds nothing; nothing is mapped either way
    assert leaf(vm, GPA) is None


@pytest.mark.parametrize("target", ALL)
def test_a_retired_table(target: str) -> None:
    vm = world(target)
    vm.answers["table_retired"] = True
    assert isinstance(vm.resolve(fault(target, "write")), Retry)
    assert list(vm.table.entries()) == []
    assert vm.events[-1] == "release"


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_invalidating_unmaps_and_the_next_fault_maps_what_is_there_now(target: str) -> None:
    vm = world(target, "thp")
    vm.resolve(fault(target, "write"))
    sequence = vm.invalidations.seq
    vm.back(HVA, SIZE, "anon")
    assert vm.invalidations.seq == sequence + 1
    assert leaf(vm, GPA) is None
    outcome = vm.resolve(fault(target, "write"))
    assert isinstance(outcome, Fixed)
    assert outcome.size == 4096


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_an_invalidation_that_meets_no_slot_is_none(target: str) -> None:
    vm = world(target)
    key = vm.key()
    vm.invalidate(HvaRange(Hva(0x1000), Hva(0x2000)))
    vm.invalidate(None)
    assert vm.key() == key


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_ageing_is_noticed_once(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    assert vm.age(PAGE, test_only=True)
    assert vm.age(PAGE)
    assert not vm.age(PAGE)
    assert not vm.age(ELSEWHERE)


# A slot that is being deleted or moved.


def changing(target: str, kind: ChangeKind, *, until: Stage) -> Watched:
    """Stopped just before the step *until* of the change."""
    vm = world(target)
    vm.resolve(fault(target, "write"))
    size, gpa = (0, GPA) if kind is ChangeKind.DELETE else (SIZE, 2 * GPA)
    assert vm.slots.begin(MemslotRequest(slot=0, flags=0, gpa=Gpa(gpa), size=size, hva=Hva(HVA))) is None
    while vm.slots.next_stage is not until:
        if vm.slots.next_stage is Stage.FLUSH:
            vm.table.clear()
        vm.slots.step(vm.host)
    vm.events.clear()
    return vm


def mmio(outcome: Outcome) -> bool:
    return (isinstance(outcome, Exit) and outcome.reason is Reason.MMIO) or outcome == Emulate()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("kind", [ChangeKind.DELETE, ChangeKind.MOVE])
@pytest.mark.parametrize("until", [Stage.SETTLE_INVALID, Stage.FLUSH, Stage.PREPARE, Stage.PUBLISH])
def test_an_invalid_slot(target: str, kind: ChangeKind, until: Stage) -> None:
    vm = changing(target, kind, until=until)
    slot = vm.find_slot(Gfn(GPA >> 12))
    assert slot is not None
    assert slot.invalid
    outcome = vm.resolve(fault(target, "write", size=4, register=1))
    if target.startswith("arm64"):
        assert mmio(outcome)  # as if there were no slot
    else:
        assert isinstance(outcome, Retry)
    assert not {"lock", "map"} & {e.split()[0] for e in vm.events}


@pytest.mark.parametrize("target", ALL)
def test_after_the_change_the_slot_is_gone(target: str) -> None:
    vm = changing(target, ChangeKind.DELETE, until=Stage.SETTLE)
    assert mmio(vm.resolve(fault(target, "write", size=4, register=1)))
    moved = changing(target, ChangeKind.MOVE, until=Stage.SETTLE)
    assert mmio(moved.resolve(fault(target, "write", size=4, register=1)))
    assert isinstance(moved.resolve(fault(target, "write", 2 * GPA)), Fixed)


@pytest.mark.parametrize("target", ALL)
def test_a_fault_that_found_the_slot_before_keeps_it(target: str) -> None:
    # reads of the old set are over before the flush (SRCU), so this is before it: the entry is dropped by the flush
    vm = world(target)

    def publish_invalid(vm: Watched) -> None:
        assert vm.slots.begin(MemslotRequest(slot=0, flags=0, gpa=Gpa(GPA), size=0, hva=Hva(HVA))) is None
        vm.slots.step(vm.host)

    vm.meanwhile["topup"] = publish_invalid
    assert isinstance(vm.resolve(fault(target, "write")), Fixed)
    assert leaf(vm, GPA) is not None


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_deleting_a_slot_drops_what_it_mapped(target: str) -> None:
    vm = world(target, "thp")
    vm.resolve(fault(target, "write"))
    result = vm.set_region(MemslotRequest(slot=0, flags=0, gpa=Gpa(GPA), size=0, hva=Hva(HVA)))
    assert not result.errno
    assert list(vm.table.entries()) == []


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_a_refused_request_changes_nothing(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    key = vm.key()
    result = vm.set_region(MemslotRequest(slot=1, flags=0, gpa=Gpa(GPA), size=SIZE, hva=Hva(HVA)))
    assert result.errno == 17
    assert vm.key() == key


@pytest.mark.parametrize("target", ARM)
def test_starting_a_log_makes_the_next_write_fault(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA, log_dirty=True)
    assert leaf(vm, GPA) == (GPA, 4096, "r--")
    assert isinstance(vm.resolve(permission(target, "write", granule=4096)), Fixed)
    assert vm.log.pages(0) == (0,)
