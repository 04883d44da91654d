"""What an access of the guest comes to: pages crossed, devices, the emulator, waiting, signals, statistics."""

from __future__ import annotations

from errno import EAGAIN, EINTR
from typing import Final

import pytest

from kvmfault.contract.access import Cause
from kvmfault.contract.outcome import Error, Exit, Fixed, Inject, MmioAccess, Reason, Retry, Spurious
from kvmfault.errors import ModelError
from kvmfault.machine.guest import TRIES, AccessRun, Ended
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot import MemslotFlag
from kvmfault.vm.memslot_request import MemslotRequest
from tests.worlds import GPA, HVA, fault, leaf

K, M2 = 4096, 2 << 20
TDP: Final = ("arm64", "arm64@6.12", "x86-ept", "x86-npt")
X86: Final = ("x86-ept", "x86-npt")


def vm_on(target: str, kind: str = "anon", pages: int = 512, **facts: object) -> Vm:
    vm = Vm.on(target).back(HVA, 2 * M2, kind).add_memslot(0, gpa=GPA, size=pages * K, hva=HVA)
    return vm.with_facts(**facts)


def devices(run: AccessRun) -> list[tuple[int, int, bytes]]:
    """The device accesses that the VMM saw: address, size, data written."""
    details = [left.detail for left in run.exits if isinstance(left, Exit)]
    return [(d.gpa, d.size, d.data) for d in details if isinstance(d, MmioAccess)]


# Sizes and places.


@pytest.mark.parametrize("target", TDP)
@pytest.mark.parametrize(
    ("gpa", "size", "faults", "pfns"), [(0, 1, 1, 1), (K - 1, 1, 1, 1), (K - 1, 2, 2, 2), (0, K, 1, 1), (5, K, 2, 2)]
)
def test_one_fault_for_each_page_touched(target: str, gpa: int, size: int, faults: int, pfns: int) -> None:
    run = vm_on(target).access(GPA + gpa, size, write=True)
    assert (run.ended, len(run.faults), len(run.pfns)) == (Ended.DONE, faults, pfns)
    assert [pfn - run.pfns[0] for pfn in run.pfns] == list(range(pfns))


@pytest.mark.parametrize(("gpa", "size"), [(-1, 1), (0, 0), (0, K + 1), ((1 << 64) - 1, 2)])
def test_an_access_that_no_guest_makes(gpa: int, size: int) -> None:
    with pytest.raises(ModelError, match="1 to 4096 bytes below 2"):
        vm_on("arm64").access(gpa, size)


def test_an_unknown_property_and_an_unknown_vcpu() -> None:
    vm = vm_on("arm64")
    with pytest.raises(TypeError, match="colour"):
        vm.access(GPA, colour="red")
    for number in (-1, 64):
        with pytest.raises(ModelError, match="the model has 0 to 63"):
            vm.access(GPA, vcpu=number)


@pytest.mark.parametrize("target", X86)
def test_an_address_beyond_the_table_is_not_one_inside(target: str) -> None:
    vm = vm_on(target)
    vm.access(GPA, write=True)
    run = vm.access(GPA + (1 << 48), 4)
    assert devices(run) == [(GPA + (1 << 48), 4, b"")]
    assert run.pfns == ()


def test_an_address_beyond_the_ipa_space() -> None:
    vm = vm_on("arm64")
    vm.access(GPA)
    run = vm.access(GPA + (1 << 48), 4)
    assert run.ended is Ended.INJECTED
    assert isinstance(run.outcome, Inject)


# Devices, as 6.12 kernels answered for the same accesses.

DATA: Final = 0x0807_0605_0403_0201
EMULATED = {
    # (offset from the slot's end, size) -> device accesses of a write: what is in the slot's last page is written
    (0, 4): [(0, b"\1\2\3\4")],
    (-3, 4): [(0, b"\4")],
    (-1, 2): [(0, b"\2")],
    (K - 1, 2): [(K - 1, b"\1"), (K, b"\2")],
    (K - 2, 4): [(K - 2, b"\1\2"), (K, b"\3\4")],
    (0, 16): [(0, b"\1\2\3\4\5\6\7\x08"), (8, bytes(8))],
    (K - 12, 16): [(K - 12, b"\1\2\3\4\5\6\7\x08"), (K - 4, bytes(4)), (K, bytes(4))],
}


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("at", EMULATED)
def test_the_emulator_splits_at_pages_and_eight_bytes(target: str, at: tuple[int, int]) -> None:
    vm = vm_on(target, pages=8)
    end = GPA + 8 * K
    run = vm.access(end + at[0], at[1], write=True, data=DATA)
    assert run.ended is Ended.DONE
    assert [(gpa - end, data) for gpa, _, data in devices(run)] == EMULATED[at]
    read = vm.access(end + at[0], at[1])
    assert [(gpa - end, size) for gpa, size, _ in devices(read)] == [(o, len(d)) for o, d in EMULATED[at]]


def test_the_emulator_marks_what_it_writes_and_a_read_only_slot_is_a_device() -> None:
    vm = Vm.on("x86-ept").back(HVA, M2)
    vm.add_memslot(0, gpa=GPA, size=4 * K, hva=HVA, log_dirty=True)
    vm.add_memslot(1, gpa=GPA + 4 * K, size=4 * K, hva=HVA + 4 * K, readonly=True, log_dirty=True)
    run = vm.access(GPA + 4 * K - 1, 2, write=True, data=0x2211)
    assert devices(run) == [(GPA + 4 * K, 1, b"\x22")]
    assert (vm.log.pages(0), vm.log.pages(1)) == ((3,), ())


@pytest.mark.parametrize("target", X86)
def test_what_the_vcpu_remembers_as_a_device_is_one_to_the_emulator_too(target: str) -> None:
    # vcpu_is_mmio_gpa; what is remembered has the generation of the first address space (see State.mmio_space)
    vm = vm_on(target)
    vm.vcpu.as_id = 1
    hole = GPA + (1 << 30)
    for _ in range(2):
        assert [gpa for gpa, _, _ in devices(vm.access(hole, 4))] == [hole]
    made = MemslotRequest(slot=1 | 1 << 16, flags=MemslotFlag(0), gpa=Gpa(hole), size=M2, hva=Hva(HVA))
    assert vm.set_region(made).errno == 0
    assert [gpa for gpa, _, _ in devices(vm.access(hole, 4))] == [hole]
    vm.add_memslot(2, gpa=GPA + (2 << 30), size=M2, hva=HVA + M2)
    assert devices(vm.access(hole, 4)) == []


def test_a_device_inside_the_kernel() -> None:
    for target in ("x86-ept", "arm64"):
        vm = vm_on(target)
        vm.devices = ((Gpa(1 << 20), 8, 0x55),)
        assert vm.access(1 << 20, 4).exits == ()
        assert vm.access((1 << 20) + 6, 4).exits != ()  # half of it is nobody's


@pytest.mark.parametrize(("target", "ended"), [("arm64", Ended.INJECTED), ("x86-ept", Ended.EXITED)])
def test_a_fetch_from_a_hole(target: str, ended: Ended) -> None:
    run = vm_on(target).access(GPA + M2, fetch=True)
    assert run.ended is ended
    assert [left.reason for left in run.exits if isinstance(left, Exit)] == [Reason.INTERNAL_ERROR] * (
        ended is Ended.EXITED
    )


def test_an_access_that_the_syndrome_does_not_describe() -> None:
    vm = vm_on("arm64")
    assert isinstance(vm.access(GPA + M2, 16).outcome, Error)
    vm.with_facts(undecoded_mmio_exits=True)
    run = vm.access(GPA + M2, 4, described=False)
    assert isinstance(run.outcome, Exit)
    assert (run.ended, run.outcome.reason) == (Ended.EXITED, Reason.UNDECODED_MMIO)


# Memory that user space supplies, and memory that fails.


@pytest.mark.parametrize("target", TDP)
@pytest.mark.parametrize("write", [False, True])
def test_a_missing_page_waits_until_it_is_supplied(target: str, write: bool) -> None:
    vm = vm_on(target)
    was = vm.access(GPA, write=True).pfns
    vm.invalidate(vm.host.make_missing(Hva(HVA)))
    for _ in range(2):
        run = vm.access(GPA, write=write)
        assert (run.ended, len(run.faults), run.exits) == (Ended.WAITS, 1, ())
    vm.host.supply(Hva(HVA))
    now = vm.access(GPA, write=write)
    assert now.ended is Ended.DONE
    assert now.pfns != was


@pytest.mark.parametrize("target", TDP)
def test_a_protected_page_is_read_and_its_writer_waits(target: str) -> None:
    vm = vm_on(target, "thp")
    was = vm.access(GPA, write=True).pfns
    vm.invalidate(vm.host.write_protect(Hva(HVA)))
    assert vm.access(GPA).pfns == was
    assert "w" not in (leaf(vm, GPA) or (0, 0, "w"))[2]
    assert vm.access(GPA, write=True, vcpu=1).ended is Ended.WAITS
    assert vm.access(GPA + K, write=True).ended is Ended.DONE
    vm.host.supply(Hva(HVA))
    assert vm.access(GPA, write=True).pfns == was


def test_the_emulator_waits_too() -> None:
    vm = vm_on("x86-ept")
    vm.track_writes(Gfn(GPA >> 12))
    vm.access(GPA)
    vm.host.write_protect(Hva(HVA))  # nobody has to be told: nothing is mapped writable
    assert vm.access(GPA, write=True).ended is Ended.WAITS
    vm.host.supply(Hva(HVA))
    assert vm.access(GPA, write=True).ended is Ended.DONE


@pytest.mark.parametrize("target", TDP)
def test_memory_that_failed_is_one_signal_for_each_access(target: str) -> None:
    vm = vm_on(target)
    vm.access(GPA, write=True)
    vm.invalidate(vm.host.poison(Hva(HVA)))
    for count in (1, 2):
        run = vm.access(GPA + 5)
        assert (run.ended, run.exits) == (Ended.SIGNALLED, (Exit(Reason.INTR, errno=EINTR),))
        assert [(s.hva, s.lsb) for s in vm.signals] == [(HVA, 12)] * count
    assert vm.access(GPA + K).ended is Ended.DONE


# Ageing, splitting, collapsing.


@pytest.mark.parametrize("target", TDP)
def test_ageing(target: str) -> None:
    vm = vm_on(target)
    span = HvaRange(Hva(HVA), Hva(HVA + K))
    assert not vm.age(span)
    vm.access(GPA)
    assert vm.age(span, test_only=True)
    assert vm.age(span)
    assert not vm.age(span)
    vm.vcpu.tlb.flush_all()
    assert vm.access(GPA).faults == ()  # the CPU sets the flag itself
    assert vm.age(span)


def test_without_hardware_flags_an_old_page_faults_where_the_architecture_has_such_a_fault() -> None:
    span = HvaRange(Hva(HVA), Hva(HVA + K))
    arm = vm_on("arm64", hardware_access_dirty=False)
    arm.access(GPA)
    arm.age(span)
    assert arm.access(GPA).faults == ()  # through the TLB
    arm.vcpu.tlb.flush_all()
    run = arm.access(GPA)
    assert [isinstance(f.outcome, Fixed) for f in run.faults] == [True]
    x86 = vm_on("x86-npt", hardware_access_dirty=False)
    x86.access(GPA)
    x86.age(span)
    x86.vcpu.tlb.flush_all()
    assert x86.access(GPA, write=True).faults == ()


@pytest.mark.parametrize("target", TDP)
def test_the_host_splits_and_collapses_a_block(target: str) -> None:
    vm = vm_on(target, "thp")
    vm.access(GPA + 5 * K, write=True, vcpu=0)
    vm.access(GPA + 6 * K, vcpu=1)
    vm.invalidate(vm.host.split(Hva(HVA)))
    assert leaf(vm, GPA + 5 * K) is None
    assert not any(vcpu.tlb.entries() for vcpu in vm.vcpus)
    vm.access(GPA + 5 * K, write=True)
    assert (leaf(vm, GPA + 5 * K) or (0, 0))[1] == K
    vm.invalidate(vm.host.collapse(Hva(HVA)))
    vm.access(GPA + 5 * K, write=True)
    assert (leaf(vm, GPA + 5 * K) or (0, 0))[1] == M2


def test_an_invalidation_reaches_every_slot_of_every_address_space_that_has_the_memory() -> None:
    vm = vm_on("x86-ept")
    vm.add_memslot(1, gpa=1 << 33, size=4 * K, hva=HVA)
    vm.add_memslot(1 << 16, gpa=1 << 34, size=4 * K, hva=HVA)
    vm.access(GPA)
    vm.access(1 << 33)
    vm.vcpu.as_id = 1
    vm.access(1 << 34)
    seq = vm.invalidations.seq
    vm.invalidate(vm.host.migrate(Hva(HVA)))
    assert [leaf(vm, gpa) for gpa in (GPA, 1 << 33, 1 << 34)] == [None] * 3
    assert vm.invalidations.seq == seq + 1
    assert (vm.invalidations.range_start, vm.invalidations.range_end) == (GPA >> 12, (1 << 22) + 1)


def test_relaxing_flushes_the_own_tlb_only() -> None:
    vm = Vm.on("arm64").back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA, log_dirty=True)
    for vcpu in (0, 1):
        vm.access(GPA, vcpu=vcpu)
    flushes = [vcpu.tlb.flushes for vcpu in vm.vcpus]
    first = vm.access(GPA, write=True, vcpu=0)
    assert [type(run.outcome) for run in first.faults] == [Fixed]
    assert first.faults[0].progress.size == K
    assert [vcpu.tlb.flushes for vcpu in vm.vcpus] == [flushes[0] + 1, flushes[1]]
    assert vm.vcpus[1].tlb.find(Gpa(GPA)) is not None  # still with the old permissions, which is allowed
    assert vm.access(GPA, write=True, vcpu=1).ended is Ended.DONE


# Frames whose writes are tracked.


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize("first", ["nothing", "read", "write"])
def test_a_tracked_frame_is_never_writable_and_its_writes_are_emulated(target: str, first: str) -> None:
    vm = vm_on(target, "thp")
    if first != "nothing":
        vm.access(GPA, write=first == "write", vcpu=1)
    vm.track_writes(Gfn(GPA >> 12))
    for _ in range(2):
        run = vm.access(GPA, write=True, vcpu=1)
        assert (run.ended, run.pfns, run.exits) == (Ended.DONE, (), ())
        assert "w" not in (leaf(vm, GPA) or (0, 0, "-"))[2]
    assert vm.access(GPA).ended is Ended.DONE
    assert vm.access(GPA + K, write=True).pfns != ()
    assert leaf(vm, GPA) == (GPA, K, "r-x")
    vm.unprotect(Gfn(GPA >> 12))
    assert vm.access(GPA, write=True).pfns != ()


def test_a_tracked_frame_that_is_only_read_is_not_marked() -> None:
    vm = Vm.on("x86-ept").back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA, log_dirty=True)
    vm.track_writes(Gfn(GPA >> 12))
    run = vm.access(GPA)
    assert [str(f.outcome.prot) for f in run.faults if isinstance(f.outcome, Fixed)] == ["r-x"]
    assert vm.log.pages(0) == ()
    vm.access(GPA, write=True)
    assert vm.log.pages(0) == (0,)


# Statistics.


def counted(vm: Vm) -> dict[str, int]:
    return {name.removeprefix("pf_"): n for name, n in vm.vcpu.counters.items() if n}


def test_statistics() -> None:
    vm = Vm.on("x86-npt").back(HVA, M2).add_memslot(0, gpa=GPA, size=M2, hva=HVA, log_dirty=True)
    vm.access(GPA, write=True)
    assert counted(vm) == {"taken": 1, "fixed": 1}
    vm.access(GPA)
    assert counted(vm) == {"taken": 1, "fixed": 1}  # no fault, nothing to count
    vm.get_dirty_log(0)
    vm.access(GPA, write=True)
    assert counted(vm) == {"taken": 2, "fixed": 2, "fast": 1}
    vm.handle(fault("x86-npt", "write", GPA, Cause.PERMISSION))
    assert counted(vm) == {"taken": 3, "fixed": 2, "fast": 2, "spurious": 1}
    vm.age(HvaRange(Hva(HVA), Hva(HVA + K)))  # a writable entry allows the write, old or not
    assert isinstance(vm.fork().handle(fault("x86-npt", "write", GPA, Cause.PERMISSION)).outcome, Spurious)
    vm.access(GPA + M2)
    assert counted(vm) == {"taken": 4, "fixed": 2, "fast": 2, "spurious": 1, "emulate": 1}
    vm.access(GPA + M2)  # the entry remembers it: the fault machinery is not reached
    assert counted(vm)["taken"] == 4
    vm.track_writes(Gfn(GPA >> 12))
    vm.access(GPA, write=True)  # write-protected, hence emulated
    assert counted(vm) == {"taken": 5, "fixed": 2, "fast": 2, "spurious": 1, "emulate": 2}


def test_what_a_page_that_became_ready_counts() -> None:
    vm = vm_on("x86-npt")
    ready = fault("x86-npt", "read", prefetch=True)
    vm.handle(ready)
    assert counted(vm) == {"fixed": 1}
    assert isinstance(vm.handle(ready).outcome, Spurious)
    assert counted(vm) == {"fixed": 1}


def test_resolving_counts_nothing() -> None:
    vm = vm_on("x86-npt")
    vm.resolve(fault("x86-npt", "read"))
    assert counted(vm) == {}


def test_an_access_that_never_ends_is_told() -> None:
    class Racing(Vm):
        def mapping_size(self, hva: Hva) -> int:
            return -EAGAIN  # the host's page table changes all the time

    vm = Racing.on("arm64").back(HVA, M2, "thp").add_memslot(0, gpa=GPA, size=M2, hva=HVA)
    run = vm.access(GPA)
    assert (run.ended, len(run.faults)) == (Ended.STUCK, TRIES)
    assert {type(f.outcome) for f in run.faults} == {Retry}
