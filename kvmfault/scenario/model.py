"""The format of scenario files. The docstrings are its reference: docs/scenarios.md and the schema are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from kvmfault.scenario.events import Event
from kvmfault.scenario.fields import (
    MOST_EVENTS,
    MOST_PARTS,
    MOST_TARGETS,
    PAGE,
    Address,
    Backing,
    Bytes,
    Fd,
    Id,
    Record,
    Setting,
    Word,
)

__all__ = [
    "HVA_BASE",
    "MOST_ACTED",
    "MOST_ACTORS",
    "Actor",
    "Device",
    "Machine",
    "Memfd",
    "Memory",
    "Scenario",
    "Slot",
    "Translation",
]

MOST_ACTORS: Final = 6
MOST_ACTED: Final = 8
"""Events of one actor: the number of interleavings grows with them faster than anything."""
HVA_BASE = 0x7F00_0000_0000
"""User address of guest address 0 where a slot does not say its own."""


class Machine(Record):
    """The VM and its host. Everything is optional; what is left out is as usual on the target."""

    private_memory: Literal["by_attribute", "by_access"] | None = None
    """The VM can have private memory: an access is private where the attribute of its page is (software-protected VM),
    or where the event says so. Switches guest_memfd and memory attributes on."""
    manual_protect: bool = False
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: reading the dirty log does not clear it."""
    initially_set: bool = False
    """With it: new bitmaps are all ones, and nothing is protected before it is cleared."""
    dirty_ring: Bytes | None = None
    """Bytes of each vCPU's dirty ring (16 an entry), instead of bitmaps."""
    invalidations: Word = 0
    """Invalidations that have ended before the first event: where the sequence number begins."""
    policy: Mapping[str, Setting] = {}
    """Other decisions than the target's, as ``--set``: ``userfault = "v3"``."""
    facts: Mapping[str, Setting] = {}
    """Other facts of the VM (VmFacts): ``eager_split = true``."""
    host: Mapping[str, Setting] = {}
    """Other limits of the host (HostCaps): ``userfault = true``."""

    @model_validator(mode="after")
    def _protects(self) -> Machine:
        if self.initially_set and not self.manual_protect:
            raise ValueError("initially_set needs manual_protect = true")
        return self


class Slot(Record):
    """A memslot that exists before the first event, with its host memory."""

    id: Id | None = None
    """Its number; the place in the list if left out."""
    gpa: Address
    """Guest-physical address."""
    size: Bytes
    """Bytes."""
    hva: Address | None = None
    """User address; 0x7f0000000000 + gpa if left out."""
    memory: Backing | Literal["none"] = "anon"
    """What the host has there; "none": nothing, or what ``[[memory]]`` says."""
    as_id: Literal[0, 1] = 0
    """Address space."""
    readonly: bool = False
    """KVM_MEM_READONLY."""
    log_dirty: bool = False
    """KVM_MEM_LOG_DIRTY_PAGES."""
    userfault: bool = False
    """KVM_MEM_USERFAULT (proposed); the machine's host needs ``userfault = true``."""
    memfd: Fd | None = None
    """Number of a ``[[memfd]]`` for private memory."""
    memfd_offset: Address = 0
    """Bytes from the file's start."""


class Memory(Record):
    """Host memory at a user address, for slots with ``memory = "none"``."""

    hva: Address
    """User address."""
    size: Bytes
    """Bytes."""
    kind: Backing = "anon"
    """What it is."""
    readonly: bool = False
    """The host may not write to it either."""


class Device(Record):
    """A device inside the kernel: it takes accesses that lie in its range."""

    gpa: Address
    """Guest-physical address."""
    size: Bytes
    """Bytes."""
    value: Word = 0
    """What loads give."""


class Memfd(Record):
    """A guest_memfd file."""

    id: Fd
    """What slots and events call it."""
    size: Bytes
    """Bytes."""


class Translation(Record):
    """What the guest's own tables make of addresses: its paging when it is shadowed, the second stage of its hypervisor
    when the vCPU runs a nested guest (fact ``nested``). Everywhere else they map every address to itself."""

    address: Address
    """Where the guest, or its guest, goes."""
    size: Bytes
    """Bytes."""
    gpa: Address | None = None
    """Where that is; the same address if left out. ``read`` and the like need it to be the same."""
    block: Bytes = PAGE
    """Bytes that one entry of the guest's maps."""
    present: bool = True
    """False: nothing is mapped there."""
    readable: bool = True
    """The guest's entries allow reads."""
    writable: bool = True
    """The guest's entries allow writes."""
    executable: bool = True
    """The guest's entries allow fetches."""
    user: bool = True
    """User mode may use them."""


class Actor(Record):
    """Somebody who acts beside others, in any order with them: what ``explore`` interleaves, action by action."""

    name: Annotated[str, Field(pattern=r"^([a-z][a-z0-9_-]{0,15})?$")] = ""
    """What it is called; of accesses the vCPU's name if left out, of others "host", "slots" and the like."""
    event: Annotated[tuple[Event, ...], Field(min_length=1, max_length=MOST_ACTED)]
    """What it does, in order; the accesses of an actor are those of one vCPU."""


class Scenario(Record):
    """A scenario file."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    """One line."""
    targets: Annotated[tuple[str, ...], Field(max_length=MOST_TARGETS)] = ()
    """Where it is meant to run: BACKEND[:FORMAT][@KERNEL]. The default target of every backend if left out."""
    machine: Machine = Machine()
    """The VM and its host."""
    slot: Annotated[tuple[Slot, ...], Field(max_length=MOST_PARTS)] = ()
    """Memslots before the first event."""
    memory: Annotated[tuple[Memory, ...], Field(max_length=MOST_PARTS)] = ()
    """Host memory beside that of slots."""
    device: Annotated[tuple[Device, ...], Field(max_length=MOST_PARTS)] = ()
    """Devices inside the kernel."""
    memfd: Annotated[tuple[Memfd, ...], Field(max_length=MOST_PARTS)] = ()
    """guest_memfd files."""
    guest: Annotated[tuple[Translation, ...], Field(max_length=MOST_PARTS)] = ()
    """The guest's own tables, where they do not map an address to itself."""
    event: Annotated[tuple[Event, ...], Field(max_length=MOST_EVENTS)] = ()
    """What happens, in order; before the actors act, if there are any."""
    actor: Annotated[tuple[Actor, ...], Field(max_length=MOST_ACTORS)] = ()
    """Who acts beside whom."""
    mutant: str = ""
    """A bug of the past that the kernel is given back: a name of ``explore --list``."""
    schedule: Annotated[tuple[str, ...], Field(max_length=MOST_EVENTS)] = ()
    """Whose turn it is, action by action, one order of all that are possible: an actor's name, or its name and what it
    then does (``"vcpu0 pin"``), which has to be so."""

    @model_validator(mode="after")
    def _something_happens(self) -> Scenario:
        if not (self.event or self.actor):
            raise ValueError("has neither an event nor an actor: nothing happens")
        if (self.schedule or self.mutant) and not self.actor:
            raise ValueError("has a schedule or a mutant, which are for scenarios with actors")
        if self.schedule and len(self.targets) != 1:
            raise ValueError("has a schedule, which is for one target: name it in targets")
        return self
