"""Predicates and values of the trapped syndrome as functions of a fault, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

from arch.arm64.facts import FSC
from arch.arm64.registers import ESR_EL2
from kvmfault.algebra.expr import Pred, Word
from kvmfault.algebra.scalar import compile_pred, compile_word
from kvmfault.contract.fault import MmioFault

_ESR: Final = (ESR_EL2.name,)


@cache
def holds(pred: Pred) -> Callable[[MmioFault], bool]:
    """Whether *pred*, over ESR_EL2 alone, holds for a fault."""
    compiled = compile_pred(pred, _ESR)
    return lambda fault: compiled((fault.syndrome,))


def value(word: Word) -> Callable[[MmioFault], int]:
    """The value of *word*, over ESR_EL2 alone, for a fault."""
    compiled = compile_word(word, _ESR)
    return lambda fault: compiled((fault.syndrome,))


_outside_status: Final = value(ESR_EL2.field_at(63, 6) << 6)
assert FSC.hi == 5  # what _outside_status leaves out


def with_status(fault: MmioFault, status: int) -> int:
    """The trapped syndrome with another status code."""
    return _outside_status(fault) | status
