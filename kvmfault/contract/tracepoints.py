"""Tracepoints: which trace events of an architecture mean what, how their text reads, and what they say of a fault.

Everything here is data, and each event is declared once: replay, check, summary, columns and the live view ask its
role, its address and what tells it from others. What an event says are expressions of the algebra whose registers are
the event's fields (`recorded`), so one definition serves a row and a million of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from errno import errorcode
from functools import cached_property
from typing import Final, TypeAlias

from kvmfault.algebra.expr import NEVER, Pred, Word
from kvmfault.algebra.layout import Field, register

__all__ = [
    "LOCATING",
    "REPLAYED",
    "Change",
    "Fields",
    "Printed",
    "Role",
    "Sort",
    "Tells",
    "Tracepoint",
    "Tracepoints",
    "Values",
    "Words",
    "recorded",
    "words",
]

Fields: TypeAlias = Mapping[str, int | str | bytes]
"""Fields of one event by their kernel names, without those that the recording leaves out."""
Values: TypeAlias = Mapping[str, int | str]
"""What an event or a probe tells, by neutral names (`kvmfault.contract.probes.Said`)."""


class Sort(Enum):
    """What the live view counts."""

    FAULT = "faults"
    """Guest faults, by an event of their own."""
    HANDLED = "handled"
    """Faults by how they were handled: counted as faults where those have no event."""
    ENTRY = "entries"
    """Entries of the second-stage table set or changed."""
    MMIO = "mmio"
    """Accesses to devices."""
    INVALIDATION = "invalidations"
    """What the host does to a range of the process's memory: unmap, age."""
    EXIT = "exits"
    """The guest stopped."""
    USER_EXIT = "user exits"
    """KVM_RUN returned."""
    WALK = "walks"
    """KVM walked the guest's own tables."""

    def __str__(self) -> str:
        return self.value


class Role(Enum):
    """What an event says."""

    FAULT = "a guest fault, with its registers"
    EXIT = "the guest stopped"
    ENTRY = "the guest runs"
    MMIO = "a device access"
    SIGNAL = "a device access of which only the address counts"
    UNDECODED = "a device access that the syndrome does not describe"
    UNMAP = "a host range is being unmapped"
    AGE = "a host range is aged: access flags are read and cleared"
    TEST_AGE = "a host range is looked at for its access flags"
    REPLACED = "another page took the place of a host page"
    USER_EXIT = "KVM_RUN returned"
    ADDRESS = "the guest-physical address of the access that is emulated"
    REQUESTED = "a fault has a page, and asks for an entry"
    REPAIRED = "a fault was repaired, or not, without the slow path"
    RECALLED = "a fault met an entry that remembers a device"
    REMEMBERED = "an entry that remembers a device was set"
    YOUNG = "an access flag was set for a fault"
    CHANGE = "an entry of the second-stage table changed"
    SET = "an entry of the second-stage table was set for a fault"
    SPLIT = "a large entry is to become a table of small ones"
    CLEAR = "the whole second-stage table is dropped"
    WALK = "KVM walks the guest's own tables"
    WALK_STEP = "one entry of such a walk"
    WALK_MARKED = "such a walk marked an entry as used or written"
    WALK_FAILED = "such a walk ended in a fault of the guest's own"
    SHADOWED = "a table page stands for a table of the guest"
    SYNCED = "a table page follows its table of the guest again"
    UNSHADOWED = "a table page is given up"

    @property
    def sort(self) -> Sort | None:
        """What the live view counts it as; None: not at all."""
        return _SORTS.get(self)


REPLAYED: Final = frozenset(
    {
        Role.FAULT, Role.EXIT, Role.ENTRY, Role.MMIO, Role.SIGNAL, Role.UNDECODED, Role.UNMAP, Role.AGE, Role.TEST_AGE,
        Role.USER_EXIT, Role.ADDRESS, Role.REQUESTED,
    }
)  # fmt: skip
"""What replay makes use of."""
LOCATING: Final = frozenset({Role.MMIO, Role.SIGNAL, Role.ADDRESS, Role.REQUESTED})
"""What brings the address of a fault that an exit of the vCPU left out."""
_SORTS: Final = {
    Role.FAULT: Sort.FAULT,
    **dict.fromkeys((Role.REQUESTED, Role.REPAIRED, Role.RECALLED), Sort.HANDLED),
    **dict.fromkeys((Role.CHANGE, Role.SET, Role.SPLIT, Role.YOUNG), Sort.ENTRY),
    **dict.fromkeys((Role.MMIO, Role.SIGNAL, Role.UNDECODED), Sort.MMIO),
    **dict.fromkeys((Role.UNMAP, Role.AGE, Role.TEST_AGE, Role.REPLACED), Sort.INVALIDATION),
    Role.EXIT: Sort.EXIT,
    Role.USER_EXIT: Sort.USER_EXIT,
    Role.WALK: Sort.WALK,
}


@dataclass(frozen=True)
class Words:
    """Words that text has in place of numbers. ``told`` reads them, ``name`` gives them."""

    of: str
    """The field that they stand for."""
    values: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Word, or words, -> fields that it tells, ``of`` among them. Of several words for the same, the first is shown."""
    flags: Mapping[str, int] = field(default_factory=dict)
    """Word -> bits, joined by ``|`` or a space, alone or behind a value."""

    def told(self, text: str) -> Mapping[str, int]:
        """Fields by *text*, empty if it has a word that is not known. Numbers may stand for words."""
        if text in self.values:
            return self.values[text]
        first, *rest = re.split(r"[| ]", text, maxsplit=16)
        fields = dict(self.values.get(first, {}))
        number = fields.get(self.of, 0)
        for word in rest if fields else (first, *rest):
            bits = self.flags.get(word)
            if bits is None and re.fullmatch(_NUMBER, word):
                bits = int(word, 0)
            if bits is None:
                return {}
            number |= bits
        return {**fields, self.of: number}

    def name(self, fields: Fields) -> str:
        """Words for the number in *fields*, or the number itself; ``?`` if it is not there."""
        number = fields.get(self.of)
        if not isinstance(number, int):
            return "?" if number is None else str(number)
        for keys, names in self._names.items():
            known = [fields.get(key) for key in keys]
            flags = [word for word, bit in self.flags.items() if number & bit]
            at = keys.index(self.of)
            for known[at], shown in ((number, []), (number & ~sum(self.flags[word] for word in flags), flags)):
                if (word := names.get(tuple(known))) is not None:
                    return " ".join([word, *shown])
        return str(number) if number < 1 << 16 else hex(number)

    @cached_property
    def _names(self) -> dict[tuple[str, ...], dict[tuple[object, ...], str]]:
        names: dict[tuple[str, ...], dict[tuple[object, ...], str]] = {}
        for word, told in self.values.items():
            names.setdefault(tuple(told), {}).setdefault(tuple(told.values()), word)
        return names


def words(of: str, flags: Mapping[str, int] | None = None, /, **values: int) -> Words:
    """Words that tell nothing but their own number."""
    return Words(of, {word: {of: value} for word, value in values.items()}, flags or {})


@dataclass(frozen=True, slots=True)
class Printed:
    """A template, and what it tells without printing it."""

    template: str
    implied: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tells:
    """What an event tells a check, under the names of `Said`. *read* makes it out of the fields, or None: nothing."""

    read: Callable[[Values], Values | None]
    templates: tuple[str, ...] = ()
    """How its text reads, where the templates of the event leave out what is told."""


@dataclass(frozen=True, slots=True)
class Tracepoint:
    """One event: its role, templates of its text (tried in order), its fields, and what it says."""

    role: Role | None
    """None: of no concern to anybody, but read into columns."""
    templates: tuple[str | Printed, ...]
    """See `kvmfault.trace.pattern.Pattern`."""
    fields: str = ""
    """In the kernel's order, with the base in which ``name=value`` (``trace-cmd report -R``) prints them:
    ``"gpa:x len:d errno:i val:x?"``; i is signed, ``?`` may be missing. Empty: those of the templates."""
    words: Mapping[str, Words] = field(default_factory=dict)
    """Field -> the words that stand for it."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Field -> the value that expressions take where the text leaves it out."""
    registers: Mapping[str, Word] | None = None
    """Role FAULT (and EXIT, where an exit alone is a fault): fault registers, over the event's fields."""
    when: Pred | None = None
    """Which exits, over their fields: for role FAULT the last one of the vCPU, for role EXIT this one. None: any. Where
    no exit was recorded, the TARGET must say what the faults are."""
    awaits: str = ""
    """Role EXIT with registers: the register whose value is not in the exit; the next LOCATING event of the same vCPU
    brings it. Empty: the exit has them all."""
    vcpu: str = ""
    """Roles FAULT and EXIT: the field with the vCPU's number. Empty: the event has none, a task stands for its vCPU."""
    told_by: tuple[str, ...] = ()
    """Fields that tell one kind of the event from another, where they are counted."""
    address: Word | None = None
    """Guest-physical address that it is about; a fault has its registers."""
    change: Change | None = None
    """Roles CHANGE, SET and SPLIT."""
    tells: Tells | None = None
    """What a check learns from it; None: no more than its role."""

    @property
    def needs_exit(self) -> bool:
        """The meaning of the registers is known only from the exit before the event."""
        return self.role is Role.FAULT and self.when is not None

    def kind(self, fields: Mapping[str, int | None]) -> str:
        """What the fields that tell kinds of it apart mean: words, or numbers where there are none."""
        known = {name: value for name, value in fields.items() if value is not None}
        if (failed := known.get("errno", 0)) < 0:  # then the reason says nothing
            return f"error {errorcode.get(-failed, failed)}"
        there = [name for name in self.told_by if name in known]
        parts = [(name, self.words[name].name(known)) for name in there if name in self.words]
        if not parts:
            return ", ".join(f"{name} {known[name]}" for name in there)
        return ", ".join(word for n, (name, word) in enumerate(parts) if not n or known[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an event says of the entry at its address, as expressions over its fields."""

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


def recorded(name: str, hi: int = 63, lo: int = 0) -> Field:
    """Bits hi:lo of an event's field, as a register of the algebra."""
    return register(name, 64, "a field of a trace event").field_at(hi, lo)


_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0|[1-9]\d{0,19}")
