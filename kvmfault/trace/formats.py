"""Event formats: where the fields of an event lie, read from the kernel's own format texts.

A recording carries the format of every event of its kernel, thousands of them. Only name and number of each are read
at once; a format is parsed in full when it is asked for.

>>> text = b'''name: fault
... ID: 7
... format:
... \\tfield:unsigned short common_type; offset:0; size:2; signed:0;
... \\tfield:int common_pid; offset:4; size:4; signed:1;
...
... \\tfield:u64 gpa; offset:8; size:8; signed:0;
...
... print fmt: "gpa %llx", REC->gpa
... '''
>>> formats = Formats("a.dat", [FormatText("kvm", text)])
>>> formats.names, [field.name for field in formats["fault"].fields]
({7: 'fault'}, ['gpa'])
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from kvmfault.errors import TraceError

__all__ = [
    "KVM_SYSTEMS",
    "PAGE_SIZES",
    "EventFormat",
    "Field",
    "FormatText",
    "Formats",
    "Kind",
    "Names",
    "PageHeader",
    "Place",
    "header_page",
    "task_names",
]

KVM_SYSTEMS: Final = ("kvm", "kvmmmu")
PAGE_SIZES: Final = tuple(1 << n for n in range(9, 27))
"""Sizes that a page, or a sub-buffer, may have."""
_LINE: Final = re.compile(rb"[^\n]*\S[^\n]*")
_PROBES: Final = (b"__probe_ip", b"__probe_func", b"__probe_ret_ip")
_LARGEST: Final = 1 << 16
"""Bytes of an event: the length in a __data_loc has 16 bits."""

_HEAD: Final = re.compile(rb"\s*name: *(\S{1,200})\s+ID: *(\d{1,5})\s+format:").match
_FIELD: Final = re.compile(
    rb"\tfield: ?([^;]{1,400});\s*offset:(\d{1,6});\s*size:(\d{1,6});(?:\s*signed:([01]);)?[^\n]*(?:\n|$)"
).match
_ARRAY: Final = re.compile(r"\[[^\]]*\]")
_TABLE: Final = re.compile(r"__print_(symbolic|flags)(?:_u64)?\s*\(")
_PAIR: Final = re.compile(r'\{\s*([^{}"]{1,100}?)\s*,\s*"((?:[^"\\]|\\.)*)"\s*\}')
_SHIFT: Final = re.compile(r"\(*\s*(\d\w*)\s*<<\s*\(?\s*(\d\w*)\s*\)*")


class Kind(Enum):
    """What a field holds."""

    NUMBER = "an integer or pointer of 1, 2, 4 or 8 bytes"
    TEXT = "text, ended by NUL"
    BYTES = "an array of anything else"


class Place(Enum):
    """Where the bytes of a field lie."""

    HERE = "at the field's offset"
    DATA = "at an offset from the start of the event, told by the field (__data_loc)"
    AFTER = "at an offset from the end of the field, told by the field (__rel_loc)"


class Field(NamedTuple):
    """One field of an event. ``size`` 0: up to the end of the record."""

    name: str
    declaration: str
    offset: int
    size: int
    signed: bool
    kind: Kind
    place: Place


class Names(NamedTuple):
    """Words that a print format has for numbers (__print_symbolic, or __print_flags if ``flags``)."""

    of: str
    """The expression they are for, as it stands there: ``REC->exit_reason``."""
    flags: bool
    words: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class FormatText:
    """A format not yet parsed; ``offset`` says where in the file it stands."""

    system: str
    text: bytes
    offset: int = 0


@dataclass(frozen=True, slots=True)
class EventFormat:
    """The layout of one event of this recording."""

    name: str
    """What frames call it: the kernel's name, with the system before it if another event of interest has that name."""
    system: str
    id: int
    fields: tuple[Field, ...]
    """The event's own."""
    pid: int
    """Offset of common_pid."""
    size: int
    """Bytes that every record of it has at least."""
    print_format: str

    def tables(self) -> list[Names]:
        """The words of its print format, in the order they stand there."""
        return list(_tables(self.print_format))


class Formats(Mapping[str, EventFormat]):
    """The formats of one recording, by event name, parsed when asked for.

    A text that is no format is left out and told in ``damage`` with its offset; raises TraceError if all are such. That
    of an event is read in full, and raises TraceError, only when it is asked for.
    """

    def __init__(self, path: str, texts: Iterable[FormatText]) -> None:
        self.path = path
        self.names: dict[int, str] = {}
        """Of every event, by the number that records carry."""
        self.damage: list[TraceError] = []
        self._texts: dict[str, FormatText] = {}
        self._ids: dict[str, int] = {}
        self._parsed: dict[str, EventFormat] = {}
        rank = {name: n for n, name in enumerate(KVM_SYSTEMS)}
        for text in sorted(texts, key=lambda t: rank.get(t.system, len(rank))):
            if not text.text.strip():
                continue
            head = _HEAD(text.text)
            if head is None:
                found = f"expected 'name: EVENT, ID: NUMBER, format:', found {text.text[:40]!r}"
                self.damage.append(TraceError(found, path=path, offset=text.offset))
                continue
            number, name = int(head[2]), head[1].decode(errors="replace")
            if number in self.names:
                continue
            if name in self._texts:
                name = f"{text.system}:{name}"
            self.names[number] = name
            self._texts[name] = text
            self._ids[name] = number
        if self.damage and not self.names:
            raise self.damage[0]

    def chosen(self, wanted: Collection[str] | None) -> tuple[dict[int, EventFormat], list[TraceError]]:
        """Of the events in *wanted*, or all: those that can be read, by number, and what is wrong with the others.
        Raises TraceError if none can be read."""
        found: dict[int, EventFormat] = {}
        wrong: list[TraceError] = []
        for number, name in self.names.items():
            if wanted is None or name in wanted:
                try:
                    found[number] = self[name]
                    wrong += self._strays(name, self._texts[name])
                except TraceError as e:
                    wrong.append(e)
        if wrong and not found:
            raise wrong[0]
        return found, self.damage + wrong

    def __getitem__(self, name: str) -> EventFormat:
        if name not in self._parsed:
            self._parsed[name] = self._parse(name, self._texts[name])
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def probes(self) -> frozenset[str]:
        """Kprobe events."""
        return frozenset(name for name, t in self._texts.items() if any(mark in t.text for mark in _PROBES))

    def of_interest(self) -> frozenset[str]:
        """Events that say something of faults: all of KVM's own, and everything a user probed (kprobe events)."""
        groups = {t.system for t in self._texts.values() if any(mark in t.text for mark in _PROBES)}
        groups |= {*KVM_SYSTEMS, ""}  # without a system: someone chose these formats
        return frozenset(name for name, t in self._texts.items() if t.system in groups)

    def _strays(self, name: str, text: FormatText) -> Iterator[TraceError]:
        # a line that describes something, and not as a field does
        head = text.text.partition(b"print fmt:")[0]
        body = head.find(b"format:")
        for line in _LINE.finditer(head, body + len(b"format:") if body >= 0 else 0):
            if not line[0].startswith(b"\tfield:"):
                shown = line[0][:40].decode(errors="replace")
                yield self._wrong(text, line.start(), f"{name}: expected 'field:...', found {shown!r}: left out")

    def _parse(self, name: str, text: FormatText) -> EventFormat:
        head, sep, print_format = text.text.partition(b"print fmt:")
        fields = []
        start = head.find(b"\tfield:")
        while start >= 0:
            m = _FIELD(head, start)
            if m is None:
                raise self._wrong(text, start, f"{name}: expected 'field:...; offset:N; size:N; signed:0|1;'")
            field = _field(m)
            if field is None or field.offset + field.size > _LARGEST:
                shown = m[0].decode(errors="replace").strip()
                raise self._wrong(text, start, f"{name}: no field can be like this: {shown!r}")
            fields.append(field)
            start = head.find(b"\tfield:", m.end() - 1)
        own = tuple(field for field in fields if not field.name.startswith("common_"))
        common = {field.name: field for field in fields if field.name.startswith("common_")}
        kind, pid = common.get("common_type"), common.get("common_pid")
        if kind is None or (kind.offset, kind.size) != (0, 2) or pid is None or pid.size != 4:
            raise self._wrong(text, 0, f"{name}: expected common_type (2 bytes at 0) and common_pid (4 bytes)")
        return EventFormat(
            name,
            text.system,
            self._ids[name],
            own,
            pid.offset,
            max(field.offset + field.size for field in fields),
            print_format.decode(errors="replace").strip() if sep else "",
        )

    def texts(self) -> dict[str, list[bytes]]:
        """Every format as it was given, by system."""
        systems: dict[str, list[bytes]] = {}
        for text in self._texts.values():
            systems.setdefault(text.system, []).append(text.text)
        return systems

    def _wrong(self, text: FormatText, byte: int, message: str) -> TraceError:
        return TraceError(message, path=self.path, offset=text.offset + byte)


class PageHeader(NamedTuple):
    """How ring-buffer pages are laid out, in bytes."""

    data: int
    """Where records begin."""
    long: int
    """The kernel's long."""
    page: int
    """Size of a page, or of a sub-buffer where that is larger."""


def header_page(text: bytes, *, path: str, offset: int) -> PageHeader:
    """What a header_page text says. Raises TraceError."""
    found: dict[bytes, tuple[int, int]] = {}
    for line in re.finditer(rb"field: ?[^;\n]*?(\w+);\s*offset:(\d{1,6});\s*size:(\d{1,9});", text):
        found.setdefault(line[1], (int(line[2]), int(line[3])))
    stamp, commit, data = found.get(b"timestamp"), found.get(b"commit"), found.get(b"data")
    if stamp != (0, 8) or commit not in ((8, 8), (8, 4)) or data is None or data[0] != 8 + commit[1]:
        raise TraceError(
            "header_page: expected timestamp (8 bytes at 0), commit (4 or 8 at 8) and data right after",
            path=path,
            offset=offset,
        )
    return PageHeader(data[0], commit[1], data[0] + data[1])


def task_names(text: bytes) -> dict[int, str]:
    """Tasks by pid, from lines ``PID NAME`` as in saved_cmdlines. Other lines are skipped."""
    lines = (line.partition(b" ") for line in text.split(b"\n"))
    return {
        int(pid): name.rstrip(b"\0").decode(errors="replace")
        for pid, _, name in lines
        if name and len(pid) < 11 and pid.isdigit()
    }


def _field(m: re.Match[bytes]) -> Field | None:
    declaration = " ".join(m[1].decode(errors="replace").split())
    offset, size, signed = int(m[2]), int(m[3]), m[4] == b"1"
    place = Place.HERE
    for word, where in (("__data_loc ", Place.DATA), ("__rel_loc ", Place.AFTER)):
        if declaration.startswith(word):
            declaration, place = declaration.removeprefix(word), where
    array = _ARRAY.search(declaration) is not None or place is not Place.HERE
    words = _ARRAY.sub(" ", declaration).replace("*", " * ").split()
    if len(words) < 2 or (place is not Place.HERE and size != 4):
        return None
    name, base = words[-1], words[:-1]
    if array and base[-1] == "char" and "unsigned" not in base:
        kind = Kind.TEXT
    elif array or size not in (1, 2, 4, 8):
        kind = Kind.BYTES
    else:
        kind = Kind.NUMBER
    return Field(name, declaration, offset, size, signed and "*" not in base, kind, place)


def _tables(text: str) -> Iterator[Names]:
    for m in _TABLE.finditer(text):
        depth, end, quoted = 1, m.end(), False
        while end < len(text) and depth:
            c = text[end]
            if c == '"' and text[end - 1] != "\\":
                quoted = not quoted
            elif not quoted:
                depth += (c == "(") - (c == ")")
            end += 1
        inside = text[m.end() : end - 1]
        pairs = ((_number(pair[1]), pair[2]) for pair in _PAIR.finditer(inside))
        words = {number: word for number, word in pairs if number is not None}
        yield Names(inside.split(",", 1)[0].strip(), m[1] == "flags", words)


def _number(text: str) -> int | None:
    # what format texts have: numbers with a suffix, and shifts of them
    if m := _SHIFT.fullmatch(text):
        one, by = _number(m[1]), _number(m[2])
        return one << by if one is not None and by is not None and by < 64 else None
    try:
        return int(text.strip("() ").rstrip("uUlL"), 0)
    except ValueError:
        return None
