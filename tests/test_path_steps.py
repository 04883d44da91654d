"""Every step and every joint of the path decides something; every run says why; a run on a fork changes nothing else.

All of it over one list of situations (``SITUATIONS``), run on every backend and kernel where it makes sense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import ENOMEM
from functools import cache
from typing import Final

import pytest

from kvmfault.contract.access import Cause
from kvmfault.contract.outcome import Signal
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, MapResult, PinError
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import backend
from kvmfault.errors import ModelError
from kvmfault.path.run import BoundPath, bind
from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm.memslot_request import MemslotRequest
from tests.crippled import crippled
from tests.worlds import (
    ALL,
    APIC,
    GPA,
    HVA,
    ONE_OF_EACH,
    Watched,
    fault,
    permission,
    with_apic_page,
    with_memfd,
    world,
)

NOWHERE: Final = 0x1000_0018
PAGE: Final = 4096
Situation = tuple[Watched, tuple[Raw, ...]]
"""A VM and the faults that it gets, one after the other."""
SITUATIONS: Final[dict[str, tuple[tuple[str, ...], Callable[[str], Situation]]]] = {}
"""name -> (backends where it makes sense, how it is made for a target)."""
X86: Final = ("x86-ept", "x86-npt", "x86-shadow")
NESTED: Final = ("x86-ept", "x86-npt")
ARM: Final = ("arm64",)


def situation(*on: str) -> Callable[[Callable[[str], Situation]], Callable[[str], Situation]]:
    """Registers what the function makes, for some backends (none: all)."""

    def note(make: Callable[[str], Situation]) -> Callable[[str], Situation]:
        SITUATIONS[make.__name__.strip("_")] = (on or ONE_OF_EACH, make)
        return make

    return note


def plain(name: str, make: Callable[[str], Situation], *on: str) -> None:
    SITUATIONS[name] = (on or ONE_OF_EACH, make)


def _of_kind(k: str) -> None:
    plain(f"missing {k}, twice", lambda t: (world(t), (fault(t, k), fault(t, k))))
    plain(f"huge page, {k}", lambda t: (world(t, "thp"), (fault(t, k, GPA + 0x30_2000),)))
    plain(f"no slot, {k}", lambda t: (world(t), (fault(t, k, NOWHERE),)))
    plain(f"no slot, described {k}", lambda t: (world(t), (fault(t, k, NOWHERE, size=4, register=2),)))
    plain(f"read-only slot, {k}", lambda t: (world(t, readonly=True), (fault(t, k, size=4, register=2),)))
    plain(f"logged, {k}", lambda t: (world(t, "thp", log_dirty=True), (fault(t, k),)))
    plain(f"device memory, {k}", lambda t: (world(t, "pfnmap"), (fault(t, k),)))
    plain(f"forbidden {k}", lambda t: (world(t), (fault(t, "read"), permission(t, k, granule=PAGE))))
    plain(f"nothing behind the slot, {k}", lambda t: (world(t, None), (fault(t, k),)))
    plain(f"small fetches only, {k}", lambda t: (world(t, "thp", small_exec=True), (fault(t, k),)))
    plain(f"logged read, then {k}", lambda t: (world(t, log_dirty=True), (fault(t, "read"), permission(t, k))))


for _kind in ("read", "write", "exec"):
    _of_kind(_kind)
plain("misaligned", lambda t: (world(t, "thp", hva=HVA + (1 << backend(t).format.page_shift)), (fault(t, "write"),)))
plain("prefetched", lambda t: (world(t), (fault(t, "read", prefetch=True),)))
plain(
    "logged, then written",
    lambda t: (world(t, log_dirty=True), (fault(t, "read"), permission(t, "write", granule=PAGE))),
)
plain("no root", lambda t: (world(t, root_valid=False), (fault(t, "read"),)), *X86)
plain("external abort", lambda t: (world(t), (fault(t, "read", cause=Cause.EXTERNAL),)), *ARM)
plain("address size", lambda t: (world(t), (fault(t, "read", cause=Cause.ADDRESS_SIZE),)), *ARM)
plain("beyond the table", lambda t: (world(t, table_bits=28), (fault(t, "read"),)), *ARM)
plain("walk outside memory", lambda t: (world(t), (fault(t, "read", NOWHERE, on_walk=True, final=False),)))
plain("cache operation", lambda t: (world(t), (fault(t, "write", NOWHERE, cache_op=True),)), *ARM)
plain("nobody decodes", lambda t: (world(t, undecoded_mmio_exits=True), (fault(t, "read", NOWHERE),)))
plain("no tags", lambda t: (world(t, tagging=True), (fault(t, "write"),)), *ARM)
plain("apic", lambda t: (with_apic_page(t, apic_virtualised=False), (fault(t, "read", APIC),)), *X86)
plain("apic, nested", lambda t: (with_apic_page(t, nested=True), (fault(t, "read", APIC),)), *X86)
plain("private, shared frame", lambda t: (world(t, private_memory=True), (fault(t, "read", private=True),)))


@situation(*ARM)
def _access_flag(target: str) -> Situation:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    vm.table.age(Gpa(GPA), Gpa(GPA + PAGE), test_only=False)
    return vm, (fault(target, "read", cause=Cause.ACCESS_FLAG, granule=PAGE),)


@situation(*ARM)
def _tags(target: str) -> Situation:
    vm = world(target, tagging=True)
    vm.invalidate(vm.host.back(Hva(HVA), PAGE, tags=True))
    return vm, (fault(target, "write"),)


@situation(*ARM)
def _lost_address(target: str) -> Situation:
    return world(target, retranslation_fails=True), (permission(target, "write", granule=PAGE),)


@situation(*ARM)
def _exclusive(target: str) -> Situation:
    # unsupported exclusive or atomic access to memory that is mapped
    vm = world(target)
    return vm, (backend(target).decode(ESR_EL2=0x9200_0035, FAR_EL2=GPA, HPFAR_EL2=1 << 63 | GPA >> 8),)


@situation()
def _evicted(target: str) -> Situation:
    vm = world(target)
    vm.invalidate(vm.host.evict(Hva(HVA)))
    return vm, (fault(target, "write"),)


@situation()
def _evicted_and_deferred(target: str) -> Situation:
    vm, faults = _evicted(target)
    vm.answers["defer"] = True
    return vm, faults


@situation()
def _poisoned(target: str) -> Situation:
    vm = world(target, "hugetlb-2m")
    vm.invalidate(vm.host.poison(Hva(HVA)))
    return vm, (fault(target, "read"),)


@situation()
def _shared_until_written(target: str) -> Situation:
    vm = world(target)
    vm.invalidate(vm.host.make_cow(Hva(HVA)))
    return vm, (fault(target, "read"), fault(target, "write"), fault(target, "write"))


@situation()
def _interrupted(target: str) -> Situation:
    vm = world(target)
    vm.answers["pin"] = PinError.SIGPENDING
    return vm, (fault(target, "read"),)


@situation()
def _no_tables(target: str) -> Situation:
    vm = world(target)
    vm.answers["topup"] = ENOMEM
    return vm, (fault(target, "read"),)


@situation()
def _retired(target: str) -> Situation:
    vm = world(target)
    vm.answers["table_retired"] = True
    return vm, (fault(target, "read"),)


@situation()
def _lost(target: str) -> Situation:
    vm = world(target, log_dirty=True)
    vm.answers["map"] = MapResult.LOST
    return vm, (fault(target, "write"),)


def _migrate(vm: Watched) -> None:
    vm.invalidate(vm.host.migrate(Hva(HVA)))


def _begin(vm: Watched) -> None:
    vm.invalidations.begin()
    vm.invalidations.add(Gfn(GPA >> vm.page_shift), Gfn((GPA >> vm.page_shift) + 1))


def _during(port: str, happens: Callable[[Watched], None]) -> Callable[[str], Situation]:
    def make(target: str) -> Situation:
        vm = world(target)
        vm.meanwhile[port] = happens
        return vm, (fault(target, "write"), fault(target, "write"))

    return make


for _port in ("find_slot", "topup", "pin", "lock"):
    plain(f"moved at {_port}", _during(_port, _migrate))
    plain(f"being moved since {_port}", _during(_port, _begin))


@situation()
def _invalid_slot(target: str) -> Situation:
    vm = world(target)
    vm.slots.begin(MemslotRequest(slot=0, gpa=Gpa(GPA), size=0, hva=Hva(HVA)))
    vm.slots.step()
    return vm, (fault(target, "write", size=4, register=2),)


@situation(*X86)
def _tracked(target: str) -> Situation:
    vm = world(target)
    vm.resolve(fault(target, "read"))
    vm.tracked.add(Gfn(GPA >> 12))
    return vm, (permission(target, "write"),)


@situation(*X86)
def _private_apic(target: str) -> Situation:
    vm = with_apic_page(target, apic_virtualised=False, private_memory=True)
    vm.private.add(Gfn(APIC >> 12))
    return vm, (fault(target, "read", APIC, private=True),)


@situation()
def _shared_access_to_a_private_frame(target: str) -> Situation:
    vm = world(target, private_memory=True)
    vm.private.add(Gfn(GPA >> vm.page_shift))
    return vm, (fault(target, "read"),)


@situation("x86-ept", "x86-npt", "arm64")
def _guest_memfd(target: str) -> Situation:
    if target.endswith("6.12") and target.startswith("arm64"):
        return world(target), ()
    vm = with_memfd(target)
    vm.private.add(Gfn(GPA >> 12))
    return vm, (fault(target, "write", private=True), fault(target, "write", GPA + PAGE))


@situation(*X86)
def _known_device(target: str) -> Situation:
    vm = world(target)
    vm.resolve(fault(target, "read", NOWHERE))
    return vm, (fault(target, "read", NOWHERE, Cause.RESERVED),)


@situation("arm64")
def _nested(target: str) -> Situation:
    vm = world(target, nested=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), PAGE, writable=False, executable=False, level=2)
    return vm, (fault(target, "exec", 0x8000_0000), permission(target, "write", 0x8000_0000, granule=PAGE))


@situation("arm64")
def _nested_race(target: str) -> Situation:
    vm = world(target, nested=True)
    vm.answers["walk_guest"] = GuestWalkFault(0, errno=11)
    return vm, (fault(target, "read"),)


@situation(*NESTED)
def _nested_second_stage(target: str) -> Situation:
    vm = world(target, nested=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), PAGE, writable=False)
    return vm, (fault(target, "read", 0x8000_0000), permission(target, "write", 0x8000_0000))


def _edit_tables(vm: Watched) -> None:
    vm.answers = {**vm.answers, "walk_guest": GuestTranslation(Gpa(GPA + PAGE), PAGE)}


@situation(*X86)
def _guest_edits_its_tables(target: str) -> Situation:
    vm = world(target, nested=True)
    vm.answers["walk_guest"] = GuestTranslation(Gpa(GPA), PAGE)
    vm.meanwhile["lock"] = _edit_tables
    return vm, (fault(target, "read", 0x8000_0000), fault(target, "read", 0x8000_0000))


@situation("x86-shadow")
def _no_paging(target: str) -> Situation:
    vm = world(target, log_dirty=True, guest_paging=False)
    vm.resolve(fault(target, "read"))
    vm.table.write_protect(Gpa(GPA), Gpa(GPA + PAGE))
    return vm, (permission(target, "write"),)


@situation(*X86)
def _tracked_before_it_is_mapped(target: str) -> Situation:
    vm = world(target)
    vm.tracked.add(Gfn(GPA >> 12))
    return vm, (fault(target, "read"), fault(target, "write"))


@situation(*X86)
def _fetched_before(target: str) -> Situation:
    vm = world(target, "thp", small_exec=True)
    vm.answers["fetched_small"] = (2 << 20,)
    return vm, (fault(target, "read", GPA + 0x30_2000),)


@situation(*X86)
def _prefetched_again(target: str) -> Situation:
    vm = world(target)
    vm.resolve(fault(target, "write"))
    return vm, (fault(target, "read", prefetch=True),)


@situation("x86-shadow")
def _guests_own(target: str) -> Situation:
    vm = world(target)
    vm.answers["walk_guest"] = GuestWalkFault(0)
    return vm, (fault(target, "write"),)


@dataclass(frozen=True)
class Seen:
    """All that can be seen of a situation."""

    outcomes: object
    events: tuple[str, ...]
    key: object


def see(made: Situation, path: BoundPath | None = None) -> Seen:
    """Run the faults on a fork."""
    vm, faults = made[0].fork(), made[1]
    if path is not None:
        vm._path = path
    try:
        outcomes: object = tuple(vm.resolve(f) for f in faults)
    except ModelError as e:  # a path with a part missing may do what no kernel does
        outcomes = str(e)
    return Seen(outcomes, tuple(vm.events), vm.key())


@cache
def made(target: str) -> dict[str, Situation]:
    """All situations of a target."""
    name = target.partition("@")[0]
    return {what: make(target) for what, (on, make) in SITUATIONS.items() if name in on}


# Nothing is idle.


@pytest.mark.parametrize("target", ALL)
def test_every_step_and_joint_decides_something(target: str) -> None:
    normal = {name: see(what) for name, what in made(target).items()}
    idle = [
        name
        for name, path in crippled(backend(target))
        if all(see(what, path) == normal[situation_] for situation_, what in made(target).items())
    ]
    assert idle == []


# Every run says why.


def _cases() -> list[tuple[str, str]]:
    return [(t, name) for t in ALL for name, (on, _) in SITUATIONS.items() if t.partition("@")[0] in on]


@pytest.mark.parametrize(("target", "name"), _cases())
def test_every_step_of_every_run_says_why(target: str, name: str) -> None:
    vm, faults = made(target)[name]
    recorded, fast = vm.fork(), vm.fork()
    known = ["screen", *(step.name for step, _ in bind(backend(target)).named), "conclude"]
    for f in faults:
        run = recorded.handle(f)
        assert run.outcome == fast.resolve(f)  # the fast way decides the same
        assert recorded.key() == fast.key()
        assert run.steps
        for record in run.steps:
            assert record.name in known
            assert record.because
            assert record.because == record.because.strip(" ,")
            assert "\n" not in record.because
            assert all(text for text in record.changes.values())
            assert "<" not in record.because, f"not words: {record.because}"
        names = [record.name for record in run.steps]
        assert [known.index(n) for n in names] == sorted(known.index(n) for n in names)
        last = run.steps[-1]
        assert last.outcome == run.outcome
        ended = [record.name for record in run.steps if record.outcome is not None]
        assert ended == names[-1:] or (names[-1] == "conclude" and ended == names[-2:])
        words = type(run.outcome).__name__
        assert words in last.because or "mapped" in last.because
        assert (run.machinery is None) == (not run.progress.looked_up)
        if run.machinery is not None and not any(n == "conclude" for n in names):
            assert run.machinery == run.outcome
    assert recorded.events == fast.events


# Values.


@pytest.mark.parametrize(("target", "name"), _cases())
def test_a_run_on_a_fork_leaves_the_original_alone(target: str, name: str) -> None:
    vm, faults = made(target)[name]
    before, hashed = vm.key(), hash(vm.key())
    entries = list(vm.table.entries())
    one, two = vm.fork(), vm.fork()
    for f in faults:
        one.resolve(f)
    assert vm.key() == before
    assert hash(vm.key()) == hashed
    assert list(vm.table.entries()) == entries
    assert two.key() == before
    for f in faults:
        two.resolve(f)
    assert one.key() == two.key()  # equal histories, equal state
    again, _ = SITUATIONS[name][1](target)
    assert again.key() == before
    for f in faults:
        again.resolve(f)
    assert again.key() == one.key()


@pytest.mark.parametrize("target", ONE_OF_EACH)
def test_every_part_of_the_state_is_in_the_key(target: str) -> None:
    changes: dict[str, Callable[[Watched], object]] = {
        "slots": lambda vm: vm.add_memslot(5, gpa=1 << 36, size=1 << 20, hva=HVA),
        "host": lambda vm: vm.host.evict(Hva(HVA)),
        "invalidations": lambda vm: vm.invalidations.begin(),
        "table": lambda vm: vm.resolve(fault(target, "read", GPA + 0x10_0000)),
        "dirty": lambda vm: vm.log.start(0, 8),
        "private": lambda vm: vm.private.add(Gfn(1)),
        "tracked": lambda vm: vm.tracked.add(Gfn(1)),
        "signals": lambda vm: vm.signal(Signal(Hva(0), 12)),
        "warnings": lambda vm: vm.warn("x"),
        "registers": lambda vm: setattr(vm.vcpu, "registers", (1, *vm.vcpu.registers[1:])),
        "devices": lambda vm: setattr(vm, "devices", ((Gpa(0), 1, 0),)),
        "note": lambda vm: vm.note_mmio(Gfn(7), None),
        "facts": lambda vm: vm.with_facts(nested=True),
        "space": lambda vm: setattr(vm.vcpu, "as_id", 1),
    }
    vm = world(target)
    keys = {vm.key()}
    for name, change in changes.items():
        fork = vm.fork()
        change(fork)
        assert fork.key() not in keys, name
        keys.add(fork.key())
    assert vm.key() == world(target).key()
    assert len(keys) == len(changes) + 1
