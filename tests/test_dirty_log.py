"""Dirty logging as user space sees it: errnos in their order, bitmaps, manual protection, rings.

The rows of errnos are what a 6.12 kernel answered (group dirty_log of the recorded behaviours).
"""

from __future__ import annotations

from errno import E2BIG, EINVAL, ENOENT, ENXIO

import pytest

from kvmfault.contract.outcome import Exit, Fixed, MmioAccess, Reason, Retry
from kvmfault.errors import ModelError
from kvmfault.machine.guest import Ended
from kvmfault.machine.vm import Vm
from kvmfault.types import Gpa, Hva
from kvmfault.vm.dirty import INITIALLY_SET, MANUAL_PROTECT, DirtyLog, RingEntry
from tests.worlds import GPA, HVA, fault, leaf

K, M2 = 4096, 2 << 20
TDP = ("arm64", "arm64@6.12", "x86-ept", "x86-npt")
RING = 256 * 16


def logged(target: str, pages: int = 128, *, flags: int = 0, kind: str = "anon", log: bool = True) -> Vm:
    vm = Vm.on(target)
    assert vm.enable_manual_protect(flags) == 0
    return vm.back(HVA, 4 * M2, kind).add_memslot(0, gpa=GPA, size=pages * K, hva=HVA, log_dirty=log)


def relog(vm: Vm, log: bool, pages: int = 128, *, gpa: int = GPA, readonly: bool = False) -> Vm:
    return vm.add_memslot(0, gpa=gpa, size=pages * K, hva=HVA, log_dirty=log, readonly=readonly)


def write(vm: Vm, *pages: int, vcpu: int = 0) -> int:
    """Faults that the writes took."""
    runs = [vm.access(GPA + page * K, write=True, vcpu=vcpu) for page in pages]
    assert all(run.ended is Ended.DONE for run in runs)
    return sum(len(run.faults) for run in runs)


# What the ioctls refuse.

GET = {
    # slot number -> errno, in a VM where slot 0 logs and slot 1 does not
    0: 0, 1: ENOENT, 2: ENOENT, 0x7FFB: ENOENT, 0x7FFC: EINVAL, 0x7FFF: EINVAL, 0xFFFF: EINVAL, 0x10000: ENOENT,
    0x20000: EINVAL, 0xFFFF_FFFF: EINVAL,
}  # fmt: skip
CLEAR_128 = {
    (1, 64): EINVAL, (32, 64): EINVAL, (64, 63): EINVAL, (64, 64): 0, (64, 1): EINVAL, (0, 32): EINVAL,
    (128, 64): EINVAL, (64, 128): EINVAL, (0, 129): EINVAL, (0, 0): 0, (128, 0): 0, (192, 0): EINVAL,
}  # fmt: skip
CLEAR_70 = {(64, 6): 0, (64, 7): EINVAL, (64, 5): EINVAL, (0, 70): 0, (0, 64): 0, (64, 64): EINVAL}


@pytest.mark.parametrize(("slot", "errno"), GET.items())
def test_which_slots_have_a_log(slot: int, errno: int) -> None:
    vm = logged("x86-ept").add_memslot(1, gpa=1 << 32, size=K, hva=HVA)
    assert vm.get_dirty_log(slot).errno == errno
    assert vm.clear_dirty_log(slot, 0, 0, 0) == errno


@pytest.mark.parametrize("flags", [0, MANUAL_PROTECT, MANUAL_PROTECT | INITIALLY_SET])
@pytest.mark.parametrize(("pages", "rows"), [(128, CLEAR_128), (70, CLEAR_70)])
def test_which_ranges_can_be_cleared(pages: int, rows: dict[tuple[int, int], int], flags: int) -> None:
    vm = logged("x86-npt", pages, flags=flags)
    assert {asked: vm.clear_dirty_log(0, *asked, 0) for asked in rows} == rows


def test_the_order_of_refusals() -> None:
    vm = logged("x86-ept", log=False)
    assert vm.clear_dirty_log(0x7FFC, 1, 0, 0) == EINVAL  # the slot number comes first
    assert vm.clear_dirty_log(5, 1, 0, 0) == EINVAL  # then the first page, before the slot is looked for
    assert vm.clear_dirty_log(5, 0, 0, 0) == ENOENT
    assert vm.clear_dirty_log(0, 0, 999, 0) == ENOENT  # and the range last
    ring = Vm.on("x86-ept")
    assert ring.enable_dirty_ring(RING) == 0
    assert ring.get_dirty_log(0x7FFC).errno == ring.clear_dirty_log(0x7FFC, 1, 0, 0) == ENXIO  # rings before all


def test_what_can_be_enabled() -> None:
    assert [DirtyLog().enable_manual_protect(flags) for flags in (0, 1, 2, 3, 4, 5)] == [
        0,
        0,
        EINVAL,
        0,
        EINVAL,
        EINVAL,
    ]
    sizes = {0: EINVAL, K: 0, 3 * K: EINVAL, 1024: EINVAL, 1 << 20: 0, 1 << 21: E2BIG, 1 << 32: EINVAL, 1 << 32 | K: 0}
    assert {size: DirtyLog().enable_ring(size, K, 64, vcpus=0) for size in sizes} == sizes
    assert DirtyLog().enable_ring(8192, K, 64 + 512, vcpus=0) == EINVAL  # less than what is kept free
    assert DirtyLog().enable_ring(16384, 16384, 64, vcpus=0) == 0
    assert DirtyLog().enable_ring(K, 16384, 64, vcpus=0) == EINVAL  # less than a page
    assert DirtyLog().enable_ring(K, K, 64, vcpus=1) == EINVAL
    once = DirtyLog()
    assert (once.enable_ring(K, K, 64, vcpus=0), once.enable_ring(K, K, 64, vcpus=0)) == (0, EINVAL)
    assert once.soft_limit == 256 - 64


# Bitmaps.


@pytest.mark.parametrize("target", TDP)
def test_a_log_is_what_the_guest_wrote_since_it_was_read(target: str) -> None:
    vm = logged(target)
    write(vm, 16, 18, 63)
    assert vm.get_dirty_log(0).pages == (16, 18, 63)
    assert vm.get_dirty_log(0).pages == ()
    assert write(vm, 16, 16) == 1  # protected once more, and only once
    vm.access(GPA + 18 * K - 1, 2, write=True)
    assert vm.get_dirty_log(0).runs == (range(16, 19),)


@pytest.mark.parametrize(("target", "marked"), [("arm64", ()), ("x86-ept", (20,))])
def test_what_a_read_marks(target: str, marked: tuple[int, ...]) -> None:
    # a page that a read maps writable is marked: nothing would be noticed later
    vm = logged(target)
    vm.access(GPA + 20 * K)
    assert vm.get_dirty_log(0).pages == marked


@pytest.mark.parametrize("target", TDP)
def test_turning_logging_off_and_on_forgets(target: str) -> None:
    vm = logged(target)
    write(vm, 20)
    relog(vm, False)
    assert vm.get_dirty_log(0).errno == ENOENT
    write(vm, 21)
    relog(vm, True)
    assert vm.get_dirty_log(0).pages == ()
    assert write(vm, 20, 21) == 2
    relog(vm, True)  # nothing changes
    assert vm.get_dirty_log(0).pages == (20, 21)


@pytest.mark.parametrize("target", TDP)
def test_a_move_keeps_the_bitmap_while_the_flag_stays(target: str) -> None:
    vm = logged(target)
    write(vm, 0, 2)
    relog(vm, True, gpa=GPA + M2)
    assert vm.log.pages(0) == (0, 2)
    vm.access(GPA + M2 + K, write=True)
    assert vm.get_dirty_log(0).pages == (0, 1, 2)
    relog(vm, False, gpa=GPA)  # the flag may ride along
    assert vm.get_dirty_log(0).errno == ENOENT


@pytest.mark.parametrize("target", TDP)
def test_a_read_only_slot_that_logs_marks_nothing(target: str) -> None:
    vm = Vm.on(target).back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA, readonly=True, log_dirty=True)
    run = vm.access(GPA, 2, write=True, data=0xB000)
    assert run.ended is Ended.DONE
    assert isinstance(run.outcome, Exit)
    assert run.outcome.detail == MmioAccess(Gpa(GPA), 2, True, b"\x00\xb0")
    vm.access(GPA)
    assert vm.get_dirty_log(0).pages == ()


@pytest.mark.parametrize("target", TDP)
def test_manual_protection_reads_without_clearing(target: str) -> None:
    vm = logged(target, flags=MANUAL_PROTECT)
    write(vm, 16, 17, 100)
    assert vm.get_dirty_log(0).pages == vm.get_dirty_log(0).pages == (16, 17, 100)
    assert write(vm, 16, 17, 100) == 0  # still writable
    assert vm.clear_dirty_log(0, 0, 64, 1 << 16 | 1 << 40 | 1 << 100) == 0  # 40 was clean, 100 is not asked for
    assert vm.get_dirty_log(0).pages == (17, 100)
    assert (write(vm, 17), write(vm, 16)) == (0, 1)
    assert vm.get_dirty_log(0).pages == (16, 17, 100)


@pytest.mark.parametrize("bits", [0, 1, 1 << 127, (1 << 128) - 1, 0x8000_0000_0000_0001 << 63, 0xF0F0 << 56])
def test_clearing_takes_exactly_the_bits_given(bits: int) -> None:
    vm = logged("x86-ept", flags=MANUAL_PROTECT | INITIALLY_SET)
    assert vm.get_dirty_log(0).pages == tuple(range(128))
    assert vm.clear_dirty_log(0, 0, 128, bits) == 0
    assert vm.get_dirty_log(0).pages == tuple(n for n in range(128) if not bits >> n & 1)


def test_a_large_log_is_quick_and_small() -> None:
    pages = 1 << 22  # 16 GiB
    vm = Vm.on("x86-ept")
    vm.enable_manual_protect(3)
    vm.add_memslot(0, gpa=1 << 40, size=pages * K, hva=HVA, log_dirty=True)
    assert vm.get_dirty_log(0).runs == (range(pages),)
    assert vm.clear_dirty_log(0, 0, pages, (1 << pages) - 1) == 0
    assert vm.get_dirty_log(0).runs == ()


# Blocks.


@pytest.mark.parametrize("target", TDP)
@pytest.mark.parametrize("eager", [False, True])
def test_blocks_when_logging_begins(target: str, eager: bool) -> None:
    vm = logged(target, 512, kind="thp", log=False).with_facts(eager_split=eager)
    assert write(vm, 0) == 1
    assert leaf(vm, GPA) == (GPA, M2, "rwx" if target.startswith("x86") else "rw-")
    relog(vm, True, 512)
    found = leaf(vm, GPA + 9 * K)
    assert found is not None
    assert found[:2] == ((GPA + 9 * K, K) if eager else (GPA, M2))
    assert "w" not in found[2]
    assert vm.get_dirty_log(0).pages == ()
    assert write(vm, 9) == 1
    assert vm.get_dirty_log(0).pages == (9,)
    neighbour = leaf(vm, GPA + 10 * K)
    drops = target.startswith("arm64") and not eager  # break-before-make: the other pieces fault again
    assert (neighbour is None) is drops


@pytest.mark.parametrize("target", TDP)
@pytest.mark.parametrize("eager", [False, True])
def test_initially_set_protects_nothing_until_it_is_cleared(target: str, eager: bool) -> None:
    vm = logged(target, 512, flags=3, kind="thp", log=False).with_facts(eager_split=eager)
    write(vm, 0)
    relog(vm, True, 512)
    assert vm.get_dirty_log(0).runs == (range(512),)
    found = leaf(vm, GPA)
    assert found is not None
    assert found[1] == M2
    assert "w" in found[2]
    assert write(vm, 7) == 0  # the block as it was
    assert vm.clear_dirty_log(0, 0, 64, 1 << 7) == 0
    assert "w" not in (leaf(vm, GPA + 7 * K) or (0, 0, "w"))[2]
    assert write(vm, 7) == 1
    assert vm.get_dirty_log(0).runs == (range(512),)
    assert (leaf(vm, GPA + 7 * K) or (0, 0))[1] == K


@pytest.mark.parametrize(("target", "dropped"), [("arm64", False), ("x86-ept", True), ("x86-npt", True)])
def test_blocks_come_back_when_logging_ends(target: str, dropped: bool) -> None:
    vm = logged(target, 512, kind="thp")
    write(vm, 3)
    relog(vm, False, 512)
    assert (leaf(vm, GPA + 3 * K) is None) is dropped
    if dropped:
        write(vm, 3)
        assert leaf(vm, GPA + 3 * K) == (GPA, M2, "rwx")


def test_pages_stay_where_no_block_is_possible() -> None:
    for hva, npages in ((HVA + K, 512), (HVA, 300)):  # not congruent; too small
        vm = Vm.on("x86-ept").back(HVA, 4 * M2, "thp")
        vm.add_memslot(0, gpa=GPA, size=npages * K, hva=hva, log_dirty=True)
        write(vm, 3)
        vm.add_memslot(0, gpa=GPA, size=npages * K, hva=hva)
        assert leaf(vm, GPA + 3 * K) is not None


def test_a_fast_fix_marks_only_what_it_makes_writable() -> None:
    vm = logged("x86-ept@6.12")  # later kernels keep an entry that allows the access
    write(vm, 1)
    vm.get_dirty_log(0)
    run = vm.access(GPA + K, write=True)
    assert [step.name for step in run.faults[0].steps][-1] == "repair"
    assert vm.log.pages(0) == (1,)
    vm.get_dirty_log(0)
    stale = fault("x86-ept", "read", GPA + K)
    assert isinstance(vm.resolve(stale), (Fixed, Retry))  # the slow path: mapped writable again, so marked
    assert vm.log.pages(0) == (1,)


# Rings.


def ringed(target: str) -> Vm:
    vm = Vm.on(target)
    assert vm.enable_dirty_ring(RING) == 0
    return vm.back(HVA, 4 * M2).add_memslot(0, gpa=GPA, size=512 * K, hva=HVA, log_dirty=True)


@pytest.mark.parametrize("target", TDP)
def test_a_ring_is_written_read_and_reset(target: str) -> None:
    vm = ringed(target)
    write(vm, 5, 6, 5)
    assert write(vm, 5, vcpu=1) == 0
    assert write(vm, 9, vcpu=1) == 1
    assert vm.harvest_ring(0) == (RingEntry(0, 5), RingEntry(0, 6))
    assert vm.harvest_ring(0) == ()
    write(vm, 7)
    assert write(vm, 5) == 0  # harvested, but not protected before the reset
    assert vm.reset_rings() == 2
    assert (write(vm, 5, 6), write(vm, 9, vcpu=1)) == (2, 0)
    assert [entry.offset for entry in vm.harvest_ring(0)] == [7, 5, 6]
    assert [entry.offset for entry in vm.harvest_ring(1)] == [9]
    assert vm.reset_rings() == 4
    assert vm.reset_rings() == 0


def test_a_reset_needs_rings() -> None:
    assert logged("arm64").reset_rings() == -EINVAL


@pytest.mark.parametrize("target", TDP)
def test_a_full_ring_stops_the_vcpu_before_it_enters_the_guest(target: str) -> None:
    vm = ringed(target)
    limit = vm.log.soft_limit
    write(vm, *range(limit - 1))
    run = vm.access(GPA + 400 * K - 4, 8, write=True)  # two pages: the first fault fills the ring
    assert (run.ended, len(run.faults)) == (Ended.EXITED, 1)
    assert run.exits == (Exit(Reason.DIRTY_RING_FULL),)
    again = vm.access(GPA)
    assert (again.ended, again.faults) == (Ended.EXITED, ())
    assert vm.access(GPA, vcpu=1).ended is Ended.DONE  # the other vCPU's ring is empty
    vm.harvest_ring(0)
    assert vm.access(GPA, vcpu=0).ended is Ended.EXITED
    assert vm.reset_rings() == limit
    assert vm.access(GPA + 400 * K - 4, 8, write=True, vcpu=0).ended is Ended.DONE


def test_entries_of_a_slot_that_is_gone_or_smaller() -> None:
    vm = ringed("x86-ept")
    write(vm, 5, 300)
    vm.remove_memslot(0)
    assert [entry.offset for entry in vm.harvest_ring(0)] == [5, 300]
    vm.add_memslot(0, gpa=GPA, size=8 * K, hva=HVA, log_dirty=True)
    vm.add_memslot(1, gpa=GPA + 256 * K, size=256 * K, hva=HVA)  # where page 300 was
    write(vm, 5, 300)
    vm.harvest_ring(0)
    assert vm.reset_rings() == 3
    assert write(vm, 300) == 0
    assert write(vm, 5) == 1


def test_a_vcpu_that_runs_beyond_its_ring_is_an_error() -> None:
    vm = ringed("arm64")
    for page in range(256):
        vm.resolve(fault("arm64", "write", GPA + page * K))  # nobody looks at the limit here
    with pytest.raises(ModelError, match="dirty ring of 256 entries is full"):
        vm.resolve(fault("arm64", "write", GPA + 300 * K))


def test_what_the_host_writes_is_not_logged() -> None:
    vm = logged("x86-ept")
    vm.invalidate(vm.host.migrate(Hva(HVA)))
    assert vm.get_dirty_log(0).pages == ()


@pytest.mark.parametrize(("target", "size"), [("arm64", M2), ("x86-ept", K), ("x86-npt", K)])
def test_whether_blocks_are_split_at_once_if_nobody_says_otherwise(target: str, size: int) -> None:
    # eager_page_split of x86 is on, KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE is 0
    vm = logged(target, 512, kind="thp", log=False)
    write(vm, 0)
    relog(vm, True, 512)
    assert (leaf(vm, GPA) or (0, 0))[1] == size
