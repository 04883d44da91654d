"""Small mistakes in an expression, one at a time: what a comparison with an independent oracle has to notice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvmfault.algebra.expr import AllOf, Among, AnyOf, Not, Pred, Term, Word
from kvmfault.types import U64


def mutants(pred: Pred) -> Iterator[tuple[str, Pred]]:
    """(what is wrong, the expression with it). A mutant may happen to mean the same: prove it before blaming a test."""
    yield "negated", ~pred
    match pred:
        case Among(field, values):
            top = (1 << field.width) - 1
            for value in sorted(values) if len(values) > 1 else ():
                yield f"{field.name}: {value:#x} dropped", Among(field, values - {value})
            near = {v + d for v in values for d in (-1, 1)} | {v ^ (1 << b) for v in values for b in range(field.width)}
            for value in sorted(v for v in near - values if 0 <= v <= top):
                yield f"{field.name}: {value:#x} added", Among(field, values | {value})
        case Not(of):
            yield "negation lost", of
            for what, inner in mutants(of):
                yield what, Not(inner)
        case AllOf(parts) | AnyOf(parts):
            one, other = (AllOf, AnyOf) if isinstance(pred, AllOf) else (AnyOf, AllOf)
            if len(parts) > 1:
                yield f"{one.__name__} for {other.__name__}", other(parts)
            for i, part in enumerate(parts):
                before, after = parts[:i], parts[i + 1 :]
                yield f"part {i} dropped", one((*before, *after))
                for what, inner in mutants(part):
                    yield f"part {i}: {what}", one((*before, inner, *after))


def word_mutants(word: Word) -> Iterator[tuple[str, Word]]:
    """The same for a word: masks and shifts off by one, a table entry wrong, a term or constant bit lost."""
    for i, term in enumerate(word.terms):
        before, after = word.terms[:i], word.terms[i + 1 :]
        yield f"term {i} dropped", Word((*before, *after), word.const)
        for what, wrong in _terms(term):
            yield f"term {i}: {what}", Word((*before, wrong, *after), word.const)
    yield "bit 0 flipped", Word(word.terms, word.const ^ 1) if not word.mask_out & 1 else Word((), word.const)


def _terms(term: Term) -> Iterator[tuple[str, Term]]:
    if term.table is None:
        yield "mask up by one", replace(term, mask=term.mask << 1 & U64)
        yield "mask down by one", replace(term, mask=term.mask >> 1)
        yield "shift up by one", replace(term, shift=term.shift + 1)
        yield "shift down by one", replace(term, mask=term.mask if term.shift > -63 else 0, shift=term.shift - 1)
        return
    for i, value in enumerate(term.table):
        if value:
            yield f"table[{i:#x}] lost", replace(term, table=(*term.table[:i], 0, *term.table[i + 1 :]))
            wrong = value << 1 & U64 or value >> 1
            yield f"table[{i:#x}] doubled", replace(term, table=(*term.table[:i], wrong, *term.table[i + 1 :]))
