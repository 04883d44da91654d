"""The proposed KVM Userfault: which pages leave to user space, when, and what the flag does to a slot."""

from __future__ import annotations

from dataclasses import replace
from errno import EFAULT

import pytest

from kvmfault.contract.outcome import Exit, MemoryFault, Reason
from kvmfault.contract.target import backend
from kvmfault.errors import ModelError
from kvmfault.machine.guest import Ended
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa
from kvmfault.vm.memslot import Memslot
from tests.naive_vm import with_userfault
from tests.worlds import GPA, HVA, leaf

K, M2 = 4096, 2 << 20
FLAG = 1 << 4
TDP = ("arm64", "arm64@6.12", "x86-ept", "x86-npt")
EXIT = Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(GPA), K, FLAG), EFAULT)


def vm_on(target: str, *, flag: bool = True, log: bool = False, kind: str = "thp") -> Vm:
    vm = Vm.on(with_userfault(target, hardware_ad=True)).with_caps(userfault=True).back(HVA, 4 * M2, kind)
    return change(vm, flag=flag, log=log)


def change(vm: Vm, *, flag: bool, log: bool = False, gpa: int = GPA) -> Vm:
    return vm.add_memslot(0, gpa=gpa, size=2 * M2, hva=HVA, userfault=flag, log_dirty=log)


@pytest.mark.parametrize("target", TDP)
def test_a_marked_page_leaves_to_user_space_and_its_neighbour_is_mapped_alone(target: str) -> None:
    vm = vm_on(target)
    vm.set_userfault(0, 0, 1, wanted=True)
    for write, fetch in ((True, False), (False, False), (False, True)):
        run = vm.access(GPA + 0x123, vcpu=1, write=write, fetch=fetch)
        assert (run.ended, run.exits) == (Ended.FAILED, (EXIT,))
    assert leaf(vm, GPA) is None
    assert vm.access(GPA + K).ended is Ended.DONE
    assert (leaf(vm, GPA + K) or (0, 0))[1] == K
    vm.set_userfault(0, 0, 1, wanted=False)
    assert vm.access(GPA).ended is Ended.DONE
    vm.set_userfault(0, 0, 1, wanted=True)
    assert vm.access(GPA).faults == ()  # what is mapped stays


@pytest.mark.parametrize("target", TDP)
def test_the_flag_takes_everything_away_and_gives_blocks_back(target: str) -> None:
    vm = vm_on(target, flag=False)
    vm.access(GPA)
    assert (leaf(vm, GPA) or (0, 0))[1] == M2
    change(vm, flag=True)
    assert leaf(vm, GPA) is None
    assert vm.vcpu.tlb.entries() == ()
    vm.access(GPA)
    change(vm, flag=False)
    assert (leaf(vm, GPA) is None) is target.startswith("x86")  # others keep what they have
    vm.access(GPA + K)
    assert (leaf(vm, GPA) or (0, 0))[1] == M2  # arm64 puts the block in the place of the table


def test_blocks_do_not_come_back_while_the_slot_needs_pages() -> None:
    vm = vm_on("x86-ept", log=True)
    vm.access(GPA, write=True)
    change(vm, flag=False, log=True)
    assert leaf(vm, GPA) == (GPA, K, "rwx")
    change(vm, flag=True, log=True)
    vm.access(GPA, write=True)
    change(vm, flag=True, log=False)
    assert leaf(vm, GPA) == (GPA, K, "rwx")


@pytest.mark.parametrize("target", TDP)
def test_a_move_keeps_the_marks_and_a_deletion_forgets_them(target: str) -> None:
    vm = vm_on(target)
    vm.set_userfault(0, 0, 3, wanted=True)
    change(vm, flag=True, gpa=GPA + M2)
    assert vm.access(GPA + M2).ended is Ended.FAILED
    vm.remove_memslot(0)
    assert vm.userfault == {}
    change(vm, flag=True)
    assert vm.access(GPA).ended is Ended.DONE


def test_marks_may_be_made_before_the_flag() -> None:
    vm = vm_on("arm64", flag=False)
    vm.set_userfault(0, 0, 1, wanted=True)
    assert vm.access(GPA).ended is Ended.DONE
    change(vm, flag=True)
    assert vm.access(GPA).ended is Ended.FAILED
    change(vm, flag=False)
    vm.set_userfault(0, 0, 1, wanted=True)
    vm.remove_memslot(0)
    assert vm.userfault == {}


def test_a_guest_memfd_slot_may_change_the_flag_but_not_move() -> None:
    vm = Vm.on(with_userfault("arm64", hardware_ad=True)).with_caps(userfault=True, guest_memfd=True)
    vm.back(HVA, M2).create_guest_memfd(5, M2)
    vm.add_memslot(0, gpa=GPA, size=M2, hva=HVA, memfd=5)
    was = vm.access(GPA).pfns
    vm.add_memslot(0, gpa=GPA, size=M2, hva=HVA, memfd=5, userfault=True)
    vm.set_userfault(0, 0, 1, wanted=True)
    assert vm.access(GPA).exits == (EXIT,)
    vm.set_userfault(0, 0, 1, wanted=False)
    assert vm.access(GPA).pfns == was
    with pytest.raises(ModelError, match="memfd-immutable"):
        vm.add_memslot(0, gpa=GPA + M2, size=M2, hva=HVA, memfd=5, userfault=True)


def test_a_bitmap_that_cannot_be_read_fails_without_an_exit() -> None:
    class Unreadable(Vm):
        def userfault_wanted(self, slot: Memslot, gfn: Gfn) -> bool | None:  # type: ignore[override]  # as Ports
            return None

    vm = Unreadable.on(with_userfault("x86-ept", hardware_ad=True)).with_caps(userfault=True).back(HVA, M2)
    vm.add_memslot(0, gpa=GPA, size=M2, hva=HVA, userfault=True)
    run = vm.access(GPA)
    assert (run.ended, [type(left).__name__ for left in run.exits]) == (Ended.FAILED, ["Error"])


def test_kvms_own_accesses_are_not_covered() -> None:
    vm = vm_on("x86-ept", kind="anon")
    vm.access(GPA)
    vm.set_userfault(0, 0, 2, wanted=True)
    vm.track_writes(Gfn(GPA >> 12))
    run = vm.access(GPA, write=True)  # emulated
    assert (run.ended, run.exits) == (Ended.DONE, ())


def test_a_kernel_without_the_feature() -> None:
    with pytest.raises(ModelError, match=r"EINVAL \(flags\)"):
        Vm.on("x86-ept").back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA, userfault=True)
    on = backend("x86-ept")
    vm = Vm.on(on, caps=replace(on.backend.host(on.format), userfault=True)).back(HVA, M2)
    vm.add_memslot(0, gpa=GPA, size=M2, hva=HVA, userfault=True)
    vm.set_userfault(0, 0, 1, wanted=True)
    assert vm.access(GPA).ended is Ended.DONE  # the path has no such step


@pytest.mark.parametrize(("slot", "first", "count"), [(1, 0, 1), (0, -1, 1), (0, 1023, 2), (0, 5, -1), (1 << 20, 0, 1)])
def test_marks_outside_the_slot(slot: int, first: int, count: int) -> None:
    with pytest.raises(ModelError, match="has no pages"):
        vm_on("x86-ept").set_userfault(slot, first, count, wanted=True)


def test_no_mark_and_a_mark_taken_back_are_the_same() -> None:
    vm = vm_on("x86-ept")
    key = vm.key()
    vm.set_userfault(0, 5, 2, wanted=True)
    fork = vm.fork()
    fork.set_userfault(0, 5, 2, wanted=False)
    assert fork.key() == key != vm.key()
