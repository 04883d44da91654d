"""The second-stage table against a naive model, a dict of leaves, in every format of every backend."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arch.x86.spte import EPT_4K_5LEVEL, EPT_4K_NO_AD
from kvmfault.contract.format import Kind, Memory, R, Stage2Format, W, block_sizes, watch_writes
from kvmfault.contract.ports import MapResult, Repair
from kvmfault.contract.target import backends
from kvmfault.errors import ModelError
from kvmfault.machine.stage2 import Stage2
from kvmfault.machine.table import Found, Removed
from kvmfault.types import Gpa, Hpa, Pfn

FORMATS: Final[dict[str, Stage2Format]] = {
    f"{b.name}:{name}": fmt for b in backends().values() for name, fmt in b.formats.items()
} | {"x86-ept:4k-no-ad": EPT_4K_NO_AD, "x86-ept:4k-5level": EPT_4K_5LEVEL}
EVERY_FORMAT: Final = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


@dataclass
class Naive:
    """Leaves and MMIO entries by first address; nothing else is kept."""

    fmt: Stage2Format
    splits: bool
    at: dict[int, tuple[int, int]] = field(default_factory=dict)
    """first address -> (shift, descriptor)"""

    @property
    def shifts(self) -> list[int]:
        return [level.shift for level in self.fmt.levels]

    def over(self, gpa: int) -> tuple[int, int, int] | None:
        for shift in self.shifts:
            start = gpa & -(1 << shift)
            if self.at.get(start, (None,))[0] == shift:
                return (start, *self.at[start])
        return None

    def walk(self, gpa: int) -> Found:
        found = self.over(gpa)
        if found is not None:
            return Found(Gpa(found[0]), found[1], found[2])
        starts = sorted(self.at)
        for shift in self.shifts:  # ends where no table is needed for anything smaller
            start = gpa & -(1 << shift)
            i = bisect_left(starts, start)
            if shift == self.shifts[-1] or not (i < len(starts) and starts[i] < start + (1 << shift)):
                return Found(Gpa(start), shift, self.fmt.empty)
        raise AssertionError

    def within(self, start: int, end: int) -> list[tuple[int, int, int]]:
        return [(a, s, d) for a, (s, d) in sorted(self.at.items()) if a < end and a + (1 << s) > start]

    def make_room(self, gpa: int, shift: int) -> None:
        # what lies over the new entry is split or dropped, what lies below goes
        while (found := self.over(gpa)) is not None and found[1] > shift:
            start, above, desc = found
            del self.at[start]
            if self.splits and self.fmt.kind(desc, above) is Kind.LEAF:
                below = max(s for s in self.shifts if s < above)
                for i in range(1 << above - below):
                    self.at[start + (i << below)] = (below, self.fmt.child_leaf(desc, above, below, i))
        first = gpa & -(1 << shift)
        for start, _, _ in self.within(first, first + (1 << shift)):
            if self.at[start][0] < shift:
                del self.at[start]

    def map(self, gpa: int, shift: int, desc: int) -> MapResult:
        first = gpa & -(1 << shift)
        self.make_room(gpa, shift)
        old = self.at.get(first)  # also a piece of a block that was split just now
        if old is not None:
            leaf = self.fmt.kind(old[1], shift) is Kind.LEAF
            if old[1] == desc or (leaf and self.fmt.perm_mask and not (old[1] ^ desc) & ~self.fmt.perm_mask):
                return MapResult.UNCHANGED
        self.at[first] = (shift, desc)
        return MapResult.FIXED

    def change(self, start: int, desc: int) -> None:
        self.at[start] = (self.at[start][0], desc)

    def tables(self) -> int:
        needed = set()
        for start, (shift, _) in self.at.items():
            for above, here in zip(self.shifts, self.shifts[1:], strict=False):
                if here >= shift:
                    needed.add((here, start >> above))
        return 1 + len(needed)


def same(table: Stage2, naive: Naive) -> None:
    assert [(f.gpa, f.shift, f.desc) for f in table.entries()] == [(a, s, d) for a, (s, d) in sorted(naive.at.items())]
    assert table.tables() == naive.tables()


BASE: Final = 0x1_4000_0000


@st.composite
def addresses(draw: st.DrawFn, fmt: Stage2Format) -> int:
    """Few addresses that meet often: at the ends of blocks of every size, and pages inside."""
    sizes = block_sizes(fmt)
    gpa = (BASE & -sizes[-1]) + draw(st.integers(0, 1)) * sizes[-1]
    for size, below in zip(sizes[:0:-1], sizes[-2::-1], strict=True):
        gpa += draw(st.sampled_from((0, 1, size // below - 1))) * below
    return gpa + draw(st.sampled_from((0, 0x18)))


def operations(fmt: Stage2Format) -> st.SearchStrategy[tuple[object, ...]]:
    gpa, prot, yes = addresses(fmt), st.integers(0, 7), st.booleans()
    size = st.sampled_from(block_sizes(fmt))
    pages = st.sampled_from((1, 2, 600)).map(lambda n: n << fmt.page_shift)
    span = st.tuples(gpa, pages | size).map(lambda s: (s[0], s[0] + s[1]))
    one = [
        st.tuples(st.just("map"), gpa, size, st.integers(0, 1), prot, st.sampled_from(Memory), yes, yes),
        st.tuples(st.just("map"), gpa, size, st.just(0), prot, st.just(Memory.NORMAL), yes, yes),
        st.tuples(st.just("mmio"), gpa, prot),
        st.tuples(st.just("unmap"), span),
        st.tuples(st.just("relax"), gpa, prot),
        st.tuples(st.just("young"), gpa),
        st.tuples(st.just("protect"), span),
        st.tuples(st.just("age"), span, yes),
        st.tuples(st.just("fast"), gpa, yes, yes, yes),
        st.tuples(st.just("fork")),
    ]
    return st.one_of(one)


def apply(table: Stage2, naive: Naive, op: tuple[object, ...]) -> None:
    """One operation on both; what it answers is compared."""
    fmt = table.format
    match op:
        case ("map", int(gpa), int(size), int(which), int(prot), Memory() as memory, bool(host), bool(young)):
            shift = size.bit_length() - 1
            which *= fmt.break_before_make  # elsewhere another frame may not take the place of one that is mapped
            hpa = Hpa((which + 1 << 36) | gpa & -size & (1 << 36) - 1)
            desc = fmt.leaf(shift, hpa, prot, memory, young=young, host_writable=host, tag=0)
            got = table.map(
                Gpa(gpa), size, Pfn(hpa >> fmt.page_shift), prot, memory, host_writable=host, young=young, tag=0
            )
            assert got is naive.map(gpa, shift, desc)
        case ("mmio", int(gpa), int(prot)):
            entry = fmt.mmio(Gpa(gpa & -4096), prot, 2)
            if entry is not None:
                naive.make_room(gpa, fmt.page_shift)
                old = naive.at.get(gpa & -(1 << fmt.page_shift))
                wanted = MapResult.UNCHANGED if old == (fmt.page_shift, entry) else MapResult.FIXED
                naive.at[gpa & -(1 << fmt.page_shift)] = (fmt.page_shift, entry)
                assert table.put(Gpa(gpa), 1 << fmt.page_shift, entry) is wanted
        case ("unmap", (int(start), int(end))):
            gone = naive.within(start, end)
            leaves = [s for _, s, d in gone if fmt.kind(d, s) is Kind.LEAF]
            for at, _, _ in gone:
                del naive.at[at]
            assert table.unmap(Gpa(start), Gpa(end)) == Removed(len(leaves), sum(1 << s for s in leaves))
        case _:
            change(table, naive, op)


def change(table: Stage2, naive: Naive, op: tuple[object, ...]) -> None:
    """One that only changes leaves."""
    fmt = table.format
    match op:
        case ("relax", int(gpa), int(prot)):
            found = leaf_over(naive, gpa)
            assert table.relax(Gpa(gpa), prot) is (MapResult.FIXED if found else MapResult.ABSENT)
            if found:
                naive.change(found[0], fmt.add_prot(found[2], prot))
        case ("young", int(gpa)):
            found = leaf_over(naive, gpa)
            assert table.make_young(Gpa(gpa)) is (found is not None)
            if found:
                naive.change(found[0], fmt.with_young(found[2], True))
        case ("protect", (int(start), int(end))):
            changed = 0
            for at, shift, desc in naive.within(start, end):
                if fmt.kind(desc, shift) is Kind.LEAF and fmt.write_protect(desc) != desc:
                    naive.change(at, fmt.write_protect(desc))
                    changed += 1
            assert table.write_protect(Gpa(start), Gpa(end)) == changed
        case ("age", (int(start), int(end)), bool(test_only)):
            used = [e for e in naive.within(start, end) if fmt.kind(e[2], e[1]) is Kind.LEAF and fmt.is_young(e[2])]
            assert table.age(Gpa(start), Gpa(end), test_only=test_only) is bool(used)
            for at, _, desc in [] if test_only else used:
                naive.change(at, fmt.with_young(desc, False))
        case ("fast", int(gpa), bool(write), bool(execute), bool(logged)):
            found = leaf_over(naive, gpa)
            result = table.fix_fast(Gpa(gpa), write=write, execute=execute, logged=logged)
            if result is Repair.FIXED:
                assert found is not None
                now = table.walk(Gpa(gpa))
                assert (now.gpa, now.shift) == found[:2]
                assert now.desc != found[2]
                naive.change(found[0], now.desc)
        case _:
            raise AssertionError(op)


def leaf_over(naive: Naive, gpa: int) -> tuple[int, int, int] | None:
    found = naive.over(gpa)
    return found if found is not None and naive.fmt.kind(found[2], found[1]) is Kind.LEAF else None


def _cases() -> list[pytest.ParameterSet]:
    # splitting is the same code for every format, and blocks of 32M or 512M have so many pieces
    drops = [pytest.param(fmt, False, id=f"{name}-drops") for name, fmt in FORMATS.items()]
    split = ("arm64:4k", "x86-ept:4k", "x86-npt:4k")
    return drops + [pytest.param(FORMATS[name], True, id=f"{name}-splits") for name in split]


@pytest.mark.parametrize(("fmt", "splits"), _cases())
@settings(max_examples=25)
@given(data=st.data())
def test_a_table_is_a_dict_of_leaves(fmt: Stage2Format, splits: bool, data: st.DataObject) -> None:
    table, naive = Stage2(fmt, split_blocks=splits), Naive(fmt, splits)
    kept: list[tuple[Stage2, Naive]] = []
    for op in data.draw(st.lists(operations(fmt), max_size=12)):
        if op == ("fork",):
            kept.append((table, Naive(fmt, splits, dict(naive.at))))
            before = table.key()
            table = table.fork()
            assert table.key() == before
        else:
            apply(table, naive, op)
        same(table, naive)
    for gpa in data.draw(st.lists(addresses(fmt), min_size=3, max_size=6)):
        assert table.walk(Gpa(gpa)) == naive.walk(gpa)
    for original, as_it_was in kept:
        same(original, as_it_was)


@pytest.mark.parametrize("name", ["arm64:4k", "arm64:16k-lpa2", "arm64:64k", "x86-npt:4k"])
@settings(max_examples=20)
@given(data=st.data())
def test_ranges(name: str, data: st.DataObject) -> None:
    fmt = FORMATS[name]
    table, naive = Stage2(fmt, split_blocks=False), Naive(fmt, False)
    for op in data.draw(st.lists(operations(fmt), max_size=8)):
        if op[0] in ("map", "mmio"):
            apply(table, naive, op)
    start, end = sorted(data.draw(st.tuples(addresses(fmt), addresses(fmt))))
    assert [(f.gpa, f.shift, f.desc) for f in table.in_range(Gpa(start), Gpa(end))] == (
        naive.within(start, end) if start < end else []
    )
    everything = (Gpa(0), Gpa(1 << fmt.gpa_bits))
    assert list(table.in_range(*everything)) == list(table.entries())
    assert list(table.in_range(everything[1], everything[0])) == []
    assert list(table.in_range(Gpa(0), Gpa(0))) == []


def make(fmt: Stage2Format, *, splits: bool = False) -> Stage2:
    """A table with one page, read and write, used, at BASE."""
    table = Stage2(fmt, split_blocks=splits)
    put(table, BASE, 1 << fmt.page_shift, R | W)
    return table


def put(table: Stage2, gpa: int, size: int, prot: int, *, host: bool = True, young: bool = True) -> MapResult:
    frame = Pfn(0x100000 + (gpa >> table.format.page_shift))
    return table.map(Gpa(gpa), size, frame, prot, Memory.NORMAL, host_writable=host, young=young, tag=0)


@EVERY_FORMAT
def test_tables_come_and_go(fmt: Stage2Format) -> None:
    table = Stage2(fmt, split_blocks=False)
    depth = len(fmt.levels)
    assert table.tables() == 1
    page = 1 << fmt.page_shift
    for i in range(3):
        put(table, BASE + i * page, page, R)
    assert table.tables() == depth
    table.unmap(Gpa(BASE), Gpa(BASE + page))
    assert table.tables() == depth
    table.unmap(Gpa(BASE), Gpa(BASE + 3 * page))
    assert table.tables() == 1
    put(table, BASE, page, R)
    put(table, 0, page, R)
    table.clear()
    assert (table.tables(), list(table.entries())) == (1, [])


@EVERY_FORMAT
def test_tables_that_a_fetch_made_stay_when_they_are_empty(fmt: Stage2Format) -> None:
    page, sizes = 1 << fmt.page_shift, [1 << level.shift for level in fmt.levels[:-1]]

    def made(table: Stage2) -> list[int]:
        return [size for size in sizes if table.made_for_fetch(Gpa(BASE), size)]

    table = Stage2(fmt, split_blocks=False)
    empty = table.key()
    table.grow_for_fetch(Gpa(BASE))
    put(table, BASE, page, R)
    fork = table.fork()
    for one in (table, fork):
        one.unmap(Gpa(BASE), Gpa(BASE + page))
        assert (one.tables(), list(one.entries()), made(one)) == (len(fmt.levels), [], sizes)
        assert one.key() != empty
    put(table, BASE, page, R)
    table.unmap(Gpa(BASE), Gpa(BASE + page), tables=True)
    assert (table.tables(), table.key(), made(table), made(fork)) == (1, empty, [], sizes)
    put(table, BASE, page, R)
    table.grow_for_fetch(Gpa(BASE))  # nothing is new
    assert made(table) == []


@EVERY_FORMAT
def test_sizes_that_no_leaf_has(fmt: Stage2Format) -> None:
    page = 1 << fmt.page_shift
    small, block = block_sizes(fmt)[:2]
    table = Stage2(fmt, split_blocks=False)
    start = BASE & -block
    # from one page before a block on: the page, the block, a page
    assert put(table, start - page, block + 2 * page, R) is MapResult.FIXED
    assert [(f.gpa, 1 << f.shift) for f in table.entries()] == [
        (start - page, small), (start, block), (start + block, small),
    ]  # fmt: skip
    for found in table.entries():
        frame = 0x100000 + (found.gpa >> fmt.page_shift)
        assert fmt.hpa(found.desc, found.shift) == frame << fmt.page_shift
    assert put(table, start - page, block + 2 * page, R) is MapResult.UNCHANGED
    for bad in (0, -page, page + 1, page // 2):
        with pytest.raises(ModelError, match=f"are not whole pages of {page:#x}$"):
            put(table, BASE, bad, R)
    with pytest.raises(ModelError, match=r"no level of .* maps 0x2000000000000000 bytes$"):
        table.put(Gpa(BASE), 1 << 61, 1)


@EVERY_FORMAT
def test_the_whole_address_space_is_reached(fmt: Stage2Format) -> None:
    # the root is wider where tables are concatenated: the first and the last page are not the same one
    page = 1 << fmt.page_shift
    last = (1 << fmt.gpa_bits) - page
    table = Stage2(fmt, split_blocks=False)
    put(table, 0, page, R)
    put(table, last, page, W | R)
    put(table, 1 << fmt.gpa_bits - 1, page, R)
    assert [f.gpa for f in table.entries()] == [0, 1 << fmt.gpa_bits - 1, last]
    assert fmt.prot(table.walk(Gpa(0)).desc) & W == 0


@EVERY_FORMAT
def test_a_key_is_the_content(fmt: Stage2Format) -> None:
    page = 1 << fmt.page_shift
    a, b = make(fmt), Stage2(fmt, split_blocks=False)
    assert a.key() != b.key()
    put(b, BASE + page, page, R)  # other tables first: their addresses take no part
    put(b, BASE, page, R | W)
    b.unmap(Gpa(BASE + page), Gpa(BASE + 2 * page))
    assert a.key() == b.key()
    assert hash(a.key()) == hash(b.key())
    b.make_young(Gpa(BASE))
    assert a.key() == b.key()
    b.age(Gpa(BASE), Gpa(BASE + page), test_only=False)
    assert a.key() != b.key()


# The lockless repair, where a format allows one.


@pytest.mark.parametrize("name", ["x86-ept:4k", "x86-npt:4k"])
def test_a_repair_gives_write_permission_back(name: str) -> None:
    fmt = FORMATS[name]
    table = make(fmt)
    assert table.fix_fast(Gpa(BASE), write=True, execute=False, logged=True) is Repair.SPURIOUS
    table.write_protect(Gpa(BASE), Gpa(BASE + 1))
    assert table.fix_fast(Gpa(BASE), write=False, execute=False, logged=True) is Repair.SPURIOUS
    assert fmt.prot(table.walk(Gpa(BASE)).desc) & W == 0
    assert table.fix_fast(Gpa(BASE + 0x18), write=True, execute=False, logged=True) is Repair.FIXED
    assert fmt.prot(table.walk(Gpa(BASE)).desc) & W
    assert table.fix_fast(Gpa(BASE + 4096), write=True, execute=False, logged=True) is Repair.NOT_HERE


@pytest.mark.parametrize("name", ["x86-ept:4k", "x86-npt:4k"])
def test_what_a_repair_must_not_do(name: str) -> None:
    fmt = FORMATS[name]
    table = Stage2(fmt, split_blocks=True)
    put(table, BASE, 4096, R, host=False)  # read-only for the host too
    assert table.fix_fast(Gpa(BASE), write=True, execute=False, logged=False) is Repair.NOT_HERE
    assert table.fix_fast(Gpa(BASE), write=False, execute=True, logged=False) is Repair.NOT_HERE
    block = (BASE & -(1 << 21)) + (1 << 21)
    put(table, block, 1 << 21, R | W)
    table.write_protect(Gpa(block), Gpa(block + 1))
    before = table.key()
    assert table.fix_fast(Gpa(block), write=True, execute=False, logged=True) is Repair.NOT_HERE
    assert table.key() == before
    assert table.fix_fast(Gpa(block), write=True, execute=False, logged=False) is Repair.FIXED


def test_a_repair_undoes_access_tracking() -> None:
    fmt = EPT_4K_NO_AD
    table = make(fmt)
    table.age(Gpa(BASE), Gpa(BASE + 1), test_only=False)
    assert fmt.prot(table.walk(Gpa(BASE)).desc) == 0
    assert table.fix_fast(Gpa(BASE), write=False, execute=False, logged=False) is Repair.FIXED
    assert fmt.is_young(table.walk(Gpa(BASE)).desc)
    assert fmt.prot(table.walk(Gpa(BASE)).desc) & R


@pytest.mark.parametrize("name", ["arm64:4k", "arm64:64k"])
def test_arm64_always_asks_the_host(name: str) -> None:
    table = make(FORMATS[name])
    table.write_protect(Gpa(BASE), Gpa(BASE + 1))
    assert table.fix_fast(Gpa(BASE), write=True, execute=False, logged=False) is Repair.NOT_HERE


@EVERY_FORMAT
@pytest.mark.parametrize("shift_index", [-1, -2])
@pytest.mark.parametrize("hardware_log", [False, True])
def test_a_watched_leaf_faults_or_is_logged(fmt: Stage2Format, shift_index: int, hardware_log: bool) -> None:
    shift = fmt.levels[shift_index].shift
    desc = fmt.leaf(shift, Hpa(1 << 30), 7, Memory.NORMAL, young=True, host_writable=True, tag=0)
    watched = watch_writes(fmt, desc, shift, hardware_log=hardware_log)
    assert fmt.prot(watched) in (fmt.prot(desc), fmt.prot(desc) & ~W)
    logged = hardware_log and shift_index == -1 and not fmt.is_dirty(watched)
    assert logged or not fmt.prot(watched) & W
