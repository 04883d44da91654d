"""One fault: an expression becomes one Python function, compiled once.

The generated text is built only from integers and from register names checked to be identifiers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from kvmfault.algebra.expr import Among, Pred, Term, Word

__all__ = ["Regs", "compile_pred", "compile_word", "pred_source", "word_source"]

Regs = tuple[int, ...]
"""Register values in the order of the backend's ``registers``; each 0 <= value < 2**64."""


def compile_pred(pred: Pred, order: tuple[str, ...]) -> Callable[[Regs], bool]:
    """The predicate as a function of a register tuple in *order*. KeyError if it reads another register."""
    return cast("Callable[[Regs], bool]", _function(pred_source(pred, _by_position(order)) + " and True or False"))


def compile_word(word: Word, order: tuple[str, ...]) -> Callable[[Regs], int]:
    """The word as a function of a register tuple in *order*. KeyError if it reads another register."""
    return cast("Callable[[Regs], int]", _function(word_source(word, _by_position(order))))


def pred_source(pred: Pred, ref: Callable[[str], str]) -> str:
    """Python text of the predicate, parenthesised; *ref* spells a register. Its value is only truthy or falsy."""

    def leaf(p: Among) -> str:
        bits = f"{ref(p.field.register)} & {p.field.mask:#x}"
        in_place = sorted(v << p.field.lo for v in p.values)
        if p.field.width == 1 and in_place:
            return f"({bits})" if p.values == {1} else f"(not {bits})" if p.values == {0} else "True"
        if len(in_place) == 1:
            return f"({bits} == {in_place[0]:#x})"
        return f"({bits} in {{{', '.join(map(hex, in_place))}}})"

    return pred.fold(
        leaf,
        lambda parts: f"({' and '.join(parts)})" if parts else "True",
        lambda parts: f"({' or '.join(parts)})" if parts else "False",
        lambda part: f"(not {part})",
    )


def word_source(word: Word, ref: Callable[[str], str]) -> str:
    """Python text of the word."""

    def term(t: Term) -> str:
        bits = f"({ref(t.register)} & {t.mask:#x})"
        shifted = f"{bits} >> {t.shift}" if t.shift > 0 else f"{bits} << {-t.shift}" if t.shift < 0 else bits
        return f"({shifted})" if t.table is None else f"{t.table!r}[{shifted}]"

    parts = [term(t) for t in word.terms]
    return " | ".join(parts + [hex(word.const)] * (word.const != 0 or not parts))


def _by_position(order: tuple[str, ...]) -> Callable[[str], str]:
    places = {name: f"r[{i}]" for i, name in enumerate(order)}
    return places.__getitem__


def _function(body: str) -> Callable[..., object]:
    return cast("Callable[..., object]", eval(f"lambda r: {body}", {"__builtins__": {}}))  # noqa: S307 see module text
