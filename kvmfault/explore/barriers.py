"""Memory ordering of the invalidation protocol: its barriers as steps, and what may happen where one is missing.

The model. A load or store that the protocol does without the lock that orders it *begins* where the code has it, and
*takes effect* by itself, at any moment from then on: that is an action of its own actor, one for each kind of access of
each vCPU or notifier (a load that the CPU or the compiler delays; a store that waits in a buffer, which gives them in
any order). A barrier waits until what began before it has taken effect. Three things order without one: a value is
there before it is used, accesses that began under a lock have taken effect when it is dropped, and what a branch
guards may run ahead of the branch if it only loads. In the sequentially consistent mode every access takes effect as it
begins, and barriers have nothing to wait for.

The accesses. The fault loads the sequence (``snapshot``), then looks at host memory (``pin``); the notifier's end
stores the sequence, then the count; a test that is not made under mmu_lock loads the count, then the sequence. Between
the two is a barrier each time: smp_rmb (or the mmap lock's release) in the fault paths, smp_wmb in
kvm_mmu_invalidate_end, smp_rmb in mmu_invalidate_retry. Under mmu_lock nobody can see the last two out of order: these
two are for tests under other locks, as powerpc's with hashed page tables under the lock of the reverse map, and that of
the pfn cache. ``FRAME_LOCK`` is that design: faults take a lock that zapping takes, but not the notifier's end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Outcome, Retry
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress
from kvmfault.explore import actions
from kvmfault.explore.actor import Actor, Did, Rest
from kvmfault.explore.host import HostActor
from kvmfault.explore.mutant import Change, Mutant, after, before, instead, nobody
from kvmfault.explore.vcpu import VcpuActor
from kvmfault.explore.world import Blocked, Explored
from kvmfault.path import commit, lookup, resolve
from kvmfault.path.run import Step
from kvmfault.scenario import events

__all__ = [
    "BARRIERS",
    "COUNT",
    "RMB",
    "SAMPLE",
    "SEQUENCE",
    "TEST_RMB",
    "WITHOUT_BARRIERS",
    "WMB",
    "Access",
    "Ordering",
    "area_only",
    "protocol",
    "sample",
    "unlock",
    "zap_frames",
]

SAMPLE, COUNT, SEQUENCE = "sample", "count", "sequence"
RMB, WMB, TEST_RMB = "rmb", "wmb", "rmb of the test"
BARRIERS: Final = {
    RMB: "sequence sampled | page looked up: smp_rmb or the release of the mmap lock in the fault paths",
    WMB: "sequence raised | count dropped: smp_wmb in kvm_mmu_invalidate_end",
    TEST_RMB: "count read | sequence read: smp_rmb in mmu_invalidate_retry",
}
"""The barriers of the protocol: what they stand between, and where the kernel has them."""


def area_only(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """What ``snapshot`` does, but for the sample."""
    outcome = lookup.snapshot(vm, fault, at)
    at.seq = 0
    return outcome


def sample(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The sample alone."""
    at.seq = vm.invalidations.seq
    return None


class Access(Actor):
    """Lets one kind of access of a vCPU or notifier take effect, whenever one has begun."""

    serves: bool = True

    def __init__(self, who: str, what: str, *, store: bool) -> None:
        self.name: str = f"{who}:{what}"
        self._who, self._what, self._store = who, what, store

    def start(self) -> Hashable:
        """See Actor."""
        return None

    def ended(self, local: Hashable) -> bool:
        """See Actor: one may always come."""
        return False

    def rest(self, local: Hashable, parts: tuple[str, ...]) -> Rest:
        """See Actor."""
        both = frozenset(("buffers", "invalidations"))
        return Rest(both, both)

    def act(self, vm: Explored, local: Hashable) -> Did:
        """See Actor."""
        if (self._who, self._what) not in vm.buffers.begun:
            raise Blocked
        told = _take_effect(vm, self._who, self._what, store=self._store)
        return Did("store" if self._store else "load", None, told)


def _take_effect(vm: Explored, who: str, what: str, *, store: bool) -> str:
    begun, got = vm.buffers
    protocol = vm.invalidations
    if store:
        (protocol.raise_sequence if what == SEQUENCE else protocol.drop_count)()
    value = protocol.in_progress if what == COUNT else protocol.seq
    if not store:
        got |= {(who, what, value)}
    vm.buffers = vm.buffers._replace(begun=begun - {(who, what)}, got=got)
    return str(value)


@dataclass(frozen=True)
class Ordering:
    """The protocol's accesses in one of the two modes, as steps of the path and actions of a notifier."""

    weak: bool

    def _begin(self, vm: Explored, who: str, what: str, *, store: bool = False) -> None:
        begun, got = vm.buffers
        left = frozenset(entry for entry in got if entry[:2] != (who, what))
        vm.buffers = vm.buffers._replace(begun=begun | {(who, what)}, got=left)
        if not self.weak:
            _take_effect(vm, who, what, store=store)

    # The fault.

    def snapshot(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """The area's facts as ever; the load of the sequence begins."""
        seen = cast(Explored, vm)
        outcome = area_only(vm, fault, at)
        if outcome is None:
            self._begin(seen, _runs(seen), SAMPLE)
        return outcome

    def barrier(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """Wait for the loads of before."""
        seen = cast(Explored, vm)
        _wait_for_accesses(seen, _runs(seen))
        return None

    def precheck(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """As ever if the sample is there; if not, what follows runs ahead of the branch."""
        seen = cast(Explored, vm)
        who = _runs(seen)
        if (who, SAMPLE) in seen.buffers.begun:
            return None
        at.seq = _value(seen, who, SAMPLE)
        return resolve.precheck(vm, fault, at)

    def stale(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """As ever, once the sample is there: under mmu_lock the rest cannot change."""
        seen = cast(Explored, vm)
        at.seq = _taken(seen, _runs(seen), SAMPLE)
        return commit.stale(vm, fault, at)

    # The fault's test where no lock orders it.

    def load_count(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """The first half of mmu_invalidate_retry begins."""
        seen = cast(Explored, vm)
        self._begin(seen, _runs(seen), COUNT)
        return None

    def load_sequence(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """The second half."""
        seen = cast(Explored, vm)
        self._begin(seen, _runs(seen), SEQUENCE)
        return None

    def decide(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """What both say."""
        seen = cast(Explored, vm)
        who = _runs(seen)
        at.seq = _taken(seen, who, SAMPLE)
        count, sequence = _taken(seen, who, COUNT), _taken(seen, who, SEQUENCE)
        return Retry("the page was invalidated after it was looked up") if count or sequence != at.seq else None

    # The notifier's end.

    def raise_sequence(self, vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
        """mmu_lock, and the store of the sequence begins. (kvm_mmu_invalidate_end)"""
        if _hits(data):
            vm.lock_for_write(who)
            self._begin(vm, who, SEQUENCE, store=True)
        return actions.Done("raise sequence", data)

    def write_barrier(self, vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
        """Wait for the stores of before."""
        _wait_for_accesses(vm, who)
        return actions.Done(WMB, data)

    def drop_count(self, vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
        """The store of the count begins."""
        if _hits(data):
            self._begin(vm, who, COUNT, store=True)
        return actions.Done("drop count", data)


def unlock(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    """Everything is seen by whoever takes mmu_lock next. (kvm_mmu_notifier_invalidate_range_end)"""
    _wait_for_accesses(vm, who)
    if vm.writer == who:
        vm.writer = None
    else:
        vm.need_lock()
    if vm.invalidations.active:
        vm.invalidations.notifier_leaves()
    return actions.Done("unlock")


def _runs(vm: Explored) -> str:
    return f"vcpu{vm.vcpus.index(vm.vcpu)}"


def _hits(data: Hashable) -> bool:
    return bool(cast(tuple[object, object], data)[1])


def _wait_for_accesses(vm: Explored, who: str) -> None:
    if any(entry[0] == who for entry in vm.buffers.begun):
        raise Blocked


def _value(vm: Explored, who: str, what: str) -> int:
    for entry in vm.buffers.got:
        if entry[:2] == (who, what):
            return entry[2]
    raise Blocked


def _taken(vm: Explored, who: str, what: str) -> int:
    value = _value(vm, who, what)
    vm.buffers = vm.buffers._replace(got=vm.buffers.got - {(who, what, value)})
    return value


# A fault tests under the lock of its frame.


def _take_frame_lock(self: Explored) -> None:
    self.vcpu_part("reads", True)


def _only_writers(self: Explored) -> None:
    if self.writer is not None:
        raise Blocked


def zap_frames(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    """Entries go and TLBs follow, under the locks of the frames. (kvm_unmap_rmapp)"""
    if any(vm.of_vcpu("reads", number) for number in range(len(vm.vcpus))):
        raise Blocked
    done = actions.zap(vm, event, who, data)
    vm.flush_stale()
    return done


def protocol(*, weak: bool, frame_lock: bool = False, missing: str = "", **told: str) -> Mutant:
    """The kernel with the protocol's accesses and barriers as steps of their own, but for the barrier *missing*.

    *frame_lock*: faults test under the lock of their frame, and not under mmu_lock. *told*: other members of Mutant.
    """
    mode = Ordering(weak)
    early = (instead(name, mode.precheck) for name in ("precheck", "recheck"))
    changes: list[Change] = [instead("snapshot", mode.snapshot), *early]
    if missing != RMB:
        changes.append(after("snapshot", Step(RMB, mode.barrier)))
    loads = [SAMPLE]
    if frame_lock:
        barrier = (Step(TEST_RMB, mode.barrier),) if missing != TEST_RMB else ()
        test = (Step("load count", mode.load_count), *barrier, Step("load sequence", mode.load_sequence))
        changes += [before("stale", *test), instead("stale", mode.decide)]
        loads += [COUNT, SEQUENCE]
    else:
        changes.append(instead("stale", mode.stale))
    end = (mode.raise_sequence, *(() if missing == WMB else (mode.write_barrier,)), mode.drop_count, unlock)
    zap = zap_frames if frame_lock else actions.zap
    notify = (actions.range_start, zap, actions.flush_and_unlock, actions.change, *end)

    def accesses(actors: Sequence[Actor]) -> Sequence[Actor]:
        # each actor's accesses, as they take effect
        return [
            Access(actor.name, what, store=isinstance(actor, HostActor))
            for actor in actors
            for what in (loads if isinstance(actor, VcpuActor) else (SEQUENCE, COUNT))
        ]

    return Mutant(
        **{"name": missing, **told},  # type: ignore[arg-type]  # members that are text
        changes=tuple(changes),
        actions={events.Host: notify, events.Back: notify},
        ports={"lock": _take_frame_lock, "need_lock": _only_writers} if frame_lock else {},
        guards=not frame_lock,
        more=accesses if weak else nobody,
    )


WITHOUT_BARRIERS: Final = (
    protocol(
        weak=True,
        missing=RMB,
        name="sample-without-rmb",
        about="no read barrier after the sample: the page may be looked up first, and change in between",
        scenario="migrate",
    ),
    protocol(
        weak=True,
        frame_lock=True,
        missing=WMB,
        name="end-without-wmb",
        about="no write barrier in the end: without mmu_lock one sees neither that it runs nor that it ended",
        scenario="migrate",
    ),
    protocol(
        weak=True,
        frame_lock=True,
        missing=TEST_RMB,
        name="test-without-rmb",
        about="no read barrier in the test: without mmu_lock it reads the old sequence and the new count",
        scenario="migrate",
    ),
)
"""Each barrier left out where it is needed, in the weak mode."""
