"""A Vm whose guest has tables of its own: shadow paging, nested guests; what hardware logs; pages on their way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvmfault.contract.outcome import Exit, Inject, Reason, Retry
from kvmfault.machine.guest import Ended
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.guest_tables import GuestEntry, GuestTables, WalkEnd
from tests.worlds import GPA, HVA

M2, G = 2 << 20, 1 << 30
L2 = 0x10_0000_0000
"""An address of the nested guest, or a virtual one."""
TABLES = GuestTables((GuestEntry(address=L2, size=M2, gpa=Gpa(GPA), block=4096),))


def world(target: str, backing: str = "anon", **facts: object) -> Vm:
    return Vm.on(target).add_memslot(0, gpa=GPA, size=G, hva=HVA).back(HVA, G, backing).with_facts(**facts)


@pytest.mark.parametrize("target", ["arm64", "arm64@6.12", "x86-ept", "x86-npt"])
def test_a_nested_guest_reaches_the_frame_that_its_hypervisor_gave_it(target: str) -> None:
    vm = world(target)
    own = vm.access(GPA + 0x3000, write=True)
    nested = vm.run_nested(TABLES).access(L2 + 0x3000, write=True)
    assert (own.ended, nested.ended) == (Ended.DONE, Ended.DONE)
    assert own.pfns == nested.pfns
    assert vm.table.leaf(Gpa(L2 + 0x3000)) is not None
    assert vm.own_table.leaf(Gpa(L2 + 0x3000)) is None
    beyond = vm.access(L2 + M2)
    assert beyond.ended is Ended.INJECTED
    assert isinstance(beyond.outcome, Inject)
    assert vm.run_own().access(GPA + 0x3000).faults == ()
    vm.invalidate(vm.host.migrate(Hva(HVA + 0x3000)))
    assert vm.run_nested(TABLES).table.leaf(Gpa(L2 + 0x3000)) is None  # an invalidation reaches the shadow too
    assert vm.access(L2 + 0x3000).pfns != own.pfns


def test_what_a_nested_hypervisor_is_told() -> None:
    read_only = GuestTables((replace(TABLES.entries[0], writable=False),))
    for target, what in (("arm64", "s2_fault"), ("x86-ept", "ept_violation"), ("x86-npt", "npf")):
        vm = world(target).run_nested(read_only)
        assert vm.access(L2).ended is Ended.DONE
        told = vm.access(L2, write=True)
        assert isinstance(told.outcome, Inject), told
        assert (told.ended, told.outcome.what) == (Ended.INJECTED, what)


def test_a_shadowed_guest_runs_on_its_own_tables() -> None:
    vm = world("x86-shadow")
    assert vm.access(L2).ended is Ended.FAILED  # no tables were given
    vm.guest_tables = TABLES
    done = vm.access(L2 + 0x3000, write=True)
    assert done.ended is Ended.DONE
    again = vm.access(L2 + 0x3000)
    assert (again.faults, again.pfns) == ((), done.pfns)
    told = vm.access(L2 + M2)
    assert isinstance(told.outcome, Inject)
    assert (told.ended, told.outcome.what, told.outcome.address) == (Ended.INJECTED, "#PF", L2 + M2)
    vm.invalidate(vm.host.migrate(Hva(HVA + 0x3000)))
    assert vm.access(L2 + 0x3000).pfns != done.pfns
    flat = world("x86-shadow", guest_paging=False)  # real mode: addresses are physical
    assert flat.access(GPA).ended is Ended.DONE
    exits = flat.access(GPA + (4 << 30), 2).exits
    assert [e.reason for e in exits if isinstance(e, Exit)] == [Reason.MMIO]


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
def test_mmio_is_remembered_with_its_own_frame_in_a_nested_table(target: str) -> None:
    nowhere = 0x90_0000_0000
    tables = GuestTables((GuestEntry(address=L2, size=4096, gpa=Gpa(nowhere)),))
    vm = world(target).run_nested(tables)
    vm.access(L2, 4)
    entry = vm.format.entry(vm.table.walk(Gpa(L2)).desc, 12)
    assert (entry.gpa, vm.vcpu.mmio.gfn) == (nowhere, nowhere >> 12)


def logged(*, pml: bool) -> Vm:
    vm = world("x86-ept", "thp", page_modification_log=pml, eager_split=False)
    vm.access(GPA, write=True)
    vm.access(GPA + M2, write=True)
    vm.table.split(Gpa(GPA + M2), Gpa(GPA + 2 * M2))
    return vm.add_memslot(0, gpa=GPA, size=G, hva=HVA, log_dirty=True)


def test_with_a_log_of_the_hardware_pages_stay_writable_and_blocks_do_not() -> None:
    plain, pml = logged(pml=False), logged(pml=True)
    block, page = Gpa(GPA), Gpa(GPA + M2)
    for vm, kept in ((plain, False), (pml, True)):
        for at, writable in ((block, False), (page, kept)):
            found = vm.table.leaf(at)
            assert found is not None
            assert bool(vm.format.prot(found.desc) & 2) is writable
    assert len(plain.access(page, write=True).faults) == 1
    assert pml.access(page, write=True).faults == ()  # no fault, and the write is logged all the same
    for vm in (plain, pml):
        assert vm.get_dirty_log(0).pages == (M2 // 4096,)
        assert vm.access(page, write=True).ended is Ended.DONE
        assert vm.get_dirty_log(0).pages == (M2 // 4096,)


def test_a_page_that_is_not_waited_for() -> None:
    vm = world("x86-ept", async_delivery=True)
    vm.invalidate(vm.host.evict(Hva(HVA)))
    asked = vm.access(GPA)
    assert asked.ended is Ended.WAITS
    assert isinstance(asked.outcome, Retry)
    assert [w.gfn for w in vm.vcpu.deferred.waiting] == [Gfn(GPA >> 12)]
    assert vm.access(GPA).ended is Ended.WAITS
    arrived = vm.page_ready()
    assert arrived is not None
    assert type(arrived.outcome).__name__ == "Fixed"
    assert vm.page_ready() is None
    assert vm.access(GPA).faults == ()
    halted = world("x86-ept")  # the guest cannot be told: its vCPU is halted until the page is there
    halted.invalidate(halted.host.evict(Hva(HVA)))
    done = halted.access(GPA)
    assert (done.ended, len(done.faults), halted.vcpu.deferred.waiting) == (Ended.DONE, 1, ())
    waits = world("x86-ept", halt_exits=False)  # nor can it be halted
    waits.invalidate(waits.host.evict(Hva(HVA)))
    assert type(waits.access(GPA).outcome).__name__ == "Fixed"


def translated(target: str, **facts: bool) -> Vm:
    """A VM whose vCPU runs on addresses that TABLES translate; the host has put the memory behind them away."""
    vm = world(target, "anon", **facts)
    vm.invalidate(vm.host.evict(Hva(HVA + 0x3000)))
    if target != "x86-shadow":
        return vm.run_nested(TABLES)
    vm.guest_tables = TABLES
    return vm


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "x86-shadow"])
def test_a_page_that_arrives_is_mapped_where_it_was_asked_for_and_as_it_was_asked_for(target: str) -> None:
    vm = translated(target, async_delivery=True)
    assert vm.access(L2 + 0x3000, write=True).ended is Ended.WAITS
    (waiting,) = vm.vcpu.deferred.waiting
    assert (waiting.gfn, waiting.fault.is_write, waiting.fault.is_prefetch) == (Gfn((GPA >> 12) + 3), True, True)
    arrived = vm.page_ready()
    assert arrived is not None
    assert type(arrived.outcome).__name__ == "Fixed"
    assert [entry.gpa for entry in vm.table.entries()] == [L2 + 0x3000]
    assert vm.access(L2 + 0x3000, write=True).faults == ()
    halted = translated(target)
    done = halted.access(L2 + 0x3000, write=True)
    assert (done.ended, len(done.faults), halted.vcpu.deferred.waiting) == (Ended.DONE, 1, ())


def test_a_page_that_arrives_when_the_vcpu_runs_on_another_table_is_not_mapped() -> None:
    vm = translated("x86-ept", async_delivery=True)
    vm.access(L2 + 0x3000)
    assert vm.run_own().page_ready() is None
    assert (vm.vcpu.deferred.waiting, list(vm.table.entries())) == ((), [])
    flat = translated("x86-shadow", async_delivery=True)
    flat.access(L2 + 0x3000)
    assert flat.with_facts(guest_paging=False).page_ready() is None
    assert (flat.vcpu.deferred.waiting, list(flat.table.entries())) == ((), [])


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
def test_a_block_does_not_take_the_place_of_pages_made_for_code(target: str) -> None:
    vm = world(target, "thp", small_exec=True)
    assert [str(f.progress.size) for f in vm.access(GPA + 0x3000, fetch=True).faults] == ["4096"]
    assert [f.progress.size for f in vm.access(GPA + 0x5000, write=True).faults] == [4096]
    other = world(target, "thp", small_exec=True)
    assert [f.progress.size for f in other.access(GPA + 0x5000, write=True).faults] == [M2]


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt", "x86-shadow"])
def test_the_emulator_walks_the_guests_tables_too(target: str) -> None:
    device = Gpa(0x90_0000_0000)
    tables = GuestTables((*TABLES.entries, GuestEntry(address=L2 + M2, size=4096, gpa=device)))
    vm = Vm.on(target).add_memslot(0, gpa=GPA, size=G, hva=HVA, log_dirty=True).back(HVA, G)
    vm.track_writes(Gfn((GPA >> 12) + 3))
    if target == "x86-shadow":
        vm.guest_tables = tables
    else:
        vm.run_nested(tables)
    written = vm.access(L2 + 0x3000, 4, write=True)  # a tracked frame: emulated, in memory
    assert (written.ended, written.exits, vm.get_dirty_log(0).pages) == (Ended.DONE, (), (3,))
    across = vm.access(L2 + M2 - 2, 4, write=True, data=0x11223344)  # memory, then a device
    assert [(e.detail.gpa, e.detail.data) for e in across.exits] == [(device, b"\x22\x11")]  # type: ignore[union-attr]  # MMIO
    beyond = vm.access(L2 + M2 + 0xFFE, 4, write=True)  # a device, then nothing: the guest's fault
    assert (beyond.ended, beyond.exits) == (Ended.INJECTED, ())


def test_an_entry_of_the_guests_own_ept_that_only_writes_is_a_misconfiguration() -> None:
    tables = GuestTables((replace(TABLES.entries[0], readable=False),))
    told = world("x86-ept").run_nested(tables).access(L2, write=True).outcome
    assert isinstance(told, Inject)
    assert told.what == "ept_misconfig"


def test_where_no_entry_is_none_grants_anything() -> None:
    absent = GuestTables((GuestEntry(address=L2, size=4096, end=WalkEnd.MISSING),))
    told = [world("x86-ept").run_nested(t).access(L2).outcome for t in (absent, GuestTables())]
    assert [t.syndrome for t in told if isinstance(t, Inject)] == [0x181, 0x181]


FETCHED, OTHER = GPA + 0x3000, GPA + 0x5000
"""Two pages of one block."""


def sizes(vm: Vm, gpa: int, *, fetch: bool = False) -> list[int]:
    return [f.progress.size for f in vm.access(gpa, write=not fetch, fetch=fetch).faults]


def with_a_small_page(vm: Vm) -> Vm:
    """The VM with a table page at GPA that was made because the writes to a frame were tracked for a while."""
    vm.track_writes(Gfn(OTHER >> 12))
    vm.access(GPA, write=True)
    vm.unprotect(Gfn(OTHER >> 12))
    return vm


def fetched(vm: Vm) -> Vm:
    assert sizes(vm, FETCHED, fetch=True) == [4096]
    return vm


def slot_deleted(vm: Vm) -> Vm:
    return vm.add_memslot(1, gpa=GPA + G, size=M2, hva=HVA).remove_memslot(1)


def dropped(vm: Vm) -> Vm:
    vm.drop(FETCHED >> 12, (FETCHED >> 12) + 1)
    vm.flush_stale()
    return vm


def logged_for_a_while(vm: Vm) -> Vm:
    vm.add_memslot(0, gpa=GPA, size=G, hva=HVA, log_dirty=True)
    return vm.add_memslot(0, gpa=GPA, size=G, hva=HVA)


def nested(vm: Vm) -> Vm:
    return vm.run_nested(GuestTables((GuestEntry(address=GPA, size=M2, gpa=Gpa(GPA)),)))


@pytest.mark.parametrize("target", ["x86-ept", "x86-npt"])
@pytest.mark.parametrize(
    ("history", "size"),
    [
        ((with_a_small_page,), M2),  # a table page made for another reason gives way
        ((fetched,), 4096),
        ((fetched, dropped), 4096),  # KVM keeps table pages that become empty
        ((fetched, slot_deleted), M2),  # all tables go
        ((fetched, slot_deleted, with_a_small_page), M2),
        ((fetched, logged_for_a_while), M2),  # what could be a block is zapped with its table page
        ((fetched, logged_for_a_while, with_a_small_page), M2),
        ((with_a_small_page, fetched), M2),  # the fetch did not make the table page
        ((fetched, nested, with_a_small_page), M2),  # it made one of another table
        ((nested, fetched), 4096),
        ((Vm.fork, fetched, Vm.fork), 4096),
    ],
    ids=lambda value: "-".join(f.__name__ for f in value) if isinstance(value, tuple) else "",
)
def test_what_a_fetch_made_small_stays_so_as_long_as_its_table_page(
    target: str, history: tuple[Callable[[Vm], Vm], ...], size: int
) -> None:
    vm = world(target, "thp", small_exec=True)
    for event in history:
        vm = event(vm)
    assert sizes(vm, OTHER) == [size]


def test_what_was_mapped_in_tables_that_are_gone_is_forgotten() -> None:
    vm = world("x86-ept").run_nested(TABLES)
    vm.access(L2)
    slot_deleted(vm)
    vm.run_nested(GuestTables((GuestEntry(address=L2, size=4096, gpa=Gpa(GPA + M2)),))).access(L2)
    vm.invalidate(vm.host.migrate(Hva(HVA)))  # behind what was mapped there before
    assert vm.table.leaf(Gpa(L2)) is not None


@pytest.mark.parametrize("target", ["arm64", "arm64@6.12"])
def test_small_pages_for_code_are_of_no_use_where_only_fetches_get_to_execute(target: str) -> None:
    vm = world(target, "hugetlb-2m", small_exec=True)
    assert [f.progress.size for f in vm.access(GPA, fetch=True).faults] == [M2]


def test_without_hardware_bits_an_old_page_of_ept_faults_and_is_fixed_without_the_lock() -> None:
    vm = world("x86-ept", hardware_access_dirty=False)
    vm.access(GPA, write=True)
    span = HvaRange(Hva(HVA), Hva(HVA + 4096))
    assert vm.age(span)
    vm.vcpu.tlb.flush_all()
    again = vm.access(GPA, write=True)
    assert [f.steps[-1].name for f in again.faults] == ["repair"]
    assert vm.age(span, test_only=True)
    vm.prefault(GPA + 0x3000, 4096)
    assert [f.steps[-1].name for f in vm.access(GPA + 0x3000).faults] == ["repair"]  # nobody used it until now
