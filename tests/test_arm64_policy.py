"""Policy values of arm64 that the kernel's recorded decisions do not notice, each by a fault that it decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import pytest

from arch.arm64 import BACKEND
from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import Error, Exit, Outcome, Reason, Retry, Signal
from kvmfault.contract.ports import Area, MapResult, Memslot, Pin, PinError
from kvmfault.contract.target import Target
from kvmfault.path.run import bind
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import MemslotFlag
from tests.kernel.arm64_decide import decide
from tests.kernel.scripted import ScriptedPorts

K, M, G = 1 << 10, 1 << 20, 1 << 30
LOAD, STORE = 0x92000007, 0x92000047
NONE: Final = MemslotFlag(0)


class World(ScriptedPorts):
    """One slot of 4G over everything from 0, aligned; *area* and *host*: bytes of the area's and the host's block."""

    def __init__(self, name: str, *, area: int, host: int, flags: MemslotFlag) -> None:
        super().__init__(BACKEND.formats[name], BACKEND.vm)
        self.block, self.host, self.flags = area, host, flags
        self.error: PinError | None = None
        self.asked: list[tuple[bool, bool]] = []
        self.mapped: list[int] = []

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        npages = 4 * G >> self.page_shift
        base, hva = Gfn(0), Hva(0x7F00_0000_0000)
        return Memslot(
            id=0, as_id=0, base_gfn=base, npages=npages, hva=hva, flags=self.flags, page_shift=self.page_shift
        )

    def area(self, hva: Hva) -> Area | None:
        return Area(self.block)

    def mapping_size(self, hva: Hva) -> int:
        return self.host

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        self.asked.append((nowait, interruptible))
        return Pin(Pfn(gfn), writable=True) if self.error is None else Pin(None, self.error)

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        self.mapped.append(size)
        return MapResult.FIXED


def world(name: str = "4k", *, area: int = 0, host: int = 0, flags: MemslotFlag = NONE) -> World:
    page = 1 << BACKEND.formats[name].page_shift
    return World(name, area=area or page, host=host or page, flags=flags)


def handle(vm: World, esr: int = LOAD, kernel: str = "6.12") -> Outcome:
    name = next(n for n, f in BACKEND.formats.items() if f == vm.format)
    target = Target(BACKEND, name, kernel)
    return bind(target).resolve(vm, target.decode(ESR_EL2=esr, FAR_EL2=0, HPFAR_EL2=0x40_0000))


@pytest.mark.parametrize(
    ("name", "area", "host", "mapped"),
    [
        ("4k", 4 * K, 2 * M, 2 * M),
        ("4k", 4 * K, G, 2 * M),  # a look at the host's table gives PMD blocks at most
        ("4k", 64 * K, 2 * M, 4 * K),  # contiguous PTEs: pages, and no look
        ("4k", 2 * M, 4 * K, 2 * M),
        ("4k", 32 * M, 4 * K, 2 * M),
        ("4k", G, 4 * K, G),
        ("16k", 16 * K, 32 * M, 32 * M),
        ("16k", 16 * K, 2 * M, 16 * K),
        ("16k", 2 * M, 32 * M, 16 * K),
        ("16k", 32 * M, 16 * K, 32 * M),
        ("16k", G, 16 * K, 32 * M),
        ("64k", 64 * K, 512 * M, 512 * M),
        ("64k", 2 * M, 512 * M, 64 * K),
        ("64k", 512 * M, 64 * K, 512 * M),
        ("64k", 16 * G, 64 * K, 512 * M),
        ("4k-lpa2", G, 4 * K, G),
        ("16k-lpa2", G, 16 * K, 32 * M),
    ],
)
def test_mapping_size(name: str, area: int, host: int, mapped: int) -> None:
    vm = world(name, area=area, host=host)
    handle(vm)
    assert vm.mapped == [mapped]


@pytest.mark.parametrize("esr", [LOAD, STORE])
@pytest.mark.parametrize(("area", "host"), [(4 * K, 2 * M), (2 * M, 4 * K), (G, G)])
def test_logging_maps_pages_for_reads_too(esr: int, area: int, host: int) -> None:
    vm = world(area=area, host=host, flags=MemslotFlag.LOG_DIRTY)
    handle(vm, esr)
    assert vm.mapped == [4 * K]


def test_the_log_flag_of_a_read_only_slot_does_not_count() -> None:
    vm = world(host=2 * M, flags=MemslotFlag.LOG_DIRTY | MemslotFlag.READONLY)
    handle(vm)
    assert vm.mapped == [2 * M]


def test_a_slot_in_deletion_is_no_slot() -> None:
    outcome = handle(world(flags=MemslotFlag.INVALID), LOAD | 1 << 24)
    assert isinstance(outcome, Exit)
    assert outcome.reason is Reason.MMIO


def test_any_invalidation_means_retry() -> None:
    vm = world()
    vm.invalidations.begin()
    vm.invalidations.add(Gfn(0), Gfn(1))  # another frame
    assert isinstance(handle(vm), Retry)
    assert vm.mapped == []


def test_the_page_is_asked_for_once_and_before_any_test() -> None:
    vm = world()
    vm.invalidations.begin()
    vm.invalidations.add(Gfn(0), Gfn(1 << 40))
    handle(vm)
    assert vm.asked == [(False, False)]


@pytest.mark.parametrize("kernel", BACKEND.kernels)
@pytest.mark.parametrize("error", [e for e in PinError if e not in (PinError.HWPOISON, PinError.WAITS)])
def test_pin_errors(error: PinError, kernel: str) -> None:
    vm = world()
    vm.error = error
    assert handle(vm, kernel=kernel) == Error(14)
    assert len(vm.asked) == 1


@pytest.mark.parametrize(
    ("area", "flags", "lsb"),
    [
        (2 * M, NONE, 21),
        (G, NONE, 30),
        (64 * K, NONE, 12),
        (2 * M, MemslotFlag.LOG_DIRTY, 12),
    ],
)
def test_poison_names_the_block_that_would_be_mapped(area: int, flags: MemslotFlag, lsb: int) -> None:
    vm = world(area=area, flags=flags)
    vm.error = PinError.HWPOISON
    outcome = handle(vm)
    assert isinstance(outcome, Retry)
    assert outcome.signal == Signal(Hva(0x7F00_4000_0000), lsb)


def test_poison_under_a_nested_guest_names_the_block_before_the_guest_s_own_is_looked_at() -> None:
    env: Mapping[str, int] = {"nested": 1, "out": 0x41234000, "vmashift": 21, "pfnkind": 2}
    events = decide(LOAD, 0, 0x40_0120, env)["events"]
    assert isinstance(events, list)
    assert events[-1] == "hwpoison hva=7f0001234000 lsb=21"


KERNELS_DIFFER_IN: Final = {
    "topup", "unexplained_permission", "poison_span", "dirty_mark", "memfd_source", "prefault", "mmio_sign_extension",
    "prefetch_poison", "device_memory", "nested_fetch", "nested_walk_error", "tag_refusal", "external_aborts",
    "address_capture", "distrusted_faults", "root_address_size", "unsupported_atomics", "wide_accesses",
    "injected_length", "injected_walk", "injected_target", "register_page",
}  # fmt: skip


def test_kernels_differ_in_these_values() -> None:
    for fmt in BACKEND.formats.values():
        older, newer = (BACKEND.policies[kernel](fmt) for kernel in ("6.12", "7.4"))
        assert set(older.differs(newer)) == KERNELS_DIFFER_IN
