"""Predicates over SCAUSE and HTINST as functions of a fault: its syndrome holds both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from arch.riscv.registers import HTINST, SCAUSE
from kvmfault.algebra.expr import Pred
from kvmfault.algebra.scalar import compile_pred
from kvmfault.contract.fault import MmioFault

_ORDER: Final = (SCAUSE.name, HTINST.name)


def holds(pred: Pred) -> Callable[[MmioFault], bool]:
    """Whether *pred*, over SCAUSE and HTINST, holds for a fault."""
    compiled = compile_pred(pred, _ORDER)

    def on(fault: MmioFault) -> bool:
        word = fault.syndrome
        return compiled(((word >> 31 & 1) << 63 | word & 0x3F, word >> 32))

    return on
