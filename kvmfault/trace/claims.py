"""Whose fault an event is, and its registers: what tracepoints declare, compiled for rows.

`kvmfault.trace.faults` asks the same of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from kvmfault.algebra.expr import Pred, Word, union
from kvmfault.algebra.scalar import Regs, compile_pred, compile_word
from kvmfault.contract.tracepoints import Fields, Role, Tracepoint, Tracepoints

__all__ = ["Claim", "holds", "word"]

T = TypeVar("T")


class Claim:
    """What one tracepoint of one backend says of faults. *points* are all of that backend."""

    def __init__(self, backend: str, point: Tracepoint, points: Tracepoints) -> None:
        self.backend = backend
        self.point = point
        exits = next((p for p in points.values() if p.role is Role.EXIT), point)
        registers = point.registers or {}
        reads = union(*(word.reads for word in registers.values()))
        self._registers = _over(reads, point, lambda order: _compiled(registers, order))
        self._when: Callable[[Fields], bool | None] = lambda _: True
        if (when := point.when) is not None:
            self._when = holds(when, exits)

    def after(self, exit_: Fields) -> bool:
        """Whether an event behind an exit with these fields is a fault of the backend."""
        return bool(self._when(exit_))

    def registers(self, fields: Fields) -> Mapping[str, int] | None:
        """The fault registers; None where a field is missing or is no number."""
        return self._registers(fields)


def holds(pred: Pred, point: Tracepoint) -> Callable[[Fields], bool | None]:
    """*pred* as a function of the fields of *point*; None where a field is missing."""
    return _over(pred.reads, point, lambda order: compile_pred(pred, order))


def word(of: Word, point: Tracepoint) -> Callable[[Fields], int | None]:
    """*of* as a function of the fields of *point*; None where a field is missing."""
    return _over(of.reads, point, lambda order: compile_word(of, order))


def _over(
    reads: Mapping[str, int], point: Tracepoint, compiled: Callable[[tuple[str, ...]], Callable[[Regs], T]]
) -> Callable[[Fields], T | None]:
    order = tuple(reads)
    run = compiled(order)
    stand_ins = [(name, point.missing.get(name)) for name in order]

    def of(fields: Fields) -> T | None:
        values = []
        for name, stand_in in stand_ins:
            value = fields.get(name, stand_in)
            if not isinstance(value, int):
                return None
            values.append(value)
        return run(tuple(values))

    return of


def _compiled(registers: Mapping[str, Word], order: tuple[str, ...]) -> Callable[[Regs], Mapping[str, int]]:
    words = [(name, compile_word(word, order)) for name, word in registers.items()]
    return lambda values: {name: word(values) for name, word in words}
