"""The Vm as its user builds it: what is refused, what changes of slots and memory do to it, and that it is a value."""

from __future__ import annotations

import sys
from collections.abc import Callable
from errno import ENOENT

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import Fixed
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.target import backend
from kvmfault.contract.values import SlotFlush
from kvmfault.errors import ModelError, UsageError
from kvmfault.machine.guest import Ended
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot_request import MemslotRequest
from tests.worlds import GPA, HVA, ONE_OF_EACH, SIZE, Watched, fault, leaf, world

DELETE = MemslotRequest(slot=0, gpa=Gpa(GPA), size=0, hva=Hva(HVA))


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="no backend 'nope'"):
        Vm.on("nope")
    vm = Vm.on("arm64")
    with pytest.raises(ModelError, match="no kind of host memory 'cotton'; there is: anon, thp, hugetlb-2m,"):
        vm.back(HVA, SIZE, "cotton")
    with pytest.raises(ModelError, match=r"^memslot 0: EINVAL"):
        vm.add_memslot(0, gpa=GPA + 1, size=SIZE, hva=HVA)
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA)
    with pytest.raises(ModelError, match=r"^memslot 1: EEXIST \(overlap\)"):
        vm.add_memslot(1, gpa=GPA, size=SIZE, hva=HVA)
    with pytest.raises(TypeError, match="nosuch"):
        vm.with_facts(nosuch=1)


def test_what_was_refused_changed_nothing() -> None:
    vm = world("x86-ept")
    before = vm.key()
    wrong: list[Callable[[], object]] = [
        lambda: vm.back(HVA, SIZE, "cotton"),
        lambda: vm.add_memslot(1, gpa=GPA, size=SIZE, hva=HVA),
        lambda: vm.back(HVA + 1, SIZE),
    ]
    for make in wrong:
        with pytest.raises(ModelError):
            make()
    assert vm.key() == before


def test_building_chains() -> None:
    facts = VmFacts(nested=True)
    vm = Watched.on("arm64", facts=facts).add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE).with_facts()
    assert isinstance(vm, Watched)
    assert isinstance(vm.fork(), Watched)
    assert vm.facts == facts
    assert Vm.on(backend("arm64:16k")).page_shift == 14


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_forks_do_not_see_each_other(target: str) -> None:
    root = world(target, "thp", log_dirty=True)
    root.resolve(fault(target, "write"))
    keys = {"root": root.key()}
    mapped, deleted, moved = root.fork(), root.fork(), root.fork()
    mapped.resolve(fault(target, "write", GPA + 0x10_0000))
    deleted.set_region(DELETE)
    moved.invalidate(moved.host.migrate(Hva(HVA)))
    grandchild = mapped.fork()
    grandchild.resolve(fault(target, "write", GPA + 0x20_0000))
    grandchild.get_dirty_log(0)
    keys |= {"mapped": mapped.key(), "deleted": deleted.key(), "moved": moved.key(), "grandchild": grandchild.key()}
    assert len(set(keys.values())) == len(keys)
    assert root.key() == keys["root"]
    assert leaf(root, GPA) is not None
    assert leaf(deleted, GPA) is leaf(moved, GPA) is None
    assert leaf(root, GPA + 0x20_0000) is leaf(mapped, GPA + 0x20_0000) is None
    # the original is used on, and its forks stay
    root.set_region(DELETE)
    assert {"mapped": mapped.key(), "moved": moved.key()} == {n: keys[n] for n in ("mapped", "moved")}


@settings(max_examples=15)
@given(st.lists(st.tuples(st.sampled_from(("write", "read", "fork", "migrate", "log", "unlog")), st.integers(0, 3))))
def test_equal_histories_give_equal_keys(history: list[tuple[str, int]]) -> None:
    def live(forking: bool) -> Vm:
        vm: Vm = world("x86-npt", "thp")
        for what, where in history:
            if what in ("write", "read"):
                vm.resolve(fault("x86-npt", what, GPA + where * 0x20_1000))
            elif what == "migrate":
                vm.invalidate(vm.host.migrate(Hva(HVA + where * 0x20_1000)))
            elif what in ("log", "unlog"):
                vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA, log_dirty=what == "log")
            elif forking:
                vm = vm.fork()
        return vm

    assert live(forking=True).key() == live(forking=False).key()


def test_a_fork_costs_the_same_whatever_is_mapped() -> None:
    # no copy of tables, pages or slots: what a fork allocates does not depend on how much there is
    def cost(pages: int) -> int:
        vm = Vm.on("x86-ept").add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE)
        for i in range(pages):
            vm.table.map(
                Gpa(GPA + i * 4096), 4096, Pfn(i), 7, Memory.NORMAL, host_writable=True, young=True, tag=0
            )  # fmt: skip
            vm.private.add(2 * i)
        before = sys.getallocatedblocks()
        forks = [vm.fork() for _ in range(20)]
        grown = sys.getallocatedblocks() - before
        assert len(forks) == 20
        return grown

    assert cost(3000) < cost(1) + 400


@pytest.mark.parametrize(("target", "elsewhere_stays"), [("arm64", True), ("x86-ept", False), ("x86-npt", False)])
def test_what_deleting_a_slot_drops(target: str, elsewhere_stays: bool) -> None:
    vm = world(target)
    vm.add_memslot(1, gpa=1 << 32, size=1 << 20, hva=HVA)
    vm.resolve(fault(target, "write", 1 << 32))
    vm.resolve(fault(target, "write"))
    other = vm.fork()
    assert not vm.set_region(DELETE).errno
    assert leaf(vm, GPA) is None
    assert (leaf(vm, 1 << 32) is not None) is elsewhere_stays
    other.set_region(DELETE, flush=SlotFlush.SLOT)
    assert leaf(other, GPA) is None
    assert leaf(other, 1 << 32) is not None


def test_a_slot_of_the_second_address_space_is_another() -> None:
    vm = Vm.on("x86-ept").back(HVA, SIZE)
    smm = MemslotRequest(slot=1 << 16, gpa=Gpa(GPA), size=SIZE, hva=Hva(HVA))
    assert not vm.set_region(smm).errno
    assert vm.find_slot(Gfn(GPA >> 12)) is None
    vm.vcpu.as_id = 1
    assert vm.find_slot(Gfn(GPA >> 12)) is not None
    assert isinstance(vm.resolve(fault("x86-ept", "write")), Fixed)


def test_dirty_pages_are_collected_by_slot() -> None:
    vm = world("x86-ept", log_dirty=True)
    vm.add_memslot(3, gpa=1 << 32, size=1 << 20, hva=HVA, log_dirty=True)
    vm.resolve(fault("x86-ept", "write"))
    vm.resolve(fault("x86-ept", "write", 1 << 32))
    assert (vm.get_dirty_log(0).pages, vm.get_dirty_log(3).pages) == ((0,), (0,))
    assert vm.log.pages(0) == vm.log.pages(3) == ()


def test_registers_of_the_vcpu() -> None:
    vm = Vm.on("arm64")
    vm.vcpu.registers = tuple(range(31))
    assert [vm.register(i) for i in (0, 30, 31)] == [0, 30, 0]


def test_a_guest_memfd_that_is_not_there() -> None:
    vm = world("x86-ept")
    slot = vm.find_slot(Gfn(GPA >> 12))
    assert slot is not None
    assert vm.pin_memfd(slot, Gfn(GPA >> 12)).errno == ENOENT


@pytest.mark.parametrize("target", ["arm64", "x86-ept", "x86-npt"])
def test_an_access_to_a_poisoned_page_ends_with_the_signal(target: str) -> None:
    # vcpu_run and kvm_arch_vcpu_ioctl_run look for pending signals before the guest runs again
    vm = world(target)
    vm.invalidate(vm.host.poison(Hva(HVA)))
    done = vm.access(GPA, 8)
    assert done.ended is Ended.SIGNALLED
    assert len(done.faults) == len(vm.signals) == 1


@pytest.mark.parametrize("target", ["arm64", "x86-ept", "x86-npt"])
def test_a_page_that_user_space_supplies_is_waited_for_in_the_background_too(target: str) -> None:
    vm = world(target)
    vm.invalidate(vm.host.make_missing(Hva(HVA)))
    assert vm.access(GPA, 8).ended is Ended.WAITS
    vm.host.supply(Hva(HVA))
    assert vm.access(GPA, 8).ended is Ended.DONE
