"""Memory ordering: the barriers of the sequence protocol, and the orders in which a machine may do things without one.

The search itself is sequentially consistent. A weak machine differs by what it may do in another order than the program
has it, so a search for such a machine is one for each order that the barriers that are left allow.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, cast

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Outcome, Retry
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.target import Target
from kvmfault.explore import actions
from kvmfault.explore.mutant import Mutant, after, before, instead, without
from kvmfault.explore.mutants import BY_NAME as BUGS
from kvmfault.explore.mutants import area_only, sample
from kvmfault.explore.world import Blocked, Explored, SeenVcpu
from kvmfault.path.run import Step
from kvmfault.scenario import events

__all__ = ["ALL", "BARRIERS", "PAGE_LOCK"]

# A fault under a lock of its own, as where a page has one (Book3S HV): only then the order inside the test, and inside
# the end of an invalidation, shows, since mmu_lock orders both.


def _lock_page(self: Explored) -> None:
    others = (n for n in range(len(self.vcpus)) if n != cast(SeenVcpu, self.vcpu).number)
    if self.writer is not None or any(self.of_vcpu("reads", n) for n in others):
        raise Blocked
    self.vcpu_part("reads", True)


def _test_count(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    running = at.slot is not None and cast(Explored, vm).invalidations.in_progress
    return Retry("an invalidation runs") if running else None


def _test_sequence(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    gone = at.slot is not None and cast(Explored, vm).invalidations.seq != at.seq
    return Retry("the page was invalidated after it was looked up") if gone else None


def _begin(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    return actions.range_start(vm, event, who, data, locked=False)


def _zap(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    vm.lock_for_write(who)
    return actions.zap(vm, event, who, data)


def _raise_sequence(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    vm.invalidations.seq += 1
    return actions.Done("sequence + 1", data)


def _lower_count(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    sequence = vm.invalidations.seq
    vm.invalidations.end()
    vm.invalidations.seq = sequence
    vm.invalidations.notifier_leaves()
    return actions.Done("count - 1", data)


_HEAD: Final = (_begin, _zap, actions.flush_and_unlock, actions.change)
_COUNT, _SEQUENCE = Step("test count", _test_count), Step("test sequence", _test_sequence)
_SPLIT: Final = (before("stale", _COUNT, _SEQUENCE), without("stale"))
_SWAPPED: Final = (before("stale", _SEQUENCE, _COUNT), without("stale"))


def _own_lock(name: str, about: str, *, swap_test: bool = False, swap_end: bool = False) -> Mutant:
    end = (_lower_count, _raise_sequence) if swap_end else (_raise_sequence, _lower_count)
    return Mutant(
        name=name,
        about=about,
        scenario="migrate",
        changes=_SWAPPED if swap_test else _SPLIT,
        actions={events.Host: (*_HEAD, *end)},
        ports={"lock": _lock_page},
        guards=False,
    )


def _loads_once(target: Target) -> bool:
    # elsewhere the sample is compared before the page is asked for, and the machines concerned keep loads in order
    return not target.policy.precheck


def _sampled(name: str, behind: str) -> Mutant:
    return Mutant(
        name=name,
        about=f"the sequence is loaded as late as behind {behind}",
        scenario="migrate",
        applies=_loads_once,
        changes=(instead("snapshot", area_only), after(behind, Step("sample", sample))),
    )


PAGE_LOCK: Final = _own_lock("page-lock", "faults hold a lock of the page instead of mmu_lock; every barrier is there")
BARRIERS: Final[tuple[Mutant, ...]] = (
    Mutant(
        name="no-sample-barrier",
        about="nothing keeps the page from being looked up before the sequence is loaded (smp_rmb behind the sample)",
        scenario="migrate",
        applies=_loads_once,
        reorderings=tuple(_sampled(f"no-sample-barrier-{step}", step) for step in ("bound_size", "pin", "permit")),
    ),
    _own_lock(
        "no-end-barrier", "nothing keeps the count from dropping before the sequence grows (smp_wmb in the end)"
    ).allowing(_own_lock("no-end-barrier-swapped", "the count drops first", swap_end=True)),
    _own_lock(
        "no-test-barrier", "nothing keeps the sequence from being loaded before the count (smp_rmb in the test)"
    ).allowing(_own_lock("no-test-barrier-swapped", "the sequence is loaded first", swap_test=True)),
)
"""Each lacks one barrier: right as long as a machine keeps the order of the program."""
ALL: Final = {
    mutant.name: mutant
    for mutant in (*BUGS.values(), PAGE_LOCK, *BARRIERS, *(r for barrier in BARRIERS for r in barrier.reorderings))
}
"""Everything that can be named, bugs of the past included."""
