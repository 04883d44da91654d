"""What arm64 kernels changed, value by value: each is switched alone, and a fault notices."""

from __future__ import annotations

from dataclasses import fields, replace
from errno import EFAULT, EIO
from typing import Any, Final

import pytest

from arch.arm64 import BACKEND
from kvmfault.contract.format import Prot, R, W, X
from kvmfault.contract.outcome import (
    Done,
    Error,
    Exit,
    ExternalAbort,
    Fixed,
    Inject,
    MemoryFault,
    MmioAccess,
    Outcome,
    Reason,
    Resume,
    Retry,
    Signal,
    UndecodedMmio,
)
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Area, GuestTranslation, GuestWalkFault, Pin, PinError
from kvmfault.contract.target import Target
from kvmfault.contract.values import (
    AddressCapture,
    DeviceMemory,
    DirtyMark,
    DistrustedFaults,
    ExternalAborts,
    InjectedLength,
    InjectedTarget,
    InjectedWalk,
    MemfdSource,
    NestedFetch,
    NestedWalkError,
    PoisonSpan,
    Reaction,
    RootAddressSize,
    SignExtension,
    TagRefusal,
    Topup,
    UnsupportedAtomics,
    WideAccesses,
)
from kvmfault.path.run import BoundPath
from kvmfault.types import Gpa, Hva, Pfn
from kvmfault.vm.memslot import MemslotFlag
from tests.kernel.scripted_arm64 import (
    CM,
    FAR,
    FETCH,
    IL,
    IPA,
    ISV,
    LOAD,
    PAGE,
    PERMISSION,
    POISONED,
    S1PTW,
    STORE,
    Case,
    M,
    World,
)
from tests.test_arm64_policy import KERNELS_DIFFER_IN


def run(case: Case, kernel: str = "7.4", /, **values: object) -> tuple[Outcome, list[str]]:
    """The outcome and what was done, with some policy values switched."""
    target = Target(BACKEND, "4k", kernel)
    target.policy = replace(target.policy, **values)  # type: ignore[arg-type]  # by name
    return run_on(target, case)


def run_on(target: Target, case: Case) -> tuple[Outcome, list[str]]:
    """The outcome and what was done on a target."""
    vm = World(case)
    path = BoundPath(target.policy, target.joints)
    registers = {"ESR_EL2": case.esr, "FAR_EL2": case.far, "HPFAR_EL2": 1 << 63 | case.ipa >> 8}
    fault = target.decode(**registers, KVM=case.prefetch << 1)
    outcome = path.handle(vm, fault).outcome
    return outcome, vm.events


def fixed(prot: int, size: int = PAGE) -> Outcome:
    return Fixed(size, Prot(prot))


def mapped(prot: int, memory: str = "normal", size: int = PAGE) -> str:
    return f"map {IPA & -size:#x} {size:#x} {prot} {memory}"


LOGGED: Final = MemslotFlag.LOG_DIRTY
TABLE_1G: Final = GuestTranslation(Gpa(IPA), 1 << 30)
NO_CODE: Final = replace(TABLE_1G, executable=False)
RAW: Final = Area(PAGE, raw_frames=True)
CACHEABLE: Final = RAW._replace(cacheable=True)
DEVICE: Final = Pin(Pfn(0x8_0000), writable=True, device=True)
POISON: Final = Pin(None, PinError.HWPOISON)
NO_TAGS: Final = Area(PAGE, tags_allowed=False)
DATA_ABORT: Final = 0x9600_0010
WIDE: Final = LOAD | ISV | 3 << 22 | 2 << 11


@pytest.mark.parametrize(
    ("case", "reserving"),
    [
        (Case(LOAD), set(Topup)),
        (Case(STORE | PERMISSION), {Topup.ALWAYS}),
        (Case(STORE | PERMISSION, LOGGED), set(Topup)),
        (Case(FETCH | PERMISSION, LOGGED), {Topup.ALWAYS, Topup.UNLESS_PERMISSION_UNLOGGED}),
    ],
)
def test_topup(case: Case, reserving: set[Topup]) -> None:
    assert {rule for rule in Topup if "topup" in run(case, topup=rule)[1]} == reserving


TO_GUEST: Final = Inject("vabt", 0, 0xBF00_0000)
CAPTURED: Final[tuple[tuple[int, Outcome, Outcome, Outcome], ...]] = (
    (STORE | PERMISSION, fixed(R | W), Retry(), Retry()),
    (LOAD, fixed(R | W), fixed(R | W), fixed(R | W)),
    (LOAD | S1PTW | PERMISSION, fixed(R | W), fixed(R | W), fixed(R | W)),
    (0x9200_0010, TO_GUEST, TO_GUEST, Retry()),
    (0x9200_0410, TO_GUEST, TO_GUEST, TO_GUEST),
    (0x9200_0016, TO_GUEST, TO_GUEST, TO_GUEST),
    (0x9200_0021, Error(EFAULT), Error(EFAULT), Retry()),
)
ROOT_CODES: Final[tuple[tuple[int, tuple[Outcome, ...]], ...]] = (
    (0x25, (Retry(), Error(EFAULT), Retry())),
    (0x29, (Retry(), Retry(), Error(EFAULT))),
)
Row = tuple[Case, str, dict[Any, Outcome]]
ROWS: Final[list[Row]] = [
    # (situation, member, value -> outcome); tests/test_policy_values.py asks them of every kernel
    (Case(LOAD | PERMISSION), "unexplained_permission", {EFAULT: Error(EFAULT), None: fixed(R | W)}),
    (
        Case(LOAD, pin=POISON, prefetch=True),
        "prefetch_poison",
        {None: Retry("", Signal(Hva(0x7F00_0001_2000), 12)), Reaction.POISONED: Error(POISONED)},
    ),
    (
        Case(LOAD, pin=POISON),
        "prefetch_poison",
        dict.fromkeys((None, Reaction.POISONED), Retry("", Signal(Hva(0x7F00_0001_2000), 12))),
    ),
    (
        Case(LOAD, pin=POISON, area=Area(2 * M)),
        "poison_span",
        dict.fromkeys((PoisonSpan.MAPPED_AREA, PoisonSpan.MAPPED), Retry("", Signal(Hva(0x7F00_0001_2000), 21))),
    ),
    (
        Case(LOAD, pin=POISON, area=Area(2 * M), walk=GuestTranslation(Gpa(IPA), PAGE), facts={"nested": True}),
        "poison_span",
        {
            PoisonSpan.MAPPED_AREA: Retry("", Signal(Hva(0x7F00_0001_2000), 21)),
            PoisonSpan.MAPPED: Retry("", Signal(Hva(0x7F00_0001_2000), 12)),
        },
    ),
    # device memory
    (Case(FETCH, pin=DEVICE, area=RAW), "device_memory", dict.fromkeys(DeviceMemory, Inject("pabt", FAR, 0x8600_0010))),
    (
        Case(FETCH, pin=DEVICE),
        "device_memory",
        {DeviceMemory.BY_FRAME: Inject("pabt", FAR, 0x8600_0010), DeviceMemory.BY_AREA: fixed(R | W | X)},
    ),
    (
        Case(LOAD, pin=DEVICE, area=CACHEABLE),
        "device_memory",
        {DeviceMemory.BY_FRAME: fixed(R | W), DeviceMemory.BY_AREA: Error(EFAULT)},
    ),
    (
        Case(FETCH, pin=DEVICE, area=CACHEABLE, facts={"cacheable_raw_frames": True}),
        "device_memory",
        {DeviceMemory.BY_FRAME: Inject("pabt", FAR, 0x8600_0010), DeviceMemory.BY_AREA: fixed(R | W | X)},
    ),
    # a read of what cannot be logged may be written to, cacheable or not
    (
        Case(LOAD, LOGGED, pin=DEVICE, area=CACHEABLE, facts={"cacheable_raw_frames": True}),
        "device_memory",
        dict.fromkeys(DeviceMemory, fixed(R | W)),
    ),
    (
        Case(LOAD, LOGGED, pin=DEVICE),
        "device_memory",
        {DeviceMemory.BY_FRAME: fixed(R | W), DeviceMemory.BY_AREA: fixed(R)},
    ),
    # nested guests
    (
        Case(FETCH, walk=NO_CODE, facts={"nested": True}),
        "nested_fetch",
        {NestedFetch.LOST: fixed(R | W | X), NestedFetch.KEPT: fixed(R | W)},
    ),
    (
        Case(LOAD, walk=NO_CODE, facts={"nested": True, "coherent_icache": True}),
        "nested_fetch",
        dict.fromkeys(NestedFetch, fixed(R | W)),
    ),
    (
        Case(LOAD, walk=GuestWalkFault(0, 11), facts={"nested": True}),
        "nested_walk_error",
        {
            NestedWalkError.INJECT_AND_FAIL: Inject("s2_fault", FAR, 0x9200_0000, 11),
            NestedWalkError.RETRY_IF_RACED: Retry(),
        },
    ),
    (
        Case(LOAD, walk=GuestWalkFault(0x16, 14), facts={"nested": True}),
        "nested_walk_error",
        dict.fromkeys(NestedWalkError, Inject("s2_fault", FAR, 0x9200_0016, 14)),
    ),
    # tags
    (
        Case(LOAD, area=NO_TAGS, facts={"tagging": True}),
        "tag_refusal",
        dict.fromkeys(TagRefusal, Error(EFAULT)),
    ),
    (
        Case(LOAD, area=NO_TAGS, facts={"tagging": True}, raced=True),
        "tag_refusal",
        {TagRefusal.UNDER_LOCK: Retry(), TagRefusal.BEFORE_LOCK: Error(EFAULT)},
    ),
    (
        Case(LOAD, area=RAW._replace(tags_allowed=False), pin=DEVICE, facts={"tagging": True}),
        "tag_refusal",
        dict.fromkeys(TagRefusal, fixed(R | W)),  # device memory has no tags
    ),
    # external aborts
    (
        Case(0x9200_0010, facts={"vmm_takes_aborts": True}),
        "external_aborts",
        {
            ExternalAborts.GUEST: Inject("vabt", 0, 0xBF00_0000),
            ExternalAborts.VMM_IF_ASKED: Exit(
                Reason.EXTERNAL_ABORT, ExternalAbort(0x9000_0010 | 1 << 25, FAR, Gpa(IPA))
            ),
        },
    ),
    # the address
    *(
        (
            Case(esr, facts={"retranslation_fails": True}),
            "address_capture",
            {AddressCapture.GIVEN: here, AddressCapture.ALL_BUT_PERMISSION: old, AddressCapture.WHEN_VALID: new},
        )
        for esr, here, old, new in CAPTURED
    ),
    *(
        (
            Case(esr, facts={"retranslation_fails": True, "misreports": True}),
            "distrusted_faults",
            {DistrustedFaults.NONE: none, DistrustedFaults.TRANSLATION: some, DistrustedFaults.ALL: every},
        )
        for esr, none, some, every in (
            (LOAD, fixed(R | W), Retry(), Retry()),
            (0x9200_0000, Error(EFAULT), Error(EFAULT), Retry()),
            (LOAD | S1PTW, fixed(R | W), Retry(), fixed(R | W)),
        )
    ),
    *(
        (
            Case(0x9200_0000 | status, facts={"retranslation_fails": True}),
            "root_address_size",
            dict(zip(RootAddressSize, outcomes, strict=True)),  # unknown, mistaken, right
        )
        for status, outcomes in ROOT_CODES
    ),
    # accesses without support
    (
        Case(0x9200_0035),
        "unsupported_atomics",
        {
            UnsupportedAtomics.FAULT: Error(EFAULT),
            UnsupportedAtomics.TO_GUEST: Inject("dabt", FAR, 0x9600_0035),
        },
    ),
    (
        Case(WIDE, None),
        "wide_accesses",
        {
            WideAccesses.AS_DESCRIBED: Exit(Reason.MMIO, MmioAccess(Gpa(IPA | 0x678), 8, False)),
            WideAccesses.TO_VMM: Exit(Reason.WIDE_MMIO, UndecodedMmio(WIDE & ~0x3F, Gpa(IPA | 0x678))),
        },
    ),
    # what is injected
    (
        Case(FETCH & ~IL, None),
        "injected_length",
        {
            InjectedLength.AS_TRAPPED: Inject("pabt", FAR, 0x8400_0010),
            InjectedLength.FULL: Inject("pabt", FAR, 0x8600_0010),
        },
    ),
    (
        Case(LOAD | S1PTW, None, facts={"walk_level": 1}),
        "injected_walk",
        {InjectedWalk.PLAIN: Inject("dabt", FAR, DATA_ABORT), InjectedWalk.LEVEL: Inject("dabt", FAR, 0x9600_0015)},
    ),
    (
        Case(LOAD | S1PTW, None, facts={"walk_level": -1}),
        "injected_walk",
        {InjectedWalk.LEVEL: Inject("dabt", FAR, 0x9600_0013)},
    ),
    (
        Case(LOAD | S1PTW, None, facts={"walk_level": None}),
        "injected_walk",
        {InjectedWalk.PLAIN: Inject("dabt", FAR, DATA_ABORT), InjectedWalk.LEVEL: Retry()},
    ),
    (
        Case(FETCH, None, facts={"nested": True, "aborts_to_hypervisor": True}),
        "injected_target",
        {
            InjectedTarget.KERNEL: Inject("pabt", FAR, 0x8600_0010),
            InjectedTarget.CONFIGURED: Inject("pabt_el2", FAR, 0x8200_0010),
        },
    ),
    (
        Case(LOAD, None, facts={"nested": True, "aborts_to_hypervisor": True, "protected": True}),
        "injected_target",
        {InjectedTarget.CONFIGURED: Inject("dabt_el2", FAR, 0x9200_0010)},
    ),
    (
        Case(FETCH, None, facts={"aborts_as_serror": True}),
        "injected_target",
        {
            InjectedTarget.KERNEL: Inject("pabt", FAR, 0x8600_0010),
            InjectedTarget.CONFIGURED: Inject("pabt_serror", FAR, 0x8600_0010),
        },
    ),
]


@pytest.mark.parametrize(("case", "member", "want"), ROWS)
def test_switched_alone(case: Case, member: str, want: dict[Any, Outcome]) -> None:
    found = {value: run(case, **{member: value})[0] for value in want}
    assert found == want


def test_every_value_in_which_kernels_differ_is_switched() -> None:
    # pre-faults are asked of the machine (kvmfault/machine/prefault.py), before any fault: tests/test_policy_values.py
    elsewhere = {"topup", "dirty_mark", "memfd_source", "mmio_sign_extension", "register_page", "prefault"}
    noticed = {member for _, member, want in ROWS if len({*map(repr, want.values())}) > 1}
    assert noticed | elsewhere == KERNELS_DIFFER_IN
    assert not noticed & elsewhere
    assert {f.name for f in fields(Policy)} >= KERNELS_DIFFER_IN


@pytest.mark.parametrize("kernel", BACKEND.kernels)
@pytest.mark.parametrize(("rule", "value"), [(SignExtension.LOST, 0x80), (SignExtension.KEPT, 0xFFFF_FF80)])
def test_sign_extension(kernel: str, rule: SignExtension, value: int) -> None:
    left, _ = run(Case(LOAD | ISV | 1 << 21, None), kernel, mmio_sign_extension=rule)
    assert isinstance(left, Exit)
    assert left.completion is not None
    assert left.completion.finish(0x80) == value


@pytest.mark.parametrize(
    ("case", "page", "block"),
    [
        (Case(STORE), "dirty 0x40012", "dirty 0x40012"),
        (Case(LOAD, block=2 * M), "dirty 0x40012", "dirty 0x40000"),  # THP
        (Case(LOAD, area=Area(2 * M)), "dirty 0x40000", "dirty 0x40000"),  # hugetlb
    ],
)
def test_which_frame_is_dirty(case: Case, page: str, block: str) -> None:
    for rule, want in ((DirtyMark.AFTER_UNLOCK, page), (DirtyMark.BLOCK_AFTER_UNLOCK, block)):
        assert run(case, dirty_mark=rule)[1][-1] == want


def test_a_relaxed_block_is_dirty_as_a_whole() -> None:
    case = Case(0x9200_004E)  # a store forbidden at level 2
    assert run(case)[1] == ["area", "relax 6", "dirty 0x40000"]
    assert run(case, dirty_mark=DirtyMark.AFTER_UNLOCK)[1][-1] == "dirty 0x40012"


# Memory types.


@pytest.mark.parametrize(
    ("area", "cacheable", "want"),
    [
        (RAW, False, mapped(R | W, "device")),
        (RAW._replace(any_uncached=True), False, mapped(R | W, "non-cacheable")),
        (CACHEABLE, True, mapped(R | W)),
        (Area(PAGE), False, mapped(R | W)),
    ],
)
def test_memory_type_of_frames_that_are_not_memory(area: Area, cacheable: bool, want: str) -> None:
    case = Case(LOAD, area=area, pin=DEVICE, facts={"cacheable_raw_frames": cacheable})
    assert want in run(case)[1]


@pytest.mark.parametrize(("area", "size"), [(RAW, PAGE), (CACHEABLE, 2 * M)])
def test_device_memory_is_not_mapped_by_larger_blocks_than_its_area_has(area: Area, size: int) -> None:
    case = Case(LOAD, area=area, pin=DEVICE, block=2 * M, facts={"cacheable_raw_frames": True, "tagging": True})
    assert run(case)[0] == fixed(R | W, size) if area is RAW else Error(EFAULT)


# guest_memfd (gmem_abort).

PAGE_OF_FILE: Final = Pin(Pfn(0x9_0000), writable=True)


@pytest.mark.parametrize(
    ("case", "want"),
    [
        (Case(LOAD, memfd=PAGE_OF_FILE), ["topup", "memfd 0x40012", mapped(R | W), "dirty 0x40012"]),
        # by pages, whatever the host maps at the slot's address
        (Case(LOAD, memfd=PAGE_OF_FILE, block=2 * M), ["topup", "memfd 0x40012", mapped(R | W), "dirty 0x40012"]),
        # nothing is asked of the host's areas
        (Case(LOAD, memfd=PAGE_OF_FILE, area=None), ["topup", "memfd 0x40012", mapped(R | W), "dirty 0x40012"]),
        (Case(LOAD, MemslotFlag.READONLY, memfd=PAGE_OF_FILE), ["topup", "memfd 0x40012", mapped(R)]),
        (Case(FETCH, memfd=PAGE_OF_FILE), ["topup", "memfd 0x40012", mapped(R | W | X), "dirty 0x40012"]),
        (
            Case(LOAD, memfd=PAGE_OF_FILE, facts={"coherent_icache": True}),
            ["topup", "memfd 0x40012", mapped(R | W | X), "dirty 0x40012"],
        ),
        # no page-table pages for a permission fault, which only relaxes, at whatever level it was
        (Case(STORE | PERMISSION, memfd=PAGE_OF_FILE), ["memfd 0x40012", "relax 6", "dirty 0x40012"]),
        (Case(0x9200_004E, memfd=PAGE_OF_FILE), ["memfd 0x40012", "relax 6", "dirty 0x40012"]),
        # an unsupported atomic gets its page, tags are not looked at
        (Case(0x9200_0035, memfd=PAGE_OF_FILE), ["topup", "memfd 0x40012", mapped(R | W), "dirty 0x40012"]),
        (
            Case(LOAD, memfd=PAGE_OF_FILE, facts={"tagging": True}),
            ["topup", "memfd 0x40012", mapped(R | W), "dirty 0x40012"],
        ),
        (
            Case(LOAD, memfd=PAGE_OF_FILE, walk=replace(NO_CODE, writable=False), facts={"nested": True}),
            ["topup", "memfd 0x40012", mapped(R)],
        ),
    ],
)
def test_guest_memfd(case: Case, want: list[str]) -> None:
    outcome, events = run(case)
    assert isinstance(outcome, Fixed)
    assert events == want


def test_a_file_without_the_page_tells_the_address_that_faulted() -> None:
    broken = Pin(None, PinError.FAULT, errno=EIO)
    elsewhere = GuestTranslation(Gpa(0x4234_5000), 1 << 30)
    for walk, asked in ((None, "memfd 0x40012"), (elsewhere, "memfd 0x42345")):
        case = Case(LOAD, memfd=broken, walk=walk, facts={"nested": walk is not None})
        outcome, events = run(case)
        assert outcome == Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(IPA), PAGE, 0), EIO)
        assert events[-1] == asked


def test_only_newer_kernels_take_pages_from_a_file() -> None:
    case = Case(LOAD, memfd=PAGE_OF_FILE)
    assert "area" in run(case, memfd_source=MemfdSource.NONE)[1]
    assert "area" not in run(case, memfd_source=MemfdSource.SLOT)[1]


# External aborts.

ASKED: Final = {"vmm_takes_aborts": True}


def exit_with(syndrome: int, gva: int = FAR, gpa: int | None = IPA) -> Exit:
    return Exit(Reason.EXTERNAL_ABORT, ExternalAbort(syndrome, gva, None if gpa is None else Gpa(gpa)))


@pytest.mark.parametrize(
    ("esr", "facts", "want"),
    [
        (0x9200_0010, {"host_claims_aborts": True}, Resume(Done.CLAIMED)),
        (0x9200_0010, {"vmm_takes_aborts": False}, TO_GUEST),
        (0x9200_0010, {"ras": False}, TO_GUEST),
        (0x9200_0010, {}, exit_with(0x9200_0010)),
        # what only the host may know is left out: ISV to VNCR, S1PTW, ISS2
        (0xFF_9200_0010 | 0x1FF_E000 | S1PTW, {}, exit_with(0x9200_0010)),
        (0x9200_0010 | 3 << 11 | 1 << 9 | CM | 1 << 6, {}, exit_with(0x9200_0010 | 3 << 11 | 1 << 9 | CM | 1 << 6)),
        (0x8000_0010, {}, exit_with(0x8000_0010)),
        (0x9200_0410, {}, exit_with(0x9200_0410, 0, None)),
        # FnV counts by itself, also where it is not defined
        (0x9200_0418, {}, exit_with(0x9200_0418, 0)),
        # the guest's own walk, not the second stage's
        (0x9200_0016, {}, exit_with(0x9200_0016, FAR, None)),
        (0x9200_001E | S1PTW, {}, exit_with(0x9200_001E, FAR, None)),
        (0x9200_0016 | S1PTW, {}, TO_GUEST),
        (0x9600_2010, {"in_hypervisor": True}, TO_GUEST),
        (0x9600_2010, {}, exit_with(0x9600_0010)),
        (0x9600_0010, {"in_hypervisor": True}, exit_with(0x9600_0010)),
    ],
)
def test_external_aborts(esr: int, facts: dict[str, object], want: Outcome) -> None:
    assert run(Case(esr, facts={**ASKED, **facts}))[0] == want


# What is injected.

BEYOND, BEYOND_HOST = 1 << 40 | 0x5000, 1 << 48 | 0x5000


@pytest.mark.parametrize(
    ("case", "want"),
    [
        (Case(LOAD, ipa=BEYOND), Inject("dabt", BEYOND | 0x678, DATA_ABORT)),
        (Case(FETCH, ipa=BEYOND), Inject("pabt", BEYOND | 0x678, 0x8600_0010)),
        (Case(LOAD, ipa=BEYOND_HOST), Inject("size_fault", BEYOND_HOST | 0x678, 0x9600_0000)),
        (Case(FETCH, ipa=BEYOND_HOST), Inject("size_fault", BEYOND_HOST | 0x678, 0x8600_0000)),
        # of a walk the status is overwritten too, but without the walk nothing is injected
        (Case(LOAD | S1PTW, ipa=BEYOND), Inject("dabt", BEYOND | 0x678, 0x9600_0017)),
        (Case(LOAD | S1PTW, ipa=BEYOND_HOST), Inject("size_fault", BEYOND_HOST | 0x678, 0x9600_0000)),
        (Case(LOAD | S1PTW, ipa=BEYOND_HOST, facts={"walk_level": None}), Retry()),
        # user code: from a lower exception level
        (Case(FETCH, None, facts={"user_level": True}), Inject("pabt", FAR, 0x8200_0010)),
        (Case(LOAD | S1PTW, None, facts={"user_level": True}), Inject("dabt", FAR, 0x9200_0017)),
        # 32-bit guests
        (Case(FETCH, None, facts={"guest_bits": 32}), Inject("pabt", FAR & 0xFFFF_FFFF, 0x210)),
        (Case(LOAD | S1PTW, None, facts={"guest_bits": 32}), Inject("dabt", FAR & 0xFFFF_FFFF, 0x210)),
        (
            Case(FETCH, None, facts={"guest_bits": 32, "long_descriptors": False}),
            Inject("pabt", FAR & 0xFFFF_FFFF, 0x008),
        ),
        (Case(LOAD, ipa=BEYOND_HOST, facts={"guest_bits": 32}), Inject("size_fault", 0x5678, 0x200)),
        (Case(FETCH, ipa=BEYOND_HOST, facts={"guest_bits": 32}), Inject("size_fault", 0x5678, 0x210)),
        (
            Case(LOAD, ipa=BEYOND_HOST, facts={"guest_bits": 32, "long_descriptors": False}),
            Inject("size_fault", 0x5678, 0x008),
        ),
        # an unsupported atomic of a nested guest, whose second stage is its hypervisor's
        (Case(0x9200_0035, walk=TABLE_1G, facts={"nested": True}), Inject("dabt_el2", FAR, 0x9200_0035)),
        (Case(0x9200_0035, facts={"guest_bits": 32}), Inject("dabt", FAR & 0xFFFF_FFFF, 0x235)),
    ],
)
def test_injected(case: Case, want: Outcome) -> None:
    assert run(case)[0] == want


# Execution by level (FEAT_XNX).


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize(("kernel_may", "user_may"), [(True, False), (False, True), (True, None), (False, None)])
def test_who_may_execute(user: bool, kernel_may: bool, user_may: bool | None) -> None:
    walk = replace(TABLE_1G, executable=kernel_may, user_executable=user_may)
    may = user_may if user and user_may is not None else kernel_may
    facts = {"nested": True, "user_level": user, "coherent_icache": True}
    assert run(Case(LOAD, walk=walk, facts=facts))[0] == fixed(R | W | (X if may else 0))
    forbidden, _ = run(Case(FETCH | PERMISSION, walk=walk, facts=facts))
    if may:
        assert forbidden == fixed(R | W | X)
    else:
        assert forbidden == Inject("s2_fault", FAR, 0x8200_000F)
