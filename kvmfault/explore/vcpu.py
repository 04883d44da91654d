"""A vCPU as an actor: its accesses meet TLB and table; what faults goes along the path, one action for each step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Final, NamedTuple, TypeAlias, cast

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import (
    Completion,
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    Outcome,
    Reason,
    Retry,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.progress import Progress
from kvmfault.contract.target import Target
from kvmfault.explore.actor import Actor, Did, Rest
from kvmfault.explore.parts import OF_VCPU, part
from kvmfault.explore.world import Broken, Explored
from kvmfault.machine.guest import transfer_register, wanted_access
from kvmfault.machine.tlb import Cached
from kvmfault.path.run import FELL_THROUGH, PATH, BoundPath, Locked, Step, StepFn
from kvmfault.scenario import events
from kvmfault.scenario.meaning import known
from kvmfault.types import Gfn, Gpa

__all__ = ["At", "Complete", "Conduct", "Located", "Misread", "Path", "VcpuActor", "kept_completion"]

Path: TypeAlias = tuple[Step | Locked, ...]
_RUN, _FAULT, _ANSWER, _EMULATE, _COMPLETE = "run", "fault", "answer", "emulate", "complete"


class At(NamedTuple):
    """Where a vCPU is."""

    access: int
    """Of its accesses."""
    phase: str = _RUN
    met: tuple[Cause, int] | None = None
    """Why translation ended, and at which size: what its fault says."""
    since: tuple[int, Gpa] | None = None
    """Memslot generation and address when the fault began, if memory that allows the access was there; else None."""
    step: int = 0
    """The step of the path that comes next."""
    progress: tuple[tuple[str, object], ...] = ()
    outcome: Outcome | None = None


class Located(NamedTuple):
    """A step of the path, in order, with what the lock does there."""

    name: str
    run: StepFn
    locked: bool
    """Runs under mmu_lock."""


Complete: TypeAlias = Callable[[Explored, BoundPath, Exit], Completion | None]
"""By what a device access is finished that user space has carried out."""


def kept_completion(vm: Explored, bound: BoundPath, left: Exit) -> Completion | None:
    """By what was kept of its fault."""
    return left.completion


@dataclass(frozen=True)
class Conduct:
    """What a target's vCPUs do on a fault: the path, in its order or as a mutant has it."""

    target: Target
    steps: tuple[Located, ...]
    bound: BoundPath
    misread: Mapping[str, Callable[[MmioFault], bool]]
    """Facts of a fault that this kernel reads wrongly."""
    complete: Complete

    @classmethod
    def of(
        cls,
        target: Target,
        path: Path = PATH,
        misread: Mapping[str, Callable[[MmioFault], bool]] | None = None,
        complete: Complete | None = None,
    ) -> Conduct:
        """*path* as *target* has it."""
        bound = BoundPath(target.policy, target.joints, path)
        under = {step for entry in path if isinstance(entry, Locked) for step in entry.steps}
        steps = tuple(
            Located(step.name if step.run is not None else run.__name__, run, step in under or step.name == "lock")
            for step, run in bound.named
        )
        return cls(target, steps, bound, misread or {}, complete or kept_completion)


class Misread:
    """A fault of which some facts are told wrongly."""

    def __init__(self, fault: MmioFault, wrong: Mapping[str, Callable[[MmioFault], bool]]) -> None:
        self._fault = fault
        self._wrong = wrong

    def __getattr__(self, name: str) -> object:
        wrong = self._wrong.get(name)
        return wrong(self._fault) if wrong is not None else getattr(self._fault, name)


_ONE_EXCHANGE: Final = ("keep_present", "protect_tracked")
"""Steps that look at the entry that is then changed by compare-and-swap: with the steps behind them one action, since
where another vCPU changes it in between the exchange fails, and the fault begins again."""
_CLEAN: Final[frozenset[object]] = frozenset()


class VcpuActor(Actor):
    """One vCPU and what its guest does, an access after the other."""

    def __init__(
        self, conduct: Conduct, number: int, accesses: Sequence[events.Access], may: Rest, *, noted: bool = False
    ) -> None:
        self.name: str = f"vcpu{number}"
        self.number = number
        self.holds: str = part("reads", number)
        self._conduct = conduct
        transfer = transfer_register(conduct.target)
        self._accesses = tuple(
            (Gpa(event.gpa + n * event.step), event, _wanted(event, transfer))
            for event in accesses
            for n in range(event.count)
        )
        self._may = may
        self._noted = noted  # somebody else may use the vCPU's fault registers
        self._faults: dict[tuple[int, object], MmioFault] = {}

    def start(self) -> Hashable:
        """See Actor."""
        return At(0)

    def ended(self, local: Hashable) -> bool:
        """See Actor."""
        return cast(At, local).access == len(self._accesses)

    def restarts(self, local: Hashable) -> bool:
        """See Actor."""
        return cast(At, local).phase == _RUN

    def rest(self, local: Hashable, parts: tuple[str, ...]) -> Rest:
        """See Actor."""
        if self.ended(local):
            return Rest(frozenset(), frozenset())
        own = frozenset(part(name, self.number) for name in OF_VCPU)
        return Rest(self._may.touches | own, self._may.writes | own)

    def act(self, vm: Explored, local: Hashable) -> Did:
        """See Actor."""
        at = cast(At, local)
        vm.vcpu = vm.vcpus[self.number]
        if at.phase == _FAULT:
            return self._step(vm, at)
        if at.phase == _RUN:
            return self._access(vm, at)
        if at.phase == _COMPLETE:
            return self._complete(vm, at)
        return self._answer(vm, at) if at.phase == _ANSWER else self._emulate(vm, at)

    # The guest.

    def _access(self, vm: Explored, at: At) -> Did:
        gpa, event, wanted = self._accesses[at.access]
        if vm.vcpu.as_id != event.as_id:
            vm.vcpu.as_id = event.as_id
        if vm.table_retired():
            vm.vcpu_part("retired", False)  # a request that is served before the guest runs (kvm_mmu_reload)
        met = vm._translate(gpa, wanted)
        if isinstance(met, Cached):
            if wanted.write:
                vm.guest_wrote(gpa)
            frame = met.pfn + (gpa - met.gpa >> vm.page_shift)
            return Did(event.do, self._next(vm, at), f"frame {frame:#x}")
        vm.enter_section()
        if self._noted:
            vm.vcpu_part("fault", vm._as_access(wanted, gpa, met))
        begun = At(at.access, _FAULT, met, self._since(vm, gpa, wanted))
        return Did(event.do, begun, f"faults: {met[0].name.lower().replace('_', ' ')}")

    def _since(self, vm: Explored, address: Gpa, wanted: Access) -> tuple[int, Gpa] | None:
        gpa = vm.canonical(address)
        slot = vm.slots.find(Gfn(gpa >> vm.page_shift), vm.vcpu.as_id)
        allows = slot is not None and not slot.invalid and not (wanted.write and slot.readonly)
        return (vm.slots.generation(vm.vcpu.as_id), gpa) if allows else None

    def _fault(self, vm: Explored, at: At) -> MmioFault:
        key = at.access, at.met
        found = self._faults.get(key)
        if found is None:
            gpa, _, wanted = self._accesses[at.access]
            assert at.met is not None
            found = self._conduct.target.encode(vm._as_access(wanted, gpa, at.met)).fault
            if self._conduct.misread:
                found = cast(MmioFault, Misread(found, self._conduct.misread))
            self._faults[key] = found
        return found

    # The kernel.

    def _progress(self, at: At) -> Progress:
        progress = Progress(self._conduct.bound.policy, self._conduct.bound.joints)
        vars(progress).update(at.progress)
        return progress

    def _step(self, vm: Explored, at: At) -> Did:
        steps = self._conduct.steps
        name, run, locked = steps[at.step]
        progress = self._progress(at)
        outcome = run(vm, self._fault(vm, at), progress)
        following = at.step + 1
        while outcome is None and name in _ONE_EXCHANGE and following < len(steps) and steps[following].locked:
            name, run, _ = steps[following]
            outcome = run(vm, self._fault(vm, at), progress)
            following += 1
        over = outcome is not None or following == len(steps)
        if locked and (over or not steps[following].locked):
            vm.unlock()
        seen = at._replace(
            phase=_ANSWER if over else _FAULT, step=0 if over else following, progress=_kept(progress), outcome=outcome
        )
        return Did(name, seen, _told(outcome) if outcome is not None else "")

    def _answer(self, vm: Explored, at: At) -> Did:
        progress, fault = self._progress(at), self._fault(vm, at)
        outcome = at.outcome if at.outcome is not None else FELL_THROUGH
        if progress.held:
            vm.release(progress.pfn)
        for conclude in self._conduct.bound.joints.conclude:
            outcome = conclude(vm, fault, progress, outcome)
        if vm.of_vcpu("marks", self.number):
            vm.vcpu_part("marks", _CLEAN)
        if isinstance(outcome, Emulate):
            return Did("conclude", at._replace(phase=_EMULATE, progress=(), outcome=None), _told(outcome))
        self._judge(vm, at, outcome)
        vm.leave_section()
        if isinstance(outcome, Exit) and outcome.completion is not None and self._noted:
            vm.vcpu_part("idle", True)
            return Did("return", At(at.access, _COMPLETE, at.met, outcome=outcome), _told(outcome))
        return Did("return", At(at.access) if _again(outcome) else self._next(vm, at), _told(outcome))

    def _emulate(self, vm: Explored, at: At) -> Did:
        gpa, event, wanted = self._accesses[at.access]
        exits = vm.emulate(gpa, event.size, wanted, event.data or 0)
        for left in exits or ():
            self._judge(vm, at, left)
        vm.leave_section()
        note = _told(exits[-1]) if exits else "in memory" if exits is not None else "waits for user space"
        return Did("emulate", At(at.access) if exits is None else self._next(vm, at), note)

    def _complete(self, vm: Explored, at: At) -> Did:
        # KVM_RUN again, with what the device gave (kvm_handle_mmio_return)
        vm.vcpu_part("idle", False)
        assert isinstance(at.outcome, Exit)
        wanted, used = at.outcome.completion, self._conduct.complete(vm, self._conduct.bound, at.outcome)
        if used is None or wanted is None or (used.access, used.register) != (wanted.access, wanted.register):
            what = "no device access" if used is None else f"register {used.register}, {used.access.size} bytes"
            raise Broken("completion", f"the access to {self._accesses[at.access][0]:#x} is finished as {what}")
        return Did("complete", self._next(vm, at))

    def _next(self, vm: Explored, at: At) -> At:
        if self._noted and at.access + 1 == len(self._accesses):
            vm.vcpu_part("idle", True)  # user space does not run it again
        return At(at.access + 1)

    def _judge(self, vm: Explored, at: At, outcome: Outcome) -> None:
        # memory that was there all the time must answer
        if at.since is None:
            return
        gpa, event, wanted = self._accesses[at.access]
        refused = isinstance(outcome, Inject) or (
            isinstance(outcome, Exit) and outcome.reason in (Reason.MMIO, Reason.UNDECODED_MMIO, Reason.INTERNAL_ERROR)
        )
        if refused and self._since(vm, gpa, wanted) == at.since:
            raise Broken("memory-answers", f"{event.do} of memory at {gpa:#x} ends in: {_told(outcome)}")


def _wanted(event: events.Access, transfer: int) -> Access:
    return wanted_access(
        event.size,
        write=event.do == "write",
        fetch=event.do == "fetch",
        exchange=event.do == "exchange",
        private=event.private,
        described=event.described,
        transfer=transfer,
        **known(event),
    )


def _kept(progress: Progress) -> tuple[tuple[str, object], ...]:
    found = ((name, value) for name, value in vars(progress).items() if name not in ("policy", "joints"))
    return tuple(sorted(found, key=itemgetter(0)))


def _again(outcome: Outcome) -> bool:
    # whether the guest repeats the instruction
    if isinstance(outcome, Retry):
        return outcome.signal is None
    return isinstance(outcome, Fixed | Spurious | WriteProtected)


def _told(outcome: Outcome) -> str:
    match outcome:
        case Fixed():
            return f"maps {outcome.size:#x} {outcome.prot}"
        case Retry():
            return "retry"
        case Exit():
            return f"exit: {outcome.reason}"
        case Error():
            return f"error {outcome.errno}"
        case Inject():
            return f"injects {outcome.what}"
        case _:
            return type(outcome).__name__.lower()
