"""Aborts on a nested hypervisor's register page: every outcome of the handler and the translation, and races."""

from __future__ import annotations

from dataclasses import replace
from errno import EACCES, EAGAIN, EFAULT, EINVAL, EIO, ENOENT, ENOMEM, EPERM
from typing import Final

import pytest

from arch.arm64 import BACKEND
from arch.arm64.vncr import Vncr, VncrWalk, handle_vncr_abort
from kvmfault.contract.format import Prot, R, W
from kvmfault.contract.outcome import (
    Done,
    Exit,
    ExternalAbort,
    Fixed,
    Inject,
    MemoryFault,
    Outcome,
    Reason,
    Resume,
    Retry,
)
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, Pin, PinError
from kvmfault.contract.target import Target
from kvmfault.contract.values import MemfdSource, RegisterPage
from kvmfault.errors import ModelError
from kvmfault.machine.vm import Vm
from kvmfault.path.run import Run
from kvmfault.types import Gpa, Hva, Pfn
from kvmfault.vm.memslot import MemslotFlag
from tests.kernel.scripted_arm64 import FAR, IPA, PAGE, POISONED, Case, World

READ, WRITE = 0x9600_2007, 0x9600_2047
"""From the current exception level, on the register page, translation at level 3."""
NO_READ, NO_WRITE = 0x9600_200F, 0x9600_204F
PA: Final = Gpa(IPA)
OWN: Final = GuestTranslation(PA, PAGE)
READ_ONLY: Final = replace(OWN, writable=False, level=2)
HOST_READ_ONLY: Final = Pin(Pfn(0x8_0000), writable=False)
DEVICE: Final = Pin(Pfn(0x8_0000), writable=True, device=True)
READONLY: Final = MemslotFlag.READONLY
EXTERNAL, PERMISSION_3, PERMISSION_2 = 0x10, 0x0F, 0x0E


def vcpu(found: GuestTranslation | GuestWalkFault = OWN, asid: int | None = None, register: int = 0x7000) -> Vncr:
    return Vncr(register, lambda va: found if isinstance(found, GuestWalkFault) else VncrWalk(found, asid))


def handle(case: Case, own: Vncr, kernel: str = "7.4", **values: object) -> tuple[Run, list[str]]:
    target = Target(BACKEND, "4k", kernel)
    target.policy = replace(target.policy, **values)  # type: ignore[arg-type]  # by name
    return handle_on(target, case, own)


def handle_on(target: Target, case: Case, own: Vncr) -> tuple[Run, list[str]]:
    vm = World(case)
    return handle_vncr_abort(target, vm, target.decode(ESR_EL2=case.esr, FAR_EL2=FAR), own), vm.events


def outcome(case: Case, own: Vncr, kernel: str = "7.4", **values: object) -> Outcome:
    return handle(case, own, kernel, **values)[0].outcome


def given_back(esr: int, status: int) -> Inject:
    return Inject("vncr_el2", 0, esr & ~0x3F | status)


def fixed(prot: int) -> Fixed:
    return Fixed(PAGE, Prot(prot))


# The handler.


def test_older_kernels_have_no_handler() -> None:
    assert outcome(Case(WRITE), vcpu(), "6.12") == Inject("undef", 0, 1 << 25)
    assert outcome(Case(WRITE & ~(1 << 25)), vcpu(), "6.12") == Inject("undef", 0, 0)
    assert outcome(Case(WRITE), vcpu(), "6.12", register_page=RegisterPage.RETRANSLATE) == fixed(R | W)


@pytest.mark.parametrize(
    ("facts", "want"),
    [
        ({}, Inject("vabt", 0, 0xBF00_0000)),
        ({"host_claims_aborts": True}, Resume(Done.CLAIMED)),
        ({"vmm_takes_aborts": True}, Exit(Reason.EXTERNAL_ABORT, ExternalAbort(0x9600_0010, FAR))),
        ({"vmm_takes_aborts": True, "in_hypervisor": True}, Inject("vabt", 0, 0xBF00_0000)),
    ],
)
def test_external_aborts_come_first(facts: dict[str, object], want: Outcome) -> None:
    assert outcome(Case(0x9600_2010, facts=facts), vcpu()) == want


@pytest.mark.parametrize("status", [0x00, 0x0B, 0x21, 0x30, 0x35])
def test_other_faults_are_not_handled(status: int) -> None:
    own = vcpu()
    run, events = handle(Case(0x9600_2000 | status), own)
    assert run.outcome == Retry()
    assert events == ["warn"]
    assert not own.valid


def test_the_class_alone_is_enough() -> None:
    run, events = handle(Case(WRITE & ~(1 << 13)), vcpu())
    assert run.outcome == fixed(R | W)
    assert events == ["warn", "dirty 0x40012"]


def test_other_classes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"0x92002007 is no abort of class 0x25"):
        outcome(Case(0x9200_2007), vcpu())


# Permission, in two generations of the handler.


def filled(found: GuestTranslation, pin: Pin, asid: int | None = None) -> Vncr:
    own = vcpu(found, asid)
    handle(Case(READ, pin=pin), own)
    assert own.valid
    return own


MEMORY: Final = Pin(Pfn(0x8_0000), writable=True)


@pytest.mark.parametrize("rule", [RegisterPage.LOOKUP, RegisterPage.RETRANSLATE])
@pytest.mark.parametrize(
    ("esr", "found", "pin", "status"),
    [
        (NO_WRITE, READ_ONLY, MEMORY, PERMISSION_2),
        (NO_WRITE, READ_ONLY, HOST_READ_ONLY, PERMISSION_2),
        (NO_WRITE, OWN, HOST_READ_ONLY, EXTERNAL),
        (NO_READ, replace(OWN, readable=False, writable=False, level=1), MEMORY, 0x0D),
    ],
)
def test_forbidden(rule: RegisterPage, esr: int, found: GuestTranslation, pin: Pin, status: int) -> None:
    own = filled(found, pin)
    assert outcome(Case(esr, pin=pin), own, register_page=rule) == given_back(esr, status)


def test_looking_up_forbids_what_the_host_allows_by_now() -> None:
    # the page was read first, so the host's was read-only; a write could have it writable
    for rule, want in ((RegisterPage.LOOKUP, given_back(NO_WRITE, EXTERNAL)), (RegisterPage.RETRANSLATE, fixed(R | W))):
        assert outcome(Case(NO_WRITE), filled(OWN, HOST_READ_ONLY), register_page=rule) == want


@pytest.mark.parametrize(
    ("now", "asid", "hit"),
    [
        ({}, None, True),
        ({"asid": 5}, None, True),  # a global entry
        ({"asid": 5}, 5, True),
        ({"asid": 6}, 5, False),
        ({"register": 0x8000}, None, False),
        ({"valid": False}, None, False),
    ],
)
def test_what_is_kept_hits(now: dict[str, int], asid: int | None, hit: bool) -> None:
    own = filled(OWN, MEMORY, asid)
    for name, value in now.items():
        setattr(own, name, value)
    assert own.hits() is hit
    want = given_back(READ, PERMISSION_3) if hit else fixed(R | W)
    assert outcome(Case(READ), own, register_page=RegisterPage.LOOKUP) == want
    assert outcome(Case(READ), own) == fixed(R | W)


@pytest.mark.parametrize(
    ("register", "address"),
    [
        (0x7000, 0x7000),
        (0x0000_FFFF_FFFF_F000, 0x0000_FFFF_FFFF_F000),
        (0x0001_0000_0000_0000, 0xFFFF_0000_0000_0000),
        (0x001F_FFFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000),
    ],
)
def test_the_address_is_signed_at_bit_48(register: int, address: int) -> None:
    asked: list[int] = []

    def walk(va: int) -> VncrWalk:
        asked.append(va)
        return VncrWalk(OWN)

    own = Vncr(register, walk)
    handle(Case(READ), own)
    assert asked == [address]
    assert own.gva == own.address == address


# The translation.


@pytest.mark.parametrize(
    ("errno", "want"),
    [
        *((errno, given_back(WRITE, 0x06)) for errno in (EFAULT, EIO, POISONED, EINVAL, ENOENT, EACCES)),
        (EAGAIN, Retry()),
        (ENOMEM, Retry()),
        (EPERM, Retry()),
    ],
)
def test_a_walk_that_fails(errno: int, want: Outcome) -> None:
    own = vcpu(GuestWalkFault(0x06, errno))
    own.valid = True
    assert outcome(Case(WRITE), own) == want
    assert not own.valid
    assert own.kept is None


@pytest.mark.parametrize(
    ("case", "status"),
    [
        (Case(WRITE, None), EXTERNAL),
        (Case(WRITE, MemslotFlag.INVALID), EXTERNAL),
        (Case(WRITE, READONLY), EXTERNAL),
        (Case(READ, pin=Pin(None, PinError.FAULT)), EXTERNAL),
        (Case(READ, pin=Pin(None, PinError.HWPOISON)), EXTERNAL),  # and no signal
        (Case(READ, pin=DEVICE), EXTERNAL),
    ],
)
def test_no_page(case: Case, status: int) -> None:
    own = vcpu()
    run, events = handle(case, own)
    assert run.outcome == given_back(case.esr, status)
    assert not own.valid
    assert events == []


PAGE_OF_FILE: Final = Pin(Pfn(0x9_0000), writable=True)


def test_a_page_of_a_file() -> None:
    own = vcpu()
    run, events = handle(Case(WRITE, memfd=PAGE_OF_FILE), own)
    assert run.outcome == fixed(R | W)
    assert (own.pfn, own.host_writable) == (0x9_0000, True)
    assert events == ["memfd 0x40012", "dirty 0x40012"]
    # a read-only slot gives the page, and then forbids the write
    own = vcpu()
    assert outcome(Case(WRITE, READONLY, memfd=PAGE_OF_FILE), own) == given_back(WRITE, EXTERNAL)
    assert own.valid
    assert outcome(Case(READ, READONLY, memfd=PAGE_OF_FILE), vcpu()) == fixed(R)
    assert handle(Case(READ, memfd=PAGE_OF_FILE), vcpu(), memfd_source=MemfdSource.NONE)[1] == ["dirty 0x40012"]


@pytest.mark.parametrize("errno", [ENOMEM, EFAULT, EIO, POISONED])
def test_a_file_without_the_page_is_the_vmms_to_sort_out(errno: int) -> None:
    case = Case(WRITE, memfd=Pin(None, PinError.FAULT, errno=errno))
    assert outcome(case, vcpu()) == Exit(Reason.MEMORY_FAULT, MemoryFault(PA, PAGE, 0))


def test_a_file_that_is_being_changed() -> None:
    case = Case(WRITE, memfd=Pin(None, PinError.FAULT, errno=EAGAIN))
    assert outcome(case, vcpu()) == Retry()


@pytest.mark.parametrize(
    ("esr", "found", "pin", "prot", "dirty"),
    [
        (WRITE, OWN, MEMORY, R | W, True),
        (READ, OWN, MEMORY, R | W, True),  # it may be written from now on
        (READ, READ_ONLY, MEMORY, R, False),
        (READ, OWN, HOST_READ_ONLY, R, False),
    ],
)
def test_kept(esr: int, found: GuestTranslation, pin: Pin, prot: int, dirty: bool) -> None:
    own = vcpu(found, asid=3)
    run, events = handle(Case(esr, pin=pin), own)
    assert run.outcome == fixed(prot)
    assert own.prot == prot
    assert (own.valid, own.gva, own.pfn, own.host_writable) == (True, 0x7000, 0x8_0000, pin.writable)
    assert events == (["dirty 0x40012"] if dirty else [])


def test_a_page_that_may_not_be_read_is_not_mapped() -> None:
    own = vcpu(replace(OWN, readable=False))
    assert own.prot == 0
    assert outcome(Case(WRITE), own) == fixed(0)


# Races.


@pytest.mark.parametrize("memfd", [None, PAGE_OF_FILE])
def test_an_invalidation_between_sample_and_lock(memfd: Pin | None) -> None:
    own = vcpu()
    case = Case(WRITE, memfd=memfd, raced=True)
    run, events = handle(case, own)
    assert run.outcome == Retry()
    assert run.steps[-1].name == "stale"
    assert not own.valid
    assert "dirty 0x40012" not in events
    assert outcome(replace(case, raced=False), own) == fixed(R | W)


def test_an_invalidation_before_the_sample_does_no_harm() -> None:
    def walk(va: int) -> VncrWalk:
        vm.invalidations.begin()
        vm.invalidations.end()
        return VncrWalk(OWN)

    target = Target(BACKEND, "4k", "7.4")
    vm = World(Case(WRITE))
    fault = target.decode(ESR_EL2=WRITE, FAR_EL2=FAR)
    assert handle_vncr_abort(target, vm, fault, Vncr(0x7000, walk)).outcome == fixed(R | W)


@pytest.mark.parametrize(("start", "end", "hit"), [(PA, PA + PAGE, True), (0, PA, False), (PA + PAGE, 1 << 40, False)])
def test_the_host_takes_the_page(start: int, end: int, hit: bool) -> None:
    own = filled(OWN, MEMORY)
    own.invalidate(Gpa(start), Gpa(end))
    assert own.valid is not hit


# On a VM.


def test_on_a_vm() -> None:
    target = Target(BACKEND, "4k", "7.4")
    vm = Vm(target)
    vm.add_memslot(0, gpa=PA & -(1 << 30), size=1 << 30, hva=0x7F00_0000_0000, log_dirty=True)
    vm.back(0x7F00_0000_0000, 1 << 30)
    own = vcpu()
    fault = target.decode(ESR_EL2=WRITE, FAR_EL2=FAR)
    run = handle_vncr_abort(target, vm, fault, own)
    assert run.outcome == fixed(R | W)
    assert [step.name for step in run.steps] == [
        "screen", "find", "translate", "sample", "lookup", "settle", "pin", "judge", "lock", "stale", "keep", "account",
    ]  # fmt: skip
    vma = vm.host.vma(Hva(0x7F00_0000_0000))
    assert vma is not None
    assert own.pfn == vma.pfn_at(Hva(0x7F00_0001_2000))
    assert vm.table.leaf(PA) is None  # nothing is mapped in the second stage
