"""What a recording and the probes beside it say, in one order: faults and their registers, and what KVM then did.

Kprobe events have whatever name somebody gave them: what they are is told by the function in their text,
``(function+offset/size)`` for its call, ``(caller <- function)`` for its return. A binary recording has addresses
there, so in it the event's name tells the function (`Probes.function`). Two recordings on one clock are merged by time.
Stamps of a text are in us: of two events of one time, a trace event that begins a fault or unmaps comes first, then
calls, other trace events, returns, and the vCPU's entry last.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, cast

from kvmfault.contract.backend import Backend
from kvmfault.contract.probes import SAID, Probe, Probes, Said
from kvmfault.contract.tracepoints import Values
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.events import EntryEvent, Event, FaultEvent, UnmapEvent
from kvmfault.trace.pattern import Misfit, Pattern
from kvmfault.trace.recording import ReadStats, RecordedEvent, Recording
from kvmfault.trace.text import TextEvent, misread, read_text, row_of

__all__ = [
    "ProbeReader",
    "ProbeSource",
    "ProbeStats",
    "Told",
    "Truth",
    "beside",
    "functions_of",
    "is_probe",
    "probe_events",
    "probed",
    "read_probes",
    "read_truth",
    "said_by",
]

_PLACE: Final = re.compile(
    r"\((?:(?P<caller>[^\s()]+)(?: \[\w+\])? <- )?(?P<function>[A-Za-z_]\w*)[^\s()]*(?: \[\w+\])?\) ?", re.ASCII
).match
_FIELD: Final = re.compile(r"(\w+)=(-?\d+|0x[0-9a-f]+)(?!\S)", re.ASCII).findall


_CALL: Final = "__probe_ip"
_RETURN: Final = "__probe_func"
"""Fields that only a kprobe event has, of a call and of a return."""


class Told(NamedTuple):
    """What a probe said. ``line`` is of its own recording: the one beside if ``aux``."""

    says: Said
    line: int
    time: int
    pid: int
    values: Values
    aux: bool

    def number(self, name: str, missing: int = 0) -> int:
        """One of its values; *missing* if it was not recorded."""
        value = self.values.get(name, missing)
        return value if isinstance(value, int) else missing


Truth: TypeAlias = Told | Event
ProbeSource: TypeAlias = str | Path | Recording
"""A recording of probes: the path of a text, or a binary one."""


@dataclass(slots=True)
class ProbeStats:
    """What was met."""

    functions: Counter[str] = field(default_factory=Counter)
    """Probed functions, by call and return together."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Those that the backend knows nothing of."""
    misfits: Counter[str] = field(default_factory=Counter)
    """Events that a backend declares and whose text reads differently, or with values that there are not."""


def probed(event: TextEvent) -> tuple[str, bool, str] | None:
    """The function of a kprobe event, whether it is its return, and the text of the fields; None: no kprobe event.

    >>> body = "(kvm_vm_ioctl+0xa9f/0x1090 [kvm] <- __kvm_set_memory_region) ret=0"
    >>> probed(TextEvent(1, "t", 1, 0, 0, "memslot_ret", 1, body))
    ('__kvm_set_memory_region', True, 'ret=0')
    """
    m = _PLACE(event.body)
    return None if m is None else (m["function"], m["caller"] is not None, event.body[m.end() :])


class ProbeReader:
    """Reads what the probes of one backend say out of events."""

    def __init__(self, backend: Backend) -> None:
        self.stats: ProbeStats = ProbeStats()
        self.probes: Probes = backend.probes
        self.unnamed: set[str] = set()
        """Kprobe events of binary recordings whose names tell no function that the backend knows."""
        self._events: dict[str, Probe] = {}
        self.patterns: dict[str, Pattern] = {}
        """How trace events that say something read, by name."""
        for name, point in backend.tracepoints.items():
            if point.tells is not None and point.role is not None:
                self._events[name] = Probe(SAID[point.role], point.tells.read)
                own = point.tells.templates
                self.patterns[name] = Pattern(*own) if own else Pattern.of([point])

    def said(self, event: RecordedEvent, *, aux: bool) -> Told | None:
        """What a trace event says, or None. Its name is one of ``patterns``."""
        fields = cast("Values", event.fields)
        return self._told(self._events[event.name], event.name, fields, event.place, event.time, event.pid, aux)

    def called(self, event: TextEvent, *, aux: bool) -> Told | None:
        """What a line says if it is a kprobe event, or None."""
        place = probed(event) if event.body.startswith("(") else None
        if place is None:
            return None
        function, returns, rest = place
        values: Values = {name: int(value, 0) for name, value in _FIELD(rest)}
        return self._hit(function, returns, values, event.line, event.time, event.pid, aux)

    def recorded(self, event: RecordedEvent, *, aux: bool) -> Told | None:
        """What an event of a binary recording says, or None."""
        if not is_probe(event.fields):
            return self.said(event, aux=aux) if event.name in self.patterns else None
        function = self.probes.function(event.name)
        if function is None:
            return None
        values = {name: value for name, value in event.fields.items() if isinstance(value, int)}
        return self._hit(function, _RETURN in values, values, event.place, event.time, event.pid, aux)

    def asks(self, recording: Recording) -> set[str]:
        """The events of a binary recording that may say something."""
        from kvmfault.trace.rows import probes

        known = probe_events(recording, [self.probes])
        self.unnamed |= probes(recording) - known.keys()
        return {*self.patterns, *known}

    def _hit(
        self, function: str, returns: bool, values: Values, line: int, time: int, pid: int, aux: bool
    ) -> Told | None:
        self.stats.functions[function] += 1
        probe = (self.probes.returns if returns else self.probes.entries).get(function)
        if probe is None:
            self.stats.unknown[function] += 1
            return None
        return self._told(probe, function, values, line, time, pid, aux)

    def read(self, event: TextEvent, *, aux: bool) -> Told | None:
        """What a line says, or None."""
        pattern = self.patterns.get(event.name)
        if pattern is None:
            return self.called(event, aux=aux)
        row = row_of(event, pattern)
        if isinstance(row, Misfit):
            self.stats.misfits[event.name] += 1
            return None
        return self.said(row, aux=aux)

    def _told(
        self, probe: Probe, name: str, recorded: Values, line: int, time: int, pid: int, aux: bool
    ) -> Told | None:
        values: Values | None
        ret = recorded.get("ret", 0)
        if isinstance(ret, int) and (ret >> 63 == 1 or ret >> 12 == _ERRORS):  # recorded without its sign
            recorded = {**recorded, "ret": ret - (1 << (64 if ret >> 63 else 32))}
        try:
            values = probe.read(recorded)
        except (KeyError, ValueError):  # another kernel's, without what is needed
            values = {"": -1}
        if values is None:
            return None
        if not all(_is_sane(key, value) for key, value in values.items()):
            self.stats.misfits[name] += 1
            return None
        return Told(probe.says, line, time, pid, values, aux)


_ERRORS: Final = 0xFFFFF
"""What a negative errno of 32 bits begins with."""
_BITS: Final = {"gfn": 52, "pfn": 52, "first": 52, "as_id": 1, "slot": 32, "level": 3}
"""How large values can be; others have 64 bits. Only what a function returns may be negative."""


def _is_sane(name: str, value: int | str) -> bool:
    return not isinstance(value, int) or name == "ret" or 0 <= value < 1 << _BITS.get(name, 64)


def read_truth(
    source: str,
    recording: Recording | None,
    beside: ProbeSource | None,
    assembler: Assembler,
    reader: ProbeReader,
    *,
    stats: ReadStats,
    aux_stats: ReadStats | None = None,
) -> Iterator[Truth]:
    """Everything that *recording*, or the text *source*, and the probes *beside* it say; in order of time.

    Raises UsageError and TraceError as their readers do.
    """
    if recording is not None:
        streams = [_of_columns(recording, assembler, reader, stats)]
    else:
        streams = [_of_text(source, assembler, reader, stats)]
    if beside is not None:
        aux_stats = ReadStats() if aux_stats is None else aux_stats
        streams.append(read_probes(beside, reader, stats=aux_stats))
    return heapq.merge(*streams, key=_when) if len(streams) > 1 else streams[0]


def _of_columns(recording: Recording, assembler: Assembler, reader: ProbeReader, stats: ReadStats) -> Iterator[Truth]:
    from kvmfault.trace.rows import events

    wanted = {*assembler.patterns, *reader.asks(recording)}
    for row in events(recording, wanted, stats=stats):
        if row.name in assembler.patterns and not is_probe(row.fields):
            yield from assembler.feed(row)
        if (told := reader.recorded(row, aux=False)) is not None:
            yield told


def _of_text(source: str, assembler: Assembler, reader: ProbeReader, stats: ReadStats) -> Iterator[Truth]:
    for event in read_text(source, stats=stats):
        pattern = assembler.patterns.get(event.name)
        if pattern is not None:
            row = row_of(event, {} if event.name in assembler.bare else pattern)
            if isinstance(row, Misfit):
                misread(source, event, row, stats, strict=False)
            else:
                yield from assembler.feed(row)
        told = reader.read(event, aux=False)
        if told is not None:
            yield told


def read_probes(source: ProbeSource, reader: ProbeReader, *, stats: ReadStats | None = None) -> Iterator[Told]:
    """What the probes of a recording beside the one of the faults say."""
    if isinstance(source, str | Path):
        told = (reader.read(event, aux=True) for event in read_text(source, stats=stats))
    else:
        from kvmfault.trace.rows import events

        told = (reader.recorded(row, aux=True) for row in events(source, reader.asks(source), stats=stats))
    return (one for one in told if one is not None)


def is_probe(fields: Collection[str]) -> bool:
    """Whether an event with these fields is a kprobe event."""
    return _CALL in fields or _RETURN in fields


def probe_events(recording: Recording, every: Collection[Probes]) -> dict[str, str]:
    """Kprobe events that a binary recording may hold -> their functions, as far as *every* backend's probes know."""
    from kvmfault.trace.rows import probes

    functions = {name: [f for p in every if (f := p.function(name))] for name in probes(recording)}
    return {name: found[0] for name, found in functions.items() if found}


_LAST: Final = 4
_RETURNS: Final = frozenset(
    {
        Said.RETURNED,
        Said.DECIDED,
        Said.PINNED,
        Said.REPAIR_TRIED,
        Said.MAPPED,
        Said.RELAXED,
        Said.EMULATED,
        Said.UNSYNCED,
        Said.PREFAULTED,
        Said.SLOT_CHANGED,
        Said.SLOT_DONE,
        Said.GOT_LOG,
        Said.CLEARED_LOG,
    }
)


def _when(event: Truth) -> tuple[int, int]:
    if isinstance(event, Told):
        return event.time, (3 if event.says in _RETURNS else 1) if event.aux else 2
    if isinstance(event, FaultEvent | UnmapEvent):  # what is unmapped at once is a call
        return event.time, 0
    return event.time, _LAST if isinstance(event, EntryEvent) else 2


def said_by(probes: Probes, functions: Iterable[str]) -> Iterator[Said]:
    """What probes of these functions can say."""
    for function in functions:
        for known in (probes.entries, probes.returns):
            if function in known:
                yield known[function].says


def functions_of(source: ProbeSource, every: Collection[Probes]) -> Counter[str]:
    """How often each probed function was hit, calls and returns together; of a binary recording those that *every*
    backend's probes know."""
    counted: Counter[str] = Counter()
    if isinstance(source, str | Path):
        for event in read_text(source):
            if event.body.startswith("(") and (place := probed(event)) is not None:
                counted[place[0]] += 1
    elif names := probe_events(source, every):
        for frames in source.frames(names):
            for name, frame in frames.items():
                if is_probe(frame.columns):
                    counted[names[name]] += len(frame)
    return counted


def beside(recording: str | Path) -> Path | None:
    """The text recording of probes in the same folder: ``aux.txt[.gz]``, or one called as *recording* with ``aux`` in
    the place of ``trace``."""
    path = Path(recording)
    names = (path.name.replace("trace", "aux"), "aux.txt", "aux.txt.gz")
    return next((path.with_name(n) for n in names if n != path.name and path.with_name(n).is_file()), None)
