"""Accesses where no memory is, or to memory that may only be read: devices, emulation, exceptions, and completions."""

from __future__ import annotations

from errno import EFAULT, EINVAL, ENOSYS
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arch.x86.registers import EPT_MISCONFIG
from kvmfault.contract.access import Cause
from kvmfault.contract.outcome import (
    Completion,
    Done,
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    MemoryFault,
    MmioAccess,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Resume,
    Retry,
    UndecodedMmio,
)
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import backend
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa
from tests.worlds import ALL, APIC, ARM, GPA, HVA, SIZE, Watched, fault, permission, with_apic_page, world

NOWHERE: Final = 0x1000_0018
"""A guest-physical address that no slot has."""
ESR_DATA, ESR_FETCH = 0x9200_0000, 0x8200_0000
NESTED_X86: Final = ("x86-ept@6.12", "x86-ept@7.4", "x86-npt@6.12", "x86-npt@7.4")


def abort(target: str, esr: int, gpa: int = NOWHERE, far: int = 0xFFFF_0000_0000_0018) -> Raw:
    return backend(target).decode(ESR_EL2=esr, FAR_EL2=far, HPFAR_EL2=1 << 63 | gpa >> 12 << 4)


def described(size: int, register: int, *, write: bool = False, sign: bool = False, wide: bool = True) -> int:
    """ESR_EL2 of a load or store whose instruction the syndrome describes; a translation fault."""
    sas = {1: 0, 2: 1, 4: 2, 8: 3}[size]
    return ESR_DATA | 1 << 25 | 1 << 24 | sas << 22 | sign << 21 | register << 16 | wide << 15 | write << 6 | 7


# arm64: the syndrome describes the access.


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_load_leaves_to_user_space(target: str, size: int) -> None:
    vm = world(target)
    before = vm.key()
    outcome = vm.resolve(abort(target, described(size, 3)))
    assert outcome == Exit(Reason.MMIO, MmioAccess(Gpa(NOWHERE), size, False))
    assert isinstance(outcome, Exit)
    assert outcome.completion is not None
    assert outcome.completion.access == outcome.detail
    assert vm.key() == before
    assert "lock" not in vm.events


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize(
    ("size", "big", "data"),
    [
        (1, False, "88"), (2, False, "8877"), (4, False, "88776655"), (8, False, "8877665544332211"),
        (1, True, "88"), (2, True, "7788"), (4, True, "55667788"), (8, True, "1122334455667788"),
    ],
)  # fmt: skip
def test_a_store_carries_the_registers_bytes(target: str, size: int, big: bool, data: str) -> None:
    vm = world(target, big_endian=big)
    vm.vcpu.registers = tuple(0x1122_3344_5566_7788 if i == 5 else 0xEEEE for i in range(31))
    outcome = vm.resolve(abort(target, described(size, 5, write=True)))
    assert outcome == Exit(Reason.MMIO, MmioAccess(Gpa(NOWHERE), size, True, bytes.fromhex(data)))
    assert isinstance(outcome, Exit)
    assert outcome.completion is not None
    assert outcome.completion.finish(0x55) is None
    zero = vm.resolve(abort(target, described(size, 31, write=True)))
    assert isinstance(zero, Exit)
    assert zero.detail == MmioAccess(Gpa(NOWHERE), size, True, bytes(size))


@pytest.mark.parametrize("target", ARM)
def test_an_access_may_cross_a_page(target: str) -> None:
    outcome = world(target).resolve(abort(target, described(8, 0), 0x1000_0000, far=0xFFC))
    assert outcome == Exit(Reason.MMIO, MmioAccess(Gpa(0x1000_0FFC), 8, False))


def finish(target: str, size: int, bus: int, *, sign: bool, wide: bool, big: bool) -> int | None:
    vm = world(target, big_endian=big)
    outcome = vm.resolve(abort(target, described(size, 3, sign=sign, wide=wide)))
    assert isinstance(outcome, Exit)
    assert outcome.completion is not None
    assert outcome.completion.register == 3
    # by the time user space answers, the vCPU may have handled another fault
    vm.resolve(abort(target, described(1, 9, write=True), 0x2000_0000))
    vm.resolve(fault(target, "write"))
    return outcome.completion.finish(bus)


@pytest.mark.parametrize(
    ("size", "sign", "wide", "bus", "old", "new"),
    [
        (1, False, True, 0x80, 0x80, 0x80),
        (1, True, True, 0x80, 0x80, 0xFFFF_FFFF_FFFF_FF80),
        (1, True, False, 0x80, 0x80, 0xFFFF_FF80),
        (1, True, True, 0x7F, 0x7F, 0x7F),
        (2, True, True, 0x8001, 0x8001, 0xFFFF_FFFF_FFFF_8001),
        (2, True, False, 0x8001, 0x8001, 0xFFFF_8001),
        (2, False, False, 0x8001, 0x8001, 0x8001),
        (4, True, True, 0x8000_0001, 0x8000_0001, 0xFFFF_FFFF_8000_0001),
        (4, True, False, 0x8000_0001, 0x8000_0001, 0x8000_0001),
        (4, False, True, 0x8000_0001, 0x8000_0001, 0x8000_0001),
        (8, True, True, 1 << 63 | 5, 1 << 63 | 5, 1 << 63 | 5),
        (8, False, False, 1 << 63 | 5, 5, 5),  # a 32-bit register of an 8-byte access
        (1, False, True, 0x1234, 0x34, 0x34),  # the bus gives the bytes that were asked for
    ],
)
def test_a_load_is_completed(size: int, sign: bool, wide: bool, bus: int, old: int, new: int) -> None:
    assert finish("arm64@6.12", size, bus, sign=sign, wide=wide, big=False) == old  # 6.12 loses the sign again
    assert finish("arm64@7.4", size, bus, sign=sign, wide=wide, big=False) == new


def _extended(value: int, size: int, sign: bool, wide: bool) -> int:
    if sign and size < 8 and value >> 8 * size - 1:
        value -= 1 << 8 * size
    return value % (1 << 64 if wide else 1 << 32)


@given(st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1), st.booleans(), st.booleans(), st.booleans())
def test_every_load_ends_as_the_architecture_says(size: int, bus: int, sign: bool, wide: bool, big: bool) -> None:
    data = (bus % (1 << 8 * size)).to_bytes(size, "little")
    value = int.from_bytes(data, "big" if big else "little")
    assert finish("arm64@7.4", size, bus, sign=sign, wide=wide, big=big) == _extended(value, size, sign, wide)
    # 6.12: sign and width first, in the order of the bus, then cut to the size and swapped
    early = _extended(int.from_bytes(data, "little"), size, sign, wide) % (1 << 8 * size)
    late = int.from_bytes(early.to_bytes(size, "little"), "big" if big else "little")
    assert finish("arm64@6.12", size, bus, sign=sign, wide=wide, big=big) == late


def test_the_zero_register_drops_what_is_loaded() -> None:
    outcome = world("arm64").resolve(abort("arm64", described(4, 31)))
    assert isinstance(outcome, Exit)
    assert outcome.completion is not None
    assert outcome.completion.finish(0x55) is None


@pytest.mark.parametrize("target", ARM)
def test_a_device_inside_the_kernel_takes_the_access(target: str) -> None:
    vm = world(target)
    vm.devices = ((Gpa(0x1000_0000), 0x20, 0x80),)
    outcome = vm.resolve(abort(target, described(1, 3, sign=True)))
    assert outcome == Resume(Done.BUS, value=0x80)
    assert isinstance(outcome, Resume)
    assert isinstance(outcome.completion, Completion)
    assert outcome.completion.finish(outcome.value) == (0x80 if target.endswith("6.12") else 0xFFFF_FFFF_FFFF_FF80)
    assert vm.resolve(abort(target, described(8, 3, write=True))) == Resume(Done.BUS, value=0)
    # partly behind its end: not the device's
    assert isinstance(vm.resolve(abort(target, described(8, 3), far=0x1C)), Exit)


@pytest.mark.parametrize("target", ARM)
def test_what_the_syndrome_does_not_describe(target: str) -> None:
    esr = ESR_DATA | 1 << 6 | 7
    assert world(target).resolve(abort(target, esr)) == Error(ENOSYS)
    asked = world(target, undecoded_mmio_exits=True).resolve(abort(target, esr))
    assert asked == Exit(Reason.UNDECODED_MMIO, UndecodedMmio(1 << 6 | 7, Gpa(NOWHERE)))
    injected = world(target, protected=True, undecoded_mmio_exits=True).resolve(abort(target, esr))
    assert isinstance(injected, Inject)
    assert (injected.what, injected.address) == ("dabt", 0xFFFF_0000_0000_0018)


LOAD_STORE_TYPE = 3 << 11


@pytest.mark.parametrize("status", [0x04, 0x07, 0x0B, 0x0F, 0x2B])
def test_64_byte_accesses_leave(status: int) -> None:
    esr = described(8, 3) & ~0x3F | LOAD_STORE_TYPE | status
    left = world("arm64@7.4").resolve(abort("arm64@7.4", esr))
    assert left == Exit(Reason.WIDE_MMIO, UndecodedMmio(esr & ~0x3F, Gpa(NOWHERE)))
    for target, other in (("arm64@6.12", esr), ("arm64@7.4", esr & ~LOAD_STORE_TYPE)):
        assert world(target).resolve(abort(target, other)) == Exit(Reason.MMIO, MmioAccess(Gpa(NOWHERE), 8, False))


def test_an_exclusive_outside_memory_is_an_access_like_any_other() -> None:
    assert world("arm64@7.4").resolve(abort("arm64@7.4", ESR_DATA | 0x35)) == Error(ENOSYS)
    asked = world("arm64@7.4", undecoded_mmio_exits=True).resolve(abort("arm64@7.4", ESR_DATA | 0x35))
    assert asked == Exit(Reason.UNDECODED_MMIO, UndecodedMmio(0x35, Gpa(NOWHERE)))
    assert world("arm64@6.12").resolve(abort("arm64@6.12", ESR_DATA | 0x35)) == Error(EFAULT)


S1PTW, CM, WNR = 1 << 7, 1 << 8, 1 << 6


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize(
    ("esr", "gets"),
    [
        (ESR_FETCH | 7, ("pabt", 0x8600_0010)),
        (ESR_FETCH | S1PTW | 7, ("pabt", 0x8600_0010)),  # by its class, although the walk faulted
        (ESR_DATA | S1PTW | 7, ("dabt", 0x9600_0010)),
        (ESR_DATA | S1PTW | CM | WNR | 7, ("dabt", 0x9600_0010)),
    ],
)
def test_what_no_device_can_answer(target: str, esr: int, gets: tuple[str, int]) -> None:
    outcome = world(target).resolve(abort(target, esr | 1 << 25))
    on_walk = 0x07 if esr & S1PTW and target.endswith("7.4") else 0  # external abort on a walk, level 3
    assert outcome == Inject(gets[0], 0xFFFF_0000_0000_0018, gets[1] | on_walk)


@pytest.mark.parametrize("target", ARM)
def test_a_cache_operation_outside_memory_is_skipped(target: str) -> None:
    esr = ESR_DATA | CM | WNR | 7
    assert world(target).resolve(abort(target, esr)) == Resume(Done.SKIPPED)
    # on a read-only slot it is a write like any other, and is not described
    assert world(target, readonly=True).resolve(abort(target, esr, GPA)) == Error(ENOSYS)


@pytest.mark.parametrize("target", ARM)
def test_a_read_only_slot_is_a_device_for_writes(target: str) -> None:
    vm = world(target, readonly=True)
    for status in (0x07, 0x0F, 0x0B):  # missing, forbidden, access flag
        esr = described(4, 2, write=True) & ~0x3F | status
        outcome = vm.resolve(abort(target, esr, GPA))
        assert outcome == Exit(Reason.MMIO, MmioAccess(Gpa(GPA | 0x18), 4, True, bytes(4)))
    walk = ESR_DATA | S1PTW | 0x0F  # hardware wants to write a guest table
    status = 0x17 if target.endswith("7.4") else 0x10
    want = Inject("dabt", 0xFFFF_0000_0000_0018, 0x9600_0000 | status)
    assert vm.resolve(abort(target, walk | 1 << 25, GPA)) == want
    assert isinstance(vm.resolve(abort(target, ESR_DATA | S1PTW | 0x07, GPA)), Fixed)  # a walk that only reads


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize("status", [0x0B, 0x0F])
def test_other_faults_outside_memory_are_device_accesses_too(target: str, status: int) -> None:
    outcome = world(target).resolve(abort(target, described(4, 2, write=True) & ~0x3F | status))
    assert isinstance(outcome, Exit)
    assert outcome.reason is Reason.MMIO


# arm64: faults of other kinds.


@pytest.mark.parametrize("target", ARM)
def test_external_aborts(target: str) -> None:
    for status in (0x10, 0x14, 0x18):
        assert world(target).resolve(abort(target, ESR_DATA | status)) == Inject("vabt", 0, 0xBF00_0000)
        claimed = world(target, host_claims_aborts=True).resolve(abort(target, ESR_DATA | status))
        assert claimed == Resume(Done.CLAIMED)


@pytest.mark.parametrize("target", ARM)
@pytest.mark.parametrize("status", [0x00, 0x11, 0x21, 0x30, 0x3F])
def test_other_status_codes_end_the_run(target: str, status: int) -> None:
    assert world(target).resolve(abort(target, ESR_DATA | status)) == Error(EFAULT)


@pytest.mark.parametrize("target", ARM)
def test_addresses_that_do_not_exist(target: str) -> None:
    limited = world(target, ipa_limit_bits=40, table_bits=36)
    beyond_table = limited.resolve(abort(target, ESR_DATA | 1 << 25 | 7, 1 << 36))
    assert beyond_table == Inject("dabt", 1 << 36 | 0x18, 0x9600_0010)
    fetch = limited.resolve(abort(target, ESR_FETCH | 1 << 25 | 7, 1 << 36))
    assert fetch == Inject("pabt", 1 << 36 | 0x18, 0x8600_0010)
    beyond_host = limited.resolve(abort(target, ESR_DATA | 1 << 25 | 7, 1 << 40))
    assert beyond_host == Inject("size_fault", 1 << 40 | 0x18, 0x9600_0000)
    # only translation faults are asked
    assert isinstance(limited.resolve(abort(target, described(4, 1) | 0x0B, 1 << 40)), Exit)


@pytest.mark.parametrize("target", ARM)
def test_no_address_is_an_error_not_a_guess(target: str) -> None:
    lost = backend(target).decode(ESR_EL2=ESR_DATA | 7)  # nobody captured HPFAR_EL2
    assert world(target).resolve(lost) == Error(EFAULT)


# x86: MMIO is kept in the table.


def rsvd(target: str, gpa: int = NOWHERE) -> Raw:
    """What the CPU reports when it meets an entry that remembers MMIO."""
    on = backend(target)
    if target.startswith("x86-ept"):
        return on.decode(EXIT_REASON=EPT_MISCONFIG, GUEST_PHYSICAL_ADDRESS=gpa)
    return on.decode(EXITINFO1=1 << 32 | 0xD, EXITINFO2=gpa)


@pytest.mark.parametrize("target", NESTED_X86)
@pytest.mark.parametrize("kind", ["read", "write", "exec"])
def test_no_slot_leaves_an_entry_and_is_emulated(target: str, kind: str) -> None:
    vm = world(target)
    assert vm.resolve(fault(target, kind, NOWHERE)) == Emulate()
    found = vm.table.walk(Gpa(NOWHERE))
    entry = vm.format.entry(found.desc, found.shift)
    assert (entry.kind.value, entry.gpa) == ("mmio", NOWHERE & -4096)
    assert entry.generation == vm.slots.generation() & (1 << 19) - 1
    assert [e.split()[0] for e in vm.events[-4:]] == ["lock", "table_retired", "map_mmio", "release"]
    assert not any(e.startswith("pin") for e in vm.events)


@pytest.mark.parametrize("target", NESTED_X86)
def test_a_remembered_device_is_emulated_at_once(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "read", NOWHERE))
    cached = vm.handle(rsvd(target))
    assert cached.outcome == Emulate()
    assert "remembers" in getattr(cached.outcome, "why", "")
    assert cached.machinery is None  # the fault machinery was never reached
    vm.resolve(fault(target, "read", 0x2000_0000))  # the vCPU remembers one address: now this one
    current = vm.handle(rsvd(target))
    assert current.outcome == Emulate()
    assert "generation" in getattr(current.outcome, "why", "")


@pytest.mark.parametrize("target", NESTED_X86)
def test_a_stale_entry_is_made_anew(target: str) -> None:
    vm = world(target)
    vm.resolve(fault(target, "read", NOWHERE))
    vm.add_memslot(1, gpa=0x9000_0000, size=1 << 20, hva=0x7E00_0000_0000)
    generation = vm.slots.generation()
    run = vm.handle(rsvd(target))
    assert run.outcome == Emulate()
    assert run.machinery is not None
    entry = vm.format.entry(vm.table.walk(Gpa(NOWHERE)).desc, 12)
    assert entry.generation == generation & (1 << 19) - 1
    # and where a slot is now, the entry makes way for memory
    vm.add_memslot(2, gpa=0x1000_0000, size=1 << 20, hva=HVA)
    assert isinstance(vm.resolve(rsvd(target)), Fixed)


@pytest.mark.parametrize("target", NESTED_X86)
def test_an_entry_that_is_no_mmio_entry_any_more(target: str) -> None:
    assert isinstance(world(target).resolve(rsvd(target)), Retry)


def test_a_reserved_bit_on_a_private_access_is_a_bug() -> None:
    vm = world("x86-npt")
    private = backend("x86-npt").decode(EXITINFO1=1 << 34 | 0xD, EXITINFO2=NOWHERE, KVM=1 << 2)
    assert vm.resolve(private) == Error(EFAULT)
    assert vm.warnings == ("a reserved-bit fault on a private access",)


@pytest.mark.parametrize("target", NESTED_X86)
def test_devices_that_cannot_be_remembered(target: str) -> None:
    off = world(target, mmio_caching=False)
    assert off.resolve(fault(target, "read", NOWHERE)) == Emulate()
    far = world(target, max_gfn=0xFFF)
    assert far.resolve(fault(target, "read", NOWHERE)) == Emulate()
    for vm in (off, far):
        assert list(vm.table.entries()) == []
        assert not {"lock", "release"} & set(vm.events)


@pytest.mark.parametrize("target", NESTED_X86)
def test_a_missing_slot_is_stale_by_its_table_only(target: str) -> None:
    vm = world(target)
    vm.invalidations.begin()
    vm.invalidations.add(Gfn(NOWHERE >> 12), Gfn((NOWHERE >> 12) + 1))
    assert vm.resolve(fault(target, "read", NOWHERE)) == Emulate()
    retired = world(target)
    retired.answers["table_retired"] = True
    assert isinstance(retired.resolve(fault(target, "read", NOWHERE)), Retry)
    assert retired.events[-1] == "release"


@pytest.mark.parametrize("target", NESTED_X86)
def test_a_write_to_a_read_only_slot_is_emulated(target: str) -> None:
    vm = world(target, readonly=True)
    for registers in (fault(target, "write"), permission(target, "write")):
        assert vm.resolve(registers) == Emulate()
    assert list(vm.table.entries()) == []  # nothing remembers it


@pytest.mark.parametrize("target", NESTED_X86)
def test_private_access_outside_slots(target: str) -> None:
    vm = world(target, private_memory=True)
    vm.private.add(Gfn(NOWHERE >> 12))
    outcome = vm.resolve(fault(target, "read", NOWHERE, private=True))
    assert outcome == Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(NOWHERE & -4096), 4096, 1 << 3), EFAULT)


# x86: the APIC page, and frames whose writes are tracked.


@pytest.mark.parametrize("target", NESTED_X86)
def test_the_apic_page(target: str) -> None:
    assert isinstance(with_apic_page(target).resolve(fault(target, "read", APIC)), Fixed)
    plain = with_apic_page(target, apic_virtualised=False)
    assert plain.resolve(fault(target, "read", APIC)) == Emulate()
    assert list(plain.table.entries()) == []
    nested = with_apic_page(target, nested=True)
    assert nested.resolve(fault(target, "read", APIC)) == Emulate()
    assert "map_mmio 0xfee00000" in nested.events  # a guest's guest has no memory there


TRACKED: Final = Gfn(GPA >> 12)


def tracked(target: str, **facts: object) -> Watched:
    vm = world(target).with_facts(**facts)
    vm.resolve(fault(target, "read"))
    vm.tracked.add(TRACKED)
    vm.table.write_protect(Gpa(GPA), Gpa(GPA + 4096))
    vm.events.clear()
    return vm


@pytest.mark.parametrize("target", NESTED_X86)
def test_a_write_to_a_tracked_frame_is_emulated(target: str) -> None:
    vm = tracked(target)
    run = vm.handle(permission(target, "write"))
    assert type(run.machinery).__name__ == "WriteProtected"
    assert run.outcome == Emulate(allow_retry=True)
    assert run.steps[-1].name == "conclude"
    assert TRACKED in vm.tracked
    assert tracked(target, nested=True).resolve(permission(target, "write")) == Emulate()
    assert tracked(target, repeats_unprotect=True).resolve(permission(target, "write")) == Emulate()


@pytest.mark.parametrize("target", NESTED_X86)
def test_a_walk_that_writes_a_tracked_frame_unprotects_it(target: str) -> None:
    vm = tracked(target)
    walk = fault(target, "write", GPA, Cause.PERMISSION, on_walk=True, final=False)
    assert isinstance(vm.resolve(walk), Retry)
    assert TRACKED not in vm.tracked
    assert isinstance(vm.resolve(walk), Fixed)


def test_shadow_paging_unprotects_only_for_an_event_in_flight() -> None:
    assert tracked("x86-shadow").resolve(permission("x86-shadow", "write")) == Emulate(allow_retry=True)
    vm = tracked("x86-shadow", event_reinjected=True)
    assert isinstance(vm.resolve(permission("x86-shadow", "write")), Retry)
    assert TRACKED not in vm.tracked


def test_without_a_root_the_guest_runs_again() -> None:
    for target in NESTED_X86:
        vm = world(target, root_valid=False)
        assert isinstance(vm.resolve(fault(target, "read")), Retry)
        assert vm.warnings == ("a fault without a valid root page",)


# Shadow paging needs the guest's tables.


def test_a_shadow_fault_without_the_guests_tables() -> None:
    plain = Vm.on("x86-shadow").add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE)
    assert plain.resolve(fault("x86-shadow", "read")) == NeedsGuestWalk()
    assert plain.resolve(backend("x86-shadow").decode(ERROR_CODE=0xD, CR2=0x1000)) == NeedsGuestWalk()
    assert world("x86-shadow").resolve(backend("x86-shadow").decode(ERROR_CODE=0x4)) == NeedsGuestWalk()


def test_a_shadow_fault_that_is_the_guests_own() -> None:
    for answer, kind, code in (
        (GuestWalkFault(0), "read", 0x0),
        (GuestWalkFault(0), "write", 0x2),
        (GuestWalkFault(1), "exec", 0x11),
        (GuestTranslation(Gpa(GPA), 4096, writable=False), "write", 0x3),
        (GuestTranslation(Gpa(GPA), 4096, executable=False), "exec", 0x11),
        (GuestTranslation(Gpa(GPA), 4096, readable=False), "read", 0x1),
    ):
        vm = world("x86-shadow")
        vm.answers["walk_guest"] = answer
        assert vm.resolve(fault("x86-shadow", kind, GPA, user=False)) == Inject("#PF", GPA, code)
        user = vm.resolve(fault("x86-shadow", kind, GPA, user=True))
        assert user == Inject("#PF", GPA, code | 4)
        assert isinstance(vm.resolve(fault("x86-shadow", kind, GPA, prefetch=True)), Retry)


# A nested guest's own table forwards what it forbids (arm64).


@pytest.mark.parametrize("target", ARM)
def test_a_nested_guests_table_forbids(target: str) -> None:
    def nested(answer: object) -> Watched:
        vm = world(target, nested=True)
        vm.answers["walk_guest"] = answer
        return vm

    write = abort(target, ESR_DATA | WNR | 0x0F, GPA)
    outcome = nested(GuestTranslation(Gpa(GPA), 4096, writable=False, level=2)).resolve(write)
    assert outcome == Inject("s2_fault", 0xFFFF_0000_0000_0018, ESR_DATA | WNR | 0x0E)
    missing = nested(GuestWalkFault(0x06)).resolve(abort(target, ESR_DATA | 7, GPA))
    assert missing == Inject("s2_fault", 0xFFFF_0000_0000_0018, ESR_DATA | 6)
    unreadable = nested(GuestWalkFault(0, errno=EINVAL)).resolve(abort(target, ESR_DATA | 7, GPA))
    assert unreadable == Inject("s2_fault", 0xFFFF_0000_0000_0018, ESR_DATA, EINVAL)
    raced = nested(GuestWalkFault(0, errno=11)).resolve(abort(target, ESR_DATA | 7, GPA))
    assert isinstance(raced, Inject if target.endswith("6.12") else Retry)


@pytest.mark.parametrize("target", ALL)
def test_no_outcome_is_without_words(target: str) -> None:
    outcomes: list[Outcome] = [
        world(target).resolve(fault(target, "read", NOWHERE)),
        world(target, readonly=True).resolve(fault(target, "write")),
        world(target, None).resolve(fault(target, "read")),
    ]
    assert all(getattr(outcome, "why", "") for outcome in outcomes)
