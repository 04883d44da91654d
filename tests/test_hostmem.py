"""Host memory: what a pin answers for every kind of area and page, sizes, and operations against a plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmfault.errors import ModelError
from kvmfault.types import Hva, Pfn
from kvmfault.vm.area import AreaKind, Pin, PinError, Vma
from kvmfault.vm.hostmem import HostMemory

K4, M2, M32, M512, G1 = 1 << 12, 1 << 21, 1 << 25, 1 << 29, 1 << 30
BASE: Final = Hva(0x7F00_0000_0000)
BELOW: Final = Hva(BASE - G1)


def at(offset: int) -> Hva:
    return Hva(BASE + offset)


def area(memory: HostMemory, hva: Hva) -> Vma:
    vma = memory.vma(hva)
    assert vma is not None
    return vma


def frame(memory: HostMemory, hva: Hva, *, write: bool = False) -> Pfn:
    pin = memory.pin(hva, write=write)
    assert pin.pfn is not None, pin
    return pin.pfn


# Pins: kind of area, read-only, what happened to the page, arguments of the pin, error, writable.
ANY: Final = (AreaKind.ANON, AreaKind.THP, AreaKind.HUGETLB_2M, AreaKind.HUGETLB_1G, AreaKind.PFNMAP)
MEMORY: Final = ANY[:-1]
R, W = {"write": False}, {"write": True}
ASYNC: Final = {"nowait": True}
SIGNAL: Final = {"interruptible": True, "signalled": True}

PINS: Final = [
    (ANY, False, None, R, None, True),
    (ANY, False, None, W, None, True),
    (ANY, True, None, R, None, False),
    (MEMORY, True, None, W, PinError.FAULT, None),
    (ANY[-1:], True, None, W, PinError.RO_FAULT, None),
    (MEMORY, False, "poison", R, PinError.HWPOISON, None),
    (MEMORY, False, "poison", W | ASYNC, PinError.HWPOISON, None),
    (MEMORY, False, "poison", W | SIGNAL, PinError.HWPOISON, None),
    (MEMORY, True, "poison", R, PinError.HWPOISON, None),
    (MEMORY, True, "poison", W, PinError.FAULT, None),  # the area is asked first
    (MEMORY, False, "evict", R, None, True),
    (MEMORY, False, "evict", W, None, True),
    (MEMORY, True, "evict", R, None, False),
    (MEMORY, False, "evict", R | ASYNC, PinError.NEEDS_IO, None),
    (MEMORY, False, "evict", W | ASYNC | SIGNAL, PinError.NEEDS_IO, None),
    (MEMORY, True, "evict", W | ASYNC, PinError.FAULT, None),  # waiting would not help
    (MEMORY, False, "evict", R | SIGNAL, PinError.SIGPENDING, None),
    (MEMORY, False, "evict", R | {"interruptible": True}, None, True),
    (MEMORY, False, "evict", R | {"signalled": True}, None, True),  # arm64 waits on
    (MEMORY, False, None, R | ASYNC | SIGNAL, None, True),  # nothing to wait for
    (ANY[-1:], False, "evict", R | ASYNC | SIGNAL, None, True),  # a device's page is put in at once
    (ANY[-1:], True, "evict", W, PinError.FAULT, None),
    (ANY[-1:], True, "evict", R, None, False),
    (MEMORY, False, "make_cow", R, None, False),
    (MEMORY, False, "make_cow", R | ASYNC | SIGNAL, None, False),
    (MEMORY, False, "make_cow", W, None, True),
    (MEMORY, True, "make_cow", R, None, False),
    (MEMORY, True, "make_cow", W, PinError.FAULT, None),
    (MEMORY, False, "migrate", R, None, True),
    (MEMORY, True, "migrate", W, PinError.FAULT, None),
]


@pytest.mark.parametrize(
    ("kind", "readonly", "event", "pin", "error", "writable"),
    [(kind, *row) for kinds, *row in PINS for kind in kinds],
)
def test_pin(
    kind: AreaKind,
    readonly: bool,
    event: str | None,
    pin: dict[str, bool],
    error: PinError | None,
    writable: bool | None,
) -> None:
    memory = HostMemory()
    memory.back(BASE, G1, kind, readonly=readonly)
    if event:
        getattr(memory, event)(at(0x5000))
    got = memory.pin(at(0x5678), **pin)
    assert got.error is error
    assert (got.pfn is None) == (error is not None)
    assert got.writable == bool(writable)
    assert got.device == (kind is AreaKind.PFNMAP and error is None)


def test_no_area() -> None:
    memory = HostMemory()
    assert memory.pin(BASE, write=False) == Pin(None, PinError.FAULT)
    assert (memory.vma(BASE), memory.mapping_size(BASE), memory.areas(Hva(0), Hva(1 << 47))) == (None, 0, ())


def test_a_pin_reads_the_area_by_its_offset() -> None:
    memory = HostMemory()
    memory.back(at(0x3000), 1 << 40, pfn=Pfn(0x777))
    assert [frame(memory, at(o)) for o in (0x3000, 0x3FFF, 0x4000, 0x3000 + (1 << 40) - 1)] == [
        0x777,
        0x777,
        0x778,
        0x777 + (1 << 28) - 1,
    ]
    assert memory.pin(at(0x2FFF), write=False).error is PinError.FAULT
    assert memory.pin(at(0x3000 + (1 << 40)), write=False).error is PinError.FAULT


@pytest.mark.parametrize("device", [None, True, False])
def test_device_frames(device: bool | None) -> None:
    memory = HostMemory()
    memory.back(BASE, K4, AreaKind.PFNMAP, device=device)
    assert memory.pin(BASE, write=False).device == (device is not False)


def test_frames_are_congruent_and_never_shared() -> None:
    memory = HostMemory()
    sizes = [K4, 3 * K4, M2, G1 + K4, K4]
    frames: set[int] = set()
    hva = at(5 * K4)
    for size in sizes:
        memory.back(hva, size, AreaKind.THP)
        assert (area(memory, hva).pfn - (hva >> 12)) % (M2 >> 12) == 0
        mine = set(range(area(memory, hva).pfn, area(memory, hva).pfn + (size >> 12)))
        assert not frames & mine
        frames |= mine
        hva = Hva(hva + size + 7 * K4)


def test_a_write_breaks_copy_on_write_and_says_so() -> None:
    memory = HostMemory()
    memory.back(BASE, M2)
    shared = frame(memory, at(0x5000))
    assert memory.make_cow(at(0x5000)) == (at(0x5000), at(0x6000))
    assert memory.pin(at(0x5000), write=False) == Pin(shared, None, False)
    assert memory.pin(at(0x5123), write=False).invalidated is None
    written = memory.pin(at(0x5123), write=True)
    assert written.pfn != shared
    assert (written.writable, written.invalidated) == (True, (at(0x5000), at(0x6000)))
    assert memory.pin(at(0x5000), write=True) == Pin(written.pfn, None, True)  # once only
    assert frame(memory, at(0x6000)) == shared + 1


def test_somebody_else_breaks_copy_on_write() -> None:
    memory = HostMemory()
    memory.back(BASE, M2)
    shared = frame(memory, BASE)
    memory.make_cow(BASE, 2 * K4)
    assert memory.break_cow(at(0x123)) == (BASE, at(K4))
    assert frame(memory, BASE) != shared
    assert memory.pin(BASE, write=False).writable
    assert not memory.pin(at(K4), write=False).writable
    with pytest.raises(ModelError, match=f"{BASE:#x} is not a page that a write would copy"):
        memory.break_cow(BASE)


def test_zero_page_is_one_frame_for_all() -> None:
    memory = HostMemory()
    memory.back(BASE, M2)
    memory.make_cow(BASE, 2 * K4, zero=True)
    assert frame(memory, BASE) == frame(memory, at(K4))
    assert frame(memory, BASE, write=True) != frame(memory, at(K4), write=True)


def test_a_page_that_left_comes_back_elsewhere() -> None:
    memory = HostMemory()
    memory.back(BASE, M2)
    before = frame(memory, BASE)
    memory.evict(BASE)
    after = frame(memory, BASE)
    assert after != before
    assert frame(memory, BASE) == after


def test_a_device_page_comes_back_where_it_was() -> None:
    memory = HostMemory()
    memory.back(BASE, M2, AreaKind.PFNMAP)
    before = frame(memory, BASE)
    memory.evict(BASE)
    assert memory.mapping_size(BASE) == 0
    assert frame(memory, BASE) == before


def test_migration_keeps_what_the_page_is() -> None:
    memory = HostMemory()
    memory.back(BASE, M2)
    before = frame(memory, BASE)
    assert memory.migrate(at(1)) == (BASE, at(K4))
    assert frame(memory, BASE) != before
    for event in (memory.make_cow, memory.evict, memory.poison):
        event(BASE)
        with pytest.raises(ModelError, match="only a present page of its own can move"):
            memory.migrate(BASE)


def test_poison_stays() -> None:
    memory = HostMemory()
    memory.back(BASE, M2)
    memory.poison(BASE)
    memory.evict(BASE, M2)
    memory.make_cow(BASE, M2)
    assert memory.pin(BASE, write=False).error is PinError.HWPOISON
    assert memory.pin(at(K4), write=False, nowait=True).error is PinError.NEEDS_IO  # nor is an absent page shared
    memory.back(BASE, M2)
    assert memory.pin(BASE, write=True).error is None  # fresh memory


def test_hugetlb_pages_are_one() -> None:
    memory = HostMemory()
    memory.back(BASE, 2 * M2, AreaKind.HUGETLB_2M)
    memory.back(at(G1), K4)  # so that the next free frame is not aligned by chance
    assert memory.make_cow(at(M2 + 0x5000)) == (at(M2), at(2 * M2))
    written = memory.pin(at(M2 + 0x7000), write=True)
    assert written.invalidated == (at(M2), at(2 * M2))
    assert frame(memory, at(M2)) == (written.pfn or 0) - 7
    assert frame(memory, at(M2)) % (M2 >> 12) == 0
    assert memory.mapping_size(at(M2)) == M2
    assert memory.poison(at(0x3000)) == (BASE, at(M2))
    assert memory.pin(at(M2 - 1), write=False).error is PinError.HWPOISON
    assert memory.pin(at(M2), write=False).error is None


# Sizes.


@pytest.mark.parametrize(("shift", "block"), [(12, M2), (14, M32), (16, M512)])
def test_thp_by_page_size(shift: int, block: int) -> None:
    memory = HostMemory(shift)
    memory.back(Hva(BASE - (1 << shift)), 2 * block + (2 << shift), AreaKind.THP)
    offsets = (-1, 0, block - 1, block, 2 * block - 1, 2 * block)
    page = 1 << shift
    assert [memory.mapping_size(at(o)) for o in offsets] == [page, block, block, block, block, page]
    assert {area(memory, at(o)).block_at(at(o)) for o in offsets} == {page}  # the area does not promise it


@pytest.mark.parametrize(
    ("kind", "block", "size"),
    [
        (AreaKind.ANON, None, K4),
        (AreaKind.HUGETLB_2M, None, M2),
        (AreaKind.HUGETLB_1G, None, G1),
        (AreaKind.PFNMAP, None, K4),
        (AreaKind.PFNMAP, M2, M2),
        (AreaKind.PFNMAP, G1, G1),
    ],
)
def test_area_and_mapping_sizes(kind: AreaKind, block: int | None, size: int) -> None:
    memory = HostMemory()
    memory.back(BASE, G1, kind, block=block)
    assert area(memory, BASE).block_at(at(0x5000)) == memory.mapping_size(at(0x5000)) == size


def test_a_device_block_must_fit_and_its_frames_be_aligned() -> None:
    memory = HostMemory()
    memory.back(at(K4), 2 * M2, AreaKind.PFNMAP, block=M2)
    vma = area(memory, at(K4))
    assert [vma.block_at(at(o)) for o in (K4, M2 - 1, M2, 2 * M2 - 1, 2 * M2)] == [K4, K4, M2, M2, K4]
    memory.back(BASE, M2, AreaKind.PFNMAP, block=M2, pfn=Pfn(0x201))
    assert (memory.mapping_size(BASE), area(memory, BASE).block_at(BASE)) == (K4, K4)
    memory.back(BASE, M2, AreaKind.PFNMAP, block=M2, pfn=Pfn(0x200))
    assert memory.mapping_size(BASE) == M2


def test_split_and_collapse() -> None:
    memory = HostMemory()
    memory.back(BASE, 3 * M2, AreaKind.THP)
    frames = [frame(memory, at(o)) for o in (0, M2)]
    before = memory.key()
    assert memory.split(at(M2 + 5)) == (at(M2), at(2 * M2))
    assert [memory.mapping_size(at(o)) for o in (0, M2, 2 * M2 - 1, 2 * M2)] == [M2, K4, K4, M2]
    assert memory.key() != before
    assert memory.collapse(at(2 * M2 - 1)) == (at(M2), at(2 * M2))
    assert [memory.mapping_size(at(o)) for o in (0, M2)] == [M2, M2]
    assert [frame(memory, at(o)) for o in (0, M2)] == frames


@pytest.mark.parametrize("event", ["poison", "evict", "make_cow", "migrate"])
def test_a_page_of_its_own_splits_its_block(event: str) -> None:
    memory = HostMemory()
    memory.back(BASE, 2 * M2, AreaKind.THP)
    assert getattr(memory, event)(at(0x5000)) == (BASE, at(M2))  # the whole block is unmapped
    gone = event in ("poison", "evict")
    assert [memory.mapping_size(at(o)) for o in (0x4000, 0x5000, M2)] == [K4, 0 if gone else K4, M2]
    assert memory.evict(at(0x7000)) == (at(0x7000), at(0x8000))  # and then only pages are left
    if event == "poison":
        with pytest.raises(ModelError, match="has a poisoned page"):
            memory.collapse(BASE)
    else:
        memory.collapse(BASE)
        assert memory.mapping_size(at(0x5000)) == M2
        assert frame(memory, at(0x5000)) == frame(memory, BASE) + 5


def test_ranges_of_events_cover_the_leaves_they_touch() -> None:
    memory = HostMemory()
    memory.back(BASE, 4 * M2, AreaKind.THP)
    assert memory.evict(at(M2 + 5), 1) == (at(M2), at(2 * M2))
    assert memory.evict(at(K4), 3 * M2) == (BASE, at(4 * M2))
    assert memory.evict(at(K4 + 1), K4) == (at(K4), at(3 * K4))
    with pytest.raises(ModelError, match=f"nothing is mapped at {at(4 * M2):#x}"):
        memory.evict(at(4 * M2 - K4), 2 * K4)


# Areas.


def test_unback_keeps_the_rest() -> None:
    memory = HostMemory()
    memory.back(BASE, 10 * K4, AreaKind.ANON, tags=True)
    frames = [frame(memory, at(i * K4)) for i in range(10)]
    memory.evict(at(4 * K4))
    assert memory.unback(at(3 * K4), 2 * K4) == (at(3 * K4), at(5 * K4))
    assert [(v.start - BASE, v.end - BASE, v.tags) for v in memory.areas(Hva(0), Hva(1 << 47))] == [
        (0, 3 * K4, True),
        (5 * K4, 10 * K4, True),
    ]
    for i in (0, 2, 5, 9):
        assert frame(memory, at(i * K4)) == frames[i]
    assert memory.unback(at(3 * K4), 2 * K4) is None
    assert memory.unback(at(2 * K4), 4 * K4) == (at(2 * K4), at(6 * K4))
    assert memory.back(at(8 * K4), 8 * K4) == (at(8 * K4), at(10 * K4))  # what it replaced


def test_a_cut_block_is_no_block() -> None:
    memory = HostMemory()
    memory.back(BASE, 2 * M2, AreaKind.THP)
    memory.unback(at(M2 - K4), K4)
    assert [memory.mapping_size(at(o)) for o in (0, M2 - K4, M2)] == [K4, 0, M2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.back(at(1), K4), "0x1000 bytes at 0x7f0000000001 are not whole units of 0x1000"),
        (lambda m: m.back(BASE, 0), "0x0 bytes"),
        (lambda m: m.back(BASE, K4, AreaKind.HUGETLB_2M), "not whole units of 0x200000"),
        (lambda m: m.back(BASE, M2, AreaKind.THP, block=M2), "block is for pfnmap areas; a thp area has its own"),
        (lambda m: m.back(BASE, M2, AreaKind.PFNMAP, block=3 * K4), "block 0x3000 is not a power of two"),
        (lambda m: m.back(BASE, M2, AreaKind.PFNMAP, block=K4 // 2), "block 0x800 is not a power of two of at least"),
        (lambda m: m.back(BASE, M2, AreaKind.THP, pfn=Pfn(1)), "frame 0x1 is not aligned as hva 0x7f0000000000 is"),
        (lambda m: m.unback(at(K4), K4), "cuts a hugetlb-2m page"),
        (lambda m: m.back(at(K4), K4), "cuts a hugetlb-2m page"),
        (lambda m: m.unback(Hva(-K4), K4), "-0x1000 are not whole"),
        (lambda m: m.poison(at(8 * M2)), "nothing is mapped at 0x7f0001000000"),
        (lambda m: m.poison(at(2 * M2)), "in a pfnmap area"),
        (lambda m: m.make_cow(at(2 * M2)), "in a pfnmap area"),
        (lambda m: m.migrate(at(2 * M2)), "in a pfnmap area"),
        (lambda m: m.make_cow(at(M2), 2 * M2), "in a pfnmap area"),
        (lambda m: m.break_cow(BASE), "is not a page that a write would copy"),
        (lambda m: m.split(BASE), "is not mapped by a block that can be split"),
        (lambda m: m.collapse(BASE), "is not in a split block"),
        (lambda m: m.collapse(at(4 * M2)), "is not in a split block"),
        (lambda m: m.break_cow(at(6 * M2)), "is not a page that a write would copy"),
    ],
)
def test_what_no_host_could_do_changes_nothing(call: Callable[[HostMemory], object], message: str) -> None:
    memory = HostMemory()
    memory.back(BASE, 2 * M2, AreaKind.HUGETLB_2M)
    memory.back(at(2 * M2), M2, AreaKind.PFNMAP)
    memory.back(at(4 * M2), M2, AreaKind.PFNMAP, block=M2)
    memory.split(at(4 * M2))
    memory.back(at(6 * M2), M2, readonly=True)
    memory.make_cow(at(6 * M2))
    before = memory.key()
    with pytest.raises(ModelError, match=message):
        call(memory)
    assert memory.key() == before


def test_state_does_not_grow_with_the_guest() -> None:
    memory = HostMemory()
    memory.back(BELOW, 1 << 46, AreaKind.THP)
    assert memory.pin(Hva(BELOW + (1 << 46) - 1), write=True).error is None
    assert len(repr(memory.key())) < 1000


# Random operations.


class Memory(RuleBasedStateMachine):
    """The model says per page: absent area (no entry), or the last thing that happened to it."""

    PAGES: Final = 24

    @initialize()
    def start(self) -> None:
        self.memory = HostMemory()
        self.model: dict[int, tuple[AreaKind, bool, str]] = {}
        self.forked: tuple[HostMemory, object] | None = None

    pages = st.integers(0, PAGES - 1)
    sizes = st.integers(1, 6)

    @rule(
        page=pages, size=sizes, kind=st.sampled_from((AreaKind.ANON, AreaKind.THP, AreaKind.PFNMAP)), ro=st.booleans()
    )
    def back(self, page: int, size: int, kind: AreaKind, ro: bool) -> None:
        self.memory.back(at(page * K4), size * K4, kind, readonly=ro)
        self.model |= dict.fromkeys(range(page, page + size), (kind, ro, "plain"))

    @rule(page=pages, size=sizes)
    def unback(self, page: int, size: int) -> None:
        gone = [p for p in range(page, page + size) if self.model.pop(p, None)]
        notified = self.memory.unback(at(page * K4), size * K4)
        assert notified == ((at(gone[0] * K4), at((gone[-1] + 1) * K4)) if gone else None)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), event=st.sampled_from(("poison", "evict", "make_cow", "migrate")))
    def event(self, data: st.DataObject, event: str) -> None:
        page = data.draw(st.sampled_from(sorted(self.model)))
        kind, ro, was = self.model[page]
        refused = kind is AreaKind.PFNMAP and event != "evict"
        refused |= event == "migrate" and was in ("poison", "evict", "make_cow")
        if refused:
            with pytest.raises(ModelError):
                getattr(self.memory, event)(at(page * K4))
            return
        getattr(self.memory, event)(at(page * K4))
        if was != "poison" and (was, event) != ("evict", "make_cow"):
            self.model[page] = (kind, ro, event)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), write=st.booleans())
    def pin(self, data: st.DataObject, write: bool) -> None:
        page = data.draw(st.sampled_from(sorted(self.model)))
        kind, ro, was = self.model[page]
        pin = self.memory.pin(at(page * K4), write=write)
        if pin.error is None and (was == "evict" or (was == "make_cow" and write)):
            self.model[page] = (kind, ro, "plain")
        assert (pin.error is None) == (was != "poison" and not (ro and write))
        assert pin.writable == (pin.error is None and not ro and (was != "make_cow" or write))

    @rule()
    def fork(self) -> None:
        self.forked = self.memory.fork(), self.memory.key()

    @invariant()
    def agrees(self) -> None:
        if self.forked:
            assert self.forked[0].key() == self.forked[1]
        probe = self.memory.fork()  # pins change memory: ask a copy
        frames = set()
        for page in range(self.PAGES + 6):
            hva = at(page * K4)
            kind, ro, was = self.model.get(page, (None, False, ""))
            vma = probe.vma(hva)
            assert (vma and vma.kind, bool(vma and vma.readonly)) == (kind, ro)
            assert probe.mapping_size(hva) == (K4 if kind and was not in ("poison", "evict") else 0)
            pin = probe.pin(hva, write=False)
            if pin.pfn is not None:
                assert pin.pfn not in frames
                frames.add(pin.pfn)
        assert self.memory.key() == self.memory.fork().key()


TestMemory = Memory.TestCase


def test_a_host_with_pages_of_64k_has_no_huge_pages_of_1g() -> None:
    with pytest.raises(ModelError, match="a host with 64K pages has no huge pages of 1G"):
        HostMemory(16).back(Hva(0), 1 << 30, AreaKind.HUGETLB_1G)
