"""Backend: what an architecture provides. Target: one backend, format and kernel, ready to use.

Recipe for a new architecture; docs/recipe.md takes each step with an example, ``kvmfault backend check`` says how far
one is. Each part needs only those before it:

1. registers        declare them (``register``); one synthetic register carries what the VM or caller adds
2. formats          descriptors and geometry (``Stage2Format``)
3. facts            fill ``Accessors``: an expression for each fact, a ``Gap`` with its reason for the rest
4. encode           build registers from an ``Access``; losses are found for you
5. policies         one value for each documented difference (``Policy``), by kernel version
6. joints           only what no policy can say: a function per place, by kernel version
7. tracepoints      which trace events carry faults, and how their text reads, what they mean
8. extras           lines that people paste, odd values, a guest that drives a real KVM (``live``)

One folder, one entry point in the group ``kvmfault.backends``; no change in kvmfault/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvmfault.algebra.expr import ALWAYS, NEVER, Maybe, Pred, Word
from kvmfault.algebra.layout import Register
from kvmfault.contract.accessors import Definition
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.probes import Probes
from kvmfault.errors import UsageError

if TYPE_CHECKING:  # behaviour is loaded by whoever runs a fault
    from kvmfault.contract.access import Access
    from kvmfault.contract.fault import MmioFault
    from kvmfault.contract.live import Live
    from kvmfault.contract.outcome import Outcome
    from kvmfault.contract.policy import Policy
    from kvmfault.contract.ports import Ports, VmFacts
    from kvmfault.contract.progress import Progress
    from kvmfault.contract.saved import Saved
    from kvmfault.contract.tracepoints import Tracepoints
    from kvmfault.vm.caps import HostCaps

__all__ = ["Backend", "Behaviour", "Conclude", "Encode", "Joint", "Joints", "Named", "needed_where", "unwritten"]

Joint: TypeAlias = "Callable[[Ports, MmioFault, Progress], Outcome | None]"
"""A step that only one architecture has: an outcome ends the path, None goes on. It installs no mapping."""
Named: TypeAlias = Mapping[str, Pred | Word | Maybe]


class Conclude(Protocol):
    """Turns the outcome of the fault machinery into that of the exit handler."""

    def __call__(self, vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
        """The outcome of the exit."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Joints:
    """The truly architectural steps, a tuple for each named place of the path."""

    screen: tuple[Joint, ...] = ()
    """First: is this a fault of this kind at all."""
    translate: tuple[Joint, ...] = ()
    """Faulting address to canonical address, through the guest's own table."""
    repair: tuple[Joint, ...] = ()
    """An entry exists and only a bit is missing."""
    reject_unbacked: tuple[Joint, ...] = ()
    """Accesses outside memory that no device can answer."""
    decode_mmio: tuple[Joint, ...] = ()
    """Syndrome to device access."""
    special_slot: tuple[Joint, ...] = ()
    """Slots that are not memory."""
    defer: tuple[Joint, ...] = ()
    """Fetch the page in the background."""
    refuse_fetch: tuple[Joint, ...] = ()
    """Code must not run from here."""
    refuse_page: tuple[Joint, ...] = ()
    """The page was obtained, but must not be given to this guest or access."""
    prepare_page: tuple[Joint, ...] = ()
    """Under the lock, before the entry is visible."""
    conclude: tuple[Conclude, ...] = ()
    """After the path."""

    def bound(self, policy: Policy) -> Joints:
        """Without the joints that a target with *policy* does not need."""
        places: dict[str, Any] = {
            f.name: tuple(joint for joint in getattr(self, f.name) if _needed(joint, policy)) for f in fields(self)
        }
        return Joints(**places)


_NEEDS: dict[object, Callable[[Policy], bool]] = {}


def needed_where(test: Callable[[Policy], bool]) -> Callable[[Joint], Joint]:
    """Marks a joint that only some policies need: targets with others are bound without it."""

    def mark(joint: Joint) -> Joint:
        _NEEDS[joint] = test
        return joint

    return mark


def _needed(joint: object, policy: Policy) -> bool:
    test = _NEEDS.get(joint)
    return test is None or test(policy)


Encode: TypeAlias = "Callable[[Access, Stage2Format], tuple[Mapping[str, int], Mapping[str, str]]]"
"""(registers by name, reasons by member of Access that they cannot say)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How kernel and host act on a fault. Apart from the facts, because decoding needs none of it and must be quick."""

    encode: Encode
    policies: Mapping[str, Callable[[Stage2Format], Policy]]
    joints: Mapping[str, Joints]
    host: Callable[[Stage2Format], HostCaps]
    """What a usual host offers."""
    vm: VmFacts
    """What a usual VM is."""
    tracepoints: Tracepoints
    probes: Probes = field(default_factory=Probes)
    """What probed kernel functions tell of decisions; empty: a recording cannot be checked."""
    saved: Saved | None = None
    """Where a kernel keeps the registers of a vCPU's last fault; None: nobody has written it."""
    live: Live | None = None
    """How a real KVM is driven, to compare it with the model; None: nobody has written it."""


def unwritten() -> Behaviour:
    """Stands for the behaviour of a backend in the making. Raises UsageError."""
    raise UsageError("the backend has no behaviour yet: nothing can be encoded or run")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An architecture: facts and a few functions. Everything by kernel version is keyed by its name, newest last.

    While it is being written, parts may be left out: ``kvmfault backend check`` tells which.
    """

    name: str
    about: str
    """One line for ``backend list``."""
    registers: tuple[Register, ...]
    """Fault registers in the order of ``Regs``; the synthetic one last."""
    code: str
    """Register that a lone number given to ``decode`` stands for."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Value of a register that was not given, where 0 would mean something else."""
    given: Mapping[str, str] = field(default_factory=dict)
    """Register -> field of the synthetic register that says it was captured."""
    zero_register: int = 31
    """Number of the transfer register that reads as zero and drops what is written; 32: none does."""
    facts: Mapping[str, Callable[[Stage2Format], Definition]] = field(default_factory=dict)
    accessors: Mapping[str, Callable[[Stage2Format], Named]] = field(default_factory=dict)
    """The kernel's own accessors under their own names."""
    formats: Mapping[str, Stage2Format] = field(default_factory=dict)
    """By name; the first is the default."""
    behaviour: Callable[[], Behaviour] = unwritten
    """The rest, loaded by whoever runs a fault."""
    reachable: Pred = ALWAYS
    """Register values that hardware can produce, as far as facts depend on it."""
    fetch_writes: Pred = NEVER
    """Where hardware reports a fetch that needs write permission, as for the reference bit of an entry that it walks.
    Everywhere else ``is_write`` and ``is_exec`` exclude each other."""
    layouts: Mapping[str, Callable[[Mapping[str, int]], Register]] = field(default_factory=dict)
    """Register -> which of several layouts of it applies, by all registers' values."""
    unusual: Callable[[Mapping[str, int]], tuple[str, ...]] | None = None
    """Diagnostics about register values that are odd but decodable."""
    paste: Callable[[str], Mapping[str, int] | None] | None = None
    """Registers out of a line that people paste (log, register dump, trace), or None: the line holds none."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernel versions modelled, oldest first."""
        return tuple(self.facts)

    @property
    def behaves(self) -> bool:
        """Its behaviour is written."""
        return self.behaviour is not unwritten

    @property
    def encode(self) -> Encode:
        """See Behaviour."""
        return self.behaviour().encode

    @property
    def policies(self) -> Mapping[str, Callable[[Stage2Format], Policy]]:
        """See Behaviour."""
        return self.behaviour().policies

    @property
    def joints(self) -> Mapping[str, Joints]:
        """See Behaviour."""
        return self.behaviour().joints

    @property
    def host(self) -> Callable[[Stage2Format], HostCaps]:
        """See Behaviour."""
        return self.behaviour().host

    @property
    def vm(self) -> VmFacts:
        """See Behaviour."""
        return self.behaviour().vm

    @property
    def tracepoints(self) -> Tracepoints:
        """See Behaviour."""
        return self.behaviour().tracepoints

    @property
    def probes(self) -> Probes:
        """See Behaviour."""
        return self.behaviour().probes

    @property
    def saved(self) -> Saved | None:
        """See Behaviour."""
        return self.behaviour().saved

    @property
    def live(self) -> Live | None:
        """See Behaviour."""
        return self.behaviour().live
