"""Faults on memory, on the real Vm: what is mapped, how large, how permitted, and what a second fault finds."""

from __future__ import annotations

from dataclasses import replace
from errno import EFAULT, ENOMEM
from typing import Final

import pytest

from arch.x86 import EPT
from arch.x86.spte import EPT_4K_NO_AD
from kvmfault.contract.access import Cause
from kvmfault.contract.format import Prot
from kvmfault.contract.outcome import (
    Emulate,
    Error,
    Exit,
    Fixed,
    MemoryFault,
    Outcome,
    Reason,
    Retry,
    Signal,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.ports import Area, GuestTranslation, MapResult, Pin, PinError
from kvmfault.contract.target import resolve
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import AreaKind
from tests.worlds import ALL, ARM, GPA, HVA, ONE_OF_EACH, SIZE, X86, Watched, fault, leaf, permission, with_memfd, world

K, M, G = 1 << 10, 1 << 20, 1 << 30
SOMEWHERE: Final = GPA + 0x300_2018
"""Not at the start of anything."""
NESTED: Final = ("x86-ept@6.12", "x86-ept", "x86-npt@6.12", "x86-npt")


def rwx(outcome: Outcome) -> tuple[int, str]:
    assert isinstance(outcome, Fixed), outcome
    return outcome.size, str(outcome.prot)


# A missing entry.


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("kind", ["read", "write", "exec"])
def test_a_missing_entry_is_made(target: str, kind: str) -> None:
    vm = world(target)
    prot = "rwx" if target.startswith("x86") or kind == "exec" else "rw-"  # arm64 makes executable what is fetched
    run = vm.handle(fault(target, kind, SOMEWHERE))
    assert rwx(run.outcome) == (4 * K, prot)
    assert leaf(vm, SOMEWHERE) == (SOMEWHERE & -4096, 4 * K, prot)
    found = vm.table.walk(Gpa(SOMEWHERE))
    pinned = vm.host.pin(Hva(HVA + SOMEWHERE - GPA), write=False).pfn
    assert pinned is not None
    assert vm.format.hpa(found.desc, 12) == pinned << 12
    assert vm.format.is_young(found.desc)
    assert vm.format.entry(found.desc, found.shift).host_writable in (None, True)
    assert vm.events.count("release") == 1
    assert [e for e in vm.events if e in ("lock", "release")] == ["lock", "release"]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("kind", ["read", "write", "exec"])
def test_a_second_fault_finds_it_there(target: str, kind: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, kind))
    if target.startswith("x86") and target.endswith("@6.12"):  # a leaf over a writable one loses its dirty bit
        assert type(vm.resolve(fault(target, kind))) is Fixed
    before = vm.key()
    outcome = vm.resolve(fault(target, kind))
    assert type(outcome) is (Spurious if target.startswith("x86") else Retry)
    assert vm.key() == before


BACKINGS: Final = ("anon", "thp", "hugetlb-2m", "hugetlb-1g", "pfnmap")
SIZES: Final = {
    # page size, then what each backing is mapped by
    "arm64:4k": (4 * K, 4 * K, 2 * M, 2 * M, G, 4 * K),
    "arm64:4k-lpa2": (4 * K, 4 * K, 2 * M, 2 * M, G, 4 * K),
    "arm64:16k": (16 * K, 16 * K, 32 * M, 16 * K, 32 * M, 16 * K),
    "arm64:16k-lpa2": (16 * K, 16 * K, 32 * M, 16 * K, 32 * M, 16 * K),
    "arm64:64k": (64 * K, 64 * K, 512 * M, 64 * K, None, 64 * K),  # such a host has no huge pages of 1G
    "x86-ept": (4 * K, 4 * K, 2 * M, 2 * M, G, 4 * K),
    "x86-npt": (4 * K, 4 * K, 2 * M, 2 * M, G, 4 * K),
    "x86-shadow": (4 * K, 4 * K, 2 * M, 2 * M, G, 4 * K),
}


def _sizes() -> list[tuple[str, str, int]]:
    return [
        (f"{name}@{kernel}", backing, size)
        for name, (_, *sizes) in SIZES.items()
        for backing, size in zip(BACKINGS, sizes, strict=True)
        for kernel in ("6.12", "7.4")
        if size is not None
    ]


@pytest.mark.parametrize(("target", "backing", "size"), _sizes())
def test_size_follows_the_host(target: str, backing: str, size: int) -> None:
    vm = world(target, backing)
    assert rwx(vm.resolve(fault(target, "write", SOMEWHERE)))[0] == size
    found = leaf(vm, SOMEWHERE)
    assert found is not None
    assert found[:2] == (SOMEWHERE & -size, size)
    first = vm.host.pin(Hva(HVA + found[0] - GPA), write=True).pfn
    assert vm.format.hpa(vm.table.walk(Gpa(SOMEWHERE)).desc, size.bit_length() - 1) == (first or 0) << vm.page_shift


@pytest.mark.parametrize("target", ["arm64:4k", "arm64:16k", "arm64:64k", "x86-ept", "x86-npt", "x86-shadow"])
def test_a_misaligned_slot_is_mapped_by_pages(target: str) -> None:
    page = SIZES[target][0]
    vm = world(target, "thp", hva=HVA + page)  # gpa and hva differ within every block
    assert rwx(vm.resolve(fault(target, "write", SOMEWHERE)))[0] == page


@pytest.mark.parametrize("target", ["arm64:4k", "arm64:16k", "arm64:64k", "x86-ept", "x86-npt"])
def test_the_ends_of_a_slot_are_mapped_by_pages(target: str) -> None:
    page, block = SIZES[target][0], SIZES[target][2]
    assert block is not None
    # begins one page behind a block, ends one page before the end of the third
    vm = world(target, "thp", gpa=GPA + page, hva=HVA + page, size=3 * block - 2 * page)
    for gpa, size in (
        (GPA + page, page),
        (GPA + block - page, page),
        (GPA + block, block),
        (GPA + 2 * block - page, block),
        (GPA + 2 * block, page),
        (GPA + 3 * block - 2 * page, page),
    ):
        assert rwx(vm.fork().resolve(fault(target, "write", gpa)))[0] == size, hex(gpa)


@pytest.mark.parametrize("target", ["arm64:4k", "x86-ept"])
def test_a_split_huge_page_is_mapped_by_pages(target: str) -> None:
    vm = world(target, "thp")
    vm.host.split(Hva(HVA + SOMEWHERE - GPA))
    assert rwx(vm.resolve(fault(target, "write", SOMEWHERE)))[0] == 4 * K
    assert rwx(vm.resolve(fault(target, "write", SOMEWHERE + 2 * M)))[0] == 2 * M


@pytest.mark.parametrize("target", ALL)
def test_a_mapping_size_that_cannot_be_read(target: str) -> None:
    vm = world(target, "thp")
    vm.answers["mapping_size"] = -EFAULT
    assert vm.resolve(fault(target, "write")) == Error(EFAULT)
    assert leaf(vm, GPA) is None


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
def test_a_block_is_not_made_over_tracked_or_mixed_frames(target: str) -> None:
    for frames in ("tracked", "private"):
        vm = world(target, "thp")
        getattr(vm, frames).add(Gfn((SOMEWHERE >> 12) + 1))
        assert rwx(vm.resolve(fault(target, "read", SOMEWHERE)))[0] == 4 * K
        assert rwx(vm.resolve(fault(target, "read", SOMEWHERE + 2 * M)))[0] == 2 * M


def test_what_is_mapped_by_pages_on_arm64_is_not_made_larger_by_area_blocks_of_a_device() -> None:
    vm = world("arm64", None)
    vm.host.back(Hva(HVA), SIZE, AreaKind.PFNMAP, block=2 * M)
    assert rwx(vm.resolve(fault("arm64", "write", SOMEWHERE))) == (2 * M, "rw-")


def test_an_area_of_an_unlisted_block_size_is_used_with_a_warning() -> None:
    vm = world("arm64", None)
    vm.host.back(Hva(HVA), SIZE, AreaKind.PFNMAP, block=8 * K)
    assert rwx(vm.resolve(fault("arm64", "write", GPA + 8 * K))) == (8 * K, "rw-")
    assert vm.warnings == ("host area of an unknown block size 0x2000",)
    assert leaf(vm, GPA + 8 * K) == (GPA + 8 * K, 4 * K, "rw-")
    assert leaf(vm, GPA + 12 * K) == (GPA + 12 * K, 4 * K, "rw-")
    assert leaf(vm, GPA + 16 * K) is None


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
def test_the_erratum_keeps_fetches_from_blocks(target: str) -> None:
    vm = world(target, "thp", small_exec=True)
    assert rwx(vm.fork().resolve(fault(target, "exec", SOMEWHERE))) == (4 * K, "rwx")
    assert rwx(vm.fork().resolve(fault(target, "read", SOMEWHERE))) == (2 * M, "rw-")
    run = vm.handle(fault(target, "exec", SOMEWHERE))
    assert (run.progress.wanted, run.progress.size) == (2 * M, 4 * K)


def test_a_coherent_instruction_cache_makes_all_memory_executable() -> None:
    assert rwx(world("arm64", coherent_icache=True).resolve(fault("arm64", "read"))) == (4 * K, "rwx")
    device = world("arm64", "pfnmap", coherent_icache=True)
    assert rwx(device.resolve(fault("arm64", "read"))) == (4 * K, "rw-")


@pytest.mark.parametrize(("target", "kind"), [("x86-shadow", "read"), ("arm64@7.4", "read"), ("arm64@7.4", "exec")])
def test_what_the_guests_own_table_makes_non_executable_stays_so(target: str, kind: str) -> None:
    vm = world(target, nested=True, coherent_icache=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), 4 * K, executable=False)
    assert rwx(vm.resolve(fault(target, kind))) == (4 * K, "rw-")


# What may not be written.


@pytest.mark.parametrize("target", ALL)
def test_a_read_only_slot_is_mapped_read_only(target: str) -> None:
    vm = world(target, readonly=True)
    prot = "r-x" if target.startswith("x86") else "r--"
    assert rwx(vm.resolve(fault(target, "read"))) == (4 * K, prot)
    found = vm.table.walk(Gpa(GPA))
    assert vm.format.fix_write(found.desc) is None  # no lockless repair can make it writable
    assert vm.format.entry(found.desc, found.shift).host_writable in (None, False)


@pytest.mark.parametrize("target", ALL)
def test_host_memory_that_may_not_be_written(target: str) -> None:
    vm = world(target, host_readonly=True)
    assert rwx(vm.resolve(fault(target, "read"))) == (4 * K, "r-x" if target.startswith("x86") else "r--")
    assert vm.resolve(fault(target, "write")) == Error(EFAULT)


@pytest.mark.parametrize("target", ALL)
def test_a_device_area_that_may_not_be_written(target: str) -> None:
    outcome = world(target, "pfnmap", host_readonly=True).resolve(fault(target, "write"))
    assert outcome == (Emulate() if target.startswith("x86") else Error(EFAULT))


@pytest.mark.parametrize("target", ALL)
def test_a_slot_without_host_memory(target: str) -> None:
    vm = world(target, None)
    assert vm.resolve(fault(target, "read")) == Error(EFAULT)
    assert vm.resolve(fault(target, "write")) == Error(EFAULT)
    assert list(vm.table.entries()) == []


@pytest.mark.parametrize("target", ALL)
def test_a_shared_page_is_copied_by_the_write(target: str) -> None:
    vm = world(target)
    old = vm.host.pin(Hva(HVA), write=False).pfn
    vm.invalidate(vm.host.make_cow(Hva(HVA)))
    assert rwx(vm.resolve(fault(target, "read")))[1][:2] == "r-"
    # the pin of the write moves the page, which invalidates, so the sample is stale and the guest faults again
    assert isinstance(vm.resolve(permission(target, "write", granule=4 * K)), Retry)
    assert leaf(vm, GPA) is None
    assert rwx(vm.resolve(fault(target, "write")))[1][:2] == "rw"
    assert vm.format.hpa(vm.table.walk(Gpa(GPA)).desc, 12) >> 12 != old


# An entry that forbids.


@pytest.mark.parametrize("target", ARM)
def test_a_permission_fault_adds_what_was_missing_in_place(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    assert leaf(vm, GPA) == (GPA, 4 * K, "rw-")
    vm.events.clear()
    assert rwx(vm.resolve(permission(target, "exec", granule=4 * K))) == (4 * K, "rwx")
    assert leaf(vm, GPA) == (GPA, 4 * K, "rwx")
    assert "relax 0x40000000 7" in vm.events
    assert "topup" not in vm.events


def test_a_permission_fault_of_a_block_relaxes_the_block_although_the_area_has_pages() -> None:
    vm = world("arm64", "thp")
    vm.resolve(fault("arm64", "read", SOMEWHERE))
    vm.host.split(Hva(HVA + SOMEWHERE - GPA))
    assert rwx(vm.resolve(permission("arm64", "exec", SOMEWHERE, granule=2 * M))) == (2 * M, "rwx")
    assert leaf(vm, SOMEWHERE) == (SOMEWHERE & -(2 * M), 2 * M, "rwx")


def test_a_permission_fault_whose_entry_is_gone() -> None:
    vm = world("arm64")
    assert isinstance(vm.resolve(permission("arm64", "write", granule=4 * K)), Retry)
    assert leaf(vm, GPA) is None


@pytest.mark.parametrize("target", ARM)
def test_a_permission_fault_of_a_larger_block_than_is_allowed_now_maps_anew(target: str) -> None:
    vm = world(target, "hugetlb-2m")
    vm.resolve(fault(target, "read", SOMEWHERE))
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA, log_dirty=True)
    assert leaf(vm, SOMEWHERE) == (SOMEWHERE & -(2 * M), 2 * M, "r--")  # the log took the write permission
    assert rwx(vm.resolve(permission(target, "write", SOMEWHERE, granule=2 * M))) == (4 * K, "rw-")
    assert leaf(vm, SOMEWHERE) == (SOMEWHERE & -(4 * K), 4 * K, "rw-")
    assert leaf(vm, SOMEWHERE + 4 * K) is None  # arm64 drops the rest of the block


@pytest.mark.parametrize(
    ("target", "becomes"), [("arm64@6.12", Error(EFAULT)), ("arm64@7.4", Fixed(4 * K, Prot.R | Prot.W))]
)
def test_a_permission_fault_that_neither_writes_nor_fetches(target: str, becomes: Outcome) -> None:
    vm = world(target)
    vm.resolve(fault(target, "read"))
    assert vm.resolve(permission(target, "read", granule=4 * K)) == becomes


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "x86-ept@6.12"])
def test_a_write_protected_entry_is_repaired_without_the_lock(target: str) -> None:
    vm = world(target, log_dirty=True)
    vm.resolve(fault(target, "write"))
    vm.get_dirty_log(0)
    vm.events.clear()
    outcome = vm.resolve(permission(target, "write"))
    assert rwx(outcome) == (4 * K, "rwx")
    assert "lock" not in vm.events
    assert vm.log.pages(0) == (0,)
    assert isinstance(vm.resolve(permission(target, "write")), Spurious)


def test_shadow_paging_takes_the_lock_for_the_same() -> None:
    vm = world("x86-shadow", log_dirty=True)
    vm.resolve(fault("x86-shadow", "write"))
    vm.table.write_protect(Gpa(GPA), Gpa(GPA + 4096))
    vm.events.clear()
    assert rwx(vm.resolve(permission("x86-shadow", "write"))) == (4 * K, "rwx")
    assert "lock" in vm.events


@pytest.mark.parametrize("target", X86)
def test_a_block_in_a_logged_slot_is_split_by_the_write(target: str) -> None:
    vm = world(target, "thp")
    vm.resolve(fault(target, "read", SOMEWHERE))
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA, log_dirty=True)
    assert rwx(vm.resolve(permission(target, "write", SOMEWHERE))) == (4 * K, "rwx")
    assert leaf(vm, SOMEWHERE) == (SOMEWHERE & -4096, 4 * K, "rwx")
    assert leaf(vm, SOMEWHERE + 4096) == ((SOMEWHERE & -4096) + 4096, 4 * K, "r-x")  # the rest stays mapped, protected


# The access flag.


@pytest.mark.parametrize("target", ARM)
def test_an_access_flag_fault_sets_the_flag(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    assert vm.table.age(Gpa(GPA), Gpa(GPA + 4096), test_only=False)
    vm.events.clear()
    run = vm.handle(fault(target, "read", cause=Cause.ACCESS_FLAG, granule=4 * K))
    assert rwx(run.outcome) == (4 * K, "rw-")
    assert vm.format.is_young(vm.table.walk(Gpa(GPA)).desc)
    assert vm.events == ["find_slot"]  # nothing was pinned, no lock taken
    gone = world(target)
    assert isinstance(gone.resolve(fault(target, "read", cause=Cause.ACCESS_FLAG, granule=4 * K)), Retry)


def test_without_hardware_access_bits_ept_repairs_what_was_aged() -> None:
    tracked = replace(EPT, formats={"4k": EPT_4K_NO_AD})
    target = resolve({"x86-ept": tracked}, "x86-ept", "", "", "x86-ept")
    vm = Watched(target).with_facts(hardware_access_dirty=False)
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE)
    vm.resolve(fault(target, "read"))
    vm.table.age(Gpa(GPA), Gpa(GPA + 4096), test_only=False)
    vm.events.clear()
    assert isinstance(vm.resolve(fault(target, "read")), Fixed)
    assert "lock" not in vm.events
    assert vm.format.is_young(vm.table.walk(Gpa(GPA)).desc)


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "arm64"])
def test_a_prefetched_page_is_not_young(target: str) -> None:
    vm = world(target)
    assert isinstance(vm.resolve(fault(target, "read", prefetch=True)), Fixed)
    assert not vm.format.is_young(vm.table.walk(Gpa(GPA)).desc)


# Dirty logging.


@pytest.mark.parametrize("target", ALL)
def test_a_logged_slot_is_mapped_by_pages(target: str) -> None:
    for backing in ("thp", "hugetlb-2m"):
        vm = world(target, backing, log_dirty=True)
        assert rwx(vm.resolve(fault(target, "write", SOMEWHERE)))[0] == 4 * K
        assert vm.log.pages(0) == (SOMEWHERE - GPA >> 12,)


@pytest.mark.parametrize("target", ALL)
def test_a_read_of_a_logged_slot(target: str) -> None:
    vm = world(target, log_dirty=True)
    if target.startswith("x86"):  # mapped writable, and counted as written
        assert rwx(vm.resolve(fault(target, "read"))) == (4 * K, "rwx")
        assert vm.log.pages(0) == (0,)
        return
    assert rwx(vm.resolve(fault(target, "read"))) == (4 * K, "r--")
    assert vm.log.pages(0) == ()
    vm.events.clear()
    assert rwx(vm.resolve(permission(target, "write", granule=4 * K))) == (4 * K, "rw-")
    assert vm.log.pages(0) == (0,)
    assert "topup" in vm.events


@pytest.mark.parametrize("target", ALL)
def test_nothing_is_logged_without_the_log(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    assert vm.log.pages(0) == ()
    assert any(e.startswith("mark_dirty") for e in vm.events) is target.startswith("arm64")  # which marks the page


@pytest.mark.parametrize(("target", "size"), [("arm64", 2 * M), ("x86-ept", 4 * K), ("x86-npt", 4 * K)])
def test_a_log_on_a_read_only_slot_counts_on_x86_only(target: str, size: int) -> None:
    vm = world(target, "hugetlb-2m", readonly=True, log_dirty=True)
    assert rwx(vm.resolve(fault(target, "read", SOMEWHERE)))[0] == size
    assert vm.log.pages(0) == ()


@pytest.mark.parametrize(
    ("target", "wanted"),
    [("arm64@6.12", False), ("arm64@7.4", True), ("x86-ept", True), ("x86-npt", True)],
)
def test_tables_are_put_in_reserve_for_a_fetch_that_is_forbidden_while_logging(target: str, wanted: bool) -> None:
    vm = world(target, log_dirty=True)
    vm.resolve(fault(target, "read"))
    vm.events.clear()
    vm.resolve(permission(target, "exec", granule=4 * K))
    assert ("topup" in vm.events) is wanted


@pytest.mark.parametrize("target", ALL)
def test_no_memory_for_tables(target: str) -> None:
    vm = world(target)
    vm.answers["topup"] = ENOMEM
    assert vm.resolve(fault(target, "write")) == Error(ENOMEM)
    assert "pin" not in " ".join(vm.events)


# Pages that fail, or have to be waited for.


@pytest.mark.parametrize(
    ("target", "backing", "lsb"),
    [
        ("arm64", "anon", 12),
        ("arm64", "hugetlb-2m", 21),
        ("arm64", "hugetlb-1g", 30),
        ("arm64:16k", "anon", 14),
        ("arm64:16k", "hugetlb-2m", 14),  # such a page is mapped by pages
        ("arm64:64k", "anon", 16),
        ("x86-ept", "anon", 12),
        ("x86-npt", "hugetlb-2m", 12),
        ("x86-shadow", "hugetlb-1g", 12),
    ],
)
def test_a_poisoned_page_is_signalled(target: str, backing: str, lsb: int) -> None:
    vm = world(target, backing)
    hva = HVA + (SOMEWHERE & -(1 << vm.page_shift)) - GPA
    vm.invalidate(vm.host.poison(Hva(hva)))
    signal = Signal(Hva(hva), lsb)
    assert vm.resolve(fault(target, "read", SOMEWHERE)) == Retry(signal=signal)
    assert vm.signals == (signal,)
    assert list(vm.table.entries()) == []
    assert vm.events.count("release") == 0


def test_the_signal_of_a_logged_slot_names_one_page() -> None:
    vm = world("arm64", "hugetlb-2m", log_dirty=True)
    vm.invalidate(vm.host.poison(Hva(HVA)))
    assert vm.resolve(fault("arm64", "read")) == Retry(signal=Signal(Hva(HVA), 12))


@pytest.mark.parametrize("target", ALL)
def test_a_page_that_has_to_be_read_in(target: str) -> None:
    vm = world(target)
    vm.invalidate(vm.host.evict(Hva(HVA)))
    assert isinstance(vm.resolve(fault(target, "read")), Fixed)
    pins = [e for e in vm.events if e.startswith("pin")]
    assert pins == (["pin nowait", "pin waits"] if target.startswith("x86") else ["pin waits"])
    assert ("defer" in vm.events) is target.startswith("x86")


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "x86-shadow"])
def test_the_guest_may_do_something_else_meanwhile(target: str) -> None:
    def slow(*, readonly: bool = False) -> Watched:
        vm = world(target, readonly=readonly)
        vm.invalidate(vm.host.evict(Hva(HVA)))
        vm.answers["defer"] = True
        return vm

    vm = slow()
    assert isinstance(vm.resolve(fault(target, "read")), Retry)
    assert "pin waits" not in vm.events
    prefetched = fault(target, "read", prefetch=True)
    for other, registers in ((slow(readonly=True), fault(target, "read")), (slow(), prefetched)):
        assert isinstance(other.resolve(registers), Fixed)
        assert "pin waits" in other.events
    # a read-only slot is not queued, but what is on its way is waited for
    known = slow(readonly=True)
    known.answers["defer"] = "known"
    assert isinstance(known.resolve(fault(target, "read")), Retry)


ERRORS: Final[dict[PinError, tuple[Outcome, Outcome]]] = {
    # error frame: on arm64, on x86
    PinError.FAULT: (Error(EFAULT), Error(EFAULT)),
    PinError.RO_FAULT: (Error(EFAULT), Emulate()),
    PinError.SIGPENDING: (Error(EFAULT), Exit(Reason.INTR, errno=4)),
    PinError.NO_SLOT: (Error(EFAULT), Emulate()),
}


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("error", ERRORS)
def test_what_an_error_frame_becomes(target: str, error: PinError) -> None:
    vm = world(target)
    vm.answers["pin"] = error
    arm, x86 = ERRORS[error]
    assert vm.resolve(fault(target, "read")) == (x86 if target.startswith("x86") else arm)
    if error is PinError.NO_SLOT and target.startswith("x86"):
        assert vm.warnings == ("a slot gave the no-slot frame",)
        assert "map_mmio 0x40000000" in vm.events
    else:
        assert vm.warnings == ()
        assert "release" not in vm.events


# Races inside the lock.


@pytest.mark.parametrize("target", ALL)
def test_another_vcpu_wins(target: str) -> None:
    vm = world(target)
    vm.answers["map"] = MapResult.LOST
    assert isinstance(vm.resolve(fault(target, "write")), Retry)
    assert vm.events[-1] == "release"


@pytest.mark.parametrize("target", ALL)
def test_a_lost_race_in_a_logged_slot_is_dirty_only_where_it_is_marked_first(target: str) -> None:
    vm = world(target, log_dirty=True)
    vm.answers["map"] = MapResult.LOST
    vm.resolve(fault(target, "write"))
    assert vm.log.pages(0) == ((0,) if target.startswith("x86") else ())


# Private memory (guest_memfd).


def test_private_access_and_shared_frame_meet_in_an_exit() -> None:
    for target in NESTED:
        vm = world(target, private_memory=True)
        outcome = vm.resolve(fault(target, "read", private=True))
        assert outcome == Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(GPA), 4 * K, 1 << 3), EFAULT)
        vm.private.add(Gfn(GPA >> 12))
        outcome = vm.resolve(fault(target, "read"))
        assert outcome == Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(GPA), 4 * K, 0), EFAULT)
        # of one kind, but the slot has no guest_memfd
        outcome = vm.resolve(fault(target, "read", private=True))
        assert outcome == Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(GPA), 4 * K, 1 << 3), EFAULT)


def test_a_software_protected_vm_takes_privacy_from_the_attribute() -> None:
    vm = world("x86-ept", private_memory=True, private_by_attribute=True)
    vm.private.add(Gfn(GPA >> 12))
    outcome = vm.resolve(fault("x86-ept", "read"))
    assert isinstance(outcome, Exit)
    assert outcome.detail == MemoryFault(Gpa(GPA), 4 * K, 1 << 3)


@pytest.mark.parametrize("target", [*NESTED, "arm64@7.4"])
def test_a_page_from_guest_memfd(target: str) -> None:
    vm = with_memfd(target)
    vm.private.add(Gfn((GPA >> 12) + 3))
    private = fault(target, "write", GPA + 0x3018, private=True)
    prot = "rwx" if target.startswith("x86") else "rw-"
    assert rwx(vm.resolve(private)) == (4 * K, prot)
    frame = vm.format.hpa(vm.table.walk(Gpa(GPA + 0x3000)).desc, 12)
    assert frame >> 12 != vm.host.pin(Hva(HVA + 0x3000), write=True).pfn
    assert "mapping_size" not in vm.events  # the host's page table does not map it
    if target.startswith("arm64"):  # nothing of the host's address space is looked at
        assert "area" not in vm.events
        vm.invalidate(vm.host.unback(Hva(HVA), SIZE))
        assert isinstance(vm.resolve(fault(target, "write", GPA + 0x7000)), Fixed)
        vm.back(HVA, SIZE)
    # x86 takes only private accesses from the file; on arm64 the whole slot is the file's
    assert isinstance(vm.resolve(fault(target, "write", GPA + 0x5000)), Fixed)
    shared = vm.format.hpa(vm.table.walk(Gpa(GPA + 0x5000)).desc, 12)
    assert (shared - frame == 0x2000) is target.startswith("arm64")


# A nested guest's own table.


def test_the_guests_own_block_limits_the_size() -> None:
    for target, own, size in (
        ("arm64", 2 * M, 2 * M),
        ("arm64", 4 * K, 4 * K),
        ("arm64", G, 2 * M),
        ("x86-shadow", 2 * M, 2 * M),
        ("x86-shadow", 4 * K, 4 * K),
    ):
        vm = world(target, "hugetlb-2m", nested=True)
        vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA + 0x60_0000), own)
        outcome = vm.resolve(fault(target, "write", 0x8000_0000))
        assert rwx(outcome)[0] == size, (target, own)
        found = leaf(vm, 0x8000_0000)  # installed where it faulted, mapped to what the guest's table says
        assert found is not None
        desc = vm.table.walk(Gpa(0x8000_0000)).desc
        assert vm.format.hpa(desc, size.bit_length() - 1) >> 12 == vm.host.pin(Hva(HVA + 0x60_0000), write=True).pfn


@pytest.mark.parametrize(("target", "prot"), [("arm64@6.12", "r-x"), ("arm64@7.4", "r--")])
def test_the_guests_own_table_trims_permissions(target: str, prot: str) -> None:
    vm = world(target, nested=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), 4 * K, writable=False, executable=False)
    outcome = vm.resolve(fault(target, "exec"))
    assert rwx(outcome) == (4 * K, prot)  # 6.12 forgot about execution


def test_the_level_of_the_guests_own_entry_is_kept_in_the_leaf() -> None:
    vm = world("arm64", nested=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), 4 * K, level=2)
    vm.resolve(fault("arm64", "read"))
    assert vm.table.walk(Gpa(GPA)).desc >> 55 & 3 == 2


# Tags (arm64).


def test_tags_are_initialised_before_the_page_is_seen() -> None:
    vm = world("arm64", "thp", tagging=True)
    vm.answers["area"] = Area(4 * K, tags_allowed=True)
    assert isinstance(vm.resolve(fault("arm64", "write")), Fixed)
    assert [e.split()[0] for e in vm.events if e.startswith(("prep", "map "))] == ["prepare_page", "map"]
    assert f"prepare_page {2 * M:#x}" in vm.events
    refused = world("arm64", tagging=True)  # host memory that allows no tags
    assert refused.resolve(fault("arm64", "write")) == Error(EFAULT)
    assert leaf(refused, GPA) is None


def test_every_page_of_a_slot_is_its_own() -> None:
    for target in ONE_OF_EACH:
        vm = world(target)
        frames = set()
        for i in (0, 1, 511, 512, SIZE // 4096 - 1):
            vm.resolve(fault(target, "write", GPA + i * 4096))
            frames.add(vm.format.hpa(vm.table.walk(Gpa(GPA + i * 4096)).desc, 12))
        assert len(frames) == 5


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "x86-shadow"])
def test_a_tracked_frame_is_never_mapped_writable(target: str) -> None:
    vm = world(target, log_dirty=True)
    vm.tracked.add(Gfn(GPA >> 12))
    assert vm.handle(fault(target, "read")).machinery == Fixed(4 * K, Prot.R | Prot.X)
    assert leaf(vm, GPA) == (GPA, 4 * K, "r-x")
    assert not vm.log.pages(0)
    written = vm.handle(fault(target, "write"))  # the entry stays as it is: the write is emulated
    assert written.machinery == WriteProtected()
    assert isinstance(written.outcome, Emulate)
    assert leaf(vm, GPA) == (GPA, 4 * K, "r-x")
    assert vm.handle(fault(target, "write", GPA + 4 * K)).machinery == Fixed(4 * K, Prot.R | Prot.W | Prot.X)


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("x86-ept@6.12", ""),
        ("x86-npt@6.12", ""),
        ("x86-shadow@6.12", ""),
        ("x86-ept@7.4", "prefetch, allowed"),
        ("x86-npt@7.4", "prefetch, allowed"),
        ("x86-shadow@7.4", "prefetch"),
    ],
)
def test_a_leaf_that_is_there_already(target: str, kept: str) -> None:
    def again(kind: str, *, prefetch: bool = False) -> tuple[type[Outcome], tuple[int, int, str] | None, bool]:
        vm = world(target)
        vm.resolve(fault(target, "write"))
        vm.answers["pin"] = Pin(Pfn(vm.host.pin(Hva(HVA), write=False).pfn or 0), writable=False)
        outcome = vm.resolve(fault(target, kind, prefetch=prefetch))
        found = vm.table.leaf(Gpa(GPA))
        return type(outcome), leaf(vm, GPA), found is not None and vm.format.is_young(found.desc)

    stays, goes = (GPA, 4 * K, "rwx"), (GPA, 4 * K, "r-x")
    assert again("read", prefetch=True) == ((Spurious, stays, True) if "prefetch" in kept else (Fixed, goes, False))
    for kind in ("read", "exec"):  # another vCPU was first, and could be given more
        assert again(kind) == ((Spurious, stays, True) if "allowed" in kept else (Fixed, goes, True))


@pytest.mark.parametrize("target", ["x86-ept@7.4", "x86-npt@7.4"])
def test_a_leaf_that_does_not_do_is_replaced(target: str) -> None:
    vm = world(target, "thp", log_dirty=True)
    vm.resolve(fault(target, "read"))
    vm.table.write_protect(Gpa(GPA), Gpa(GPA + 4 * K))
    assert isinstance(vm.resolve(fault(target, "write")), Fixed)  # not a permission fault: no repair
    assert leaf(vm, GPA) == (GPA, 4 * K, "rwx")
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA)
    assert rwx(vm.resolve(fault(target, "read"))) == (2 * M, "rwx")  # the leaf that is there is a page


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "x86-shadow"])
@pytest.mark.parametrize(
    ("backing", "small", "size"),
    [
        ("hugetlb-1g", (), G),
        ("hugetlb-1g", (G,), 2 * M),
        ("hugetlb-1g", (G, 2 * M), 4 * K),
        ("hugetlb-1g", (2 * M,), G),  # only a table where the block would be counts
        ("thp", (G,), 2 * M),
        ("thp", (2 * M,), 4 * K),
    ],
)
def test_a_block_does_not_replace_what_a_fetch_made_small(
    target: str, backing: str, small: tuple[int, ...], size: int
) -> None:
    for kind, rights in (("read", "rwx" if size == 4 * K else "rw-"), ("write", "rwx" if size == 4 * K else "rw-")):
        vm = world(target, backing, small_exec=True)
        vm.answers["fetched_small"] = small
        run = vm.handle(fault(target, kind, SOMEWHERE))
        assert rwx(run.outcome) == (size, rights)
        assert leaf(vm, SOMEWHERE) == (SOMEWHERE & -size, size, rights)
        found = vm.table.leaf(Gpa(SOMEWHERE))
        host = vm.host.pin(Hva(HVA + SOMEWHERE - GPA), write=True).pfn
        assert found is not None
        assert host is not None
        assert vm.format.hpa(found.desc, found.shift) == (host << 12) & -size
        assert run.progress.wanted == (G if backing == "hugetlb-1g" else 2 * M)
    vm = world(target, backing)
    vm.answers["fetched_small"] = small
    assert rwx(vm.resolve(fault(target, "read", SOMEWHERE)))[0] == (G if backing == "hugetlb-1g" else 2 * M)
