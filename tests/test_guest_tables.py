"""The guest's own tables as data, and what each architecture makes of a walk that fails."""

from __future__ import annotations

from errno import EFAULT

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.contract.outcome import Inject
from kvmfault.errors import ModelError
from kvmfault.types import Gpa
from kvmfault.vm.guest_tables import GuestEntry, GuestTables, GuestTranslation, GuestWalkFault, WalkEnd
from tests.test_path_mmio import ESR_DATA, abort
from tests.worlds import ARM, GPA, world

K, M = 1 << 10, 1 << 20
RUN = GuestEntry(address=0x40_0000, size=4 * M, gpa=Gpa(0x1_0000_0000), block=2 * M, writable=False, level=2)
HOLE = GuestEntry(address=0x80_0000, size=4 * K, end=WalkEnd.RESERVED, level=1, writable=False)
TABLES = GuestTables((HOLE, RUN), missing_level=1)


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (0x3F_FFFF, GuestWalkFault(level=1)),
        (0x40_0000, GuestTranslation(Gpa(0x1_0000_0000), 2 * M, writable=False, level=2)),
        (0x61_2345, GuestTranslation(Gpa(0x1_0021_2345), 2 * M, writable=False, level=2)),
        (0x7F_FFFF, GuestTranslation(Gpa(0x1_003F_FFFF), 2 * M, writable=False, level=2)),
        (0x80_0000, GuestWalkFault(end=WalkEnd.RESERVED, level=1, granted=5)),
        (0x80_1000, GuestWalkFault(level=1)),
        (0, GuestWalkFault(level=1)),
    ],
)
def test_walk(address: int, found: GuestTranslation | GuestWalkFault) -> None:
    assert TABLES.walk(address) == found


def test_all_that_an_entry_says_comes_out() -> None:
    entry = GuestEntry(address=0x1000, size=4 * K, readable=False, executable=False, user=False, level=1)
    assert GuestTables((entry,)).walk(0x1004) == GuestTranslation(
        Gpa(4), 4 * K, readable=False, executable=False, user=False, level=1
    )
    unreadable = GuestEntry(address=0, size=4 * K, end=WalkEnd.UNREADABLE, errno=EFAULT)
    assert GuestTables((unreadable,)).walk(8) == GuestWalkFault(
        errno=EFAULT, end=WalkEnd.UNREADABLE, level=3, granted=7
    )


def test_a_change_gives_new_tables() -> None:
    before = hash(TABLES)
    page = GuestEntry(address=0x60_0000, size=2 * M, gpa=Gpa(0))
    changed = TABLES.put(page)
    assert changed.walk(0x60_0010) == GuestTranslation(Gpa(0x10), 2 * M)
    assert changed.walk(0x5F_F000) == TABLES.walk(0x5F_F000)
    assert changed.without(0x60_0000, 2 * M).walk(0x60_0000) == GuestWalkFault(level=1)
    assert hash(TABLES) == before
    assert changed != TABLES
    assert GuestTables((RUN, HOLE), missing_level=1) == TABLES
    middle = GuestTables((GuestEntry(address=0, size=12 * K, block=4 * K),)).without(4 * K, 4 * K)
    assert [e.address for e in middle.entries] == [0, 8 * K]
    assert middle.walk(8 * K) == GuestTranslation(Gpa(8 * K), 4 * K)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GuestEntry(address=0, size=0), "a block of 0x0 bytes; expected a power of two from 0x1000 on"),
        (lambda: GuestEntry(address=0, size=12 * K), "a block of 0x3000 bytes; expected a power of two from 0x1000 on"),
        (lambda: GuestEntry(address=0, size=2048), "a block of 0x800 bytes; expected a power of two from 0x1000 on"),
        (lambda: GuestEntry(address=4 * K, size=2 * M), "0x200000 bytes at 0x1000 to 0x0 are not whole blocks of 0x20"),
        (lambda: GuestEntry(address=0, size=6 * K, block=4 * K), "0x1800 bytes at 0x0 to 0x0 are not whole blocks of"),
        (lambda: GuestEntry(address=0, size=0, block=4 * K), "0x0 bytes at 0x0 to 0x0 are not whole blocks of"),
        (lambda: GuestEntry(address=0, size=2 * M, gpa=Gpa(4 * K)), "0x200000 bytes at 0x0 to 0x1000 are not whole"),
        (lambda: TABLES.put(GuestEntry(address=0x60_1000, size=4 * K)), "a change at 0x601000 would cut a block of"),
        (lambda: TABLES.without(0x5F_F000, 4 * K), "a change at 0x5ff000 would cut a block of 0x200000 bytes"),
        (lambda: GuestTables((RUN, RUN)), "two entries for 0x400000"),
    ],
)
def test_what_no_guest_has(make: object, said: str) -> None:
    assert callable(make)
    with pytest.raises(ModelError, match=f"guest tables: {said}"):
        make()


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(1, 6), st.integers(0, 99), st.booleans())))
def test_against_a_page_by_page_map(changes: list[tuple[int, int, int, bool]]) -> None:
    tables, pages = GuestTables(), dict[int, int]()
    for first, count, to, put in changes:
        span = range(first, first + count)
        if put:
            run = GuestEntry(address=first * 4 * K, size=count * 4 * K, gpa=Gpa(to * 4 * K), block=4 * K)
            tables = tables.put(run)
            pages.update({page: to + page - first for page in span})
        else:
            tables = tables.without(first * 4 * K, count * 4 * K)
            pages = {page: frame for page, frame in pages.items() if page not in span}
    for page in range(24):
        found = tables.walk(page * 4 * K + 5)
        gpa = found.gpa if isinstance(found, GuestTranslation) else None
        assert gpa == (pages[page] * 4 * K + 5 if page in pages else None)


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize(
    ("walk", "status", "errno"),
    [
        (GuestWalkFault(level=1), 0x05, 0),
        (GuestWalkFault(end=WalkEnd.RESERVED, level=3), 0x07, 0),
        (GuestWalkFault(end=WalkEnd.ADDRESS_SIZE, level=2), 0x02, 0),
        (GuestWalkFault(end=WalkEnd.NOT_ACCESSED, level=3), 0x0B, 0),
        (GuestWalkFault(end=WalkEnd.UNREADABLE, level=3), 0x00, EFAULT),
        (GuestWalkFault(0x10, level=3), 0x10, 0),
    ],
)
def test_a_walk_without_a_recorded_status_has_the_architectures(
    target: str, walk: GuestWalkFault, status: int, errno: int
) -> None:
    vm = world(target, nested=True)
    vm.answers["walk_guest"] = walk
    outcome = vm.resolve(abort(target, ESR_DATA | 7, GPA))
    assert outcome == Inject("s2_fault", 0xFFFF_0000_0000_0018, ESR_DATA | status, errno)
