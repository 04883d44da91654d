"""Registers and their fields, declared once and checked when the declaring module is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from kvmfault.algebra.expr import Among, Pred, Term, Word
from kvmfault.errors import LayoutError
from kvmfault.types import U64

__all__ = ["ZERO", "Bits", "Field", "Register", "join", "register"]

Bits = int | tuple[int, int]
"""A bit number, or (high, low) inclusive, as the manuals print it."""


@dataclass(frozen=True, slots=True, eq=False)
class Field(Word):
    """A named run of bits of one register; as a Word, its value shifted down to bit 0."""

    register: str = ""
    name: str = ""
    hi: int = 0
    lo: int = 0
    meanings: Mapping[int, str] = field(default_factory=dict)
    """Words for values, for people; values not listed are reserved or have no name."""

    @property
    def width(self) -> int:
        """Number of bits."""
        return self.hi - self.lo + 1

    @property
    def mask(self) -> int:
        """The field's bits in place in the register."""
        return ((1 << self.width) - 1) << self.lo

    @property
    def place(self) -> str:
        """``bit 7`` or ``bits 31:26``."""
        return f"bit {self.lo}" if self.hi == self.lo else f"bits {self.hi}:{self.lo}"

    @property
    def is_set(self) -> Pred:
        """The one bit is 1. Raises LayoutError for a wider field: say which values are meant."""
        if self.width != 1:
            raise LayoutError(f"{self.name} has {self.width} bits: is_set needs one, use is_ or one_of")
        return self.one_of((1,))

    def is_(self, value: int) -> Pred:
        """The field equals *value*."""
        return self.one_of((value,))

    def one_of(self, values: tuple[int, ...] | range) -> Pred:
        """The field holds one of *values*. Raises LayoutError if one does not fit or the list is empty."""
        for value in values:
            if value < 0 or value >> self.width:
                raise LayoutError(f"{self.register}.{self.name}: {value:#x} does not fit {self.width} bits")
        if not values:
            raise LayoutError(f"{self.register}.{self.name}: no value is given")
        return Among(self, frozenset(values))

    def table(self, values: Mapping[int, int]) -> Word:
        """A Word looked up by the field's value; values not listed give 0. Fields of up to 8 bits only."""
        if self.width > 8:
            raise LayoutError(f"{self.name} has {self.width} bits: a table takes up to 8")
        self.one_of(tuple(values))
        for value in values.values():
            if not 0 <= value <= U64:
                raise LayoutError(f"{self.register}.{self.name}: a table holds words of 64 bits, not {value:#x}")
        row = tuple(values.get(i, 0) for i in range(1 << self.width))
        return Word((Term(self.register, self.mask, self.lo, row),))


@dataclass(frozen=True, slots=True, eq=False)
class Register:
    """A register: name, width in bits, fields by name, and the manual's table they come from."""

    name: str
    width: int
    source: str
    fields: Mapping[str, Field]

    def __getitem__(self, name: str) -> Field:
        try:
            return self.fields[name]
        except KeyError:
            raise LayoutError(f"{self.name} has no field {name}; it has {', '.join(self.fields)}") from None

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields.values())

    @property
    def reserved(self) -> int:
        """Bits that no field names."""
        named = 0
        for f in self:
            named |= f.mask
        return ((1 << self.width) - 1) & ~named

    def field_at(self, hi: int, lo: int) -> Field:
        """Bits hi:lo without a name of their own, for a word that crosses fields."""
        return _field(self.name, self.width, f"[{hi}:{lo}]", (hi, lo), {})


def register(
    name: str,
    width: int,
    source: str,
    meanings: Mapping[str, Mapping[int, str]] | None = None,
    /,
    **fields: Bits,
) -> Register:
    """Declare a register. Fields are ``NAME=bit`` or ``NAME=(hi, lo)``; *meanings* names values of fields.

    A second reading of the same bits (another exception class) is a second declaration of the same name.
    Raises LayoutError on overlap, hi < lo, a bit beyond *width*, a meaning that does not fit, a *width* that is not
    1 to 64, or a *name* that is no identifier (generated code spells it).
    """
    if not name.isidentifier() or not 0 < width <= 64:
        raise LayoutError(f"{name!r}, {width} bits: a register has an identifier for a name, and 1 to 64 bits")
    meanings = meanings or {}
    made: dict[str, Field] = {}
    taken: dict[int, str] = {}
    for field_name, bits in fields.items():
        f = _field(name, width, field_name, bits, meanings.get(field_name, {}))
        for bit in range(f.lo, f.hi + 1):
            if bit in taken:
                raise LayoutError(f"{name}: {field_name} and {taken[bit]} both claim bit {bit}")
            taken[bit] = field_name
        made[field_name] = f
    for unknown in meanings.keys() - made.keys():
        raise LayoutError(f"{name}: meanings for {unknown}, which is not a field")
    return Register(name, width, source, MappingProxyType(made))


def _field(register_name: str, width: int, name: str, bits: Bits, meanings: Mapping[int, str]) -> Field:
    hi, lo = bits if isinstance(bits, tuple) else (bits, bits)
    if hi < lo or lo < 0:
        raise LayoutError(f"{register_name}: {name}=({hi}, {lo}) is not (high, low)")
    if hi >= width:
        raise LayoutError(f"{register_name}: {name} bit {hi} is beyond the {width} bits of the register")
    mask = ((1 << (hi - lo + 1)) - 1) << lo
    f = Field((Term(register_name, mask, lo, None),), 0, register_name, name, hi, lo, MappingProxyType(dict(meanings)))
    for value in meanings:
        if value < 0 or value >> f.width:
            raise LayoutError(f"{register_name}.{name}: {value:#x} does not fit {f.width} bits")
    return f


def join(*words: Word) -> Word:
    """Join words whose possible bits are disjoint (an OR that loses nothing). Raises LayoutError otherwise."""
    terms: list[Term] = []
    const = 0
    seen = 0
    for word in words:
        if seen & word.mask_out:
            raise LayoutError(f"join: bits {seen & word.mask_out:#x} come from two words")
        seen |= word.mask_out
        terms.extend(word.terms)
        const |= word.const
    return Word(tuple(terms), const)


ZERO: Final = Word((), 0)
"""The word that is always 0: stands where an architecture has no value (its ``_valid`` fact says so)."""
