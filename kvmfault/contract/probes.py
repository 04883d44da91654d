"""Probes: what kernel functions that somebody probed tell of KVM's decisions, as trace events beside the faults do.

A backend declares them; whoever compares the model with a recording reads only what is said here, in neutral words:
sizes in bytes, answers as in ``answer_text``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, unique
from errno import errorcode
from typing import Final, TypeAlias

from kvmfault.contract.outcome import (
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    NeedsGuestWalk,
    Outcome,
    Resume,
    Retry,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.tracepoints import Role, Values
from kvmfault.vm.guest_tables import GuestTranslation, GuestWalkFault

__all__ = [
    "CONTINUE",
    "DEVICE_ACCESS",
    "EMULATE",
    "FIXED",
    "RETRY",
    "SAID",
    "SPURIOUS",
    "UNDECODED_ACCESS",
    "WRITE_PROTECTED",
    "GuestWalk",
    "Probe",
    "Probes",
    "Said",
    "answer_text",
    "error_text",
    "fields",
    "number",
]


@unique
class Said(Enum):
    """What a probe says of the task that hit it, and the values that it may bring; what was not recorded is missing."""

    FAULT = "the exit handler takes on a fault: its registers, or address and the kernel's own accessors"
    RETURNED = "the exit handler is done with it: ret (1 guest runs on, 0 left to user space, -errno)"
    DECIDED = "the fault machinery decided: answer, gfn, prefetch, max_size, wanted, size, vetoed (code in blocks)"
    PINNED = (
        "the host was asked for the page: answer, gfn, slot (absent: none), pfn or error, hva, writable, and prot "
        "(what the guest's own tables allow)"
    )
    REQUESTED = "under the lock, with a page and a size: gfn, pfn (absent: no memslot), size"
    REPAIR_TRIED = "a repair without the slow path was tried: answer, gfn"
    REPAIRED = "what that repair saw and left: gpa, old, new (descriptors)"
    MAPPING = "a leaf is about to be installed: gpa, size, hpa, prot (R/W/X bits), memory"
    MAPPED = "installing a leaf ended: answer, gfn, slot, flags, hva, pfn, writable, max_size, wanted, size, vetoed"
    RELAXING = "permissions are about to be added to a leaf: gpa, prot, memory"
    RELAXED = "permissions were added: answer"
    MAKING_YOUNG = "a leaf is about to be marked as used: gpa"
    SETTING = "a leaf is about to be set: slot, gfn, pfn, prot, place (which entry of which table)"
    SET = "setting a leaf ended: answer, gfn"
    INSTALLED = "a leaf was installed: gpa (of the shadowed guest: its frame), size, desc, place"
    CHANGED = "an entry was changed, by whoever it was: as_id, gpa, size, old, new (descriptors)"
    MMIO_INSTALLED = "an entry that remembers MMIO was installed: gpa, generation"
    INJECTED = "an exception is given to the guest: what, address"
    DEVICE = "the access goes to no memory: gpa"
    EMULATING = "the emulator begins: address"
    EMULATED = "the emulator is done: ret"
    WRITES = "the emulator writes to memory of the guest: gpa, size"
    UNSYNC = "may the frame be made writable: gfn"
    UNSYNCED = "whether it may: ret"
    PREFAULT = "KVM_PRE_FAULT_MEMORY handles one address: gpa, size"
    PREFAULTED = "KVM_PRE_FAULT_MEMORY is done with it: ret (bytes, or -errno)"
    DEFERRED = "the page is fetched in the background: gpa"
    SLOT = "user space asks for a change of a memslot (the request is read by trace.slotfile)"
    SLOT_DONE = "the request was answered: ret"
    SLOT_CHANGING = "an accepted memslot request is carried out: kind (a ChangeKind)"
    SLOT_FLUSH = "what a slot maps is taken away before it goes or moves: slot, gfn, pages"
    SLOT_CHANGED = "the memslot request was carried out: ret"
    TABLE_RETIRED = "every table of the VM is thrown away: vm"
    WRITES_WATCHED = "logging begins: every page of the slot is to be noticed: slot"
    BLOCKS_SPLIT = "logging begins: blocks are split: slot, size (down to)"
    BLOCKS_RECOVERED = "logging ended: blocks are looked for: slot"
    INVALIDATE = "a host range begins to be invalidated: start, end (user addresses)"
    INVALIDATED = "its invalidation is over: start, end"
    UNMAP = "frames of a slot are taken out of the tables: slot, start, end"
    UNMAPPED = "they are: flush (something was mapped)"
    AGE = "frames of a slot are aged: slot, start, end"
    TEST_AGE = "frames of a slot are looked at for their use: slot, start, end"
    RANGE_UNMAPPED = "addresses are taken out of the table, whoever asked: gpa, size"
    RANGE_PROTECTED = "their write permission is taken: gpa, size"
    RANGE_AGED = "their access flags are looked at: gpa, size, clear"
    GET_LOG = "KVM_GET_DIRTY_LOG: slot"
    GOT_LOG = "KVM_GET_DIRTY_LOG ended: ret"
    CLEAR_LOG = "KVM_CLEAR_DIRTY_LOG: slot, first, pages"
    CLEARED_LOG = "KVM_CLEAR_DIRTY_LOG ended: ret"
    LOG_PROTECT = "pages of a slot are to be noticed again: slot, first, mask"
    WALK = "the guest's own tables are walked: address"
    WALK_ENTRY = "an entry of them was read: desc, level"
    WALK_MARKED = "the walk marked an entry of them as used or written: gpa (of that entry)"
    WALK_FAILED = "they do not translate the address: code"
    SHADOWED = "a table page stands for a table of the guest: gfn, level, direct"
    UNSHADOWED = "that table page is given up: gfn, level, direct"
    SYNCED = "a table page follows its table of the guest again: gfn, level"


SAID: Final = {
    Role.REQUESTED: Said.REQUESTED,
    Role.REPAIRED: Said.REPAIRED,
    Role.SET: Said.INSTALLED,
    Role.CHANGE: Said.CHANGED,
    Role.REMEMBERED: Said.MMIO_INSTALLED,
    Role.WALK: Said.WALK,
    Role.WALK_STEP: Said.WALK_ENTRY,
    Role.WALK_MARKED: Said.WALK_MARKED,
    Role.WALK_FAILED: Said.WALK_FAILED,
    Role.SHADOWED: Said.SHADOWED,
    Role.SYNCED: Said.SYNCED,
    Role.UNSHADOWED: Said.UNSHADOWED,
}
"""What a trace event that `Tells` something says, by its role."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One probed function. *read* makes the values out of the recorded fields, or None: nothing."""

    says: Said
    read: Callable[[Values], Values | None]
    sizes: tuple[str, ...] = ()
    """Recorded fields of which *read* makes ``wanted`` and ``size``, once for each fault."""
    compared: str = ""
    """Recorded fields, between blanks, that a check compares with what the model decides or another event tells."""
    taken: Mapping[str, str] = field(default_factory=dict)
    """Recorded fields (several between blanks) that are inputs of the model, or of no meaning to it -> why."""


GuestWalk: TypeAlias = Callable[[Sequence[tuple[int, int]], int, bool], GuestTranslation | GuestWalkFault | None]
"""(entries as (descriptor, level), address, is it a write) -> where they lead; None: the walk is not over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """All that a backend knows of probed functions."""

    entries: Mapping[str, Probe] = field(default_factory=dict)
    """By kernel function: what its call says."""
    returns: Mapping[str, Probe] = field(default_factory=dict)
    """By kernel function: what its return says."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Kprobe event -> kernel function, where recordings name the event otherwise."""
    address: str = ""
    """The register that holds what probes call ``address``; "": none does."""
    walk: GuestWalk | None = None
    """What the entries that a walk of the guest's own tables read mean."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Kernel functions that recordings probe and of which nothing is read -> why."""
    settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Kernel function or trace event -> settings of the target that a recording of it shows."""

    @property
    def slots(self) -> frozenset[str]:
        """Functions whose calls ask for memslots."""
        return frozenset(name for name, probe in self.entries.items() if probe.says is Said.SLOT)

    def function(self, event: str) -> str | None:
        """The function that a kprobe event of this name is on; None: it is not known. For binary recordings, which tell
        an address. Events are named as in ``names`` or after the function, with what tools add: ``p_F_0``,
        ``F__return``, ``F_ret``."""
        name = event.rpartition(":")[2]
        for given in (name, _ADDED.sub("", name)):
            function = self.names.get(given, given)
            if function in self.entries or function in self.returns:
                return function
        return None


_ADDED: Final = re.compile(r"^[pr]_|_{1,2}(?:ret|return|exit|entry)(?:_\d+)?$|_\d+$")
RETRY: Final = "retry"
EMULATE: Final = "emulate"
DEVICE_ACCESS: Final = "device access"
"""What an event of such an access tells: not whether the instruction is emulated or the hardware has decoded it."""
UNDECODED_ACCESS: Final = "undecoded device access"
"""Of one that the syndrome does not describe: not whether it fails or is left to user space."""
WRITE_PROTECTED: Final = "write-protected"
FIXED: Final = "fixed"
SPURIOUS: Final = "spurious"
CONTINUE: Final = "continue"
"""Nothing was decided yet."""


def error_text(errno: int) -> str:
    """The answer of a failure; *errno* positive."""
    return f"error {errorcode.get(errno, errno)}"


def answer_text(outcome: Outcome) -> str:
    """An outcome of the fault machinery in the words that probes use."""
    match outcome:
        case Fixed():
            return FIXED
        case Spurious():
            return SPURIOUS
        case Emulate():
            return EMULATE
        case WriteProtected():
            return WRITE_PROTECTED
        case Error(errno) | Exit(errno=errno) | Inject(errno=errno) if errno:
            return error_text(errno)
        case Retry() | Inject() | Resume():
            return RETRY
        case Exit(reason):
            return f"exit {reason}"
        case NeedsGuestWalk():
            return "needs guest walk"
        case _:
            return str(outcome)


def fields(*names: str, **renamed: str) -> Callable[[Values], Values]:
    """Reads fields under their recorded names, and others as ``neutral=recorded``; those not recorded are left out."""
    table = {**{name: name for name in names}, **renamed}

    def read(recorded: Values) -> Values:
        return {neutral: recorded[name] for neutral, name in table.items() if name in recorded}

    return read


def number(recorded: Values, name: str) -> int:
    """A recorded field as a number, 0 where it is missing. Raises ValueError for other words."""
    value = recorded.get(name, 0)
    return value if isinstance(value, int) else int(value, 0)
