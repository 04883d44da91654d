"""PATH and its runner: the tuple is filtered once per target, then walked for every fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from errno import EFAULT
from functools import cache
from typing import Final, TypeAlias

from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Error, Outcome
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import PinError, Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.target import Target
from kvmfault.contract.values import DirtyMark, MemfdSource, PresentLeaf, Unbacked, Userfault
from kvmfault.path import commit, lookup, resolve
from kvmfault.path.explain import StepRecord, record

__all__ = ["FELL_THROUGH", "PATH", "BoundPath", "Locked", "Run", "Step", "StepFn", "Walk", "bind"]

StepFn: TypeAlias = Callable[[Ports, MmioFault, Progress], Outcome | None]


def _always(policy: Policy, joints: Joints) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Step:
    """A named place of the path. Atomic: what happens between two points where the real kernel can be raced."""

    name: str
    run: StepFn | None
    """None: a place that only joints fill; its name is the member of Joints."""
    settled: str = ""
    """Why the path goes on where the step found nothing to note."""
    applies: Callable[[Policy, Joints], bool] = _always
    """Whether a target with this policy and these joints has the step at all."""
    asks: tuple[str, ...] = ()
    """Members of Joints that the step calls."""

    def functions(self, policy: Policy, joints: Joints) -> tuple[StepFn, ...]:
        """What runs here for a target: nothing, the step, or its joints."""
        if self.run is None:
            place: tuple[StepFn, ...] = getattr(joints, self.name)
            return place
        return (self.run,) if self.applies(policy, joints) else ()

    @property
    def doc(self) -> str:
        """What the step decides, and the kernel functions that it stands for."""
        return _PLACES.get(self.name, "") if self.run is None else (self.run.__doc__ or "")


@dataclass(frozen=True, slots=True)
class Locked:
    """Steps under mmu_lock, held for read: atomic against invalidation, not against other vCPUs' faults."""

    steps: tuple[Step, ...]


_PLACES: Final = {
    "screen": "Is this a fault of this kind at all. Kernel: the head of kvm_handle_guest_abort; kvm_mmu_page_fault.",
    "translate": "Faulting address to canonical address through the guest's own table. "
    "Kernel: kvm_walk_nested_s2; the guest walk of shadow paging.",
    "refuse_page": "Whether this guest and access may have the page at all. Kernel: kvm_s2_fault_compute_prot.",
    "prepare_page": "What must be done to the page, or checked in the guest's tables, before anyone sees the entry. "
    "Kernel: sanitise_mte_tags; FNAME(fetch) of shadow paging.",
    "repair": "An entry exists and only a bit is missing. Kernel: handle_access_fault; fast_page_fault.",
}

PATH: Final[tuple[Step | Locked, ...]] = (
    Step("screen", None, "does not apply"),
    Step("translate", None, "the address is the guest's own"),
    Step("lookup", lookup.lookup),
    Step("track_write", lookup.track_write, "writes to the frame are not tracked", lambda p, j: p.write_tracking),
    Step("repair", None, "no entry that only lacks a bit"),
    Step(
        "leave_unbacked",
        lookup.leave_unbacked,
        "memory backs the access",
        lambda p, j: p.unbacked is Unbacked.LEAVE,
        asks=("reject_unbacked", "decode_mmio"),
    ),
    Step(
        "explain_permission",
        lookup.explain_permission,
        "not a permission fault, or one that writes or fetches",
        lambda p, j: p.unexplained_permission is not None,
    ),
    Step("topup", lookup.topup, "table pages are in reserve, or none are needed"),
    Step("snapshot", lookup.snapshot, "sequence sampled"),
    Step(
        "check_private",
        lookup.check_private,
        "access and frame are of one kind",
        lambda p, j: p.memfd_source is MemfdSource.PRIVATE_ACCESS,
    ),
    Step(
        "settle_slot",
        lookup.settle_slot,
        "a slot of memory",
        lambda p, j: p.unbacked is Unbacked.REMEMBER,
        asks=("special_slot",),
    ),
    Step("bound_size", resolve.bound_size),
    Step("precheck", resolve.precheck, "no invalidation of the frame in sight", lambda p, j: p.precheck),
    Step(
        "userfault",
        resolve.userfault,
        "user space did not ask for the page",
        lambda p, j: p.userfault is not Userfault.ABSENT,
    ),
    Step("pin", resolve.pin),
    Step("wait", resolve.wait, "no input was needed", lambda p, j: p.nowait_first, asks=("defer",)),
    Step("judge_pfn", resolve.judge_pfn, "a page was obtained"),
    Step("recheck", resolve.precheck, "still none", lambda p, j: p.precheck),
    Step("permit", resolve.permit, asks=("refuse_fetch",)),
    Step("refuse_page", None, "the guest may have the page"),
    Locked(
        (
            Step("stale", commit.stale, "nothing was invalidated since the sequence was sampled"),
            Step("fit_size", commit.fit_size, "the size stays"),
            Step("prepare_page", None, "nothing to prepare"),
            Step(
                "keep_present",
                commit.keep_present,
                "no leaf that may stay",
                lambda p, j: p.present_leaf is not PresentLeaf.REPLACE,
            ),
            Step(
                "protect_tracked",
                commit.protect_tracked,
                "writes to the frame are not tracked",
                lambda p, j: p.write_tracking,
            ),
            Step("install", commit.install),
        )
    ),
    Step("account", commit.account, "", lambda p, j: p.dirty_mark not in (DirtyMark.WITH_ENTRY, DirtyMark.ON_HARVEST)),
)
"""Reading this tuple is reading the design. Order never changes; what a target has of it is printable."""


@dataclass(frozen=True, slots=True)
class Run:
    """One fault handled. *machinery*: the outcome of the fault machinery, None if it was never reached; *outcome*:
    that of the exit handler, after the joint ``conclude``."""

    outcome: Outcome
    machinery: Outcome | None
    steps: tuple[StepRecord, ...]
    progress: Progress


def _lock(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    vm.lock()
    return None


_LOCK: Final = Step("lock", _lock, "mmu_lock held for read")


class BoundPath:
    """PATH for one target."""

    def __init__(self, policy: Policy, joints: Joints, path: tuple[Step | Locked, ...] = PATH) -> None:
        self.policy = policy
        self.joints = joints
        self.named: tuple[tuple[Step, StepFn], ...] = tuple(self._flatten(path))
        self._functions = tuple(function for _, function in self.named)
        self._conclude = joints.conclude

    def _flatten(self, path: tuple[Step | Locked, ...]) -> list[tuple[Step, StepFn]]:
        flat: list[tuple[Step, StepFn]] = []
        for entry in path:
            if isinstance(entry, Locked):
                flat.append((_LOCK, _lock))
                flat.extend(self._flatten(entry.steps))
            else:
                flat.extend((entry, function) for function in entry.functions(self.policy, self.joints))
        return flat

    def resolve(self, vm: Ports, fault: MmioFault) -> Outcome:
        """The outcome of the exit, nothing recorded: the fast way."""
        at = Progress(self.policy, self.joints)
        outcome = None
        for function in self._functions:
            outcome = function(vm, fault, at)
            if outcome is not None:
                break
        if at.held:
            vm.release(at.pfn)
        if outcome is None:
            outcome = FELL_THROUGH
        for conclude in self._conclude:
            outcome = conclude(vm, fault, at, outcome)
        return outcome

    def handle(self, vm: Ports, fault: MmioFault) -> Run:
        """The same with every step recorded: what it found out, how it decided and why."""
        return self.walk(vm, fault).end()

    def walk(self, vm: Ports, fault: MmioFault, *, told: bool = True) -> Walk:
        """The same in parts, so that other things may happen to the VM between two steps. *told*: each step's record
        has words for people, which take as long as the step."""
        return Walk(self, vm, fault, told=told)

    def _end(self, vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome | None, steps: list[StepRecord]) -> Run:
        if at.held:
            vm.release(at.pfn)
        machinery = final = outcome if outcome is not None else FELL_THROUGH
        for conclude in self._conclude:
            final = conclude(vm, fault, at, final)
        if final != machinery:
            steps.append(record("conclude", {}, {}, final, ""))
        return Run(final, machinery if at.looked_up else None, tuple(steps), at)


FELL_THROUGH: Final = Error(EFAULT, "the path ended without an answer")


class Walk:
    """One fault on its way along the path, every step recorded."""

    def __init__(self, path: BoundPath, vm: Ports, fault: MmioFault, *, told: bool) -> None:
        self.fault = fault
        self.progress: Progress = Progress(path.policy, path.joints)
        self.outcome: Outcome | None = None
        """Of the fault machinery, once a step has decided."""
        self.steps: list[StepRecord] = []
        self._path, self._vm, self._next, self._told = path, vm, 0, told

    def until(self, *names: str) -> None:
        """Run all steps before the next one called by any of *names*, or to the end without one; nothing if all that
        are called so have been run."""
        at, fault = self.progress, self.fault
        named = self._path.named
        if names and not any(step.name in names for step, _ in named[self._next :]):
            return
        while self.outcome is None and self._next < len(named):
            step, function = named[self._next]
            if step.name in names:
                return
            self._next += 1
            if not self._told:
                self.outcome = function(self._vm, fault, at)
                self.steps.append(StepRecord(step.name, "", {}, self.outcome))
                continue
            before = dict(vars(at))
            self.outcome = function(self._vm, fault, at)
            settled = step.settled if step.run is not None else f"{function.__name__}: {step.settled}"
            if at.pin is not None and at.pin.error is PinError.NO_SLOT:
                settled = "no memory: an entry that remembers MMIO is on its way"
            self.steps.append(record(step.name, before, vars(at), self.outcome, settled))

    def end(self) -> Run:
        """Run what is left, and what follows the path."""
        self.until()
        return self._path._end(self._vm, self.fault, self.progress, self.outcome, self.steps)


@cache
def bind(target: Target) -> BoundPath:
    """PATH filtered for *target*, once."""
    return BoundPath(target.policy, target.joints)
