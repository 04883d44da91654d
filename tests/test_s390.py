"""The s390 backend: what code and TEID say, and each turn of vcpu_post_run_handle_fault and below, by kernel."""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EINTR, EOPNOTSUPP
from typing import Final

import pytest

from arch.s390.dat import FORMATS, Large, empty_entry
from arch.s390.paste import paste
from arch.s390.unusual import unusual
from kvmfault.contract.format import Kind, Memory, R, W, X
from kvmfault.contract.outcome import Done, Error, Inject, Outcome, Resume, Retry, Spurious, fixed
from kvmfault.contract.ports import PinError
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import backend
from kvmfault.types import Gfn, Gpa, Hpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot_change import Stage
from kvmfault.vm.memslot_request import MemslotRequest
from tests.worlds import GPA, HVA, Watched, fault, leaf, world

NEWEST, EVERY = "s390", ("s390@6.12", "s390@6.18", "s390@7.4")
K, M = 4096, 1 << 20
STORE, FETCH = 1 << 10, 2 << 10
NOWHERE: Final = 0x900_0000
DELETION: Final = MemslotRequest(slot=0, gpa=Gpa(0), size=0, hva=Hva(0))
ADDRESSING: Final = Inject("addressing", 0, 5)


def interruption(code: int, low: int = 0, gpa: int = GPA, **more: int) -> Raw:
    return backend(NEWEST).decode(INT_CODE=code, TEID=gpa | low, **more)


# What the registers say.

WRITES: Final = [
    (0x04, 0, 0, True),  # protection is a write, whatever FSI says
    (0x04, FETCH, 0, True),
    (0x84, 0, 0, False),  # but not with a PER event: the kernel compares the whole code
    (0x84, STORE, 0, True),
    (0x11, 0, 0, False),
    (0x11, STORE, 0, True),
    (0x11, FETCH, 0, False),
    (0x11, 3 << 10, 0, False),
    (0x11, STORE, 1, False),  # without facility 75 FSI means nothing
    (0x3E, FETCH, 0, True),  # a page that is not secure yet has to be writable
]


@pytest.mark.parametrize(("code", "low", "without", "write"), WRITES)
def test_writes(code: int, low: int, without: int, write: bool) -> None:
    found = interruption(code, low, KVM=without << 2)
    assert found.is_write is write
    assert found.is_read is not write  # assumed: it is a gap
    kernel = backend(NEWEST).expression("kvm_s390_cur_gmap_fault_is_write")
    assert kernel.on(backend(NEWEST).named(found)) == (write and code != 0x3E)  # type: ignore[union-attr]  # no gap


CODES: Final[dict[int, tuple[set[str], int | None]]] = {
    0x04: ({"is_permission"}, None),
    0x10: ({"is_translation"}, M),
    0x11: ({"is_translation"}, K),
    0x12: (set(), None),
    0x38: ({"is_address_size"}, None),
    0x39: ({"is_translation"}, 1 << 53),
    0x3A: ({"is_translation"}, 1 << 42),
    0x3B: ({"is_translation"}, 1 << 31),
    0x3D: (set(), None),
    0x3E: ({"is_private"}, None),
}


@pytest.mark.parametrize(("code", "facts"), CODES.items())
def test_codes(code: int, facts: tuple[set[str], int | None]) -> None:
    true, granule = facts
    found = interruption(code, FETCH)
    answers = backend(NEWEST).answers(found)
    told = {name for name, answer in answers.items() if answer is True}
    assert told - {"gpa_valid", "granule_valid", "is_write"} == true
    assert found.granule == granule
    assert found.kvm_get_fault_gpa() == GPA
    assert found.gpa_offset is None
    assert found.gva is None
    assert backend(NEWEST).decode(INT_CODE=code).kvm_get_fault_gpa() is None


@pytest.mark.parametrize(
    ("bits", "key"), [(0, False), (1 << 2, False), (1 << 3, True), (1 << 2 | 1 << 3, False), (1 << 7 | 1 << 3, False)]
)
def test_a_key_is_told_by_three_bits(bits: int, key: bool) -> None:
    assert interruption(0x04, bits).is_protection_key is key
    assert not interruption(0x11, bits).is_protection_key


# vcpu_post_run_handle_fault: which interruption is what.

SORTED: Final[dict[str, tuple[int, int, Outcome]]] = {
    "none": (0x00, 0, Retry()),
    "only a PER event": (0x80, 0, Retry()),
    "protection": (0x04, 0, fixed(K, R | W | X)),
    "segment": (0x10, FETCH, fixed(K, R | X)),
    "page": (0x11, STORE, fixed(K, R | W | X)),
    "ASCE type": (0x38, FETCH, fixed(K, R | X)),
    "region first": (0x39, FETCH, fixed(K, R | X)),
    "region second": (0x3A, FETCH, fixed(K, R | X)),
    "region third": (0x3B, FETCH, fixed(K, R | X)),
    "with a PER event": (0x91, STORE, fixed(K, R | W | X)),
    "secure": (0x3D, 0, Retry()),
    "secure violation": (0x3F, 0, Retry()),
    "not secure, and not mapped": (0x3E, FETCH, fixed(K, R | W | X)),
    "translation specification": (0x12, 0, Resume(Done.SIGNALLED)),
    "addressing": (0x05, 0, Resume(Done.SIGNALLED)),
}


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize(("code", "low", "outcome"), SORTED.values(), ids=SORTED)
def test_interruptions(kernel: str, code: int, low: int, outcome: Outcome) -> None:
    vm = world(kernel)
    assert vm.resolve(interruption(code, low)) == outcome
    assert bool(vm.warnings) is (outcome == Resume(Done.SIGNALLED))


def test_another_address_space_marks_the_vm_and_is_handled() -> None:
    vm = world(NEWEST)
    assert vm.resolve(interruption(0x11, FETCH | 2)) == fixed(K, R | X)
    assert vm.warnings == ("the fault is not in the primary address space: the VM is marked as broken",)


def test_a_mapped_page_is_imported() -> None:
    vm = world(NEWEST)
    vm.access(GPA)
    assert vm.resolve(interruption(0x3E)) == Retry("", None)


@pytest.mark.parametrize("kernel", EVERY)
def test_outside_of_memory_is_an_addressing_exception(kernel: str) -> None:
    vm = world(kernel)
    assert vm.resolve(interruption(0x10, FETCH, NOWHERE)) == ADDRESSING
    assert vm.access(NOWHERE, 4, write=True).ended.name == "INJECTED"


# What the host cannot give.

ERRORS: Final[dict[PinError, tuple[Outcome, Outcome, Outcome]]] = {
    PinError.FAULT: (ADDRESSING, Error(EFAULT), Error(EFAULT)),
    PinError.HWPOISON: (ADDRESSING, Error(EFAULT), Error(EFAULT)),
    PinError.RO_FAULT: (ADDRESSING, Error(EFAULT), Error(EOPNOTSUPP)),
    PinError.SIGPENDING: (Error(EINTR), Error(EAGAIN), Error(EAGAIN)),
}
"""In 6.12, in 6.18 and in 7.4."""


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_the_host(error: PinError) -> None:
    for kernel, outcome in zip(EVERY, ERRORS[error], strict=True):
        vm = world(kernel)
        vm.answers["pin"] = error
        assert vm.resolve(interruption(0x11, STORE)) == outcome, kernel
        assert vm.signals == ()


@pytest.mark.parametrize("kernel", EVERY)
@pytest.mark.parametrize("asked", [False, True])
def test_a_page_that_has_to_be_read_in(kernel: str, asked: bool) -> None:
    vm = world(kernel, async_delivery=asked)
    vm.answers["defer"] = True
    vm.host.evict(Hva(HVA), K)
    run = vm.handle(interruption(0x11, FETCH))
    assert run.outcome == (Retry() if asked else fixed(K, R | X))
    # when it is there the guest is told; the page is mapped when the guest comes again
    assert leaf(vm, GPA) == (None if asked else (GPA, K, "r-x"))


@pytest.mark.parametrize("kernel", EVERY)
def test_without_leave_to_interrupt_the_vcpu_waits(kernel: str) -> None:
    vm = world(kernel, async_delivery=True, interrupts_allowed=False)
    vm.answers["defer"] = True
    vm.host.evict(Hva(HVA), K)
    assert vm.resolve(interruption(0x11, FETCH)) == fixed(K, R | X)


def test_what_arrives_is_not_mapped() -> None:
    vm = world(NEWEST)
    assert vm.resolve(interruption(0x11, FETCH, KVM=1)) == Retry()
    assert leaf(vm, GPA) is None


# Minor faults: an entry is there, and only old or protected.


def test_a_read_maps_clean_and_the_first_write_is_a_minor_fault() -> None:
    vm = world(NEWEST)
    vm.access(GPA)
    assert leaf(vm, GPA) == (GPA, K, "r-x")
    run = vm.handle(fault(NEWEST, "write", GPA))
    assert (run.outcome, run.steps[-1].name) == (fixed(K, R | W | X), "repair")
    assert vm.resolve(fault(NEWEST, "write", GPA)) == Spurious()


def test_an_old_entry_is_invalid_and_protected() -> None:
    vm = world(NEWEST)
    vm.access(GPA, write=True)
    assert vm.age(HvaRange(Hva(HVA), Hva(HVA + K)))
    assert leaf(vm, GPA) == (GPA, K, "---")
    assert vm.handle(interruption(0x11, FETCH)).steps[-1].name == "repair"
    assert leaf(vm, GPA) == (GPA, K, "r-x")
    assert len(vm.access(GPA, write=True).faults) == 1
    assert leaf(vm, GPA) == (GPA, K, "rwx")


def test_before_7_0_nothing_is_repaired() -> None:
    for kernel in EVERY[:2]:
        vm = world(kernel)
        vm.access(GPA)
        assert vm.handle(fault(kernel, "write", GPA)).steps[-1].name == "install"


def begin_to_delete(vm: Watched) -> None:
    assert vm.slots.begin(DELETION) is None
    while vm.slots.next_stage is not Stage.FLUSH:
        assert vm.slots.step(vm.host) is None
    slot = vm.find_slot(Gfn(GPA >> 12))
    assert slot is not None
    assert slot.invalid


def test_a_minor_fault_asks_for_no_memslot() -> None:
    vm = world(NEWEST)
    vm.access(GPA)
    begin_to_delete(vm)
    assert vm.resolve(fault(NEWEST, "write", GPA)) == fixed(K, R | W | X)


@pytest.mark.parametrize(
    ("kernel", "outcome"), list(zip(EVERY, (fixed(K, R | X), ADDRESSING, ADDRESSING), strict=True))
)
def test_a_slot_that_is_being_deleted(kernel: str, outcome: Outcome) -> None:
    vm = world(kernel)
    begin_to_delete(vm)
    assert vm.resolve(interruption(0x11, FETCH)) == outcome


# Dirty logging, large pages.


@pytest.mark.parametrize("kernel", EVERY)
def test_the_first_log_has_what_was_written_before(kernel: str) -> None:
    vm = world(kernel)
    vm.access(GPA + 2 * K, write=True)
    vm.access(GPA + 3 * K)
    vm.add_memslot(0, gpa=GPA, size=1 << 30, hva=HVA, log_dirty=True)
    assert vm.get_dirty_log(0).pages == (2,)
    assert leaf(vm, GPA + 2 * K) == (GPA + 2 * K, K, "r-x")
    assert vm.get_dirty_log(0).pages == ()
    assert len(vm.access(GPA + 3 * K, write=True).faults) == 1
    assert vm.get_dirty_log(0).pages == (3,)


def large(kernel: str = NEWEST) -> Watched:
    return world(backend(kernel).with_policy(fit_sizes=(M,)), "thp")


def test_segments_where_the_vmm_asked_for_them() -> None:
    vm = large()
    vm.access(GPA + K)
    assert leaf(vm, GPA) == (GPA, M, "r-x")
    vm.add_memslot(0, gpa=GPA, size=1 << 30, hva=HVA, log_dirty=True)
    assert vm.get_dirty_log(0).pages == ()
    run = vm.access(GPA + 5 * K, write=True).faults[0]
    assert (run.outcome, run.steps[-1].name) == (fixed(M, R | W | X), "repair")
    assert vm.get_dirty_log(0).pages == tuple(range(256))  # a block counts whole
    assert leaf(vm, GPA) == (GPA, M, "r-x")
    vm.access(GPA + M)  # logging does not forbid them
    assert leaf(vm, GPA + M) == (GPA + M, M, "r-x")


def test_entries_as_the_kernel_has_them() -> None:
    fmt = FORMATS["4k"]
    page = fmt.leaf(12, Hpa(0x12345000), R | W | X, Memory.NORMAL, young=True, host_writable=True, tag=0)
    assert page == 0x1234502F  # present, soft dirty, young, dirty, writable
    clean = fmt.leaf(12, Hpa(0x12345000), R | X, Memory.NORMAL, young=True, host_writable=True, tag=0)
    assert clean == 0x12345225
    assert fmt.fix_write(clean) == page
    segment = fmt.leaf(20, Hpa(0x12300000), R | W | X, Memory.NORMAL, young=True, host_writable=True, tag=0)
    assert segment == 0x12305C03
    assert isinstance(segment, Large)
    old = fmt.with_young(segment, False)
    assert old == 0x12304623
    assert fmt.prot(old) == 0
    assert fmt.prot(fmt.with_young(old, True)) == R | X
    assert fmt.kind(old, 20) is Kind.LEAF
    assert fmt.child_leaf(segment, 20, 12, 5) == 0x1230502F
    assert [hex(empty_entry(shift)) for shift in (12, 20, 31, 42)] == ["0x400", "0x20", "0x24", "0x28"]
    assert all(fmt.kind(empty_entry(shift), shift) is Kind.EMPTY for shift in (12, 20, 31, 42))
    assert [hex(fmt.table(Hpa(0x8000), shift)) for shift in (20, 31, 42)] == ["0x8000", "0x8007", "0x800b"]
    assert fmt.entry(0x0001_0005_0000_0020, 20).notes == ("a token: an access gets program interruption 0x5",)
    assert fmt.entry(int(segment), 20).dirty
    assert fmt.entry(0x8000, 31).notes == ("table type 0; entries of this level have 1",)
    assert [fmt.gpa_bits for fmt in FORMATS.values()] == [53, 42]


def test_another_page_under_the_entry_is_looked_up_again() -> None:
    vm = world(NEWEST)
    vm.meanwhile["lock"] = lambda now: now.invalidate(HvaRange(Hva(HVA), Hva(HVA + K)))
    assert vm.resolve(interruption(0x11, FETCH)) == Retry()
    assert backend(NEWEST).policy.on_retry.name == "LOOP"


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("Unexpected program interrupt 0x38, TEID 0x0000000040001400", {"INT_CODE": 0x38, "TEID": 0x4000_1400}),
        ("gmap_int_code=11 gmap_teid=40001400", {"INT_CODE": 0x11, "TEID": 0x4000_1400}),
        ("Secure storage violation (3f) in task: qemu, pid 7", {"INT_CODE": 0x3F}),
        ("TEID: 0000000040001400", None),
        ("pgm code: 12345", None),
        ("", None),
    ],
)
def test_paste(line: str, registers: dict[str, int] | None) -> None:
    assert paste(line) == registers


def test_what_is_odd() -> None:
    target = backend(NEWEST)

    def notes(**registers: int) -> str:
        return "; ".join(unusual(target.named(target.decode(**registers))))

    assert notes(INT_CODE=0x11, TEID=GPA | STORE) == ""
    assert "lets the guest run on" in notes(INT_CODE=0)
    assert "sends a SIGSEGV" in notes(INT_CODE=0x12)
    assert "takes this protection exception for a read" in notes(INT_CODE=0x84, TEID=GPA | 4)
    assert "FSI 3" in notes(INT_CODE=0x11, TEID=GPA | 3 << 10)
    assert "the address means nothing" in notes(INT_CODE=0x04, TEID=GPA)
    assert "reserved bits 0x300 are set" in notes(INT_CODE=0x11, TEID=GPA | 0x300)


def test_slots_of_s390_are_not_read_only() -> None:
    caps = backend(NEWEST).backend.host(FORMATS["4k"])
    assert not caps.readonly_slots
    assert caps.thp_size == M
