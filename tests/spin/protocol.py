"""The invalidation protocol and its mutants, for both checkers: switches of the model, mutants of the explorer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Final, cast

from kvmfault.contract.target import backend
from kvmfault.explore import actions
from kvmfault.explore.barriers import RMB, TEST_RMB, WMB, area_only, protocol, sample
from kvmfault.explore.mutant import NONE, Mutant, after, instead, without
from kvmfault.explore.mutants import BY_NAME
from kvmfault.explore.search import breadth_first
from kvmfault.explore.setup import Setting
from kvmfault.explore.world import Explored
from kvmfault.path.run import Step
from kvmfault.scenario import events
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.read import parse_scenario
from kvmfault.types import Gfn, Hva
from tests.spin.checker import ENDLESS, OLD_PAGE, Verdict


def scenario(vcpus: int, notifiers: int, *, block: bool = False, ended: int = 0) -> Scenario:
    """What the model does, in two pages: vCPU and notifier *n* use page *n* modulo 2.

    *block*: both are in a huge page, which the first notifier replaces by pages. *ended*: invalidations of before.
    """
    actors = [f'{{ do = "read", gpa = {_gpa(n)}, vcpu = {n} }}' for n in range(vcpus)]
    for n in range(notifiers):
        replaces = block and n == 0
        actors.append(
            '{ do = "back", gpa = "1G", size = "2M" }' if replaces else f'{{ do = "migrate", gpa = {_gpa(n)} }}'
        )
    text = f"""
title = "The invalidation protocol"
machine.invalidations = {ended}
[[slot]]
gpa = "1G"
size = "64M"
memory = "{"hugetlb-2m" if block else "anon"}"
"""
    return parse_scenario("protocol", text + "".join(f"[[actor]]\nevent = [{event}]\n" for event in actors)).scenario


def _gpa(n: int) -> int:
    return (1 << 30) + (n % 2 << 12)


# Mutants that undo no fix: what the protocol would be without one of its parts.


def _hits(data: Hashable) -> tuple[tuple[Gfn, Gfn], ...]:
    return cast(tuple[Hva, tuple[tuple[Gfn, Gfn], ...]], data)[1]


def _start_uncounted(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    done = actions.range_start(vm, event, who, data)
    if _hits(done.data):
        vm.invalidations.in_progress -= 1
    return done


def _start_flag(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    done = actions.range_start(vm, event, who, data)
    if _hits(done.data):
        vm.invalidations.in_progress = 1
    return done


def _start_last_range(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    done = actions.range_start(vm, event, who, data)
    hits = _hits(done.data)
    if hits:
        vm.invalidations.range_start, vm.invalidations.range_end = hits[0][0], hits[-1][1]
    return done


def _end_uncounted(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    vm.invalidations.in_progress += bool(_hits(data))
    return actions.range_end(vm, event, who, data)


def _end_flag(vm: Explored, event: events.Event, who: str, data: Hashable) -> actions.Done:
    vm.invalidations.in_progress = int(bool(_hits(data)))
    return actions.range_end(vm, event, who, data)


def _notifier(start: actions.Action, end: actions.Action = actions.range_end) -> Mutant:
    notify = (start, actions.zap, actions.flush_and_unlock, actions.change, end)
    return Mutant(name="", actions={events.Host: notify, events.Back: notify})


_LATE_SAMPLE: Final = Mutant(
    name="",
    changes=(without("precheck"), instead("snapshot", area_only), after("pin", Step("sample", sample))),
)  # fmt: skip


_MEANS: Final = {"reaches-old-page": OLD_PAGE, "stale-tlb": OLD_PAGE, "progress": ENDLESS}


@dataclass(frozen=True)
class Case:
    """One design or mutant of the protocol."""

    name: str
    switches: tuple[str, ...]
    """Of the model."""
    mutant: Mutant
    """Of the explorer."""
    target: str
    finds: str
    """What both must find: "", ``OLD_PAGE`` or ``ENDLESS``."""
    vcpus: int = 2
    notifiers: int = 2
    block: bool = False
    ended: int = 0

    @property
    def model(self) -> tuple[str, ...]:
        """All switches."""
        sizes = f"VCPUS={self.vcpus}", f"NOTIFIERS={self.notifiers}"
        return (*sizes, *(("BLOCK",) if self.block else ()), *self.switches)

    def explored(self, *, reduce: bool = True) -> Verdict:
        """What the explorer finds. Raises RuntimeError if its bound ended the search."""
        played = scenario(self.vcpus, self.notifiers, block=self.block, ended=self.ended)
        space = Setting(played, backend(self.target), (), self.mutant).space()
        start = perf_counter()
        found = breadth_first(space, reduce=reduce)
        seconds = perf_counter() - start
        if found.violation is None and not found.complete:
            raise RuntimeError(f"{self.name}: the explorer did not come to an end")
        name = found.violation.name if found.violation is not None else ""
        return Verdict(_MEANS.get(name, name), found.states, found.moves, seconds)


_MUTANTS: Final = {
    "no test under the lock": ("NO_RECHECK", BY_NAME["no-recheck"]),
    "sequence sampled after the page": ("LATE_SAMPLE", _LATE_SAMPLE),
    "end without a sequence": ("NO_SEQUENCE", BY_NAME["end-without-sequence"]),
    "running invalidations not counted": ("NO_COUNT", _notifier(_start_uncounted, _end_uncounted)),
    "a flag for the count": ("ONE_FLAG", _notifier(_start_flag, _end_flag)),
    "range of the last one": ("LAST_RANGE", _notifier(_start_last_range)),
    "sequence in an int": ("INT_SEQUENCE", BY_NAME["sequence-in-int"]),
    "no flush": ("NO_FLUSH", BY_NAME["zap-without-flush"]),
}
_TESTS: Final = {"range": ("x86-ept", ("PRECHECK",)), "plain": ("arm64", ("PLAIN",))}


def cases() -> Iterator[Case]:
    """All that both checkers are asked."""
    for test, (target, switches) in _TESTS.items():
        yield Case(f"{test} test", switches, NONE, target, finds="")
        for name, (switch, mutant) in _MUTANTS.items():
            ended = (1 << 31) - 1 if switch == "INT_SEQUENCE" else 0
            finds = ENDLESS if ended else "" if switch == "LAST_RANGE" and test == "plain" else OLD_PAGE
            yield Case(f"{test} test, {name}", (*switches, switch), mutant, target, finds, ended=ended)
    after_area = BY_NAME["sequence-after-area"]
    yield Case("block", ("PLAIN",), NONE, "arm64", "", block=True)
    late = ("PLAIN", "SAMPLE_AFTER_AREA")
    yield Case("block, sampled after the area", late, after_area, "arm64", OLD_PAGE, block=True)
    yield from _orders()


def _orders() -> Iterator[Case]:
    switch = {"": (), RMB: ("NO_RMB",), WMB: ("NO_WMB",), TEST_RMB: ("NO_TEST_RMB",)}
    for lock, target, switches in (
        ("mmu_lock", "arm64", ("PLAIN",)),
        ("mmu_lock", "x86-ept", ("PRECHECK",)),
        ("frame lock", "arm64", ("PLAIN", "FRAME_LOCK")),
    ):
        framed = lock == "frame lock"
        for weak in (False, True):
            for missing in ("", RMB, WMB, *((TEST_RMB,) if framed else ())):
                mode = "weak" if weak else "strong"
                needed = missing == RMB or (framed and missing != "")
                yield Case(
                    f"{lock}, {mode} memory, {f'no {missing}' if missing else 'all barriers'}",
                    (*switches, *(("WEAK",) if weak else ()), *switch[missing]),
                    protocol(weak=weak, frame_lock=framed, missing=missing),
                    target,
                    OLD_PAGE if weak and needed else "",
                    notifiers=1,
                )
