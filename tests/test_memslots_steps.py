"""Changes as atomic steps, look-ups while they run, and random sequences against a plain dictionary."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from errno import EEXIST, EFAULT, EINVAL
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmfault.errors import ModelError
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.memslot import Memslot, MemslotFlag
from kvmfault.vm.memslot_change import PLANS, Stage
from kvmfault.vm.memslot_request import Allocation, ChangeKind, MemslotRequest, Via
from kvmfault.vm.memslots import UPDATING, Memslots, SlotCache
from tests.conftest import ROOT

PAGE: Final = 0x1000
CAPS: Final = HostCaps(
    page_shift=12,
    max_gfn=Gfn(0xFFF),
    beyond_errno=EFAULT,
    user_top=Hva(1 << 47),
    nr_address_spaces=2,
    nr_user_slots=32764,
)


def ask(slot: int, page: int, pages: int, *, flags: int = 0, hva: int = 0x100000) -> MemslotRequest:
    return MemslotRequest(slot=slot, gpa=Gpa(page * PAGE), size=pages * PAGE, hva=Hva(hva), flags=flags)


def world(*requests: MemslotRequest) -> Memslots:
    slots = Memslots(CAPS)
    for request in requests:
        assert not slots.set_region(request).errno
    return slots


def found(slots: Memslots, page: int, as_id: int = 0) -> Memslot:
    slot = slots.find(Gfn(page), as_id)
    assert slot is not None
    return slot


def run_to(slots: Memslots, stage: Stage) -> None:
    while slots.next_stage is not stage:
        assert slots.step() is None


# Generations and the two sets.


def test_a_generation_starts_at_its_address_space_and_counts_swaps_by_their_number() -> None:
    slots = Memslots(CAPS)
    assert [slots.generation(i) for i in (0, 1)] == [0, 1]
    steps = [
        (ask(0, 0, 4), 2),
        (ask(0, 0, 4, flags=1), 4),
        (ask(0, 8, 4), 8),
        (ask(0, 8, 4), 8),
        (ask(0, 8, 0), 12),
        (ask(0x10000, 0, 4), 12),
    ]
    for request, generation in steps:
        assert slots.set_region(request).errno == 0
        assert slots.generation(0) == generation
    assert slots.generation(1) == 3
    one = Memslots(replace(CAPS, nr_address_spaces=1))
    one.set_region(ask(0, 0, 4))
    assert one.generation() == 1


def test_each_swap_makes_the_other_set_active() -> None:
    slots = Memslots(CAPS)
    indices = []
    for request in (ask(0, 0, 4), ask(0, 0, 4, flags=1), ask(0, 8, 4)):
        slots.set_region(request)
        indices.append(slots.node_index())
        assert slots.inactive().slots() == slots.slots()
    assert indices == [1, 0, 0]


@pytest.mark.parametrize(
    ("kind", "request_", "trail"),
    [
        (ChangeKind.CREATE, ask(5, 32, 4), ["-", "-", "*N", "N", "N"]),
        (ChangeKind.FLAGS_ONLY, ask(1, 16, 4, flags=1), ["O", "O", "*N", "N", "N"]),
        (ChangeKind.DELETE, ask(1, 16, 0), ["O", "*I", "I", "I", "I", "*-", "-", "-"]),
        (ChangeKind.MOVE, ask(1, 17, 4), ["O", "*I", "I", "I", "I", "*N", "N", "N"]),
    ],
)
def test_what_a_look_up_sees_after_each_step(kind: ChangeKind, request_: MemslotRequest, trail: list[str]) -> None:
    """O the old slot, I its INVALID copy, N the new slot, * while the generation has its update bit."""
    slots = world(ask(0, 0, 4), ask(1, 16, 4))
    old, (pages, generation) = slots.by_id(1), (slots.total_pages, slots.generation())
    assert slots.begin(request_) is None
    new = slots.changing[1]
    seen, stages, result = [], [], None
    while True:
        slot = slots.by_id(request_.id)
        assert slot is None or slots.find(slot.base_gfn) is slot
        assert slots.visible(request_.id) is (None if slot and slot.invalid else slot)
        what = "-" if slot is None else "I" if slot.invalid else "N" if slot == new else "O"
        assert what != "I" or (old is not None and slot == replace(old, flags=MemslotFlag.INVALID))
        seen.append(("*" if slots.generation() & UPDATING else "") + what)
        if slots.next_stage is None:
            break
        stages.append(slots.next_stage)
        assert slots.total_pages == pages  # only COMMIT counts
        result = slots.step()
        assert (result is None) == (slots.next_stage is not None)
    assert result is not None
    assert (result.kind, result.errno) == (kind, 0)
    assert tuple(stages) == PLANS[kind]
    assert seen == trail
    assert slots.generation() == generation + 2 * sum(stage.waits_for_readers for stage in stages)
    assert slots.inactive().slots() == slots.slots()


def test_only_swaps_wait() -> None:
    waits = {s: (s.waits_for_invalidations, s.waits_for_readers) for s in Stage}
    assert {s for s, (invalidations, _) in waits.items() if invalidations} == {
        Stage.PUBLISH_INVALID,
        Stage.PUBLISH,
        Stage.REVERT,
    }
    assert {s for s, (_, readers) in waits.items() if readers} == {Stage.SETTLE_INVALID, Stage.SETTLE}


# Failure in the middle.


def test_a_refused_move_comes_back() -> None:
    slots = world(ask(0, 0, 4), ask(1, 16, 4, flags=1))
    before, pages, generation, index = slots.slots(), slots.total_pages, slots.generation(), slots.node_index()
    assert slots.begin(ask(1, 0x1000, 4)) is None
    run_to(slots, Stage.PREPARE)
    assert found(slots, 16).invalid
    assert slots.step() is None
    assert slots.next_stage is Stage.REVERT
    assert found(slots, 16).invalid
    assert slots.step() is None
    assert slots.slots() == before
    assert slots.generation() == generation + 2 | UPDATING
    done = slots.step()
    assert done is not None
    assert (done.errno, done.kind, done.rule) == (EFAULT, ChangeKind.MOVE, "gfn-limit")
    assert (slots.slots(), slots.inactive().slots(), slots.total_pages) == (before, before, pages)
    assert (slots.generation(), slots.node_index()) == (generation + 4, index)
    assert slots.set_region(ask(1, 32, 4, flags=1)).errno == 0  # nothing is left of it


def test_a_refused_creation_swaps_nothing() -> None:
    slots = world(ask(0, 0, 4))
    before = slots.key()
    assert slots.set_region(ask(1, 0x1000, 4)).errno == EFAULT
    assert slots.set_region(ask(0, 0, 4, flags=1), failing=Allocation.DIRTY_BITMAP).errno
    assert slots.key() == before


def test_one_change_at_a_time() -> None:
    slots = world(ask(0, 0, 4))
    with pytest.raises(ModelError, match="no memslot change is under way"):
        slots.step()
    assert slots.changing == (None, None)
    slots.begin(ask(0, 0, 0))
    before = slots.key()
    with pytest.raises(ModelError, match="a memslot change is under way"):
        slots.begin(ask(1, 8, 4))
    assert slots.key() == before


# Copies.


def test_a_fork_goes_its_own_way_even_in_the_middle_of_a_change() -> None:
    slots = world(ask(0, 0, 4))
    slots.begin(ask(0, 8, 4))
    run_to(slots, Stage.FLUSH)
    copy, before = slots.fork(), slots.key()
    assert copy.key() == before
    keys = {before}
    while copy.next_stage:
        copy.step()
        assert copy.key() not in keys
        keys.add(copy.key())
    copy.open_file(7, None)
    assert copy.key() not in keys
    assert slots.key() == before
    assert slots.next_stage is Stage.FLUSH
    assert found(slots, 0).invalid
    while slots.step() is None:
        pass
    assert slots.key() in keys


def test_a_set_is_equal_to_itself_in_another_process() -> None:
    """Names hash differently there, so a remembered hash must not travel."""
    active = world(ask(0, 0, 4, flags=1)).inactive()
    hash(active)
    code = (
        "import pickle, sys; from kvmfault.vm.memslot import slot_set\n"
        "came = pickle.load(sys.stdin.buffer); made = slot_set(came.slots())\n"
        "assert came == made and hash(came) == hash(made)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(active), env=environment, check=True)


def test_state_can_be_pickled_in_the_middle_of_a_change() -> None:
    slots = world(ask(0, 0, 4), ask(1, 8, 4, flags=1))
    slots.begin(ask(0, 16, 4))
    run_to(slots, Stage.FLUSH)
    copy = pickle.loads(pickle.dumps(slots))
    assert copy.key() == slots.key()
    while slots.step() is None:
        assert copy.step() is None
        assert copy.find(Gfn(2)) == slots.find(Gfn(2))
    copy.step()
    assert copy.key() == slots.key()


def test_equal_histories_have_equal_keys() -> None:
    a, b = (world(ask(0, 0, 4), ask(1, 8, 4)) for _ in range(2))
    assert a.key() == b.key()
    assert hash(a.key()) == hash(b.key())
    b.set_region(ask(1, 8, 4, flags=1))
    assert a.key() != b.key()


# Look-ups.


def test_a_slot_answers_what_a_fault_asks() -> None:
    slots = world(ask(1, 16, 4, flags=3, hva=0x7000))
    slot = found(slots, 18)
    assert (slot.readonly, slot.logs_dirty, slot.invalid) == (True, True, False)
    assert slot.hva_of(Gfn(18)) == 0x9000
    assert [slot.contains(Gfn(g)) for g in (15, 16, 19, 20)] == [False, True, True, False]
    assert (slots.find(Gfn(15)), slots.find(Gfn(20)), slots.find(Gfn(18), 1)) == (None, None, None)


def test_hva_of_counts_pages_of_the_host() -> None:
    slots = Memslots(replace(CAPS, page_shift=14))
    slots.set_region(MemslotRequest(slot=0, gpa=Gpa(0x10000), size=0x10000, hva=Hva(0x40000)))
    slot = found(slots, 5)
    assert (slot.base_gfn, slot.npages, slot.hva_of(Gfn(5)), slot.hva_end) == (4, 4, 0x44000, 0x50000)


def test_an_internal_slot_is_found_but_not_visible() -> None:
    slots = Memslots(CAPS)
    slots.set_region(replace(ask(32764, 0, 4), via=Via.KERNEL))
    assert found(slots, 0) is slots.by_id(32764)
    assert slots.visible(32764) is None


def test_a_cache_never_changes_the_answer() -> None:
    slots = world(ask(0, 0, 4), ask(1, 8, 4), ask(0x10000, 0, 2))
    cache = SlotCache()
    slot, cache = slots.find_cached(Gfn(1), cache)
    assert slot is slots.find(Gfn(1))
    assert cache == (slot, slots.generation())
    assert slots.find_cached(Gfn(2), cache) == (slot, cache)
    assert slots.find_cached(Gfn(6), cache) == (None, cache)  # a miss keeps the slot
    other, kept = slots.find_cached(Gfn(1), cache, 1)  # another address space has other generations
    assert other is slots.find(Gfn(1), 1)
    assert kept == (other, slots.generation(1))
    slots.begin(ask(0, 0, 0))
    while slots.next_stage:
        now, cache = slots.find_cached(Gfn(1), cache)
        assert now is slots.find(Gfn(1))
        slots.step()
    assert slots.find_cached(Gfn(1), cache) == (None, SlotCache(None, slots.generation()))


def test_hva_ranges_mean_frames_in_every_slot_and_space() -> None:
    slots = world(
        ask(0, 0, 16, hva=0x100000),
        ask(1, 0x100, 4, hva=0x108000),  # inside the first one's addresses
        ask(2, 0x200, 4, hva=0x200000),
        ask(0x10000, 0x300, 16, hva=0x100000),
    )

    def hits(start: int, end: int) -> list[tuple[int, int, int, int]]:
        return [(h.slot.as_id, h.slot.id, h.start, h.end) for h in slots.in_hva_range(Hva(start), Hva(end))]

    assert hits(0x109000, 0x10A000) == [(0, 0, 9, 10), (0, 1, 0x101, 0x102), (1, 0, 0x309, 0x30A)]
    assert hits(0x1, 0x100000) == []
    assert hits(0xFFFFF, 0x100001) == [(0, 0, 0, 1), (1, 0, 0x300, 0x301)]
    assert hits(0x100FFF, 0x101001) == [(0, 0, 0, 2), (1, 0, 0x300, 0x302)]  # a page that is touched at all counts
    assert hits(0x10E000, 0x200001) == [(0, 0, 14, 16), (0, 2, 0x200, 0x201), (1, 0, 0x30E, 0x310)]
    assert hits(0x10C000, 0x10C001) == [(0, 0, 12, 13), (1, 0, 0x30C, 0x30D)]  # where slot 1 has ended
    assert hits(0x204000, 1 << 47) == []
    slots.begin(ask(2, 0x200, 0))
    run_to(slots, Stage.FLUSH)
    assert hits(0x200000, 0x201000) == [(0, 2, 0x200, 0x201)]  # INVALID slots too


# Random sequences.


@dataclass
class Naive:
    page: int
    pages: int
    hva: int
    flags: int


class Sequences(RuleBasedStateMachine):
    """Random well-formed requests; the model is a dictionary that is searched from end to end."""

    PAGES: Final = 24

    @initialize(spaces=st.sampled_from((1, 2)), shift=st.sampled_from((12, 14, 16)))
    def start(self, spaces: int, shift: int) -> None:
        self.shift = shift
        caps = replace(CAPS, nr_address_spaces=spaces, page_shift=shift, max_gfn=Gfn(self.PAGES - 1))
        self.slots = Memslots(caps)
        self.model: dict[tuple[int, int], Naive] = {}
        self.generations = list(range(spaces))
        self.cache = SlotCache()
        self.forked: tuple[Memslots, object] | None = None

    @rule(
        as_id=st.integers(0, 2),
        slot=st.integers(0, 4),
        page=st.integers(0, PAGES),
        pages=st.sampled_from((0, 1, 2, 2, 5)),
        hva=st.sampled_from((0x100, 0x100, 0x102)),
        flags=st.sampled_from((0, 0, 0, 1, 2, 3)),
    )
    def request(self, as_id: int, slot: int, page: int, pages: int, hva: int, flags: int) -> None:
        spaces = len(self.generations)
        old = self.model.get((as_id, slot))
        met = [k for k, s in self.model.items() if k[0] == as_id and s.page < page + pages and page < s.page + s.pages]
        kind, errno, swaps = None, 0, 0
        new = Naive(page, pages, hva, flags)
        if as_id >= spaces or (pages == 0 and old is None):
            errno = EINVAL
        elif pages == 0:
            kind, swaps = ChangeKind.DELETE, 2
        elif old is not None and (old.pages != pages or old.hva != hva or (old.flags ^ flags) & 2):
            errno = EINVAL
        elif old == new:
            pass
        elif (old is None or old.page != page) and [k for k in met if k != (as_id, slot)]:
            errno = EEXIST
        else:
            kind = ChangeKind.CREATE if old is None else ChangeKind.FLAGS_ONLY
            swaps = 1
            if old is not None and old.page != page:
                kind, swaps = ChangeKind.MOVE, 2
            if page + pages > self.PAGES:
                errno = EFAULT
                swaps = 2 if kind is ChangeKind.MOVE else 0
        done = self.slots.set_region(
            MemslotRequest(
                slot=as_id << 16 | slot,
                gpa=Gpa(page << self.shift),
                size=pages << self.shift,
                hva=Hva(hva << self.shift),
                flags=flags,
            )
        )
        assert (done.errno, done.kind) == (errno, kind)
        if as_id < spaces:
            self.generations[as_id] += swaps * spaces
        if kind is ChangeKind.DELETE:
            del self.model[as_id, slot]
        elif kind is not None and not errno:
            self.model[as_id, slot] = new

    @rule()
    def fork(self) -> None:
        self.forked = self.slots.fork(), self.slots.key()

    @invariant()
    def agrees(self) -> None:
        for as_id in range(len(self.generations)):
            self.check(as_id)
        assert self.slots.total_pages == sum(s.pages for s in self.model.values())
        if self.forked:
            assert self.forked[0].key() == self.forked[1]

    def check(self, as_id: int) -> None:
        here = {slot: s for (space, slot), s in self.model.items() if space == as_id}
        assert self.slots.generation(as_id) == self.generations[as_id]
        assert self.slots.inactive(as_id).slots() == self.slots.slots(as_id)
        assert [slot.id for slot in self.slots.slots(as_id)] == sorted(here, key=lambda k: here[k].page)
        for gfn in range(self.PAGES + 6):
            owner = [slot for slot, s in here.items() if s.page <= gfn < s.page + s.pages]
            slot = self.slots.find(Gfn(gfn), as_id)
            assert ([slot.id] if slot else []) == owner
            cached, self.cache = self.slots.find_cached(Gfn(gfn), self.cache, as_id)
            assert cached is slot
        for slot_id in range(5):
            slot, model = self.slots.by_id(slot_id, as_id), here.get(slot_id)
            assert (slot is None) == (model is None)
            if slot and model:
                mine = Naive(slot.base_gfn, slot.npages, slot.hva >> self.shift, int(slot.flags))
                assert mine == model
        for page in range(0xFE, 0x10A):
            start, end = Hva((page << self.shift) + 1), Hva((page + 2) << self.shift)
            mine_hits = {(h.slot.as_id, h.slot.id, h.start, h.end) for h in self.slots.in_hva_range(start, end)}
            assert mine_hits == {
                (a, k, s.page + max(page, s.hva) - s.hva, s.page + min(page + 2, s.hva + s.pages) - s.hva)
                for (a, k), s in self.model.items()
                if s.hva < page + 2 and page < s.hva + s.pages
            }


TestSequences = Sequences.TestCase
