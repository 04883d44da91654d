"""A backend's definitions beside an independent oracle: answers in every form, and what a mistake changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from kvmfault.algebra.columns import BoolCol, Columns, U64Col, pred_column, word_column
from kvmfault.algebra.expr import ALWAYS, NEVER, Maybe, Pred, Word
from kvmfault.algebra.prove import relate
from kvmfault.algebra.scalar import compile_pred, compile_word
from kvmfault.contract.accessors import FACTS, VALUES, Gap
from kvmfault.contract.target import Target
from tests.mutants import mutants, word_mutants

Answer = tuple[U64Col, BoolCol]
"""Values, and whether there is one."""
Definition = Pred | Word | Maybe
VALID_BY: Final = {word: valid for valid, word in VALUES.values()}
"""Name of a value -> the fact that says whether there is one."""


def fact_definitions(target: Target) -> dict[str, Definition]:
    """The target's facts; a value together with the fact that says when it has a meaning."""
    made: dict[str, Definition] = {}
    for name in FACTS:
        fact: Pred | Gap | Word = getattr(target.definition, name)
        if isinstance(fact, Word) and name in VALID_BY:
            valid: Pred | Gap = getattr(target.definition, VALID_BY[name])
            made[name] = fact.when(valid.assume if isinstance(valid, Gap) else valid)
        elif not isinstance(fact, Gap):
            made[name] = fact
    return made


def in_columns(definition: Definition, columns: Columns) -> Answer:
    """The library's answers in column form."""
    if isinstance(definition, Pred):
        truth = pred_column(definition, columns)
        return truth.astype(np.uint64), np.ones(len(truth), np.bool_)
    word, valid = (definition.word, definition.valid) if isinstance(definition, Maybe) else (definition, ALWAYS)
    return word_column(word, columns), pred_column(valid, columns)


def one_by_one(definition: Definition, order: tuple[str, ...], rows: Sequence[tuple[int, ...]]) -> Answer:
    """The library's answers in scalar form; *rows* are the registers in *order*."""
    word = definition.word if isinstance(definition, Maybe) else definition
    value = compile_word(word, order) if isinstance(word, Word) else compile_pred(word, order)
    valid = compile_pred(definition.valid if isinstance(definition, Maybe) else ALWAYS, order)
    return np.array([value(row) for row in rows], np.uint64), np.array([valid(row) for row in rows])


def differ(a: Answer, b: Answer) -> int:
    """On how many rows the answers differ; where there is no value there is nothing to compare."""
    return int(((a[1] != b[1]) | (a[1] & (a[0] != b[0]))).sum())


def wrong(definition: Definition) -> Iterator[tuple[str, Definition]]:
    """Mistakes in a definition, as in ``mutants``."""
    match definition:
        case Pred():
            yield from mutants(definition)
        case Word():
            yield from word_mutants(definition)
        case Maybe(word, valid):
            if valid is not NEVER:  # a value that never exists cannot be wrong
                yield from ((what, Maybe(other, valid)) for what, other in word_mutants(word))
            yield from ((what, Maybe(word, other)) for what, other in mutants(valid))


def assert_same(definition: Definition, mutant: Definition, what: str) -> None:
    """A mutant that no row showed must mean the same."""
    before, after = _truth(definition), _truth(mutant)
    assert before is not after, f"{what}: not noticed"
    assert relate(before, after).equal, f"{what}: not noticed, but not the same"


def _truth(definition: Definition) -> Pred:
    valid = definition.valid if isinstance(definition, Maybe) else definition
    return valid if isinstance(valid, Pred) else ALWAYS
