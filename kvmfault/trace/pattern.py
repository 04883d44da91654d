"""How the body of a recorded event reads, declared once per event and compiled once.

A kernel, a kernel version and a tool each print the same fields in their own words: an event has one
`Pattern` with a template for each of these, and all of them give the kernel's field names.

>>> from kvmfault.contract.tracepoints import words
>>> mmio = Pattern("mmio {type:w} len {len:d} gpa {gpa:x}", assigned="type:d len:d gpa:x",
...                words={"type": words("type", read=1, write=2)})
>>> mmio.read("mmio read len 4 gpa 0xfee000f0")
Fields(numbers={'type': 1, 'len': 4, 'gpa': 4276093168}, words={})
>>> mmio.read("type=1 len=4 gpa=0xfee000f0").numbers["type"]
1
>>> str(mmio.read("mmio read len four"))
"expected len as a number, found 'four'"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from kvmfault.contract.tracepoints import Printed, Tracepoint, Words
from kvmfault.errors import LayoutError

__all__ = ["Fields", "Misfit", "Pattern", "Value"]

_FIELD: Final = re.compile(r"\{(\w*):([xdinwpb])\}")
_SPEC: Final = re.compile(r"(\w+):([xdiwb])(\??)$")
# a number may be padded with spaces
_ASSIGNED: Final = re.compile(r"(?<!\S)(\w+)=(?: +(?=[\w-]+(?:\s|$)))?(ARRAY\[[^\]]*\]|\S*)")
_HEX: Final = r"(?:0[xX])?[0-9a-fA-F]{1,16}"
# Lengths are limited so that a hostile line cannot make a match take long.
_KINDS: Final = {
    "x": (_HEX, "a hexadecimal number of up to 64 bits"),
    "d": (r"-?\d{1,20}|0[xX][0-9a-fA-F]{1,16}", "a number"),
    "i": (r"-?\d{1,20}|0[xX][0-9a-fA-F]{1,16}", "a number"),
    "n": (r"\d{1,20}", "a number"),
    "w": (r"\S{1,80}", "a word"),
    "p": (r"\S.{0,200}?", "words"),
    "b": (r"(?:ARRAY\[)?(?:[0-9a-fA-F]{2}[, ]{0,2}){0,256}\]?", "bytes"),
}
Value = int | str | bytes


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one body by the kernel's names: ``numbers``, and ``words`` that stand for no number."""

    numbers: Mapping[str, int]
    words: Mapping[str, str | bytes]


@dataclass(frozen=True, slots=True)
class Misfit:
    """A body that no declared form fits: the first offset that does not, what would have, and what is there."""

    at: int
    expected: str
    found: str

    def __str__(self) -> str:
        return f"expected {self.expected}, found {self.found}"


class Pattern:
    """How the body of one event reads: printed templates, tried in order, and the ``name=value`` form.

    A template is the kernel's text with ``{field:kind}`` in it: x hexadecimal with or without 0x, d a
    number, i a signed one, n one printed without its minus sign, w a word, p words, b bytes; without a
    name it is passed over. A space stands for any white space; fields that only some templates have are
    absent from the result elsewhere. *assigned* lists those of the ``name=value`` form (``report
    -R``, kprobe events) as ``"gpa:x len:d val:x?"``, with ``?`` for those that may be missing; if not
    given they are those of the templates, and needed where every template has them. *words* says which
    numbers the words of a field stand for. Raises `LayoutError` for a declaration that does not parse.
    """

    def __init__(self, *templates: str | Printed, assigned: str = "", words: Mapping[str, Words] | None = None) -> None:
        self._templates = tuple(_Template(t if isinstance(t, Printed) else Printed(t)) for t in templates)
        self._words = dict(words or {})
        self.fields: dict[str, tuple[str, bool]] = {}
        """Field -> (kind, needed), in the kernel's order."""
        for spec in assigned.split():
            if (m := _SPEC.match(spec)) is None:
                raise LayoutError(f"field {spec!r}: expected name:x, d, i, w or b, or one of these with ?")
            self.fields[m[1]] = m[2], not m[3]
        if not assigned:
            for t in self._templates:
                for name, kind in t.fields.items():
                    self.fields[name] = _ASSIGNED_KIND.get(kind, kind), all(name in u.fields for u in self._templates)

    @classmethod
    def all_of(cls, points: Iterable[Tracepoint]) -> tuple[Pattern, ...]:
        """A pattern for each way in which *points*, of one event, declare it."""
        made = {str((p.templates, p.fields, p.words)): p for p in points}
        return tuple(cls(*p.templates, assigned=p.fields, words=p.words) for p in made.values())

    @classmethod
    def of(cls, points: Iterable[Tracepoint]) -> Pattern:
        """One pattern for an event, as all *points* of that name declare it."""
        known = list(points)
        patterns = cls.all_of(known)
        if len(patterns) == 1:
            return patterns[0]
        # events of one name differ between architectures: every field may be missing
        specs: dict[str, str] = {}
        for pattern in patterns:
            for name, (kind, _) in pattern.fields.items():
                specs.setdefault(name, f"{name}:{kind}?")
        templates = {str(t): t for p in known for t in p.templates}
        words = {name: w for p in known for name, w in p.words.items()}
        return cls(*templates.values(), assigned=" ".join(specs.values()), words=words)

    def read(self, body: str) -> Fields | Misfit:
        """The fields of *body*, or where it stops to fit. Never raises."""
        for template in self._templates:
            if (groups := template.match(body)) is not None:
                numbers: dict[str, int] = dict(template.implied)
                words: dict[str, str | bytes] = {}
                for (name, kind), text in zip(template.fields.items(), groups, strict=True):
                    self._put(name, kind, text, numbers, words)
                return Fields(numbers, words)
        found: dict[str, re.Match[str]] = {}
        for m in _ASSIGNED.finditer(body):
            found.setdefault(m[1], m)
        if found.keys().isdisjoint(self.fields):
            at, expected = max((t.mismatch(body) for t in self._templates), default=(0, "name=value"))
            return _misfit(body, at, expected)
        return self._assigned(body, found)

    def _assigned(self, body: str, found: Mapping[str, re.Match[str]]) -> Fields | Misfit:
        numbers: dict[str, int] = {}
        words: dict[str, str | bytes] = {}
        for name, (kind, needed) in self.fields.items():
            if (value := found.get(name)) is None:
                if needed:
                    return _misfit(body, len(body), f"{name}=")
            elif re.fullmatch(_KINDS[kind][0], value[2], re.ASCII) is None:
                return _misfit(body, value.start(2), f"{name} as {_KINDS[kind][1]}")
            else:
                self._put(name, kind, value[2], numbers, words)
        return Fields(numbers, words)

    def _put(self, name: str, kind: str, text: str, numbers: dict[str, int], words: dict[str, str | bytes]) -> None:
        match kind:
            case "w" | "p" if name in self._words:
                numbers.update(self._words[name].told(text))
            case "w" | "p":
                words[name] = text
            case "b":
                words[name] = bytes.fromhex(re.sub(r"ARRAY|[^0-9a-fA-F]", "", text))
            case "n":
                numbers[name] = -int(text)
            case _:
                numbers[name] = int(text, 16 if kind == "x" or text[1:2] in ("x", "X") else 10)


_ASSIGNED_KIND: Final = {"n": "i", "p": "w"}


class _Template:
    # One printed form. Its pieces are tried one by one only to say where a body stops to fit.
    def __init__(self, printed: Printed) -> None:
        template = printed.template
        self.implied = printed.implied
        self.fields: dict[str, str] = {}
        self.pieces: list[tuple[str, str]] = []
        at = 0
        for found in _FIELD.finditer(template):
            name, kind = found[1], found[2]
            if name in self.fields:
                raise LayoutError(f"pattern {template!r}: field {name!r} is named twice")
            self._literal(template[at : found.start()])
            if name:
                self.fields[name] = kind
            source, what = _KINDS[kind]
            self.pieces.append((f"({source})" if name else f"(?:{source})", f"{name} as {what}" if name else what))
            at = found.end()
        self._literal(template[at:])
        if re.search("[{}]", _FIELD.sub("", template)) or not (self.fields or _FIELD.search(template)):
            raise LayoutError(f"pattern {template!r}: a field is written {{name:x}}, {{name:d}} or {{name:w}}")
        self._match = re.compile("".join(source for source, _ in self.pieces) + r"\s*$", re.ASCII).match

    def _literal(self, text: str) -> None:
        for part in re.findall(r"\s+|\S+", text):
            self.pieces.append((r"\s+", "a space") if part.isspace() else (re.escape(part), repr(part)))

    def match(self, body: str) -> tuple[str, ...] | None:
        m = self._match(body)
        return None if m is None else m.groups()

    def mismatch(self, body: str) -> tuple[int, str]:
        for n in range(len(self.pieces), 0, -1):
            if m := re.match("".join(source for source, _ in self.pieces[:n]), body, re.ASCII):
                return m.end(), self.pieces[n][1] if n < len(self.pieces) else "the end of the line"
        return 0, self.pieces[0][1]


def _misfit(body: str, at: int, expected: str) -> Misfit:
    rest = body[at:]
    return Misfit(at, expected, repr(rest[:40]) + "..." * (len(rest) > 40) if rest else "the end of the line")
