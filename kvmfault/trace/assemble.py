"""From the kernel's events to neutral ones, by the tracepoints that backends declare.

A fault event may mean something only together with the exit before it (its error code has several
encodings); where that exit was not recorded, the TARGET must say what the faults are. Nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvmfault.contract.backend import Backend
from kvmfault.contract.tracepoints import LOCATING, REPLAYED, Fields, Role, Tracepoint
from kvmfault.errors import needs
from kvmfault.trace.claims import Claim, word
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
from kvmfault.trace.pattern import Pattern
from kvmfault.trace.recording import ReadStats, RecordedEvent, Recording
from kvmfault.trace.source import Source, is_text
from kvmfault.trace.text import text_rows
from kvmfault.types import Gpa, Hva

__all__ = ["AssembleStats", "Assembler", "assemble", "opened"]

_UNSATISFIED: Final = 0
_WRITE: Final = 2
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
    """Feeds on events in the order of the recording. One per recording; a task of the recording is a vCPU."""

    def __init__(self, backends: Iterable[Backend], *, told: str | None = None) -> None:
        self.stats: AssembleStats = AssembleStats()
        self._told = told
        self._claims: dict[str, list[Claim]] = {}
        points: dict[str, list[Tracepoint]] = {}
        for backend in backends:
            for name, point in backend.tracepoints.items():
                points.setdefault(name, []).append(point)
                if point.registers is not None:
                    self._claims.setdefault(name, []).append(Claim(backend.name, point, backend.tracepoints))
        self._points = {name: known[0] for name, known in points.items() if known[0].role in REPLAYED}
        self._where = {
            name: word(point.address, point) for name, point in self._points.items() if point.address is not None
        }
        self._exit_words = {name: tuple(point.words.values()) for name, point in self._points.items()}
        self.patterns: Mapping[str, Pattern] = {name: Pattern.of(points[name]) for name in self._points}
        """How the events that mean something read, by name."""
        self.bare: frozenset[str] = frozenset(name for name, point in self._points.items() if point.role is Role.ENTRY)
        """Those of which no field is used: a third of all."""
        self._exits: dict[int, Fields] = {}
        self._waiting: dict[int, tuple[FaultEvent, str]] = {}

    def feed(self, event: RecordedEvent) -> Iterator[Event]:
        """The neutral events that *event* gives, mostly one."""
        point, fields = self._points[event.name], event.fields
        line, time, pid, vcpu = event.place, event.time, event.pid, str(event.pid)
        if point.role in LOCATING and self._waiting:
            yield from self._located(event)
        match point.role:
            case Role.FAULT:
                yield from self._fault(event)
            case Role.EXIT:
                self._exits[pid] = fields
                self._abandon(pid)
                yield ExitEvent(line, time, vcpu, self._named(event))
                yield from self._alone(event)
            case Role.ENTRY:
                self._abandon(pid)
                yield EntryEvent(line, time, vcpu)
            case Role.MMIO:
                yield self._mmio(event)
            case Role.UNDECODED if (gpa := self._where[event.name](fields)) is not None:
                yield MmioEvent(line, time, vcpu, Gpa(gpa), 0, False, None, False)
            case Role.UNMAP:
                start, end = _int(fields, "start"), _int(fields, "end")
                yield UnmapEvent(line, time, Hva(start), Hva(end), vcpu)
            case Role.AGE | Role.TEST_AGE as role:
                start = _int(fields, "start") or _int(fields, "hva")
                end = _int(fields, "end") or start + 1
                yield AgeEvent(line, time, Hva(start), Hva(end), role is Role.TEST_AGE)
            case Role.USER_EXIT:
                errno = -min(_int(fields, "errno"), 0)
                yield UserspaceExitEvent(line, time, vcpu, "" if errno else self._named(event), errno)

    def end(self) -> None:
        """The recording is over: no event will tell the addresses that faults still wait for."""
        for pid in list(self._waiting):
            self._abandon(pid)

    def _fault(self, event: RecordedEvent) -> Iterator[Event]:
        before = self._exits.get(event.pid)
        for claim in self._claims.get(event.name, ()):
            if before is None and claim.point.needs_exit:
                if self._told != claim.backend:
                    continue
            elif not claim.after(before or {}):
                continue
            registers = claim.registers(event.fields)
            if registers is not None:
                self.stats.faults[claim.backend] += 1
                yield FaultEvent(event.place, event.time, str(event.pid), claim.backend, registers)
                return
        self.stats.unclaimed[event.name] += 1
        if len(self.stats.unclaimed_lines) < 5:
            self.stats.unclaimed_lines.append(event.place)

    def _alone(self, event: RecordedEvent) -> Iterator[Event]:
        # an exit that is a fault by itself; where it lacks the address, the MMIO event that follows has it
        for claim in self._claims.get(event.name, ()):
            registers = claim.registers(event.fields) if claim.after(event.fields) else None
            if registers is not None:
                fault = FaultEvent(event.place, event.time, str(event.pid), claim.backend, registers)
                if claim.point.awaits:
                    self._waiting[event.pid] = fault, claim.point.awaits
                else:
                    self.stats.faults[claim.backend] += 1
                    yield fault
                return

    def _mmio(self, event: RecordedEvent) -> MmioEvent:
        fields = event.fields
        gpa, kind = _int(fields, "gpa"), _int(fields, "type")
        unsatisfied = kind == _UNSATISFIED
        return MmioEvent(
            event.place,
            event.time,
            str(event.pid),
            Gpa(gpa),
            _int(fields, "len"),
            kind == _WRITE,
            None if unsatisfied else _int(fields, "val"),
            not unsatisfied,
        )

    def _named(self, event: RecordedEvent) -> str:
        return next((words.name(event.fields) for words in self._exit_words[event.name]), "?")

    def _located(self, event: RecordedEvent) -> Iterator[Event]:
        gpa = self._where[event.name](event.fields)
        if gpa is not None and (waiting := self._waiting.pop(event.pid, None)) is not None:
            fault, register = waiting
            self.stats.faults[fault.target] += 1
            registers = {**fault.registers, register: gpa}
            yield FaultEvent(fault.line, fault.time, fault.vcpu, fault.target, registers)

    def _abandon(self, pid: int) -> None:
        if self._waiting.pop(pid, None) is not None:
            self.stats.without_address += 1


def opened(source: Source) -> Recording | None:
    """The recording *source* if it is binary, whose rows come from its columns; None: text, read line by line.

    Raises UsageError if it cannot be opened or the extra that reads it is missing, and TraceError.
    """
    if not isinstance(source, str | Path) or str(source) == "-" or is_text(source):
        return None
    with needs("trace", str(source)):
        from kvmfault.trace.opening import open_recording
    return open_recording(str(source))


def assemble(
    source: Source,
    assembler: Assembler,
    *,
    recording: Recording | None = None,
    stats: ReadStats | None = None,
    strict: bool = False,
) -> Iterator[Event]:
    """The neutral events of *recording*, or of the text *source*, in their order. With *strict*, text that does not
    read as declared raises TraceError; otherwise it is counted in *stats*."""
    if recording is None:
        rows = text_rows(source, assembler.patterns, bare=assembler.bare, stats=stats, strict=strict)
    else:
        from kvmfault.trace.rows import events

        rows = events(recording, assembler.patterns.keys(), stats=stats)
    for event in rows:
        yield from assembler.feed(event)
    assembler.end()


def _int(fields: Fields, name: str) -> int:
    value = fields.get(name, 0)
    return value if isinstance(value, int) else 0
