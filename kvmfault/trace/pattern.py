"""How the body of a recorded event reads, declared once per event and compiled once.

A kernel, a kernel version and a tool each print the same fields in their own words: an event has one
`Pattern` with a template for each of these, and all of them give the kernel's field names.

>>> mmio = Pattern("mmio {type:w} len {len:d} gpa {gpa:x}", assigned="type:d len:d gpa:x")
>>> mmio.read("mmio read len 4 gpa 0xfee000f0")
Fields(numbers={'len': 4, 'gpa': 4276093168}, words={'type': 'read'})
>>> mmio.read("type=1 len=4 gpa=0xfee000f0").numbers["type"]
1
>>> str(mmio.read("mmio read len four"))
"expected len as a number, found 'four'"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from kvmfault.errors import LayoutError

_FIELD: Final = re.compile(r"\{(\w+):([xdw])\}")
_SPEC: Final = re.compile(r"(\w+):([xdw])(\??)$")
_ASSIGNED: Final = re.compile(r"(?<!\S)(\w+)=(\S*)")
# Lengths are limited so that a hostile line cannot make a match take long.
_KINDS: Final = {
    "x": (r"(?:0[xX])?[0-9a-fA-F]{1,16}", "a hexadecimal number of up to 64 bits"),
    "d": (r"-?\d{1,20}|0[xX][0-9a-fA-F]{1,16}", "a number"),
    "w": (r"\S{1,80}", "a word"),
}


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one body by the kernel's names: ``numbers`` (kinds x and d) and ``words`` (kind w)."""

    numbers: Mapping[str, int]
    words: Mapping[str, str]


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
    number, w a word. A space stands for any white space; fields that only some templates have are
    absent from the result elsewhere. *assigned* lists the fields of the ``name=value`` form (``report
    -R``, kprobe events) as ``"gpa:x len:d val:x?"``, with ``?`` for those that may be missing; if not
    given they are those of the templates, and needed where every template has them. Raises
    `LayoutError` for a declaration that does not parse.
    """

    def __init__(self, *templates: str, assigned: str | None = None) -> None:
        self._templates = tuple(_Template(t) for t in templates)
        self._assigned: dict[str, tuple[str, bool]] = {}
        if assigned is None:
            for t in self._templates:
                for name, kind in t.fields.items():
                    self._assigned[name] = kind, all(name in u.fields for u in self._templates)
        for spec in (assigned or "").split():
            if (m := _SPEC.match(spec)) is None:
                raise LayoutError(f"assigned field {spec!r}: expected name:x, name:d, name:w, or one of these with ?")
            self._assigned[m[1]] = m[2], not m[3]

    def read(self, body: str) -> Fields | Misfit:
        """The fields of *body*, or where it stops to fit. Never raises."""
        for template in self._templates:
            if fields := template.read(body):
                return fields
        found: dict[str, re.Match[str]] = {}
        for m in _ASSIGNED.finditer(body):
            found.setdefault(m[1], m)
        if found.keys().isdisjoint(self._assigned):
            at, expected = max((t.mismatch(body) for t in self._templates), default=(0, "name=value"))
            return _misfit(body, at, expected)
        numbers, words = {}, {}
        for name, (kind, needed) in self._assigned.items():
            if (value := found.get(name)) is None:
                if needed:
                    return _misfit(body, len(body), f"{name}=")
            elif re.fullmatch(_KINDS[kind][0], value[2], re.ASCII) is None:
                return _misfit(body, value.start(2), f"{name} as {_KINDS[kind][1]}")
            elif kind == "w":
                words[name] = value[2]
            else:
                numbers[name] = _number(kind, value[2])
        return Fields(numbers, words)


class _Template:
    # One printed form. Its pieces are tried one by one only to say where a body stops to fit.
    def __init__(self, template: str) -> None:
        self.fields: dict[str, str] = {}
        self.pieces: list[tuple[str, str]] = []
        at = 0
        for found in _FIELD.finditer(template):
            name, kind = found[1], found[2]
            if name in self.fields:
                raise LayoutError(f"pattern {template!r}: field {name!r} is named twice")
            self.fields[name] = kind
            self._literal(template[at : found.start()])
            self.pieces.append((f"({_KINDS[kind][0]})", f"{name} as {_KINDS[kind][1]}"))
            at = found.end()
        self._literal(template[at:])
        if re.search("[{}]", _FIELD.sub("", template)) or not self.fields:
            raise LayoutError(f"pattern {template!r}: a field is written {{name:x}}, {{name:d}} or {{name:w}}")
        self._match = re.compile("".join(source for source, _ in self.pieces) + r"\s*$", re.ASCII).match

    def _literal(self, text: str) -> None:
        for part in re.findall(r"\s+|\S+", text):
            self.pieces.append((r"\s+", "a space") if part.isspace() else (re.escape(part), repr(part)))

    def read(self, body: str) -> Fields | None:
        m = self._match(body)
        if m is None:
            return None
        numbers, words = {}, {}
        for (name, kind), text in zip(self.fields.items(), m.groups(), strict=True):
            if kind == "w":
                words[name] = text
            else:
                numbers[name] = _number(kind, text)
        return Fields(numbers, words)

    def mismatch(self, body: str) -> tuple[int, str]:
        for n in range(len(self.pieces), 0, -1):
            if m := re.match("".join(source for source, _ in self.pieces[:n]), body, re.ASCII):
                return m.end(), self.pieces[n][1] if n < len(self.pieces) else "the end of the line"
        return 0, self.pieces[0][1]


def _number(kind: str, text: str) -> int:
    return int(text, 16 if kind == "x" or text[1:2] in ("x", "X") else 10)


def _misfit(body: str, at: int, expected: str) -> Misfit:
    rest = body[at:]
    return Misfit(at, expected, repr(rest[:40]) + "..." * (len(rest) > 40) if rest else "the end of the line")
