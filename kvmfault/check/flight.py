"""One recorded fault on its way: how far the model is, and what the recording has said of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from kvmfault.contract.format import R, W, X
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault
from kvmfault.contract.probes import Said
from kvmfault.contract.shapes import Raw
from kvmfault.errors import ModelError
from kvmfault.machine.table import Found
from kvmfault.path.run import Run, Walk
from kvmfault.trace.events import MmioEvent
from kvmfault.trace.truth import Told
from kvmfault.types import Gpa

if TYPE_CHECKING:
    from kvmfault.check.world import CheckedVm

__all__ = ["Flight", "Leaves", "Seen"]


class Seen(NamedTuple):
    """The entry at which a walk of the second-stage table had arrived, and whether the next table page was at hand."""

    shift: int
    desc: int
    linking: bool = False


@dataclass(slots=True)
class Leaves:
    """What probes tell of the leaves that a fault makes, and of its decision once more."""

    again: list[Told] = field(default_factory=list)
    """The decision, as functions that call the one which made it tell it."""
    setting: Told | None = None
    """The leaf that is being set."""
    made: list[tuple[Told, Told]] = field(default_factory=list)
    """Each leaf as it was announced and as it then was."""
    sets: list[tuple[Told, Told]] = field(default_factory=list)
    """Each leaf as it was announced and how that ended."""
    unsynced: list[tuple[int, int | None]] = field(default_factory=list)
    """Frames of which it was asked whether they may be writable, and that of the leaf that was being set."""
    withheld: list[int] = field(default_factory=list)
    """What was answered."""


class Flight:
    """A fault on its way: how far the model is, and what the recording has said of it so far."""

    def __init__(
        self, line: int, pid: int, vm: CheckedVm, vcpu: int, fault: Raw, *, prefetch: bool, epoch: int
    ) -> None:
        self.line = line
        """Where the recording has it: of the fault's own event, or of the probe that showed it."""
        self.pid: int = pid
        self.vm: CheckedVm = vm
        self.vcpu: int = vcpu
        self.fault: Raw = fault
        self.prefetch = prefetch
        self.epoch = epoch
        """Number of the last retirement of any table that the vCPU's entry into the guest came after."""
        self.told: dict[Said, Told] = {}
        """The last of each kind that the recording said."""
        self.installed: list[Told] = []
        self.leaves: Leaves = Leaves()
        self.walked: list[tuple[int, int]] = []
        """Entries of the guest's own tables, (descriptor, level), that the walk for it read."""
        self.paging: bool | None = None
        """Whether the guest's tables are in use, where they are shadowed; None: not known yet."""
        self._guest: GuestTranslation | GuestWalkFault | None = None
        self.guest_taken: bool = False
        """Where the guest's own tables lead is taken from what KVM made of it."""
        self.devices: list[MmioEvent] = []
        """Device accesses that followed."""
        self.errno = 0
        """KVM_RUN returned this error."""
        self.as_id: int = 0
        self.seen: Seen | None = None
        """The entry that it is about to replace, as it was read."""
        self.seq: int = vm.invalidations.seq
        self.others = False
        """Another task changed the VM since it began."""
        self.left: Found | None = None
        """The entry over the fault, as the model left it."""
        self.changed = False
        """The recording shows that the leaf was changed."""
        self.run: Run | None = None
        self.unknown = False
        """What the host answered is not recorded, so the model cannot go on."""
        self.failed: str = ""
        """The model could not go on: why."""
        self.walk: Walk = vm.walk(fault)

    def translation(self) -> GuestTranslation | GuestWalkFault | None:
        """Where the guest's own tables lead, from what is recorded; None: not yet known."""
        if self._guest is not None:
            return self._guest
        address = self.fault.gva or 0
        walk = self.vm.target.backend.probes.walk
        found = walk(self.walked, address, self.fault.is_write) if walk is not None and self.walked else None
        if found is not None:
            self._guest = found
            return found
        told = self.told.get(Said.PINNED) or self.told.get(Said.DECIDED)
        if told is None:
            return None
        if Said.INJECTED in self.told or "gfn" not in told.values:
            return GuestWalkFault()
        prot, page = told.number("prot", R | W | X), 1 << self.vm.page_shift
        gpa = Gpa(told.number("gfn") * page | address & page - 1)
        size = self.number(Said.DECIDED, "max_size") or max(self.vm.target.policy.fit_sizes, default=page)
        self.vm.taken["where the guest's own tables lead"] += 1
        self.guest_taken = True
        self._guest = GuestTranslation(gpa, size, True, bool(prot & W), bool(prot & X), 0, bool(prot & R))
        return self._guest

    def bound_by_guest(self, size: int) -> None:
        """The size of the guest's own block, recorded later than where it leads."""
        at = self.walk.progress
        if self.guest_taken and at.guest is not None and self.walk.outcome is None:
            self._guest = at.guest = replace(at.guest, size=size)
            at.max_size = size

    def until(self, *names: str) -> None:
        """Let the model go on up to the next step called so, or to its decision."""
        if not self.failed:
            with self.vm.speaking_for(self):
                try:
                    self.walk.until(*names)
                except ModelError as e:
                    self.failed = str(e)
                if self.walk.outcome is not None and self.left is None:
                    self.left = self.vm.entry(self.walk.progress.at)

    def restart(self, as_id: int, upto: str = "install") -> None:
        """The vCPU turns out to run in another address space, or with other memory: the same again, up to a step."""
        reached = self.walk.progress.seq
        self.as_id, self._guest, self.left = as_id, None, None
        self.walk = self.vm.walk(self.fault)
        self.until("pin", upto)
        self.walk.progress.seq = reached
        self.until(upto)

    def end(self) -> Run:
        """Let the model finish."""
        if self.run is None:
            with self.vm.speaking_for(self):
                self.run = self.walk.end()
        return self.run

    def number(self, says: Said, name: str) -> int | None:
        """A value that the recording has told of this fault, or None."""
        told = self.told.get(says)
        value = told.values.get(name) if told is not None else None
        return value if isinstance(value, int) else None
