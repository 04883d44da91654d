"""Steps 5 and 6 of the recipe: what the path does with the backend's policies and joints, on a whole VM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, get_args

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.format import PROTS, R, W, X, block_sizes
from kvmfault.contract.outcome import Outcome
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.machine.guest import AccessRun, Ended
from kvmfault.machine.vm import Vm
from kvmfault.path.run import bind
from kvmfault.testing.facts import spelled
from kvmfault.testing.samples import any_rows, reachable_rows
from kvmfault.testing.shapes import shapes
from kvmfault.types import Gpa, Gva, Hva, Pfn
from kvmfault.vm.area import HvaRange

__all__ = ["ACCESSES", "HVA", "SAMPLE", "World", "guest", "invalidation", "logging", "path"]

HVA: Final = 0x3F00_0000_0000
ACCESSES: Final = {"read": R, "write": W, "fetch": X}
SAMPLE: Final = 120
"""Faults that the path is tried with."""


class World:
    """A VM with one slot of memory, as simple as its format allows."""

    def __init__(self, target: Target, kind: str = "anon", *, readonly: bool = False, log_dirty: bool = False) -> None:
        sizes = [size for size in block_sizes(target.format) if size <= 1 << 30]
        self.page: int = 1 << target.format.page_shift
        self.base: int = sizes[-1]
        self.size: int = 2 * sizes[-1]
        self.vm: Vm = Vm.on(target).with_facts(guest_paging=False)
        readonly = readonly and self.vm.caps.readonly_slots
        self.vm.add_memslot(0, gpa=self.base, size=self.size, hva=HVA, readonly=readonly, log_dirty=log_dirty)
        self.vm.back(HVA, self.size, kind)

    def access(self, how: str, at: int) -> AccessRun:
        """The guest reads, writes or fetches."""
        return self.vm.access(at, write=how == "write", fetch=how == "fetch")

    def aged_and_reached(self, how: str, at: int) -> bool:
        """Whether the guest gets on after the host took its page for unused."""
        self.vm.age(HvaRange(Hva(HVA), Hva(HVA + self.size)))
        self.vm.vcpu.tlb.flush_all()
        return self.access(how, at).pfns == (self.frame(at),)

    def write_fault(self, at: int) -> Raw:
        """The fault of a write to memory that is not mapped."""
        access = Access(
            read=False, write=True, exec=False, gpa=Gpa(at), offset=0, gva=Gva(at), cause=Cause.MISSING,
            granule=self.page, final=True,
        )  # fmt: skip
        return self.vm.target.encode(access).fault

    def leaf_prot(self, at: int) -> int | None:
        """What the leaf over an address grants; None: there is none."""
        leaf = self.vm.table.leaf(Gpa(at))
        return None if leaf is None else self.vm.format.prot(leaf.desc)

    def frame(self, at: int) -> Pfn:
        """The frame that the host has for an address of the slot."""
        pfn = self.vm.host.pin(Hva(HVA + at - self.base), write=False).pfn
        assert pfn is not None
        return pfn


def guest(target: Target) -> Iterator[str]:
    """A guest reaches its own memory, and nothing where it has none."""
    for kind in ("anon", "thp"):
        for how, need in ACCESSES.items():
            world = World(target, kind)
            at = world.base + 5 * world.page + 0x18
            run = world.access(how, at)
            where = f"{how} of {kind} memory"
            prot = world.leaf_prot(at)
            if run.ended is not Ended.DONE or not run.pfns:
                yield f"{where}: {run.ended.value}{_because(run)}"
            elif run.pfns[0] != world.frame(at):
                yield f"{where} reaches frame {run.pfns[0]:#x}; the host has it in {world.frame(at):#x}"
            elif prot is None or not prot & need:
                yield f"{where}: the entry grants {'nothing' if prot is None else PROTS[prot]}"
            elif world.access(how, at).faults:
                yield f"{where} faults again"
            elif not world.aged_and_reached(how, at):
                yield f"{where} does not reach it again once it was aged"
    yield from _elsewhere(target)


def _elsewhere(target: Target) -> Iterator[str]:
    for how in ACCESSES:
        world = World(target)
        at = world.base + world.size + 3 * world.page
        run = world.access(how, at)
        # a kernel may leave a fetch from there to itself: nobody but the guest notices that it faults for ever
        stuck = run.ended is Ended.STUCK and how != "fetch"
        if stuck or run.pfns or world.leaf_prot(at) is not None:
            yield f"{how} where no memory is: {run.ended.value}, {len(run.pfns)} frames reached{_because(run)}"
    world = World(target, readonly=True)
    if world.vm.caps.readonly_slots:
        run = world.access("write", world.base)
        if run.ended is Ended.STUCK or run.pfns or (world.leaf_prot(world.base) or 0) & W:
            yield f"a write to a read-only slot: {run.ended.value}, {len(run.pfns)} frames reached{_because(run)}"
        if not World(target, readonly=True).access("read", world.base).pfns:
            yield "a read-only slot cannot be read"


def _because(run: AccessRun) -> str:
    return f" ({run.faults[-1].outcome})" if run.faults else ""


def logging(target: Target) -> Iterator[str]:
    """Every write to a logged slot is in the dirty log, again after each harvest. (A read may be: KVM on x86 maps what
    the host lets it write, and marks it.)"""
    world = World(target, "thp", log_dirty=True)
    world.access("read", world.base)
    for page, touched in ((3, {0, 3}), (3, {3}), (0, {0})):
        world.access("write", world.base + page * world.page)
        log = world.vm.get_dirty_log(0)
        if log.errno or page not in log.pages or not touched.issuperset(log.pages):
            yield f"after a write to page {page} the log of the slot has errno {log.errno}, pages {log.pages[:8]}"


def invalidation(target: Target) -> Iterator[str]:
    """What the host takes away is nowhere mapped, not even by a fault that was on its way."""
    for kind in ("anon", "thp"):
        world = World(target, kind)
        world.access("write", world.base)
        before = world.frame(world.base)
        world.vm.invalidate(world.vm.host.migrate(Hva(HVA)))
        if world.leaf_prot(world.base) is not None:
            yield f"{kind}: an entry survives the invalidation of its memory"
        after = world.access("write", world.base).pfns
        if not after or after[0] == before or after[0] != world.frame(world.base):
            yield f"{kind}: after a page moved, the guest reaches {after}, the host has {world.frame(world.base):#x}"
    yield from _raced(target)


def _raced(target: Target) -> Iterator[str]:
    # the frame moves after it was pinned, at every point until the lock is held
    path = bind(target)
    steps = [step.name for step, _ in path.named]
    for name in dict.fromkeys(steps[steps.index("snapshot") + 1 : steps.index("stale") + 1]):
        world = World(target)
        walk = path.walk(world.vm, world.write_fault(world.base))
        walk.until(name)
        old = world.frame(world.base)
        world.vm.invalidate(world.vm.host.migrate(Hva(HVA)))
        run = walk.end()
        leaf = world.vm.table.leaf(Gpa(world.base))
        if leaf is not None and world.vm.format.hpa(leaf.desc, leaf.shift) >> world.vm.page_shift == old:
            yield f"a frame that moved before {name} is mapped all the same: {run.outcome}"


def path(target: Target) -> Iterator[str]:
    """Whatever registers say, the path ends with an outcome, the same one in every shape."""
    rows = (*reachable_rows(target)[:SAMPLE], *any_rows(target)[: SAMPLE // 2])
    world = World(target, "thp")
    outcomes = get_args(Outcome)
    for row in rows:
        fault = target.decode(**row)
        vms = {name: world.vm.fork() for name in (*shapes(target, fault), "fast")}
        ends = {name: vms[name].handle(shape).outcome for name, shape in shapes(target, fault).items()}
        ends["fast"] = vms["fast"].resolve(fault)
        for name, end in ends.items():
            if not isinstance(end, outcomes):
                yield f"the path ends with {end!r}, which is no outcome: {spelled(fault, target)}"
            elif end != ends["raw"] or vms[name].key() != vms["raw"].key():
                yield f"{name} ends with {end}, raw with {ends['raw']}: {spelled(fault, target)}"
