"""Every policy value of every target decides something: a situation in which any other value shows.

A situation runs on a target and gives what could be seen. With the target's own policy that is what is written here;
with any other value of the member in question it is something else. What a target never asks is declared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from errno import EFAULT, EINVAL, ENOSYS, EOPNOTSUPP, EPERM
from functools import partial
from itertools import chain, combinations
from typing import Final

import pytest

from kvmfault.contract.format import Memory, R, W, X, block_sizes
from kvmfault.contract.outcome import Emulate, Error, Exit, Inject, Outcome, Reason, Retry, Signal
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Area, GuestTranslation, Leaf, MapResult, Memslot, Pin, PinError
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backend
from kvmfault.contract.values import Reaction, Unbacked
from kvmfault.machine.stage2 import Stage2
from kvmfault.path.run import bind
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.area import HvaRange
from kvmfault.vm.memslot import GmemBinding, MemslotFlag
from kvmfault.vm.memslot_request import MemslotRequest, Via
from tests.kernel.scripted import ScriptedPorts
from tests.kernel.scripted_arm64 import Case
from tests.test_arm64_kernels import ROWS, run_on
from tests.test_arm64_vncr import NO_WRITE, handle_on, vcpu
from tests.worlds import ALL, GPA, Watched, fault, leaf, permission, world

K, M, G = 1 << 10, 1 << 20, 1 << 30
HVA: Final = Hva(0x7F00_0000_0000)
NONE: Final = MemslotFlag(0)
LOGGED, READONLY, INVALID = MemslotFlag.LOG_DIRTY, MemslotFlag.READONLY, MemslotFlag.INVALID
READ, WRITE, EXEC = "read", "write", "exec"
ARM: Final = ("arm64@6.12", "arm64@7.4")
X86: Final = tuple(name for name in ALL if name not in ARM)
SHADOW: Final = tuple(name for name in X86 if "shadow" in name)
TDP: Final = tuple(name for name in X86 if name not in SHADOW)
OTHER_PAGES: Final = ("arm64:16k@6.12", "arm64:16k@7.4", "arm64:64k@6.12", "arm64:64k@7.4")
"""Targets whose sizes are others; all other values are those of 4K pages."""


class Script(ScriptedPorts):
    """One slot over everything, *area* and *host* the blocks that the host has there. Notes the ports that are used."""

    def __init__(
        self,
        target: Target,
        flags: MemslotFlag = NONE,
        *,
        area: int = 0,
        host: int = 0,
        hva: Hva = HVA,
        npages: int = 1 << 30,
        slot: bool = True,
        pins: tuple[Pin, ...] = (),
        mapped: MapResult = MapResult.FIXED,
        tracked: bool = False,
        memfd: bool = False,
        raw: bool = False,
        present: Leaf | None = None,
        nested: int = 0,
        paging: bool = True,
    ) -> None:
        """*raw*: the area's frames are raw; *present*: the leaf that is there; *nested*: the block of a nested
        guest's own table; without *paging* no guest has tables of its own."""
        facts = replace(target.backend.vm, private_memory=memfd, nested=bool(nested))
        super().__init__(target.format, facts if paging else replace(facts, guest_paging=False))
        page = 1 << self.page_shift
        self.block, self.host, self.pins, self.mapped = area or page, host or page, [*pins], mapped
        self.tracked, self.memfd, self.raw, self.present, self.nested = tracked, memfd, raw, present, nested
        self.slot = Memslot(
            id=0,
            as_id=0,
            base_gfn=Gfn(0),
            npages=npages if slot else 0,
            hva=hva,
            flags=flags | MemslotFlag.GUEST_MEMFD if memfd else flags,
            page_shift=self.page_shift,
            gmem=GmemBinding(3, 0) if memfd else None,
        )
        self.sizes: list[int] = []
        self.prots: list[str] = []
        self.memory: list[str] = []

    def used(self, *ports: str) -> list[str]:
        """The events of these ports."""
        return [event for event in self.events if event.split()[0] in ports]

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        return self.slot if self.slot.contains(gfn) else None

    def is_private(self, gfn: Gfn) -> bool:
        return self.memfd

    def is_tracked(self, gfn: Gfn) -> bool:
        return self.tracked

    def walk_guest(self, gpa: Gpa) -> GuestTranslation:
        return GuestTranslation(gpa, self.nested or G)  # the guest maps everything one to one

    def topup(self) -> int:
        self.events.append("topup")
        return 0

    def area(self, hva: Hva) -> Area | None:
        return Area(self.block, raw_frames=self.raw)

    def find_leaf(self, gpa: Gpa) -> Leaf | None:
        return self.present

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        self.events.append("pin" + " nowait" * nowait + " interruptible" * interruptible)
        return self.pins.pop(0) if self.pins else Pin(Pfn(gfn), writable=True)

    def pin_memfd(self, slot: Memslot, gfn: Gfn) -> Pin:
        self.events.append("pin_memfd")
        return Pin(Pfn(gfn), writable=True)

    def mapping_size(self, hva: Hva) -> int:
        return self.host

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        self.events.append("map")
        self.sizes.append(size)
        self.memory.append(memory.value)
        self.prots.append("".join(c for c, bit in (("r", 4), ("w", 2), ("x", 1)) if prot & bit))
        return self.mapped

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult | int:
        self.events.append("relax")
        return self.mapped

    def map_mmio(self, at: Gpa, gpa: Gpa, prot: int) -> MapResult:
        self.events.append("map_mmio")
        return MapResult.MMIO

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        self.events.append(f"mark_dirty {gfn:#x}")

    def warn(self, text: str) -> None:
        self.events.append("warn")


# What is seen where.

See = Callable[[Target], object]


@dataclass(frozen=True)
class Situation:
    """What shows *member* on one target, and what is seen there."""

    member: str
    target: str
    see: See
    want: object


SITUATIONS: Final[list[Situation]] = []


def shows(member: str, wants: Mapping[tuple[str, ...], object]) -> Callable[[See], See]:
    """Registers what shows the member: targets -> what is seen there."""

    def note(see: See) -> See:
        SITUATIONS.extend(Situation(member, name, see, want) for names, want in wants.items() for name in names)
        return see

    return note


def resolve(target: Target, vm: Script, f: Raw) -> Outcome:
    return bind(target).resolve(vm, f)


def kind(outcome: Outcome) -> str:
    return type(outcome).__name__


def pmd(target: Target) -> int:
    """The smallest block of more than a page."""
    return block_sizes(target.format)[1]


@shows("unbacked", {ARM: (Error(ENOSYS), []), X86: (Emulate(), ["map_mmio"])})
def no_slot(on: Target) -> object:
    vm = Script(on, slot=False)
    return resolve(on, vm, fault(on, READ)), vm.used("map_mmio")


@shows("invalid_slot", {ARM: Error(ENOSYS), X86: Retry()})
def slot_in_deletion(on: Target) -> object:
    return resolve(on, Script(on, INVALID), fault(on, READ))


@shows("write_tracking", {ARM: "Fixed", X86: "Emulate"})
def tracked_frame(on: Target) -> object:
    return kind(resolve(on, Script(on, tracked=True), permission(on, WRITE)))


@shows("topup", {ARM[:1]: [True, True, False, False], ARM[1:]: [True, True, True, False], X86: [True] * 4})
def table_pages(on: Target) -> object:
    cases = (NONE, fault(on, READ)), (LOGGED, permission(on, WRITE)), (LOGGED, permission(on, EXEC))
    asked = []
    for flags, f in (*cases, (NONE, permission(on, WRITE))):
        vm = Script(on, flags)
        resolve(on, vm, f)
        asked.append("topup" in vm.events)
    return asked


@shows("unexplained_permission", {ARM[:1]: Error(EFAULT), ARM[1:] + X86: "Fixed"})
def forbidden_read(on: Target) -> object:
    outcome = resolve(on, Script(on), permission(on, READ))
    return outcome if isinstance(outcome, Error) else kind(outcome)


@shows(
    "area_sizes",
    {
        ARM: {4 * K: [4 * K], 8 * K: [8 * K, "warn"], 64 * K: [4 * K], 2 * M: [2 * M], 32 * M: [2 * M], G: [G]},
        OTHER_PAGES[:2]: {16 * K: [16 * K], 2 * M: [16 * K], 32 * M: [32 * M], G: [32 * M], 2 * G: [2 * G, "warn"]},
        OTHER_PAGES[2:]: {64 * K: [64 * K], 2 * M: [64 * K], 512 * M: [512 * M], 16 * G: [512 * M]},
        X86: {4 * K: [4 * K], 2 * M: [4 * K], G: [4 * K]},
    },
)
def host_areas(on: Target) -> object:
    by_page = {14: (16 * K, 2 * M, 32 * M, G, 2 * G), 16: (64 * K, 2 * M, 512 * M, 16 * G)}
    areas = by_page.get(on.format.page_shift, (4 * K, 8 * K, 64 * K, 2 * M, 32 * M, G))
    seen = {}
    for area in areas if on.policy.unbacked is Unbacked.LEAVE else (4 * K, 2 * M, G):
        vm = Script(on, area=area)
        resolve(on, vm, fault(on, READ))
        seen[area] = [*vm.sizes, *vm.used("warn")]
    return seen


@shows("unknown_area", {ARM: ("Fixed", ["warn"])})
def unlisted_area(on: Target) -> object:
    vm = Script(on, area=8 * K)
    return kind(resolve(on, vm, fault(on, READ))), vm.used("warn")


@shows("check_geometry", {ARM + X86: [4 * K]})
def misaligned_slot(on: Target) -> object:
    vm = Script(on, area=pmd(on), host=pmd(on), hva=Hva(HVA + 4 * K))
    resolve(on, vm, fault(on, READ))
    return vm.sizes


@shows("logged_size", {ARM + X86: [4 * K]})
def read_of_a_logged_slot(on: Target) -> object:
    vm = Script(on, LOGGED, area=pmd(on), host=pmd(on))
    resolve(on, vm, fault(on, READ))
    return vm.sizes


@shows("readonly_slot_logs", {ARM: [2 * M], X86: [4 * K]})
def read_of_a_logged_read_only_slot(on: Target) -> object:
    vm = Script(on, LOGGED | READONLY, area=pmd(on), host=pmd(on))
    resolve(on, vm, fault(on, READ))
    return vm.sizes


@shows("precheck", {ARM: (Retry(), ["pin"]), X86: (Retry(), [])})
def frame_being_invalidated(on: Target) -> object:
    vm = Script(on)
    vm.invalidations.begin()
    vm.invalidations.add(Gfn(0), Gfn(1 << 40))
    return resolve(on, vm, fault(on, READ)), vm.used("pin")


@shows("nowait_first", {ARM: ["pin"], X86: ["pin nowait", "pin interruptible"]})
@shows("interruptible", {X86: ["pin nowait", "pin interruptible"]})
def page_on_its_way(on: Target) -> object:
    vm = Script(on, pins=(Pin(None, PinError.NEEDS_IO),))
    resolve(on, vm, fault(on, READ))
    return vm.used("pin")


ASKED_OF_THE_TABLE: Final = tuple(error for error in PinError if error is not PinError.WAITS)
"""Whoever waits for user space tries again on every kernel."""


@shows(
    "frame_reaction",
    {
        ARM: {
            **dict.fromkeys(ASKED_OF_THE_TABLE, (Error(EFAULT), [])),
            PinError.HWPOISON: (Retry(signal=Signal(Hva(HVA + GPA), 12)), []),
        },
        X86: {
            PinError.FAULT: (Error(EFAULT), []),
            PinError.HWPOISON: (Retry(signal=Signal(Hva(HVA + GPA), 12)), []),
            PinError.RO_FAULT: (Emulate(), []),
            PinError.SIGPENDING: (Exit(Reason.INTR, errno=4), []),
            PinError.NEEDS_IO: (Error(EFAULT), []),  # also when it was waited for
            PinError.NO_SLOT: (Emulate(), ["warn", "map_mmio"]),
        },
    },
)
def no_page(on: Target) -> object:
    seen = {}
    for error in ASKED_OF_THE_TABLE:
        vm = Script(on, pins=(Pin(None, error),) * 2)
        seen[error] = resolve(on, vm, fault(on, READ)), vm.used("warn", "map_mmio")
    return seen


@shows("prefetch_poison", {X86: Retry(signal=Signal(Hva(HVA + GPA), 12))})
def poison_that_nobody_waits_for(on: Target) -> object:
    return resolve(on, Script(on, pins=(Pin(None, PinError.HWPOISON),)), fault(on, READ, prefetch=True))


@shows("poison_span", {ARM[:1]: [21, 21], ARM[1:]: [21, 12]})
def poisoned_block(on: Target) -> object:
    # an area of 1G of which the slot has room for 2M and the nested guest's own table for a page: four spans
    spans = []
    for nested in (0, 4 * K):
        pins = (Pin(None, PinError.HWPOISON),)
        vm = Script(on, area=G, npages=GPA + 4 * M >> 12, pins=pins, nested=nested)
        outcome = resolve(on, vm, fault(on, READ))
        assert isinstance(outcome, Retry)
        assert outcome.signal is not None
        spans.append(outcome.signal.lsb)
    return spans


DEVICE: Final = Pin(Pfn(1), writable=True, device=True)


@shows("fetch_from_device", {ARM: "Inject", X86: "Fixed"})
def fetch_from_a_device(on: Target) -> object:
    return kind(resolve(on, Script(on, pins=(DEVICE,), raw=True), fault(on, EXEC)))


@shows("device_memory", {X86: ["device"]})
def frame_of_a_device(on: Target) -> object:
    vm = Script(on, pins=(DEVICE,))
    resolve(on, vm, fault(on, READ))
    return vm.memory


@shows("read_maps_writable", {ARM: ["rw", "r", "rw"], X86: ["rw", "rw", "rw"]})
def read_of_writable_memory(on: Target) -> object:
    prots = []
    for flags, device in ((NONE, False), (LOGGED, False), (LOGGED, True)):
        pins = (DEVICE if device else Pin(Pfn(1), writable=True),)
        vm = Script(on, flags, pins=pins, raw=device, paging=False)
        resolve(on, vm, fault(on, READ))
        prots.append(vm.prots[0].removesuffix("x"))
    return prots


@shows("exec_grant", {ARM: ["rw"], X86: ["rwx"]})
def read(on: Target) -> object:
    vm = Script(on, paging=False)  # the rights of a guest's own table are another matter
    resolve(on, vm, fault(on, READ))
    return vm.prots


@shows("retry_test", {ARM: "Retry", X86: "Fixed"})
def another_frame_being_invalidated(on: Target) -> object:
    vm = Script(on)
    vm.invalidations.begin()
    vm.invalidations.add(Gfn(0), Gfn(1))
    return kind(resolve(on, vm, fault(on, READ)))


@shows(
    "fit_sizes",
    {
        ARM: {2 * M: 2 * M, G: 2 * M},
        OTHER_PAGES[:2]: {32 * M: 32 * M},
        OTHER_PAGES[2:]: {512 * M: 512 * M},
        X86: {2 * M: 2 * M, G: G},
    },
)
def huge_pages_of_the_host(on: Target) -> object:
    sizes = {}
    for host in block_sizes(on.format)[1:]:
        vm = Script(on, host=host)
        resolve(on, vm, fault(on, READ))
        sizes[host] = vm.sizes[0]
    return sizes


@shows("relax_in_place", {ARM: ["relax", 4 * K], X86: ["map", 2 * M]})
def more_permissions(on: Target) -> object:
    at_its_granule, device = Script(on), Script(on, host=pmd(on), pins=(DEVICE._replace(pfn=Pfn(0)),), raw=True)
    resolve(on, at_its_granule, permission(on, WRITE, granule=4 * K))
    resolve(on, device, fault(on, READ))  # what may be relaxed later is not looked at anew: device memory stays pages
    return [*at_its_granule.used("map", "relax"), *device.sizes]


@shows(
    "dirty_mark",
    {
        ARM[:1]: ["map", "mark_dirty 0x40003", "map", "mark_dirty 0x40003"],
        ARM[1:]: ["map", "mark_dirty 0x40003", "map", "mark_dirty 0x40000"],
        X86: ["mark_dirty 0x40003", "map", "map"],
    },
)
def writes_to_a_logged_slot_and_to_a_block(on: Target) -> object:
    seen = []
    for flags in (LOGGED, NONE):
        vm = Script(on, flags, host=2 * M)
        resolve(on, vm, fault(on, WRITE, GPA + 3 * 4 * K))
        seen += vm.used("map", "mark_dirty")
    return seen


@shows("memfd_source", {ARM[:1]: ["pin"], ARM[1:]: ["pin_memfd"], X86: ["memory_fault"]})
def shared_access_to_a_private_frame(on: Target) -> object:
    vm = Script(on, memfd=True)
    outcome = resolve(on, vm, fault(on, READ))
    refused = isinstance(outcome, Exit) and outcome.reason is Reason.MEMORY_FAULT
    return ["memory_fault"] if refused else [event.split()[0] for event in vm.used("pin", "pin_memfd")]


@shows("unchanged", {ARM: "Retry", X86: "Spurious"})
def entry_is_there(on: Target) -> object:
    return kind(resolve(on, Script(on, mapped=MapResult.UNCHANGED), fault(on, READ)))


READABLE: Final = Leaf(4, 4 * K, Pfn(GPA >> 12))


@shows(
    "present_leaf",
    {
        ARM: ["Fixed", "Fixed", "Fixed"],
        tuple(name for name in X86 if name.endswith("@6.12")): ["Fixed", "Fixed", "Fixed", "map_mmio"],
        ("x86-ept@7.4", "x86-npt@7.4"): ["Fixed", "Spurious", "Spurious", "warn"],
        ("x86-shadow@7.4",): ["Fixed", "Fixed", "Spurious", "map_mmio"],
    },
)
def leaf_is_there(on: Target) -> object:
    faults = fault(on, WRITE), fault(on, READ), fault(on, READ, prefetch=True)
    seen = [kind(resolve(on, Script(on, present=READABLE), f)) for f in faults]
    lost = Script(on, present=READABLE, slot=False)  # mapped by another vCPU, which found a slot there
    resolve(on, lost, fault(on, READ))
    return seen + lost.used("map_mmio", "warn")


@shows("userfault", {ARM + X86: EINVAL})
def slot_with_userfault(on: Target) -> object:
    request = MemslotRequest(
        slot=1, flags=MemslotFlag.USERFAULT, gpa=Gpa(1 << 32), size=2 * M, hva=Hva(HVA + 8 * G), via=Via.REGION2
    )
    return world(on).set_region(request).errno


@shows("prefault", {ARM[:1]: EINVAL, ARM[1:] + TDP: 0, SHADOW: EOPNOTSUPP})
def prefault_of_a_page(on: Target) -> object:
    return world(on).prefault(GPA, 4 * K).errno


@shows("logging_drops", {ARM + X86: True})
def begin_of_logging(on: Target) -> object:
    vm = world(on)
    vm.resolve(fault(on, WRITE))
    change(vm, slot=0, flags=LOGGED, gpa=Gpa(GPA), size=G, hva=HVA)
    return leaf(vm, GPA) is not None


@shows("unmap_marks", {X86: ()})
def pages_marked_as_they_go(on: Target) -> object:
    vm = world(on, log_dirty=True)
    vm.resolve(fault(on, WRITE))
    vm.get_dirty_log(0)
    vm.drop(GPA >> 12, (GPA >> 12) + 1)
    return vm.get_dirty_log(0).pages


@shows("age_flushes", {ARM + X86: True})
def aged(on: Target) -> object:
    vm = world(on)
    vm.access(GPA)
    vm.age(HvaRange(HVA, Hva(HVA + 4 * K)))
    return bool(vm.vcpu.tlb.entries())


@shows("recovers_blocks", {ARM: [4 * K, 4 * K], X86: [4 * K, None]})
def end_of_logging(on: Target) -> object:
    vm = world(on, "thp", log_dirty=True)
    vm.resolve(fault(on, WRITE))
    sizes = []
    for flags in (LOGGED, NONE):
        change(vm, slot=0, flags=flags, gpa=Gpa(GPA), size=G, hva=HVA)
        found = leaf(vm, GPA)
        sizes.append(found and found[1])
    return sizes


def change(vm: Watched, **request: object) -> None:
    whole: dict[str, object] = {"gpa": Gpa(0), "size": 0, "hva": Hva(0), **request}
    assert not vm.set_region(MemslotRequest(**whole)).errno  # type: ignore[arg-type]  # members of any type


@shows("smaller_over_block", {ARM: (4 * K, None), X86: (4 * K, 4 * K)})
def page_over_a_block(on: Target) -> object:
    vm = world(on, "thp", eager_split=False)
    vm.resolve(fault(on, READ))
    change(vm, slot=0, flags=LOGGED, gpa=Gpa(GPA), size=G, hva=HVA)
    vm.resolve(permission(on, WRITE, granule=pmd(on)))
    found = leaf(vm, GPA), leaf(vm, GPA + 8 * K)
    return tuple(entry and entry[1] for entry in found)


@shows("slot_flush", {ARM: True, X86: False})
def another_slot_is_deleted(on: Target) -> object:
    vm: Watched = world(on)
    vm.add_memslot(1, gpa=1 << 32, size=2 * M, hva=HVA + 8 * G)
    vm.resolve(fault(on, READ))
    change(vm, slot=1)
    return leaf(vm, GPA) is not None


@shows(
    "marks_rewritten",
    {
        tuple(n for n in X86 if n.endswith("@6.12")): [True, False, True],
        tuple(n for n in X86 if n.endswith("@7.4")): [True, True, True],
    },
)
def leaf_over_a_writable_entry(on: Target) -> object:
    fmt, seen = on.format, []
    table = world(on).own_table
    for old in (None, R | W | X, R | X):
        if old is not None:
            table.unmap(Gpa(GPA), Gpa(GPA + 4 * K))
            install(table, old)
        install(table, R | W | X)
        found = table.walk(Gpa(GPA))
        seen.append(fmt.is_dirty(found.desc))
    return seen


def install(table: Stage2, prot: int) -> None:
    table.map(Gpa(GPA), 4 * K, Pfn(0x1234), prot, Memory.NORMAL, host_writable=True, young=True, tag=0)


@shows("mmio_sign_extension", {ARM[:1]: 0x80, ARM[1:]: 0xFFFF_FFFF_FFFF_FF80})
def signed_load_from_a_device(on: Target) -> object:
    f = fault(on, READ, size=1, register=2, sign_extend=True, wide=True)
    outcome = resolve(on, Script(on, slot=False), f)
    assert isinstance(outcome, Exit)
    assert outcome.completion is not None
    return outcome.completion.finish(0x80)


@shows("register_page", {ARM[:1]: "undef", ARM[1:]: "Fixed"})
def page_of_registers(on: Target) -> object:
    # the hypervisor's own table allows the write by now
    outcome = handle_on(on, Case(NO_WRITE), vcpu())[0].outcome
    return outcome.what if isinstance(outcome, Inject) else kind(outcome)


def cases(member: str, value: object) -> dict[int, Outcome]:
    """Situations of arm64 that are about the member, by number, with what becomes of them where it has the value."""
    return {i: want[value] for i, (_, about, want) in enumerate(ROWS) if about == member and value in want}


def _arm64_situations() -> Iterator[Situation]:
    members = {about for _, about, _ in ROWS}
    for name in ARM:
        for member in sorted(members - {"poison_span", "unexplained_permission"}):
            if name in chain(*NOT_ASKED.get(member, ())):
                continue
            want = cases(member, getattr(backend(name).policy, member))
            yield Situation(member, name, partial(_outcomes, [*want]), want)


def _outcomes(numbers: list[int], on: Target) -> object:
    return {i: run_on(on, ROWS[i][0])[0] for i in numbers}


NOT_ASKED: Final[Mapping[str, Mapping[tuple[str, ...], str]]] = {
    "unknown_area": {X86: "no area is looked at"},
    "interruptible": {ARM: "the first try sleeps, so there is no second one"},
    "poison_span": {X86: "no area is looked at, so each of the four is the page"},
    "on_retry": {ARM + X86: "what follows a retry is done by who called the path"},
    "mmio_sign_extension": {X86: "the emulator does the access, after the path"},
    "wide_accesses": {X86: "the emulator does the access, after the path"},
    "nested_fetch": {X86: "a fetch that the guest's own table forbids is reflected; its rights bound every entry"},
    "nested_walk_error": {X86: "a walk that fails for any reason is reflected"},
    "tag_refusal": {X86: "no memory has tags"},
    "external_aborts": {X86: "machine checks come another way"},
    "address_capture": {X86: "hardware gives the address with the fault"},
    "distrusted_faults": {X86: "hardware gives the address with the fault"},
    "root_address_size": {X86: "no such status", ARM[:1]: "HPFAR_EL2 is read whatever the status, but permission"},
    "unsupported_atomics": {X86: "no such fault"},
    "injected_length": {X86: "no such bit"},
    "injected_walk": {X86: "what is reflected has another format"},
    "injected_target": {X86: "a fault is reflected to the hypervisor by other rules"},
    "register_page": {X86: "no such page"},
    "marks_rewritten": {ARM: "no entry says whether it was written"},
    "unmap_marks": {ARM: "no entry says whether it was written"},
}
"""Member -> targets whose path never asks it, and why."""
SITUATIONS.extend(_arm64_situations())

# The tests.


def changed(name: str, **members: object) -> Target:
    """The target with another policy, and no path bound to it yet."""
    return backend(name).with_policy(**members)


def others(target: Target, member: str) -> Iterator[object]:
    """Every other value that the member could have; of mappings and tuples those that differ in one element."""
    value: object = getattr(target.policy, member)
    page, *blocks = block_sizes(target.format)
    match member, value:
        case "area_sizes", None:
            yield from ({page: page}, {blocks[0]: blocks[0]})
        case "area_sizes", dict():
            yield None
            for block in value.keys() - {page}:  # an area of pages needs no look
                yield {key: size for key, size in value.items() if key != block}
                yield from ({**value, block: size} for size in {page, *value.values()} - {value[block]})
        case "fit_sizes", _:
            subsets = chain.from_iterable(combinations(blocks, n) for n in range(len(blocks) + 1))
            yield from (subset for subset in subsets if subset != value)
        case "frame_reaction", dict():
            for error in ASKED_OF_THE_TABLE:
                others = set(Reaction) - {value.get(error, Reaction.FAULT)}
                yield from ({**value, error: reaction} for reaction in others)
        case "unexplained_permission", _:
            yield from {None, EFAULT, EPERM} - {value}
        case "prefetch_poison", _:
            as_any = {None, target.policy.frame_reaction[PinError.HWPOISON]}  # both say: as if somebody waited
            yield from {None, *Reaction} - (as_any if value in as_any else {value})
        case _, bool():
            yield not value
        case _, Enum():
            yield from (other for other in type(value) if other is not value)
        case _:
            raise AssertionError(f"say which values {member} can have")


def _id(what: Situation) -> str:
    return f"{what.member}-{what.target}"


@pytest.mark.parametrize("what", SITUATIONS, ids=_id)
def test_value(what: Situation) -> None:
    assert what.see(changed(what.target)) == what.want


@pytest.mark.parametrize("what", SITUATIONS, ids=_id)
def test_any_other_value_shows(what: Situation) -> None:
    values = list(others(backend(what.target), what.member))
    assert values
    for value in values:
        assert what.see(changed(what.target, **{what.member: value})) != what.want, value


@pytest.mark.parametrize("name", ALL)
def test_every_member_is_shown_or_not_asked(name: str) -> None:
    shown = {what.member for what in SITUATIONS if what.target == name}
    not_asked = {member for member, on in NOT_ASKED.items() if any(name in names for names in on)}
    assert not shown & not_asked
    assert shown | not_asked == {field.name for field in fields(Policy)}


def _not_asked() -> list[tuple[str, str]]:
    return [(member, name) for member, on in NOT_ASKED.items() for names in on for name in names]


@pytest.mark.parametrize(("member", "name"), _not_asked())
def test_what_is_not_asked_changes_nothing(member: str, name: str) -> None:
    here = [what for what in SITUATIONS if what.target == name]
    for value in others(backend(name), member):
        for what in here:
            assert what.see(changed(name, **{member: value})) == what.want, (what.member, value)
