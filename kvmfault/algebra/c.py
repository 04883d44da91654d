"""C: an expression as text over ``uint64_t`` variables, with the values that Python and columns give.

C11 with <stdbool.h> and <stdint.h>, or other names for the same (``Style``). Truths are 0 and 1 under ``&``, ``|`` and
``!``: nothing is skipped, nothing is evaluated twice, and loops over arrays can be vectorised. Words have 64 bits and
shifts drop what leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from kvmfault.algebra.cubes import cubes
from kvmfault.algebra.expr import Among, Pred, Term, Word
from kvmfault.errors import UsageError
from kvmfault.types import U64

__all__ = ["PLAIN", "CExpression", "Names", "Style", "c_expression", "c_function", "number"]

Names: TypeAlias = Mapping[str, str]
"""Register -> the C variable of type ``uint64_t`` that holds it."""


def number(value: int) -> str:
    """A 64-bit constant."""
    return f"{value:#x}ULL" if value > 9 else f"{value}ULL"


@dataclass(frozen=True, slots=True)
class Style:
    """What a project calls things."""

    word: str = "uint64_t"
    """The type of a word."""
    mask: Callable[[str, int], str] = lambda register, mask: number(mask)
    """Some bits of a register."""


PLAIN: Final = Style()


@dataclass(frozen=True, slots=True)
class CExpression:
    """*text* is an ``int`` that is 0 or 1 for a predicate, a ``uint64_t`` for a word; it stands in parentheses."""

    text: str
    tables: tuple[str, ...] = ()
    """Declarations that *text* needs before it, at file or at block scope."""


def c_expression(of: Pred | Word, names: Names, prefix: str = "table", style: Style = PLAIN) -> CExpression:
    """*of* in C. Its tables are named *prefix* and a number. Raises UsageError for a register without a name."""
    for register in of.reads:
        if not names.get(register, "").isidentifier():
            raise UsageError(f"no C variable is named for register {register}; named: {', '.join(names) or 'none'}")
    return _word(of, names, prefix, style) if isinstance(of, Word) else CExpression(_pred(of, names, style))


def c_function(name: str, of: Pred | Word, names: Names) -> str:
    """A ``static inline`` function of that *name* with a parameter for each of *names*, in their order.

    Raises UsageError for a register without a name.
    """
    expression = c_expression(of, names)
    result = "uint64_t" if isinstance(of, Word) else "bool"
    parameters = ", ".join(f"uint64_t {variable}" for variable in names.values()) or "void"
    body = "".join(f"\t{line}\n" for line in (*expression.tables, f"return {expression.text};"))
    return f"static inline {result} {name}({parameters})\n{{\n{body}}}\n"


def _pred(pred: Pred, names: Names, style: Style) -> str:
    # each part with its negation: a test of one bit has its own
    def leaf(p: Among) -> tuple[str, str]:
        f = p.field
        tests = [(mask << f.lo, value << f.lo) for mask, value in cubes(p.values, f.width)]
        return joined(" | ", [_test(p, names, style, mask, value) for mask, value in tests], ("0", "1"))

    def joined(operator: str, parts: Sequence[tuple[str, str]], without_parts: tuple[str, str]) -> tuple[str, str]:
        if len(parts) < 2:
            return (*parts, without_parts)[0]
        text = f"({operator.join(part for part, _ in parts)})"
        return text, f"(!{text})"

    def negated(part: tuple[str, str]) -> tuple[str, str]:
        return part[1], part[0]

    text, _ = pred.fold(
        leaf, lambda parts: joined(" & ", parts, ("1", "0")), lambda parts: joined(" | ", parts, ("0", "1")), negated
    )
    return text


def _test(leaf: Among, names: Names, style: Style, mask: int, value: int) -> tuple[str, str]:
    if not mask:
        return "1", "0"
    bits = f"({names[leaf.field.register]} & {style.mask(leaf.field.register, mask)})"
    if mask.bit_count() == 1:
        is_set, is_clear = f"(!!{bits})", f"(!{bits})"
        return (is_set, is_clear) if value else (is_clear, is_set)
    return f"({bits} == {number(value)})", f"({bits} != {number(value)})"


def _word(word: Word, names: Names, prefix: str, style: Style) -> CExpression:
    tables: list[str] = []

    def term(t: Term) -> str:
        bits = names[t.register]
        if t.mask != U64:
            bits = f"({bits} & {style.mask(t.register, t.mask)})"
        if t.shift:
            bits = f"({bits} {'>>' if t.shift > 0 else '<<'} {abs(t.shift)})"
        if t.table is None:
            return bits
        name = f"{prefix}{len(tables)}"
        row = ", ".join(f"[{i:#x}] = {number(value)}" for i, value in enumerate(t.table) if value)
        tables.append(f"static const {style.word} {name}[{len(t.table)}] = {{ {row or '0'} }};")
        return f"{name}[{bits}]"

    # A term whose bits were all shifted out is 0; its shift may be one that C does not define.
    parts = [term(t) for t in word.terms if t.mask]
    if word.const or not parts:
        parts.append(number(word.const))
    return CExpression(f"({' | '.join(parts)})" if len(parts) > 1 else parts[0], tuple(tables))
