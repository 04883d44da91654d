"""From the kernel's events to neutral ones, by the tracepoints that backends declare.

A fault event may mean something only together with the exit before it (its error code has several
encodings); where that exit was not recorded, the TARGET must say what the faults are. Nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvmfault.contract.backend import Backend
from kvmfault.contract.tracepoints import Role, Tracepoint
from kvmfault.errors import TraceError
from kvmfault.trace.events import (
    AgeEvent,
    EntryEvent,
    Event,
    ExitEvent,
    FaultEvent,
    MmioEvent,
    UnmapEvent,
    UserspaceExitEvent,
)
from kvmfault.trace.pattern import Fields, Misfit, Pattern
from kvmfault.trace.text import ReadStats, Source, TextEvent, read_text, source_name
from kvmfault.types import Gpa, Hva

_UNSATISFIED: Final = 0
_WRITE: Final = 2
_TYPES: Final = {"unsatisfied-read": _UNSATISFIED, "read": 1, "write": _WRITE}
"""kvm_mmio.type; common to all architectures."""


@dataclass(slots=True)
class AssembleStats:
    """What was made of the events."""

    faults: Counter[str] = field(default_factory=Counter)
    """By backend."""
    unclaimed: Counter[str] = field(default_factory=Counter)
    """Fault events whose encoding is not known from the recording, by event name."""
    unclaimed_lines: list[int] = field(default_factory=list)
    without_address: int = 0
    """Faults that only an exit told of, and no event gave their address."""


class Assembler:
    """Feeds on text events in file order. One per recording; a task of the recording is a vCPU."""

    def __init__(self, backends: Iterable[Backend], *, told: str | None = None) -> None:
        self.stats = AssembleStats()
        self._told = told
        self._points: dict[str, list[tuple[str, Tracepoint]]] = {}
        self._page_shift: dict[str, int] = {}
        for backend in backends:
            self._page_shift[backend.name] = next(iter(backend.formats.values())).page_shift
            for name, point in backend.tracepoints.items():
                self._points.setdefault(name, []).append((backend.name, point))
        self.patterns: Mapping[str, Pattern] = {name: _pattern(p for _, p in ps) for name, ps in self._points.items()}
        # a third of all events: their fields are not used, so they are not read
        self._bare = {name for name, points in self._points.items() if points[0][1].role is Role.ENTRY}
        self._exits: dict[int, Mapping[str, int | str]] = {}
        self._waiting: dict[int, tuple[FaultEvent, str]] = {}

    def feed(self, event: TextEvent) -> Iterator[Event] | Misfit:
        """The neutral events that *event* gives, mostly one; a Misfit if its text is not as declared."""
        if event.name in self._bare:
            return self._make(event, {})
        read = self.patterns[event.name].read(event.body)
        return read if isinstance(read, Misfit) else self._make(event, {**read.numbers, **read.words})

    def _make(self, event: TextEvent, fields: Mapping[str, int | str]) -> Iterator[Event]:
        points = self._points[event.name]
        line, time, pid, vcpu = event.line, event.time, event.pid, str(event.pid)
        match points[0][1].role:
            case Role.FAULT:
                yield from self._fault(event, fields, points)
            case Role.EXIT:
                self._exits[pid] = fields
                self._abandon(pid)
                yield ExitEvent(line, time, vcpu, _reason(fields))
                self._waits(event, fields, points)
            case Role.ENTRY:
                self._abandon(pid)
                yield EntryEvent(line, time, vcpu)
            case Role.ADDRESS:
                frame = _int(fields, "gfn") << self._page_shift[points[0][0]]
                yield from self._address(event, _int(fields, "gpa") or frame)
            case Role.MMIO:
                yield from self._mmio(event, fields)
            case Role.UNDECODED:
                yield MmioEvent(line, time, vcpu, Gpa(_int(fields, "ipa")), 0, False, None, False)
            case Role.UNMAP:
                start, end = _int(fields, "start"), _int(fields, "end")
                yield UnmapEvent(line, time, Hva(start), Hva(end), vcpu)
            case Role.AGE | Role.TEST_AGE as role:
                start = _int(fields, "start") or _int(fields, "hva")
                end = _int(fields, "end") or start + 1
                yield AgeEvent(line, time, Hva(start), Hva(end), role is Role.TEST_AGE)
            case Role.USER_EXIT:
                reason = fields.get("reason", "")
                yield UserspaceExitEvent(line, time, vcpu, str(reason), abs(_int(fields, "errno")))

    def _fault(
        self, event: TextEvent, fields: Mapping[str, int | str], points: list[tuple[str, Tracepoint]]
    ) -> Iterator[Event]:
        before = self._exits.get(event.pid)
        for name, point in points:
            if point.registers is None:
                continue
            context = before
            if before is None and point.needs_exit:
                if self._told != name:
                    continue
                context = {}
            registers = point.registers(fields, context or {})
            if registers is not None:
                self.stats.faults[name] += 1
                yield FaultEvent(event.line, event.time, str(event.pid), name, registers)
                return
        self.stats.unclaimed[event.name] += 1
        if len(self.stats.unclaimed_lines) < 5:
            self.stats.unclaimed_lines.append(event.line)

    def _waits(self, event: TextEvent, fields: Mapping[str, int | str], points: list[tuple[str, Tracepoint]]) -> None:
        # an exit that is a fault by itself, but lacks the address: the MMIO event that follows has it
        for name, point in points:
            registers = point.registers(fields, fields) if point.registers is not None and point.awaits else None
            if registers is not None:
                fault = FaultEvent(event.line, event.time, str(event.pid), name, registers)
                self._waiting[event.pid] = fault, point.awaits
                return

    def _mmio(self, event: TextEvent, fields: Mapping[str, int | str]) -> Iterator[Event]:
        kind = fields.get("type", 0)
        number = kind if isinstance(kind, int) else _TYPES.get(kind, 1)
        gpa, value = _int(fields, "gpa"), _int(fields, "val")
        yield from self._address(event, gpa)
        unsatisfied = number == _UNSATISFIED
        yield MmioEvent(
            event.line,
            event.time,
            str(event.pid),
            Gpa(gpa),
            _int(fields, "len"),
            number == _WRITE,
            None if unsatisfied else value,
            not unsatisfied,
        )

    def _address(self, event: TextEvent, gpa: int) -> Iterator[Event]:
        waiting = self._waiting.pop(event.pid, None)
        if waiting is not None:
            fault, register = waiting
            self.stats.faults[fault.target] += 1
            registers = {**fault.registers, register: gpa}
            yield FaultEvent(fault.line, fault.time, fault.vcpu, fault.target, registers)

    def _abandon(self, pid: int) -> None:
        if self._waiting.pop(pid, None) is not None:
            self.stats.without_address += 1


def assemble(
    source: Source, assembler: Assembler, *, stats: ReadStats | None = None, strict: bool = False
) -> Iterator[Event]:
    """The neutral events of a recording, in file order. With *strict*, text that does not read as declared raises
    TraceError; otherwise it is counted in *stats*."""
    stats = ReadStats() if stats is None else stats
    for event in read_text(source, wanted=assembler.patterns.keys(), stats=stats, strict=strict):
        made = assembler.feed(event)
        if not isinstance(made, Misfit):
            yield from made
            continue
        if strict:
            column = event.column + made.at
            raise TraceError(f"{event.name}: {made}", path=source_name(source), line=event.line, column=column)
        stats.misfits[event.name] += 1
        if len(stats.misfit_lines) < 5:
            stats.misfit_lines.append(event.line)


def _pattern(points: Iterable[Tracepoint]) -> Pattern:
    known = list(dict.fromkeys(points))
    if len(known) == 1:
        return Pattern(*known[0].templates, assigned=known[0].assigned)
    templates = dict.fromkeys(t for p in known for t in p.templates)
    # events of one name differ between architectures: every field may be missing
    specs = dict.fromkeys(
        spec.rstrip("?") + "?" for p in known for spec in (p.assigned or _template_fields(p.templates)).split()
    )
    return Pattern(*templates, assigned=" ".join(specs))


def _template_fields(templates: tuple[str, ...]) -> str:
    return " ".join(dict.fromkeys(t.strip("{}") for text in templates for t in text.split() if t.startswith("{")))


def _reason(fields: Mapping[str, int | str]) -> str:
    for name in ("reason", "exit_reason", "ret"):
        if name in fields:
            return str(fields[name])
    return "?"


def _int(fields: Mapping[str, int | str], name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0


__all__ = ["AssembleStats", "Assembler", "Fields", "assemble"]
