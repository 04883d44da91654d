"""Annotate: a log or recording copied through, with the decoded words behind every line that holds a fault."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvmfault.contract.target import Target, backend, backends
from kvmfault.decode import MAX_INPUT, one_line
from kvmfault.errors import KvmfaultError
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.events import FaultEvent
from kvmfault.trace.pattern import Misfit
from kvmfault.trace.text import parse_line, row_of

__all__ = ["MARK", "annotate"]

MARK = "  # "
"""What stands between a line and the words for it."""


def annotate(lines: Iterable[str], target: str | None = None) -> Iterator[str]:
    """Every line, unchanged but for words behind those that hold a fault.

    *target* says what faults are where the line does not: without it a code with several encodings is left alone. A
    line that holds several faults is left to the first backend that reads it. Raises UsageError for a bad *target*.
    """
    told = backend(target) if target is not None else None
    known = (
        [told, *(backend(n) for n in backends() if n != told.backend.name)]
        if told
        else [backend(n) for n in backends()]
    )
    by_name = {t.backend.name: t for t in known}
    assembler = Assembler(backends().values(), told=told.backend.name if told else None)
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\n")
        words = _words(text, number, assembler, by_name, told) if len(text) <= MAX_INPUT else None
        yield f"{text}{MARK}{words}" if words else text


def _words(text: str, number: int, assembler: Assembler, targets: dict[str, Target], told: Target | None) -> str | None:
    event = parse_line(text, number)
    if event is not None:
        if event.name not in assembler.patterns:
            return None
        row = row_of(event, assembler.patterns[event.name])
        faults = [] if isinstance(row, Misfit) else [e for e in assembler.feed(row) if isinstance(e, FaultEvent)]
        return "; ".join(_told(targets[f.target], f.registers) or "" for f in faults) or None
    for target in [told] if told else targets.values():
        if told is None and not any(name in text for name in target.order):
            continue  # neither KVM speaks nor is a register named: several backends could read these words
        registers = target.backend.paste(text) if target.backend.paste is not None else None
        if registers:
            return _told(target, registers)
    return None


def _told(target: Target, registers: Mapping[str, int]) -> str | None:
    try:
        return f"{target.backend.name}: {one_line(target, registers)}"
    except KvmfaultError:
        return None
