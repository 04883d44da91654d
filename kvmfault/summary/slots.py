"""Which memslot a fault hit, by columns."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from kvmfault.summary.partial import SlotsOf
from kvmfault.trace.events import SlotEvent
from kvmfault.trace.slots import SlotSource

__all__ = ["slots_of"]

_SPACE: Final = 16
"""A slot number has its address space above these bits."""


def slots_of(source: SlotSource) -> SlotsOf:
    """A function of faults (``kvm_get_fault_gpa``, ``time``): the slot as ``id`` or ``space:id``, else ``none``."""
    epochs: list[tuple[int, dict[tuple[str, int], SlotEvent]]] = [(-(1 << 63), {})]
    for change in source.changes:
        if change.ret:
            continue
        time = change.time if source.timed else -(1 << 63)
        if time > epochs[-1][0]:
            epochs.append((time, dict(epochs[-1][1])))
        epochs[-1][1].pop((change.vm, change.slot), None)
        if change.size:
            epochs[-1][1][change.vm, change.slot] = change
    starts = np.array([time for time, _ in epochs], np.int64)
    # the latest last: that a VM ended is not told, and a new one may have others at its addresses
    ranges = [[(c.gpa, c.gpa + c.size, _name(c.slot)) for c in slots.values()] for _, slots in epochs]

    def find(faults: pl.DataFrame) -> pl.Series:
        gpa = faults["kvm_get_fault_gpa"].to_numpy()
        epoch = np.searchsorted(starts, faults["time"].to_numpy(), side="right") - 1
        found = np.full(len(gpa), "none", object)
        for number in np.unique(epoch):
            at = np.flatnonzero(epoch == number)
            for start, end, name in ranges[number]:
                found[at[(gpa[at] >= np.uint64(start)) & (gpa[at] <= np.uint64(end - 1))]] = name
        return pl.Series(found, dtype=pl.String)

    return find


def _name(slot: int) -> str:
    space, number = slot >> _SPACE, slot & ((1 << _SPACE) - 1)
    return f"{space}:{number}" if space else str(number)
