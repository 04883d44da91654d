"""Random histories of whole VMs beside naive models: 10,000 steps and more in every run of the suite."""

from __future__ import annotations

import os
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvmfault.errors import ModelError
from kvmfault.types import Hva
from kvmfault.vm.area import HvaRange
from tests.naive_vm import BLOCKS, MEMFD, VCPUS, Mode, NaiveVm, Slot

TARGETS: Final = ("arm64", "arm64:16k", "arm64@6.12", "x86-ept", "x86-npt", "x86-shadow", "loongarch")
ALL_STEPS: Final = 12_000
"""Of all targets together, at least."""
LONG: Final = os.environ.get("HYPOTHESIS_PROFILE") == "long"
STEPS: Final = 50
EXAMPLES: Final = 60

HEALTH: Final = tuple(HealthCheck)
PAGES = st.integers(0, 9 * 9 * 7 - 1)
KINDS = st.sampled_from(("read", "write", "write", "exec"))
NUMBERS = st.integers(0, 2)
ACCESSES = st.tuples(st.integers(0, VCPUS - 1), PAGES, KINDS)


class Machine(RuleBasedStateMachine):
    """Steps of user space, host and guest in any order."""

    target = ""
    steps = 0

    @initialize(
        mode=st.sampled_from(Mode),
        kind=st.sampled_from(("anon", "thp", "thp", "hugetlb")),
        eager=st.booleans(),
        small_exec=st.booleans(),
        ad=st.booleans(),
        logged=st.booleans(),
    )
    def begin(self, mode: Mode, kind: str, eager: bool, small_exec: bool, ad: bool, logged: bool) -> None:
        if kind == "hugetlb":
            kind = "thp" if self.target == "arm64:16k" else "hugetlb-2m"
        self.it = NaiveVm(self.target, mode, kind, eager=eager, small_exec=small_exec, hardware_ad=ad)
        self.thp = kind == "thp"
        self.create(0, 0, readonly=False, logged=logged, memfd=False, userfault=False)

    def place(self, n: int) -> int:
        """A page: mostly one of a slot, else anywhere."""
        found = self.existing(n)
        if found is None or n % 9 == 0:
            return self.it.places()[n % len(self.it.places())]
        slot, block = found[1], self.it.in_block
        near = (0, 1, 70, block - 1, block, block + 70, slot.npages - 1)
        return slot.base + near[n // 9 % len(near)] % slot.npages

    def backed(self, n: int) -> Hva:
        page = self.place(n)
        found = self.it.slot_of(page)
        page = (page if found is None else found[1].hva + page - found[1].base) % (BLOCKS * self.it.in_block)
        return self.it.hva(page)

    def existing(self, n: int) -> tuple[int, Slot] | None:
        chosen = sorted(self.it.slots)
        return (chosen[n % len(chosen)], self.it.slots[chosen[n % len(chosen)]]) if chosen else None

    # User space: slots.

    @rule(
        number=NUMBERS,
        shape=st.integers(0, 3),
        readonly=st.booleans(),
        logged=st.booleans(),
        memfd=st.booleans(),
        userfault=st.booleans(),
    )
    def create(self, number: int, shape: int, *, readonly: bool, logged: bool, memfd: bool, userfault: bool) -> None:
        if number in self.it.slots:
            return
        n = self.it.in_block
        base, npages, hva = ((0, 2 * n, 0), (2 * n, n, 2 * n), (3 * n, n + 80, 1), (5 * n, n, n))[shape]
        memfd = memfd and self.it.has_memfd
        self.it.set_slot(
            number,
            Slot(base, npages, hva, readonly and not memfd, logged and not memfd, userfault, memfd),
        )

    @rule(n=NUMBERS, rare=st.integers(0, 3))
    def delete(self, n: int, rare: int) -> None:
        found = self.existing(n)
        if found and rare == 0:
            self.it.remove_slot(found[0])

    @rule(n=NUMBERS, log=st.booleans(), userfault=st.booleans())
    def change(self, n: int, log: bool, userfault: bool) -> None:
        self._change(n, 0, log, userfault)

    @rule(n=NUMBERS)
    def toggle_log(self, n: int) -> None:
        found = self.existing(n)
        if found:
            self._change(n, 0, not found[1].logged, found[1].userfault)

    @rule(n=NUMBERS, by=st.sampled_from((-1, 1)), log=st.booleans())
    def move(self, n: int, by: int, log: bool) -> None:
        found = self.existing(n)
        if found and not found[1].memfd and found[1].base + by * self.it.in_block >= 0:
            self._change(n, by * self.it.in_block, log, found[1].userfault)

    def _change(self, n: int, by: int, log: bool, userfault: bool) -> None:
        found = self.existing(n)
        if found:
            number, old = found
            self.it.set_slot(
                number,
                Slot(old.base + by, old.npages, old.hva, old.readonly, log and not old.memfd, userfault, old.memfd),
            )

    @rule(n=NUMBERS, at=PAGES, count=st.sampled_from((1, 3, 100)), wanted=st.booleans())
    def set_userfault(self, n: int, at: int, count: int, wanted: bool) -> None:
        found = self.existing(n)
        if found and found[1].userfault:
            number, slot = found
            first = self.place(at) % slot.npages
            count = min(count, slot.npages - first)
            self.it.vm.set_userfault(number, first, count, wanted=wanted)
            touched = set(range(first, first + count))
            slot.wanted = slot.wanted | touched if wanted else slot.wanted - touched

    # User space: logs.

    @rule(n=NUMBERS)
    def get_log(self, n: int) -> None:
        found = self.existing(n)
        if found is None:
            return
        number, slot = found
        before = self.it.recorded(number)
        got = self.it.vm.get_dirty_log(number)
        if self.it.mode is Mode.RING or not slot.logged:
            assert got.errno
            return
        assert set(got.pages) == before >= slot.written
        if self.it.mode is Mode.BITMAP:
            assert not self.it.recorded(number)
            slot.written = set()

    @rule(n=NUMBERS, word=st.integers(0, 3), words=st.integers(1, 2), bits=st.integers(0, (1 << 128) - 1))
    def clear_log(self, n: int, word: int, words: int, bits: int) -> None:
        found = self.existing(n)
        if found is None:
            return
        number, slot = found
        first, count = word * 64, words * 64
        if first + count > slot.npages:
            return
        before = self.it.recorded(number)
        got = self.it.vm.clear_dirty_log(number, first, count, bits)
        if self.it.mode is Mode.RING or not slot.logged:
            assert got
            return
        assert got == 0
        cleared = {first + i for i in range(count) if bits >> i & 1}
        assert self.it.recorded(number) == before - cleared
        slot.written -= cleared

    @precondition(lambda self: self.it.mode is Mode.RING)
    @rule(vcpu=st.integers(0, VCPUS - 1), reset=st.booleans())
    def harvest(self, vcpu: int, reset: bool) -> None:
        self.it.vm.harvest_ring(vcpu)
        if reset:
            self.it.vm.reset_rings()
            for number, slot in self.it.slots.items():
                slot.written &= self.it.recorded(number)

    # The guest.

    @rule(accesses=st.lists(ACCESSES, min_size=1, max_size=6))
    def run(self, accesses: list[tuple[int, int, str]]) -> None:
        for vcpu, at, kind in accesses:
            self.it.access(vcpu, self.place(at), kind)

    @rule(at=PAGES, accesses=st.lists(ACCESSES, min_size=2, max_size=6))
    def share(self, at: int, accesses: list[tuple[int, int, str]]) -> None:
        for vcpu, _, kind in accesses:
            self.it.access(vcpu, self.place(at), kind)

    @rule(accesses=st.lists(ACCESSES, min_size=1, max_size=4))
    def again(self, accesses: list[tuple[int, int, str]]) -> None:
        """The same before and after user space takes everything that was written."""
        self.run(accesses)
        for n, number in enumerate(sorted(self.it.slots)):
            if self.it.slots[number].npages % 64 == 0:
                self.clear_log(n, 0, self.it.slots[number].npages // 64, -1 & (1 << self.it.slots[number].npages) - 1)
            self.get_log(n)
        if self.it.mode is Mode.RING:
            for vcpu in range(VCPUS):
                self.harvest(vcpu, vcpu == VCPUS - 1)
        self.run(accesses)

    @rule(at=PAGES, pages=st.integers(1, 3), vcpu=st.integers(0, VCPUS - 1))
    def prefault(self, at: int, pages: int, vcpu: int) -> None:
        self.it.vm.prefault(self.it.gpa(self.place(at)), pages << self.it.page_shift, vcpu=vcpu)

    # The host.

    @rule(at=PAGES, what=st.sampled_from(("migrate", "make_cow", "evict", "make_missing", "write_protect")))
    def unmap(self, at: int, what: str) -> None:
        vm = self.it.vm
        hva = self.backed(at)
        try:
            span = getattr(vm.host, what)(hva)
        except ModelError:
            return
        vm.invalidate(span)

    @rule(at=PAGES)
    def supply(self, at: int) -> None:
        self.it.vm.host.supply(self.backed(at))

    @rule(at=PAGES, rare=st.integers(0, 5))
    def poison(self, at: int, rare: int) -> None:
        if rare == 0:
            self.it.vm.invalidate(self.it.vm.host.poison(self.backed(at)))

    @rule(at=PAGES, collapse=st.booleans())
    def reshape(self, at: int, collapse: bool) -> None:
        vm, hva = self.it.vm, self.backed(at)
        try:
            span = vm.host.collapse(hva) if collapse else vm.host.split(hva)
        except ModelError:
            return
        vm.invalidate(span)

    @rule(at=PAGES, test_only=st.booleans())
    def age(self, at: int, test_only: bool) -> None:
        hva = self.backed(at)
        self.it.vm.age(HvaRange(hva, Hva(hva + self.it.page)), test_only=test_only)

    # Private memory.

    @precondition(lambda self: self.it.by_attribute)
    @rule(at=PAGES, count=st.sampled_from((1, 2, 600)), private=st.booleans())
    def convert(self, at: int, count: int, private: bool) -> None:
        first = self.place(at)
        pages = set(range(first, first + count))
        assert self.it.vm.set_attributes(self.it.gpa(first), count << self.it.page_shift, 8 * private) == 0
        self.it.private = self.it.private | pages if private else self.it.private - pages

    @precondition(lambda self: self.it.has_memfd)
    @rule(at=PAGES, count=st.sampled_from((1, 2, 90)))
    def punch(self, at: int, count: int) -> None:
        first = self.place(at) % (BLOCKS * self.it.in_block)
        count = min(count, BLOCKS * self.it.in_block - first)
        frames = self.frames(first, count)
        assert self.it.vm.punch_hole(MEMFD, first << self.it.page_shift, count << self.it.page_shift) == 0
        assert not frames & self.frames(first, count)

    def frames(self, first: int, count: int) -> set[object]:
        return {self.it.vm.memfd_pages.get((MEMFD, page), -page) for page in range(first, first + count)}

    # Writes that are tracked.

    @precondition(lambda self: self.it.by_attribute)
    @rule(at=PAGES)
    def track(self, at: int) -> None:
        page = self.place(at)
        if page not in self.it.private and self.it.slot_of(page):
            self.it.vm.track_writes(self.it.gfn(page))
            self.it.tracked.add(page)

    @rule(at=PAGES)
    def untrack(self, at: int) -> None:
        page = self.place(at)
        if page in self.it.tracked:
            self.it.vm.unprotect(self.it.gfn(page))
            self.it.tracked.discard(page)

    @rule()
    def fork(self) -> None:
        key = self.it.vm.key()
        old, self.it.vm = self.it.vm, self.it.vm.fork()
        assert self.it.vm.key() == key == old.key()
        old.table.clear()
        old.log.mark(0, 1)
        old.use_vcpu(0).vcpu.tlb.flush_all()
        assert self.it.vm.key() == key

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "it"):
            type(self).steps += 1
            self.it.check()


@pytest.mark.parametrize("target", TARGETS)
def test_every_promise_is_kept(target: str) -> None:
    class OnTarget(Machine):
        pass

    OnTarget.target, OnTarget.steps = target, 0
    run_state_machine_as_test(
        OnTarget,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            suppress_health_check=HEALTH,
            derandomize=not LONG,  # the suite asks the same each time, `make long` something new
        ),
    )
    assert OnTarget.steps >= ALL_STEPS / len(TARGETS)
