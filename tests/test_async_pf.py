"""Pages fetched in the background: the queue of one vCPU, and when x86 may use it."""

from __future__ import annotations

import pickle

import pytest

from arch.x86.joints import can_defer
from kvmfault.contract.fault import MmioFault, PageFault, prefetched
from kvmfault.contract.outcome import Fixed, Retry
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.target import backend
from kvmfault.machine.async_pf import MOST, AsyncPageFaults, Waiting
from kvmfault.types import Gfn, Gpa, Hva
from tests.worlds import GPA, HVA, Watched, fault, world

X86 = ("x86-ept", "x86-npt", "x86-shadow")
READ, WRITE = fault("x86-ept", "read"), fault("x86-ept", "write")


def test_tokens_count_and_name_the_vcpu() -> None:
    queue = AsyncPageFaults(vcpu_id=3).queue(Gfn(7), READ).queue(Gfn(8), WRITE, shadowed=True)
    first, second = Waiting(Gfn(7), prefetched(READ), 0x1003), Waiting(Gfn(8), prefetched(WRITE), 0x2003, True)
    assert queue.waiting == (first, second)
    assert (queue.oldest, queue.find(Gfn(8)), queue.find(Gfn(9))) == (first, second, None)
    assert AsyncPageFaults().oldest is None
    last = AsyncPageFaults(vcpu_id=5, counter=(1 << 20) - 1).queue(Gfn(1), READ).queue(Gfn(2), READ)
    assert [w.token for w in last.waiting] == [0xFFFF_F005, 0x1005]  # 32 bits, and never 0


def test_no_more_than_64() -> None:
    queue = AsyncPageFaults()
    for n in range(MOST):
        queue = queue.queue(Gfn(n), READ)
    full = queue.queue(Gfn(99), READ)
    assert len(full.waiting) == MOST == 64
    assert full.find(Gfn(99)) is None
    assert full.counter == queue.counter + 1
    assert full.ready(full.waiting[0]).queue(Gfn(99), READ).waiting[-1].token == (MOST + 2) << 12


def test_a_page_arrives_once() -> None:
    queue = AsyncPageFaults().queue(Gfn(1), READ).queue(Gfn(2), READ)
    first, second = queue.waiting
    done = queue.ready(first)
    assert done.waiting == (second,)
    with pytest.raises(ValueError, match="not in list"):
        done.ready(first)
    assert queue.waiting == (first, second)
    assert hash(queue.cleared()) == hash(AsyncPageFaults(counter=3))


@pytest.mark.parametrize("shape", ["raw", "snapshot"])
def test_a_prefetched_fault_is_the_same_fault(shape: str) -> None:
    of: MmioFault = WRITE if shape == "raw" else backend("x86-ept").snapshot(WRITE)
    again = prefetched(of)
    asked = [n for n in (*vars(PageFault), *vars(MmioFault)) if not n.startswith("_") and n != "is_prefetch"]
    for name in asked:
        before, after = getattr(of, name), getattr(again, name)
        assert (before() if callable(before) else before) == (after() if callable(after) else after), name
    assert (of.is_prefetch, again.is_prefetch) == (False, True)
    assert hash(again) == hash(prefetched(of))
    assert pickle.loads(pickle.dumps(prefetched(backend("x86-ept").snapshot(WRITE)))).is_prefetch


@pytest.mark.parametrize(
    ("facts", "may"),
    [
        ({}, True),
        ({"interrupt_controller": False}, False),
        ({"event_reinjected": True}, False),
        ({"exception_pending": True}, False),
        ({"halt_exits": False}, False),
        ({"halt_exits": False, "async_delivery": True}, True),
        ({"async_delivery": True, "interrupts_allowed": False}, False),
        ({"interrupts_allowed": False}, False),
    ],
)
def test_when_a_vcpu_may_go_on_without_its_page(facts: dict[str, bool], may: bool) -> None:
    assert can_defer(VmFacts(**facts)) is may
    for target in X86:
        vm = Deferring.of(target).with_facts(**facts)
        assert isinstance(vm.resolve(fault(target, "write")), Retry if may else Fixed)
        assert len(vm.queue.waiting) == may


class Deferring(Watched):
    """A VM that fetches in the background."""

    queue = AsyncPageFaults()

    @classmethod
    def of(cls, target: str, *, readonly: bool = False) -> Deferring:
        vm = cls(world(target).target)
        vm.add_memslot(0, gpa=GPA, size=1 << 30, hva=HVA, readonly=readonly).back(HVA, 1 << 30)
        vm.invalidate(vm.host.evict(Hva(HVA)))
        return vm

    def defer(self, fault: MmioFault, gfn: Gfn, *, queue: bool) -> bool:
        if self.queue.find(gfn) is not None:
            return True
        if queue:
            self.queue = self.queue.queue(gfn, fault)
        return self.queue.find(gfn) is not None


@pytest.mark.parametrize("target", X86)
def test_the_page_is_mapped_when_it_is_there(target: str) -> None:
    vm = Deferring.of(target)
    assert isinstance(vm.resolve(fault(target, "write")), Retry)
    assert isinstance(vm.resolve(fault(target, "write")), Retry)  # it is on its way: the vCPU halts
    (waiting,) = vm.queue.waiting
    vm.queue = vm.queue.ready(waiting)
    assert isinstance(vm.resolve(waiting.fault), Fixed)  # waits for the page itself, and does not count as a use
    leaf = vm.table.leaf(Gpa(GPA))
    assert leaf is not None
    assert not vm.format.is_young(leaf.desc)


@pytest.mark.parametrize("target", X86)
def test_a_read_only_slot_is_never_queued(target: str) -> None:
    vm = Deferring.of(target, readonly=True)
    assert isinstance(vm.resolve(fault(target, "read")), Fixed)
    assert not vm.queue.waiting
    assert vm.queue.counter == 1
