"""ESTAT and BADI out of a fault: its syndrome holds both."""

from __future__ import annotations

from collections.abc import Callable

from arch.loongarch.registers import ESTAT
from kvmfault.algebra.expr import Pred
from kvmfault.algebra.scalar import compile_pred
from kvmfault.contract.fault import MmioFault


def holds(pred: Pred) -> Callable[[MmioFault], bool]:
    """Whether *pred*, over the codes of ESTAT, holds for a fault."""
    compiled = compile_pred(pred, (ESTAT.name,))
    return lambda fault: compiled((fault.syndrome >> 32 & 0x7FFF_0000,))


def instruction(fault: MmioFault) -> int:
    """BADI."""
    return fault.syndrome & 0xFFFF_FFFF
