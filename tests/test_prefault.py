"""KVM_PRE_FAULT_MEMORY, line by line: errnos in their order, progress, what is mapped and what is not counted."""

from __future__ import annotations

from errno import EFAULT, EINTR, EINVAL, ENOENT, EOPNOTSUPP

import pytest

from kvmfault.contract.outcome import Exit, Reason
from kvmfault.machine.prefault import PrefaultAnswer
from kvmfault.machine.vm import Vm
from kvmfault.types import EHWPOISON, Gfn, Gpa, Hva
from tests.worlds import GPA, HVA, leaf, with_apic_page, world

K, M2, U64 = 4096, 2 << 20, 1 << 64
OFFERED = ("arm64", "x86-ept", "x86-npt")


def vm_on(target: str, kind: str = "anon", size: int = 64 * K) -> Vm:
    return Vm.on(target).back(HVA, 4 * M2, kind).add_memslot(0, gpa=GPA, size=size, hva=HVA)


# gpa and size beside the slot's 64 pages; what a 6.12 kernel answered: errno, gpa, size
ROWS = [
    (0, K, 0, 0, K, 0),
    (0, 64 * K, 0, 0, 64 * K, 0),
    (0, 65 * K, 0, 0, 64 * K, K),
    (63 * K, 2 * K, 0, 0, 64 * K, K),
    (64 * K, K, 0, ENOENT, 64 * K, K),
    (1, K, 0, EINVAL, 1, K),
    (0, 1, 0, EINVAL, 0, 1),
    (0, 0, 0, EINVAL, 0, 0),
    (0, K, 1, EINVAL, 0, K),
]


@pytest.mark.parametrize("target", OFFERED)
@pytest.mark.parametrize(("at", "size", "flags", "errno", "end", "left"), ROWS)
def test_progress_and_errnos(target: str, at: int, size: int, flags: int, errno: int, end: int, left: int) -> None:
    vm = vm_on(target)
    got = vm.prefault(GPA + at, size, flags)
    assert (got.errno, got.gpa, got.size) == (errno, GPA + end, left)
    mapped = {page for page in range(64) if leaf(vm, GPA + page * K)}
    assert mapped == (set(range(at // K, min(end // K, 64))) if not errno else set())


@pytest.mark.parametrize(
    ("gpa", "size", "errno"),
    [(U64 - K, 2 * K, EINVAL), (U64 - K, K, EINVAL), (0, U64, EINVAL), (1 << 52, K, ENOENT), (1 << 47, K, ENOENT)],
)
def test_the_end_of_the_address_space(gpa: int, size: int, errno: int) -> None:
    assert vm_on("x86-ept").prefault(gpa, size) == PrefaultAnswer(errno, gpa, size)


def test_beyond_what_the_vm_has() -> None:
    assert vm_on("arm64").prefault(1 << 60, K) == PrefaultAnswer(ENOENT, 1 << 60, K)


def test_who_does_not_offer_it() -> None:
    old = vm_on("arm64@6.12")
    assert old.prefault(GPA, K).errno == EINVAL  # no such ioctl
    shadow = vm_on("x86-shadow")
    assert shadow.prefault(GPA, K).errno == EOPNOTSUPP
    assert shadow.prefault(GPA, K, 1).errno == EINVAL  # the argument is looked at first


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
def test_progress_goes_to_the_end_of_the_block(target: str) -> None:
    vm = vm_on(target, "thp", 2 * M2)
    assert vm.prefault(GPA + 5 * K, M2) == PrefaultAnswer(0, GPA + M2 + 5 * K, 0)
    assert [leaf(vm, GPA + block) for block in (0, M2)] == [(GPA, M2, "rwx"), (GPA + M2, M2, "rwx")]

    class Counting(Vm):
        faults = 0

        def topup(self) -> int:
            self.faults += 1
            return 0

    two = Counting.on(target).back(HVA, 4 * M2, "thp").add_memslot(0, gpa=GPA, size=2 * M2, hva=HVA)
    two.prefault(GPA, 2 * M2)
    assert two.faults == 2
    few = vm_on(target, "thp", 2 * M2)
    few.prefault(GPA + 5 * K, K)
    assert (leaf(few, GPA), leaf(few, GPA + M2)) == ((GPA, M2, "rwx"), None)  # all of the block that one page needs


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
def test_nobody_used_the_page_yet_and_nothing_is_counted(target: str) -> None:
    vm = vm_on(target)
    vm.prefault(GPA, 4 * K)
    assert not vm.format.is_young(vm.table.walk(Gpa(GPA)).desc)
    assert not +vm.vcpu.counters
    assert vm.vcpu.tlb.entries() == ()
    assert vm.access(GPA, write=True).faults == ()
    assert vm.prefault(GPA, 4 * K) == PrefaultAnswer(0, GPA + 4 * K, 0)  # again, over what is there


def test_a_read_of_a_logged_slot() -> None:
    for target, marked in (("x86-ept", (0,)), ("arm64", ())):
        vm = Vm.on(target).back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA, log_dirty=True)
        assert vm.prefault(GPA, K).errno == 0
        assert vm.get_dirty_log(0).pages == marked


def test_the_vcpu_that_asks_maps() -> None:
    vm = vm_on("x86-ept")
    assert vm.prefault(GPA, K, vcpu=2).errno == 0
    assert vm.vcpu is vm.vcpus[2]


def test_an_error_after_some_progress_is_success() -> None:
    vm = vm_on("x86-ept")
    vm.invalidate(vm.host.unback(Hva(HVA + 2 * K), K))
    assert vm.prefault(GPA, 4 * K) == PrefaultAnswer(0, GPA + 2 * K, 2 * K)
    assert vm.prefault(GPA + 2 * K, 2 * K) == PrefaultAnswer(EFAULT, GPA + 2 * K, 2 * K)


@pytest.mark.parametrize("target", ["x86-ept", "x86-ept@6.12", "arm64"])
def test_what_is_mapped_already_is_done(target: str) -> None:
    vm = vm_on(target)
    for _ in range(2):
        assert vm.prefault(GPA, 2 * K) == PrefaultAnswer(0, GPA + 2 * K, 0)


def test_memory_that_failed() -> None:
    vm = vm_on("x86-ept")
    vm.invalidate(vm.host.poison(Hva(HVA)))
    assert vm.prefault(GPA, K) == PrefaultAnswer(EINTR, GPA, K)
    assert len(vm.signals) == 1
    told = vm_on("arm64")  # "KVM: arm64: Propagate EHWPOISON in kvm_s2_fault_pin_pfn()": nobody waits for the page
    told.invalidate(told.host.poison(Hva(HVA)))
    assert told.prefault(GPA, K) == PrefaultAnswer(EHWPOISON, GPA, K)
    assert told.signals == ()


@pytest.mark.parametrize("target", ["x86-ept", "arm64"])
def test_a_page_that_user_space_owes(target: str) -> None:
    vm = vm_on(target)
    vm.invalidate(vm.host.make_missing(Hva(HVA)))
    assert vm.prefault(GPA, K) == PrefaultAnswer(EINTR, GPA, K)  # it would sleep until a signal
    vm.host.supply(Hva(HVA))
    assert vm.prefault(GPA, K).errno == 0


def test_a_tracked_frame_and_the_apic_page() -> None:
    vm = vm_on("x86-ept")
    vm.track_writes(Gfn(GPA >> 12))
    assert vm.prefault(GPA, K).errno == 0
    assert leaf(vm, GPA) == (GPA, K, "r-x")
    apic = with_apic_page("x86-ept", apic_virtualised=False)
    assert apic.prefault(0xFEE0_0000, K) == PrefaultAnswer(ENOENT, 0xFEE0_0000, K)


def test_private_frames_are_asked_for_as_private() -> None:
    vm = Vm.on("x86-ept").with_caps(guest_memfd=True, memory_attributes=True).with_facts(private_memory=True)
    vm.back(HVA, M2).create_guest_memfd(5, M2)
    vm.add_memslot(0, gpa=GPA, size=M2, hva=HVA, memfd=5)
    vm.set_attributes(GPA, K, 8)
    assert vm.prefault(GPA, 2 * K) == PrefaultAnswer(0, GPA + 2 * K, 0)
    vm.poison_memfd(5, 0)
    got = vm.prefault(GPA, K)
    assert (got.errno, got.gpa) == (EHWPOISON, GPA)
    assert isinstance(got.exit, Exit)
    assert got.exit.reason is Reason.MEMORY_FAULT


def test_a_read_only_slot_can_be_pre_faulted() -> None:
    vm = world("x86-ept", readonly=True)
    assert vm.prefault(GPA, 4 * K) == PrefaultAnswer(0, GPA + 4 * K, 0)
    assert leaf(vm, GPA) == (GPA, K, "r-x")
