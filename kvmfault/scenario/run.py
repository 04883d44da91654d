"""A scenario on one target: one Result for each event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, assert_never

from kvmfault.contract.format import PROTS
from kvmfault.contract.outcome import Emulate, Exit, MmioAccess, Resume
from kvmfault.contract.target import Target
from kvmfault.errors import KvmfaultError, ModelError
from kvmfault.machine.guest import AccessRun
from kvmfault.machine.private import ATTRIBUTE_PRIVATE
from kvmfault.path.run import Run
from kvmfault.scenario import events
from kvmfault.scenario.expectation import Kind
from kvmfault.scenario.invariants import broken
from kvmfault.scenario.meaning import (
    bits_to_clear,
    change_guest_map,
    change_host,
    known,
    place,
    slot_request,
)
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.result import Leaf, Left, Result, access_kind, kind_of, left, shown, signal_of
from kvmfault.scenario.world import Misuse, Subject, World
from kvmfault.types import U64, Gfn, Gpa, Hva
from kvmfault.vm.area import HvaRange
from kvmfault.vm.dirty import LogAnswer

__all__ = ["MOST_WORK", "Runner", "run", "run_on"]

MOST_WORK: Final = 100_000
"""Entries and pages that the events of a scenario may take the model to look at, together; a fault counts for four."""
_OK: Final = Result(outcome=Kind.OK)


def run(scenario: Scenario, target: Target, settings: Iterable[str] = ()) -> tuple[Result, ...]:
    """Every event of *scenario*, in order, on *target*. *settings*: ``KEY=VALUE``, members of Policy or VmFacts.

    Raises UsageError for a setting that is none, Misuse for what nobody could do.
    """
    return run_on(scenario, Subject.of(scenario, target, settings))


def run_on(scenario: Scenario, subject: Subject) -> tuple[Result, ...]:
    """The same on a target that has all its settings."""
    runner = Runner(World.build(scenario, subject))
    return tuple(runner.step(number, event) for number, event in enumerate(scenario.event))


class Runner:
    """A world, and what is remembered of it between events."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._work = 0
        self._reached: dict[int, int] = {}  # page -> frame that the guest reached last
        self._broken: frozenset[str] = frozenset()

    def step(self, number: int, event: events.Event) -> Result:
        """Carry out one event."""
        vm = self.world
        flushes = self._flushes()
        vm.forgetful = isinstance(event, events.Host) and not event.flush
        try:
            done = self._do(event)
            found = self._invariants()
        except Misuse as e:
            raise Misuse(str(e), "event", number) from e
        except KvmfaultError as e:
            raise Misuse(f"{event.do}: {e}", "event", number) from e
        finally:
            vm.forgetful = False
        fresh = {name: what for name, what in found.items() if name not in self._broken}
        self._broken = frozenset(found)
        used = vm.every_vcpu()
        vcpu = getattr(event, "vcpu", 0)
        return replace(
            done,
            violates=fresh,
            leaf=self._leaf(event),
            flushed=self._flushes() > flushes,
            counters=dict(used[vcpu].counters) if vcpu < len(used) else {},
        )

    def _charge(self, work: int) -> None:
        self._work += work
        if self._work > MOST_WORK:
            raise ModelError(f"up to here the events take more than {MOST_WORK} entries and pages of work")

    def _invariants(self) -> dict[str, str]:
        cached = sum(len(vcpu.tlb.entries()) for vcpu in self.world.every_vcpu())
        self._charge(cached + sum(1 for _ in self.world.table.entries()))
        return broken(self.world)

    def _flushes(self) -> int:
        return sum(vcpu.tlb.flushes for vcpu in self.world.every_vcpu())

    def _leaf(self, event: events.Event) -> Leaf | None:
        vm = self.world
        gpa = getattr(event, "gpa", None)
        if gpa is None:
            return None
        if isinstance(event, events.Access):
            gpa += event.step * (event.count - 1)
        found = vm.table.leaf(Gpa(gpa & U64))
        return None if found is None else Leaf(1 << found.shift, str(PROTS[vm.format.prot(found.desc)]))

    def _do(self, event: events.Event) -> Result:
        vm = self.world
        match event:
            case events.Access():
                return self._access(event)
            case events.Fault():
                return self._fault(event)
            case events.Host():
                return self._host(event)
            case events.Back():
                for span in change_host(vm.host, event, place(vm, event)):
                    vm.invalidate(span)
                return _OK
            case events.Age():
                start = vm.hva_of(event.gpa)
                young = vm.age(HvaRange(start, Hva(start + event.size)), test_only=event.test_only)
                return Result(outcome=Kind.OK, young=young)
            case events.SetSlot() | events.DeleteSlot():
                return self._slot(event)
            case events.GetLog():
                return self._log(event)
            case events.ClearLog():
                return self._clear(event)
            case events.HarvestRing():
                entries = vm.harvest_ring(event.vcpu) if event.vcpu < len(vm.every_vcpu()) else ()
                ring = tuple((e.slot, e.offset) for e in entries)
                return Result(outcome=Kind.OK, ring=ring, count=len(entries))
            case events.ResetRings():
                self._charge_split()
                return Result(outcome=Kind.OK, count=vm.reset_rings())
            case events.Convert():
                attributes = ATTRIBUTE_PRIVATE if event.private else 0
                return _answered(vm.set_attributes(event.gpa, event.size, attributes))
            case events.PunchHole():
                self._charge(event.size >> 12)
                return _answered(vm.punch_hole(event.memfd, event.offset, event.size))
            case events.PoisonMemfd():
                vm.poison_memfd(event.memfd, event.offset)
                return _OK
            case events.Mark():
                for first, last in event.pages:
                    vm.set_userfault(event.slot, first, last + 1 - first, wanted=event.wanted)
                return _OK
            case events.Prefault():
                self._charge(8 * (event.size >> 12))
                answer = vm.prefault(event.gpa, event.size, vcpu=event.vcpu)
                exits = (left(answer.exit),) if answer.exit is not None else ()
                kind = exits[-1].kind if exits else Kind.ERROR if answer.errno else Kind.OK
                return Result(outcome=kind, errno=answer.errno, left=answer.size, exits=exits)
            case events.Track():
                vm.track_writes(Gfn(event.gpa >> vm.page_shift))
                return _OK
            case events.GuestMap():
                change_guest_map(vm, event)
                return _OK
            case events.Look():
                return _OK
            case _:
                assert_never(event)

    # The guest.

    def _access(self, event: events.Access) -> Result:
        runs = [self._one(event, event.gpa + n * event.step) for n in range(event.count)]
        ends = [access_kind(run, device=self._served(event, n)) for n, run in enumerate(runs)]
        kind, errno = ends[-1] if len(set(ends)) == 1 else (Kind.VARIOUS, 0)
        faults = [fault for run in runs for fault in run.faults]
        signal = signal_of(faults)
        stale, frame = self._frames(event, runs)
        exits = tuple(left(exit_) for run in runs for exit_ in run.exits if isinstance(exit_, Exit))
        return Result(
            outcome=kind,
            errno=errno,
            exits=exits,
            loaded=self._loaded(event, runs[-1], exits),
            lost=1 << signal.lsb if signal is not None else None,
            faults=tuple(map(shown, faults)),
            stale=stale,
            frame=frame,
        )

    def _one(self, event: events.Access, gpa: int) -> AccessRun:
        if event.as_id >= self.world.caps.nr_address_spaces:
            raise ModelError(f"there is no address space {event.as_id}")
        self.world.use_vcpu(event.vcpu).vcpu.as_id = event.as_id
        run = self.world.access(
            gpa,
            event.size,
            write=event.do == "write",
            fetch=event.do == "fetch",
            vcpu=event.vcpu,
            data=event.data,
            private=event.private,
            described=event.described,
            emulated=False,
            exchange=event.do == "exchange",
            **known(event),
        )
        self._charge(1 + 4 * len(run.faults))
        return run

    def _served(self, event: events.Access, number: int) -> bool:
        gpa = event.gpa + number * event.step
        return any(start <= gpa < start + size for start, size, _ in self.world.devices)

    def _frames(self, event: events.Access, runs: list[AccessRun]) -> tuple[bool, str | None]:
        # of the pages that the guest itself reached: does it see the memory's frame, and is it another than before
        vm, stale, frame = self.world, False, None
        for n, run in enumerate(runs):
            first = event.gpa + n * event.step >> vm.page_shift
            for page, pfn in enumerate(run.pfns, first):
                frame = "same" if self._reached.get(page) == pfn else "new"
                if pfn != vm.frame_now(Gpa(page << vm.page_shift)):
                    stale, frame = True, "stale"
                self._reached[page] = pfn
        return stale, frame

    def _loaded(self, event: events.Access, run: AccessRun, exits: tuple[Left, ...]) -> int | None:
        last = run.outcome
        if event.do != "read" or event.size not in (1, 2, 4, 8):
            return None
        completion = getattr(last, "completion", None)
        if completion is not None:
            done: int | None = completion.finish(last.value if isinstance(last, Resume) else event.answer)
            return done
        served = isinstance(last, Emulate) and self._served(event, 0)
        if not served and not (exits and exits[-1].kind is Kind.MMIO):
            return None
        value = self.world.bus(MmioAccess(Gpa(event.gpa), event.size, False)) if served else event.answer
        return _emulated(event, value or 0)

    def _fault(self, event: events.Fault) -> Result:
        vm = self.world
        registers = event.registers.get(vm.target.backend.name)
        if registers is None:
            return Result(outcome=Kind.NOT_RUN)
        vm.use_vcpu(event.vcpu)
        ran: Run = vm.handle(vm.target.decode(**registers))
        self._charge(1)
        kind, errno = kind_of(ran.outcome)
        exits = (left(ran.outcome),) if isinstance(ran.outcome, Exit) else ()
        return Result(outcome=kind, errno=errno, exits=exits, faults=(shown(ran),))

    # The host.

    def _host(self, event: events.Host) -> Result:
        vm, size = self.world, event.size
        hva = place(vm, event)
        host = vm.host
        self._charge((size >> 12) * 8)
        for span in change_host(host, event, hva):
            vm.invalidate(span)
        return _OK

    # User space.

    def _slot(self, event: events.SetSlot | events.DeleteSlot) -> Result:
        request = slot_request(self.world, event)
        self._charge_split()
        result = self.world.set_region(request)
        return replace(_answered(result.errno), rule=result.rule)

    def _charge_split(self) -> None:
        # eager splitting makes entries of all that is mapped by blocks
        vm = self.world
        if vm.facts.eager_split:
            self._charge(sum(1 << e.shift - vm.page_shift for e in vm.table.entries()))

    def _log(self, event: events.GetLog) -> Result:
        bitmap = self.world.log.bitmap(event.slot)
        self._charge(len(bitmap) // 16 if bitmap is not None else 1)
        self._charge_split()
        answer: LogAnswer = self.world.get_dirty_log(event.slot)
        return replace(
            _answered(answer.errno), pages=None if answer.errno else tuple((r.start, r.stop - 1) for r in answer.runs)
        )

    def _clear(self, event: events.ClearLog) -> Result:
        self._charge(event.count)
        self._charge_split()
        return _answered(self.world.clear_dirty_log(event.slot, event.first, event.count, bits_to_clear(event)))


def _answered(errno: int) -> Result:
    return Result(outcome=Kind.ERROR if errno else Kind.OK, errno=errno)


def _emulated(event: events.Access, value: int) -> int:
    # what the instruction is defined to load: the emulator does just that
    bits = 8 * event.size
    value &= (1 << bits) - 1
    if event.sign_extend and value >> bits - 1:
        value |= U64 << bits & U64
    return value if event.wide else value & (1 << 32) - 1
