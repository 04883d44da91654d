"""From a scenario with actors to a space of states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvmfault.contract.target import Target
from kvmfault.explore.actor import Actor, Rest
from kvmfault.explore.host import HostActor
from kvmfault.explore.invariants import INVARIANTS
from kvmfault.explore.mutant import NONE, Mutant
from kvmfault.explore.parts import OF_VCPU, OF_VM, part
from kvmfault.explore.space import Space
from kvmfault.explore.vcpu import Conduct, VcpuActor
from kvmfault.explore.world import Explored
from kvmfault.scenario import events, model
from kvmfault.scenario.run import Runner
from kvmfault.scenario.world import Misuse, Subject, World
from kvmfault.types import Gpa

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """What is explored: a scenario on a target, perhaps with a bug of the past."""

    scenario: model.Scenario
    target: Target
    settings: tuple[str, ...] = ()
    mutant: Mutant = NONE

    def space(self) -> Space:
        """Raises Misuse, UsageError."""
        scenario = self.scenario
        world = World.build(scenario, Subject.of(scenario, self.target, self.settings))
        runner = Runner(world)
        for place, event in enumerate(scenario.event):
            runner.step(place, event)
        vcpus = [_vcpu_of(actor, number) for number, actor in enumerate(scenario.actor)]
        _check(scenario, world, vcpus)
        vm, parts = self.mutant.explored(Explored).of(world, 1 + max((v for v in vcpus if v is not None), default=0))
        vm.watched = _watched(scenario, vm)
        may = _vcpus_may(scenario, vm, exclusive=vm.shadows or not self.mutant.guards)
        conduct = Conduct.of(world.target, self.mutant.path(), self.mutant.misread, self.mutant.complete)
        noted = any(isinstance(event, events.Prefault) for actor in scenario.actor for event in actor.event)
        actors: list[Actor] = []
        for actor, number in zip(scenario.actor, vcpus, strict=True):
            if number is not None:
                accesses = [event for event in actor.event if isinstance(event, events.Access)]
                actors.append(VcpuActor(conduct, number, accesses, may, noted=noted))
            else:
                name = actor.name or _called(actor.event[0])
                actors.append(HostActor(name, actor.event, self.mutant.actions, place=len(actors)))
        actors = _distinct(actors)
        return Space(vm, parts, [*actors, *self.mutant.more(actors)], INVARIANTS, guards=self.mutant.guards)


def _vcpu_of(actor: model.Actor, number: int) -> int | None:
    # the vCPU whose accesses the actor makes; None: it is the host or user space
    accesses = [event for event in actor.event if isinstance(event, events.Access)]
    if not accesses:
        return None
    if len(accesses) < len(actor.event) or len({event.vcpu for event in accesses}) > 1:
        raise Misuse("accesses of one vCPU, or no accesses, are what one actor does", "actor", number)
    return accesses[0].vcpu


def _check(scenario: model.Scenario, world: World, vcpus: Sequence[int | None]) -> None:
    for n, actor in enumerate(scenario.actor):
        if vcpus[n] is not None and vcpus[n] in vcpus[:n]:
            raise Misuse(f"vCPU {vcpus[n]} is what another actor does", "actor", n)
        for at, event in enumerate(actor.event):
            if isinstance(event, events.Access) and event.as_id >= world.caps.nr_address_spaces:
                raise Misuse(f"there is no address space {event.as_id} on {world.target.name}", "actor", n, "event", at)


def _called(event: events.Event) -> str:
    match event:
        case events.SetSlot() | events.DeleteSlot():
            return "slots"
        case events.GetLog() | events.ClearLog() | events.HarvestRing() | events.ResetRings():
            return "log"
        case events.Convert() | events.PunchHole() | events.Mark() | events.Prefault() | events.GuestMap():
            return "vmm"
        case _:
            return "host"


def _distinct(actors: Sequence[Actor]) -> list[Actor]:
    names: list[str] = []
    for actor in actors:
        wanted, n = actor.name, 1
        while actor.name in names:
            n += 1
            actor.name = f"{wanted}{n}"
        names.append(actor.name)
    return list(actors)


def _watched(scenario: model.Scenario, vm: Explored) -> tuple[Gpa, ...]:
    acted = [event for actor in scenario.actor for event in actor.event] + list(scenario.event)
    named = {gpa for event in acted if (gpa := getattr(event, "gpa", None)) is not None}
    return tuple(sorted(Gpa(gpa & -(1 << vm.page_shift)) for gpa in named))


_BRINGS_IN = ("evict", "cow", "zero", "missing", "protect")
"""What the host does to pages so that a pin changes them again."""


def _vcpus_may(scenario: model.Scenario, vm: Explored, *, exclusive: bool) -> Rest:
    # what a vCPU may touch and change, beside its own parts; every action is held to this
    happens = [*scenario.event, *(event for actor in scenario.actor for event in actor.event)]
    does = {event.do for event in happens}
    writes = {"own_table", "reverse", "log", "written", "warnings", "signals", "buffers"}
    foreign = {"vcpu", "inside", "marks", "idle", "fault"}
    mine = set(vm.names) - {"slots_lock"}
    if does & set(_BRINGS_IN):
        writes |= {"host", "invalidations"}
    else:
        foreign.add("reads")  # a pin that changes nothing takes no lock
    if exclusive:
        foreign.discard("reads")  # faults keep each other out
    if vm.shadows:
        writes |= {"spare"} | {p for p in vm.names if p.startswith("retired")}
    else:
        foreign.add("retired")
    if scenario.memfd:
        writes |= {"memfds", "memfd_next"}
    if "track" in does:
        writes.add("tracked")
    writes |= {p for p in vm.names if p.startswith("tlb")}
    of_others = {part(name, n) for name in foreign for n in range(64)}
    assert of_others.isdisjoint(OF_VM)
    assert foreign <= set(OF_VCPU)
    return Rest(frozenset(mine - of_others), frozenset(writes))
