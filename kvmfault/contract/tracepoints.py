"""Tracepoints: which trace events of an architecture mean what, and how their text reads. Declared by backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from kvmfault.algebra.expr import NEVER, Pred, Word

Fields: TypeAlias = Mapping[str, int | str]
"""Fields of one event by their kernel names."""


class Role(Enum):
    """What an event says."""

    FAULT = "a guest fault, with its registers"
    EXIT = "the guest stopped"
    ENTRY = "the guest runs"
    MMIO = "a device access"
    UNMAP = "a host range is being unmapped"
    AGE = "a host range is aged: access flags are read and cleared"
    TEST_AGE = "a host range is looked at for its access flags"
    USER_EXIT = "KVM_RUN returned"
    UNDECODED = "a device access that the syndrome does not describe"
    ADDRESS = "the guest-physical address of a fault that an earlier event of the vCPU left out"
    CHANGE = "an entry of the second-stage table changed"
    SET = "an entry of the second-stage table was set to map its frames"
    SPLIT = "a large entry is to become a table of small ones"
    CLEAR = "the whole second-stage table is dropped"
    WALK = "KVM walks the guest's own tables"
    WALK_STEP = "one entry of such a walk"
    WALK_FAILED = "such a walk ended in a fault of the guest's own"


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """One event: its role, templates of its text (tried in order), and whose it is."""

    role: Role
    templates: tuple[str, ...]
    """``{name:x}`` hex with or without 0x, ``{name:d}`` decimal, ``{name:w}`` a word."""
    assigned: str | None = None
    """Fields of the ``name=value`` form (``trace-cmd report -R``) as ``"gpa:x len:d val:x?"``; None: the templates'."""
    registers: Callable[[Fields, Fields], Mapping[str, int] | None] | None = None
    """Role FAULT (and EXIT, where an exit alone is a fault): from the event's fields and those of the last exit of the
    same vCPU, the fault registers; None: this event is not a fault of this backend, or its encoding is unknown."""
    needs_exit: bool = False
    """The meaning of the registers is known only from the preceding exit. Without one the TARGET must say; then
    ``registers`` is called with no exit fields."""
    awaits: str = ""
    """Role EXIT with registers: the register whose value is not in the exit; the next ADDRESS or MMIO event of the same
    vCPU brings it."""
    told_by: tuple[str, ...] = ()
    """Roles EXIT, USER_EXIT, WALK_STEP and WALK_FAILED: the fields that tell one such event from another."""
    change: Change | None = None
    """Roles CHANGE, SET and SPLIT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an event says of one entry, as expressions over the event's fields (a field is a register of its name)."""

    frame: Word
    """First frame that the entry maps, in pages of the host."""
    size: Word
    """Bytes that the entry maps; 0: no level of this architecture."""
    removed: Pred = NEVER
    """The entry mapped its frames, and is empty now."""
    protected: Pred = NEVER
    """It still maps them, but no longer for writing."""
    split: Pred = NEVER
    """It mapped a block, and is a table now."""
    joined: Pred = NEVER
    """It was a table, and maps a block now."""
    refused: Pred = NEVER
    """It maps a block, and KVM failed to make a table of it."""


Tracepoints: TypeAlias = Mapping[str, Tracepoint]
"""By event name."""
