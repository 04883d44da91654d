"""The closed set of expressions over register bits.

A ``Word`` is kept in a normal form: an OR of terms with disjoint results, each term one masked and
shifted register, or one small table. A ``Pred`` is a tree of memberships (``Among``) under and, or, not.
Everything else (scalar code, columns, C, proofs, words for people) is a fold over these two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import not_
from typing import TYPE_CHECKING, Final, TypeVar, final

from kvmfault.types import U64

if TYPE_CHECKING:
    from kvmfault.algebra.layout import Field

__all__ = ["ALWAYS", "NEVER", "AllOf", "Among", "AnyOf", "Maybe", "Not", "Pred", "Term", "Word", "union"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Term:
    """``(register & mask) >> shift`` (left when shift is negative), or ``table[(register & mask) >> shift]``."""

    register: str
    mask: int
    shift: int
    table: tuple[int, ...] | None

    @property
    def mask_out(self) -> int:
        """Bits that the result can have."""
        if self.table is not None:
            out = 0
            for value in self.table:
                out |= value
            return out
        return self.mask >> self.shift if self.shift >= 0 else self.mask << -self.shift

    def on(self, register: int) -> int:
        """The value for one value of its register."""
        bits = register & self.mask
        moved = bits >> self.shift if self.shift >= 0 else bits << -self.shift
        return moved if self.table is None else self.table[moved]

    def shifted(self, left: int) -> Term:
        """The term moved *left* bits up (down if negative); what leaves the 64 bits is dropped."""
        if self.table is not None:
            moved = tuple(v << left & U64 if left >= 0 else v >> -left for v in self.table)
            return Term(self.register, self.mask, self.shift, moved)
        shift = self.shift - left
        # Bits that would leave at either end are masked away, so no later step has to.
        keep = self.mask & (U64 >> -shift if shift < 0 else U64 << shift)
        return Term(self.register, keep & U64, shift, None)


@dataclass(frozen=True, slots=True, eq=False)
class Word:
    """A 64-bit value computed from registers. ``==`` is identity: compare words with ``prove``."""

    terms: tuple[Term, ...]
    const: int = 0

    @property
    def mask_out(self) -> int:
        """Bits that the value can have."""
        out = self.const
        for term in self.terms:
            out |= term.mask_out
        return out

    @property
    def reads(self) -> dict[str, int]:
        """Register bits that the value depends on, as name -> mask."""
        reads: dict[str, int] = {}
        for term in self.terms:
            reads[term.register] = reads.get(term.register, 0) | term.mask
        return reads

    def __lshift__(self, bits: int) -> Word:
        return Word(tuple(t.shifted(bits) for t in self.terms), self.const << bits & U64)

    def __rshift__(self, bits: int) -> Word:
        return Word(tuple(t.shifted(-bits) for t in self.terms), self.const >> bits)

    def when(self, valid: Pred) -> Maybe:
        """The value where *valid* holds, and nothing elsewhere."""
        return Maybe(self, valid)

    def on(self, registers: Mapping[str, int]) -> int:
        """The value on one set of registers; for many, compile it (``scalar.compile_word``)."""
        value = self.const
        for term in self.terms:
            value |= term.on(registers[term.register])
        return value

    def __bool__(self) -> bool:
        raise TypeError("a Word is not a truth value: use .on(registers) or a predicate over a field")


@dataclass(frozen=True, slots=True, eq=False)
class Maybe:
    """A Word that exists only where its predicate holds: ``int | None`` on one fault, column and mask on many."""

    word: Word
    valid: Pred

    @property
    def reads(self) -> dict[str, int]:
        """Register bits that decide validity or value, as name -> mask."""
        return union(self.word.reads, self.valid.reads)

    def on(self, registers: Mapping[str, int]) -> int | None:
        """The value on one set of registers, or None."""
        return self.word.on(registers) if self.valid.on(registers) else None

    def __bool__(self) -> bool:
        raise TypeError("a Maybe is not a truth value: use .on(registers) or .valid")


class Pred:
    """A truth about registers. Combine with ``& | ~``; there is no ``and``, ``or``, ``not`` and no ``==``."""

    __slots__ = ()

    def __and__(self, other: Pred) -> Pred:
        return _joined(self, other, AllOf)

    def __or__(self, other: Pred) -> Pred:
        return _joined(self, other, AnyOf)

    def __invert__(self) -> Pred:
        return self.of if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a Pred has no truth value: combine with & | ~, or evaluate with .on(registers)")

    def on(self, registers: Mapping[str, int]) -> bool:
        """Whether it holds on one set of registers; for many, compile it (``scalar.compile_pred``)."""
        return self.fold(lambda leaf: leaf.field.on(registers) in leaf.values, all, any, not_)

    @property
    def reads(self) -> dict[str, int]:
        """Register bits that it depends on, as name -> mask."""
        return self.fold(
            lambda leaf: {leaf.field.register: leaf.field.mask}, lambda p: union(*p), lambda p: union(*p), lambda p: p
        )

    def fold(
        self,
        leaf: Callable[[Among], T],
        all_of: Callable[[Sequence[T]], T],
        any_of: Callable[[Sequence[T]], T],
        negate: Callable[[T], T],
    ) -> T:
        """Reduce the tree bottom-up. ``all_of([])`` stands for always, ``any_of([])`` for never."""
        match self:
            case Among():
                return leaf(self)
            case AllOf(parts):
                return all_of([p.fold(leaf, all_of, any_of, negate) for p in parts])
            case AnyOf(parts):
                return any_of([p.fold(leaf, all_of, any_of, negate) for p in parts])
            case Not(of):
                return negate(of.fold(leaf, all_of, any_of, negate))
            case _:
                raise TypeError(f"{type(self).__name__} is not a node of the algebra")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Among(Pred):
    """The field holds one of the values."""

    field: Field
    values: frozenset[int]


@final
@dataclass(frozen=True, slots=True, eq=False)
class AllOf(Pred):
    """All parts hold. Without parts: always."""

    parts: tuple[Pred, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class AnyOf(Pred):
    """At least one part holds. Without parts: never."""

    parts: tuple[Pred, ...]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Not(Pred):
    """The part does not hold."""

    of: Pred


ALWAYS: Final[Pred] = AllOf(())
NEVER: Final[Pred] = AnyOf(())


def union(*reads: Mapping[str, int]) -> dict[str, int]:
    """Bits read by any of several expressions, as name -> mask."""
    out: dict[str, int] = {}
    for masks in reads:
        for name, mask in masks.items():
            out[name] = out.get(name, 0) | mask
    return out


def _joined(a: Pred, b: Pred, kind: type[AllOf] | type[AnyOf]) -> Pred:
    # a & b & c is one node with three parts, so explanations and generated code stay flat
    parts: list[Pred] = []
    for p in (a, b):
        parts.extend(p.parts) if isinstance(p, AllOf | AnyOf) and type(p) is kind else parts.append(p)
    return parts[0] if len(parts) == 1 else kind(tuple(parts))
