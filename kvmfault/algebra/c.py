"""C: an expression as text over ``uint64_t`` variables, with the values that Python and columns give.

C11 with <stdbool.h> and <stdint.h>. Truths are 0 and 1 under ``&``, ``|`` and ``!``: nothing is skipped, nothing is
evaluated twice, and a loop over an array can be vectorised. Words have 64 bits and shifts drop what leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvmfault.algebra.cubes import cubes
from kvmfault.algebra.expr import Among, Pred, Term, Word
from kvmfault.errors import UsageError

__all__ = ["CExpression", "Names", "c_expression", "c_function"]

Names: TypeAlias = Mapping[str, str]
"""Register -> the C variable of type ``uint64_t`` that holds it."""


@dataclass(frozen=True, slots=True)
class CExpression:
    """*text* is an ``int`` that is 0 or 1 for a predicate, a ``uint64_t`` for a word; it stands in parentheses."""

    text: str
    tables: tuple[str, ...] = ()
    """Declarations that *text* needs before it, at file or at block scope."""


def c_expression(of: Pred | Word, names: Names, prefix: str = "table") -> CExpression:
    """*of* in C. Its tables are named *prefix* and a number. Raises UsageError for a register without a name."""
    for register in of.reads:
        if not names.get(register, "").isidentifier():
            raise UsageError(f"no C variable is named for register {register}; named: {', '.join(names) or 'none'}")
    return _word(of, names, prefix) if isinstance(of, Word) else CExpression(_pred(of, names))


def c_function(name: str, of: Pred | Word, names: Names) -> str:
    """A ``static inline`` function of that *name* with a parameter for each of *names*, in their order.

    Raises UsageError for a register without a name.
    """
    expression = c_expression(of, names)
    result = "uint64_t" if isinstance(of, Word) else "bool"
    parameters = ", ".join(f"uint64_t {variable}" for variable in names.values()) or "void"
    body = "".join(f"\t{line}\n" for line in (*expression.tables, f"return {expression.text};"))
    return f"static inline {result} {name}({parameters})\n{{\n{body}}}\n"


def _pred(pred: Pred, names: Names) -> str:
    def leaf(p: Among) -> str:
        f = p.field
        tests = [(mask << f.lo, value << f.lo) for mask, value in cubes(p.values, f.width)]
        return joined(" | ", [_test(names[f.register], mask, value) for mask, value in tests], "0")

    def joined(operator: str, parts: Sequence[str], without_parts: str) -> str:
        return f"({operator.join(parts)})" if len(parts) > 1 else (*parts, without_parts)[0]

    return pred.fold(
        leaf,
        lambda parts: joined(" & ", parts, "1"),
        lambda parts: joined(" | ", parts, "0"),
        lambda part: f"(!{part})",
    )


def _test(variable: str, mask: int, value: int) -> str:
    return f"(({variable} & {_number(mask)}) == {_number(value)})" if mask else "1"


def _word(word: Word, names: Names, prefix: str) -> CExpression:
    tables: list[str] = []

    def term(t: Term) -> str:
        bits = f"({names[t.register]} & {_number(t.mask)})"
        if t.shift:
            bits = f"({bits} {'>>' if t.shift > 0 else '<<'} {abs(t.shift)})"
        if t.table is None:
            return bits
        name = f"{prefix}{len(tables)}"
        row = ", ".join(f"[{i:#x}] = {_number(value)}" for i, value in enumerate(t.table) if value)
        tables.append(f"static const uint64_t {name}[{len(t.table)}] = {{ {row or '0'} }};")
        return f"{name}[{bits}]"

    # A term whose bits were all shifted out is 0; its shift may be one that C does not define.
    parts = [term(t) for t in word.terms if t.mask]
    if word.const or not parts:
        parts.append(_number(word.const))
    return CExpression(f"({' | '.join(parts)})" if len(parts) > 1 else parts[0], tuple(tables))


def _number(value: int) -> str:
    return f"{value:#x}ull" if value > 9 else f"{value}ull"
