"""Tracepoints: which trace events of an architecture mean what, how their text reads, and what they say of a fault.

Everything here is data. What an event says of a fault are expressions of the algebra whose registers are the event's
fields (`recorded`), so one definition serves a row and a million of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Final, TypeAlias

from kvmfault.algebra.expr import NEVER, Pred, Word
from kvmfault.algebra.layout import Field, register

__all__ = ["Change", "Fields", "Printed", "Role", "Tracepoint", "Tracepoints", "Words", "recorded", "words"]

Fields: TypeAlias = Mapping[str, int | str | bytes]
"""Fields of one event by their kernel names, without those that the recording leaves out."""


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
    SET = "an entry of the second-stage table was set for a fault"
    SPLIT = "a large entry is to become a table of small ones"
    CLEAR = "the whole second-stage table is dropped"
    WALK = "KVM walks the guest's own tables"
    WALK_STEP = "one entry of such a walk"
    WALK_FAILED = "such a walk ended in a fault of the guest's own"


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
class Tracepoint:
    """One event: its role, templates of its text (tried in order), its fields, and what it says of a fault."""

    role: Role | None
    """None: of no concern to replay, but read into columns."""
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
    """Role EXIT with registers: the register whose value is not in the exit; the next ADDRESS or MMIO event of the same
    vCPU brings it."""
    vcpu: str = ""
    """Roles FAULT and EXIT: the field with the vCPU's number. Empty: the event has none, a task stands for its vCPU."""
    told_by: tuple[str, ...] = ()
    """Fields that tell one exit, return to user space or step of a walk from another, for a summary."""
    change: Change | None = None
    """Roles CHANGE, SET and SPLIT."""

    @property
    def needs_exit(self) -> bool:
        """The meaning of the registers is known only from the exit before the event."""
        return self.role is Role.FAULT and self.when is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an event says of one entry of the second-stage table, as expressions over the event's fields."""

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


def recorded(name: str, hi: int = 63, lo: int = 0) -> Field:
    """Bits hi:lo of an event's field, as a register of the algebra."""
    return register(name, 64, "a field of a trace event").field_at(hi, lo)


_NUMBER: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0|[1-9]\d{0,19}")
