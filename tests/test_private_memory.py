"""Memory attributes and guest_memfd: errnos, conversions, holes, poison."""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EINVAL, ENOTTY

import pytest

from kvmfault.contract.outcome import Exit, MemoryFault, Reason
from kvmfault.errors import ModelError
from kvmfault.machine.guest import Ended
from kvmfault.machine.vm import Vm
from kvmfault.types import EHWPOISON, Gfn, Gpa
from tests.worlds import GPA, HVA, leaf

K, M2, U64 = 4096, 2 << 20, 1 << 64
PRIVATE = 8
X86 = ("x86-ept", "x86-npt")


def vm_with_memfd(target: str, kind: str = "thp", *, fd: int = 5) -> Vm:
    x86 = target.startswith("x86")
    vm = Vm.on(target).with_caps(guest_memfd=True, memory_attributes=x86)
    vm.with_facts(private_memory=x86, private_by_attribute=x86).back(HVA, 2 * M2, kind)
    assert vm.create_guest_memfd(fd, 2 * M2) == 0
    return vm.add_memslot(0, gpa=GPA, size=2 * M2, hva=HVA, memfd=fd)


def convert(vm: Vm, page: int, count: int = 1, *, private: bool = True) -> int:
    return vm.set_attributes(GPA + page * K, count * K, PRIVATE * private)


def frame(vm: Vm, page: int, vcpu: int = 0) -> int:
    run = vm.access(GPA + page * K, write=True, vcpu=vcpu)
    assert run.ended is Ended.DONE, run.outcome
    return run.pfns[0]


# KVM_SET_MEMORY_ATTRIBUTES.


@pytest.mark.parametrize(
    ("gpa", "size", "attributes", "flags", "errno"),
    [
        (0, K, PRIVATE, 0, 0),
        (1 << 40, M2, PRIVATE, 0, 0),  # no slot is needed
        (0, K, 0, 0, 0),
        (0, K, 0, 1, EINVAL),
        (0, K, 1, 0, EINVAL),
        (0, K, PRIVATE | 1 << 63, 0, EINVAL),
        (0, 0, PRIVATE, 0, EINVAL),
        (U64 - K, K, PRIVATE, 0, EINVAL),  # the end wraps to 0
        (U64 - K, 2 * K, PRIVATE, 0, EINVAL),
        (1, K, PRIVATE, 0, EINVAL),
        (0, K + 1, PRIVATE, 0, EINVAL),
    ],
)
def test_attributes_that_can_be_set(gpa: int, size: int, attributes: int, flags: int, errno: int) -> None:
    assert vm_with_memfd("x86-ept").set_attributes(gpa, size, attributes, flags) == errno


def test_who_has_no_attributes() -> None:
    for target in ("arm64", "x86-ept"):
        vm = Vm.on(target)
        assert [vm.set_attributes(*asked) for asked in ((0, K, PRIVATE), (1, 0, 1, 1))] == [ENOTTY, ENOTTY]
    plain = Vm.on("x86-ept").with_caps(memory_attributes=True)  # the ioctl exists, the VM has no private memory
    assert plain.set_attributes(0, K, PRIVATE) == EINVAL


@pytest.mark.parametrize("target", X86)
def test_a_conversion_takes_the_other_kind_away(target: str) -> None:
    vm = vm_with_memfd(target)
    shared = [frame(vm, 0, vcpu) for vcpu in (0, 1)]
    assert leaf(vm, GPA) == (GPA, M2, "rwx")
    assert convert(vm, 7) == 0
    assert leaf(vm, GPA) is None  # the block went as a whole
    assert not any(vcpu.tlb.entries() for vcpu in vm.vcpus)
    private = frame(vm, 7)
    assert leaf(vm, GPA + 7 * K) == (GPA + 7 * K, K, "rwx")
    assert frame(vm, 0) == shared[0]
    assert leaf(vm, GPA) == (GPA, K, "rwx")  # pages, while the block is mixed
    assert private != shared[0] + 7
    assert convert(vm, 7, private=False) == 0
    assert leaf(vm, GPA + 7 * K) is None
    assert frame(vm, 7, vcpu=1) == shared[0] + 7
    assert leaf(vm, GPA) == (GPA, M2, "rwx")


def test_a_conversion_follows_the_protocol_where_slots_are() -> None:
    vm = vm_with_memfd("x86-ept")
    seq = vm.invalidations.seq
    assert vm.set_attributes(1 << 40, M2, PRIVATE) == 0
    assert vm.invalidations.seq == seq  # nothing can be mapped there
    assert vm.set_attributes(GPA - M2, 2 * M2, PRIVATE) == 0
    assert vm.invalidations.seq == seq + 1
    assert (vm.invalidations.range_start, vm.invalidations.range_end) == (GPA >> 12, GPA + M2 >> 12)
    assert convert(vm, 3) == 0
    assert vm.invalidations.seq == seq + 1  # already so: nothing is done
    assert convert(vm, 3, 1024) == 0
    assert vm.invalidations.seq == seq + 2
    assert (vm.invalidations.in_progress, vm.invalidations.warnings) == (0, 0)


def test_an_access_of_the_other_kind_leaves_to_the_vmm() -> None:
    vm = vm_with_memfd("x86-npt").with_facts(private_by_attribute=False)
    run = vm.access(GPA, private=True)
    assert run.exits == (Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(GPA), K, PRIVATE), EFAULT),)
    assert convert(vm, 0) == 0
    assert vm.access(GPA, private=True).ended is Ended.DONE
    vm.access(GPA + K)
    assert vm.access(GPA + M2 - K, private=False).ended is Ended.DONE


def test_private_memory_without_a_file() -> None:
    vm = Vm.on("x86-ept").with_caps(memory_attributes=True).with_facts(private_memory=True, private_by_attribute=True)
    vm.back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA)
    assert convert(vm, 0) == 0
    fault = (Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(GPA), K, PRIVATE), EFAULT),)
    assert vm.access(GPA).exits == fault
    vm.set_attributes(0, K, PRIVATE)
    assert vm.access(0).exits == (Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(0), K, PRIVATE), EFAULT),)  # no slot at all


# guest_memfd.


def test_who_can_create_a_file() -> None:
    assert Vm.on("x86-ept").create_guest_memfd(5, K) == ENOTTY
    vm = Vm.on("x86-ept").with_caps(guest_memfd_files=True)
    sizes = {K: 0, 0: EINVAL, K + 1: EINVAL, 1 << 63: EINVAL, U64 - K: EINVAL}
    assert {size: vm.create_guest_memfd(fd, size) for fd, size in enumerate(sizes)} == sizes
    assert [vm.create_guest_memfd(9, K, flags) for flags in (1, 2)] == [EINVAL, EINVAL]
    assert vm.with_caps(memfd_flags=1).create_guest_memfd(10, K, 1) == 0


@pytest.mark.parametrize("target", ["arm64", "arm64:16k", "arm64:64k", *X86])
def test_frames_of_files_are_what_the_table_can_hold(target: str) -> None:
    vm = vm_with_memfd(target, "anon", fd=1 << 30)
    page = 1 << vm.page_shift
    if vm.caps.memory_attributes:
        convert(vm, 0, 2)
    pfns = [vm.access(GPA + i * page, write=True).pfns[0] for i in range(2)]
    assert pfns[1] == pfns[0] + 1
    assert pfns[0] << vm.page_shift >= 1 << 46
    assert vm.access(GPA).pfns[0] == pfns[0]  # through the entry, whatever bits it has


@pytest.mark.parametrize("target", ["arm64", *X86])
def test_a_hole_gives_other_frames_that_nobody_else_has(target: str) -> None:
    vm = vm_with_memfd(target)
    if vm.caps.memory_attributes:
        convert(vm, 0, 64)
    was = [frame(vm, page) for page in range(64)]
    seen = set(was)
    for first, count in ((0, 10), (5, 10), (20, 5), (0, 1), (0, 1)):
        assert vm.punch_hole(5, first * K, count * K) == 0
        assert all((leaf(vm, GPA + page * K) is None) is (first <= page < first + count) for page in range(64))
        now = [frame(vm, page) for page in range(64)]
        assert len(set(now)) == 64
        new = set(now[first : first + count])
        assert not new & seen
        seen |= new


@pytest.mark.parametrize(
    ("offset", "size", "errno"),
    [(0, K, 0), (0, 0, EINVAL), (-K, K, EINVAL), (1, K, EINVAL), (0, 1, EINVAL), (0, 1 << 40, 0), (4 * M2, K, 0)],
)
def test_holes_that_can_be_punched(offset: int, size: int, errno: int) -> None:
    assert vm_with_memfd("x86-ept").punch_hole(5, offset, size) == errno


def test_what_is_no_file() -> None:
    vm = vm_with_memfd("x86-ept")
    vm.slots.open_file(6, None)
    for fd in (6, 7):
        with pytest.raises(ModelError, match=f"file descriptor {fd} is no guest_memfd"):
            vm.punch_hole(fd, 0, K)
    with pytest.raises(ModelError, match="no byte 0x400000"):
        vm.poison_memfd(5, 2 * M2)
    vm.create_guest_memfd(8, 1 << 62)
    vm.add_memslot(1, gpa=1 << 33, size=K, hva=HVA, memfd=8)
    vm.set_attributes(1 << 33, K, PRIVATE)
    with pytest.raises(ModelError, match="bytes for all guest_memfds together"):
        vm.access(1 << 33)


def test_a_hole_follows_the_protocol_where_the_file_is_bound() -> None:
    vm = Vm.on("x86-ept").with_caps(guest_memfd=True)
    vm.back(HVA, M2)
    assert vm.create_guest_memfd(5, 8 * K) == 0
    vm.add_memslot(0, gpa=GPA, size=2 * K, hva=HVA, memfd=5, memfd_offset=4 * K)
    vm.punch_hole(5, 0, 4 * K)
    assert vm.invalidations.seq == 0
    vm.punch_hole(5, 3 * K, 2 * K)
    assert vm.invalidations.seq == 1
    assert (vm.invalidations.range_start, vm.invalidations.range_end) == (GPA >> 12, (GPA >> 12) + 1)


@pytest.mark.parametrize("target", ["arm64", *X86])
def test_a_poisoned_page_of_a_file_fails_until_a_hole_is_punched(target: str) -> None:
    vm = vm_with_memfd(target)
    if vm.caps.memory_attributes:
        convert(vm, 0, 2)
    before = [frame(vm, page) for page in range(2)]
    vm.poison_memfd(5, K + 5)
    assert leaf(vm, GPA + K) is None
    run = vm.access(GPA + K)
    assert run.ended is Ended.FAILED
    assert isinstance(run.outcome, Exit)
    assert (run.outcome.reason, run.outcome.errno) == (Reason.MEMORY_FAULT, EHWPOISON)
    assert vm.signals == ()
    assert frame(vm, 0) == before[0]
    vm.punch_hole(5, K, K)
    assert frame(vm, 1) not in before


def test_forks_and_keys() -> None:
    vm = vm_with_memfd("x86-ept")
    convert(vm, 0, 4)
    fork, key = vm.fork(), vm.key()
    steps: list[Callable[[Vm], object]] = [
        lambda v: v.punch_hole(5, 0, K),
        lambda v: convert(v, 1, private=False),
        lambda v: v.poison_memfd(5, 0),
        lambda v: frame(v, 3),
    ]
    for step in steps:
        step(fork)
        assert vm.key() == key != fork.key()
        again = vm.fork()
        for each in steps[: steps.index(step) + 1]:
            each(again)
        assert again.key() == fork.key()
    assert vm.find_slot(Gfn(GPA >> 12)) is not None
