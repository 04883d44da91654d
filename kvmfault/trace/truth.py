"""What a recording and the probes beside it say, in one order: faults and their registers, and what KVM then did.

Kprobe events have whatever name somebody gave them: what they are is told by the function in their text,
``(function+offset/size)`` for its call, ``(caller <- function)`` for its return. Two recordings on one clock are merged
by time. Stamps of a text are in us: of two events of one time, a trace event that begins a fault comes first, then
calls, other trace events, returns, and the vCPU's entry last.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, cast

from kvmfault.contract.backend import Backend
from kvmfault.contract.probes import Probe, Probes, Said, Values
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.events import EntryEvent, Event, FaultEvent
from kvmfault.trace.pattern import Misfit, Pattern
from kvmfault.trace.recording import ReadStats, RecordedEvent, Recording
from kvmfault.trace.text import TextEvent, misread, read_text, row_of

__all__ = ["ProbeReader", "ProbeStats", "Told", "Truth", "beside", "functions_of", "probed", "read_truth", "said_by"]

_PLACE: Final = re.compile(
    r"\((?:(?P<caller>[^\s()]+)(?: \[\w+\])? <- )?(?P<function>[A-Za-z_]\w*)[^\s()]*(?: \[\w+\])?\) ?", re.ASCII
).match
_FIELD: Final = re.compile(r"(\w+)=(-?\d+|0x[0-9a-f]+)(?!\S)", re.ASCII).findall


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
        probes, points = backend.probes, backend.tracepoints
        self._entries, self._returns, self._events = probes.entries, probes.returns, probes.events
        self.patterns: Mapping[str, Pattern] = {
            name: Pattern(*probe.templates) if probe.templates else Pattern.of([points[name]])
            for name, probe in probes.events.items()
        }
        """How trace events that say something read, by name."""

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
        self.stats.functions[function] += 1
        probe = (self._returns if returns else self._entries).get(function)
        if probe is None:
            self.stats.unknown[function] += 1
            return None
        values: Values = {name: int(value, 0) for name, value in _FIELD(rest)}
        return self._told(probe, function, values, event.line, event.time, event.pid, aux)

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


_BITS: Final = {"gfn": 52, "pfn": 52, "first": 52, "as_id": 1, "slot": 32, "level": 3}
"""How large values can be; others have 64 bits. Only what a function returns may be negative."""


def _is_sane(name: str, value: int | str) -> bool:
    return not isinstance(value, int) or name == "ret" or 0 <= value < 1 << _BITS.get(name, 64)


def read_truth(
    source: str,
    recording: Recording | None,
    beside: str | Path | None,
    assembler: Assembler,
    reader: ProbeReader,
    *,
    stats: ReadStats,
    aux_stats: ReadStats | None = None,
) -> Iterator[Truth]:
    """Everything that *recording*, or the text *source*, and the text of probes *beside* it say; in order of time.

    Raises UsageError and TraceError as their readers do.
    """
    if recording is not None:
        streams = [_of_columns(recording, assembler, reader, stats)]
    else:
        streams = [_of_text(source, assembler, reader, stats)]
    if beside is not None:
        aux_stats = ReadStats() if aux_stats is None else aux_stats
        streams.append(_of_probes(beside, reader, aux_stats))
    return heapq.merge(*streams, key=_when) if len(streams) > 1 else streams[0]


def _of_columns(recording: Recording, assembler: Assembler, reader: ProbeReader, stats: ReadStats) -> Iterator[Truth]:
    from kvmfault.trace.rows import events

    for row in events(recording, {*assembler.patterns, *reader.patterns}, stats=stats):
        if row.name in assembler.patterns:
            yield from assembler.feed(row)
        if row.name in reader.patterns and (told := reader.said(row, aux=False)) is not None:
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


def _of_probes(source: str | Path, reader: ProbeReader, stats: ReadStats) -> Iterator[Truth]:
    for event in read_text(source, stats=stats):
        told = reader.read(event, aux=True)
        if told is not None:
            yield told


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
        if event.says is Said.INVALIDATE:
            return event.time, 0  # what is unmapped at once is a call
        return event.time, (3 if event.says in _RETURNS else 1) if event.aux else 2
    return event.time, 0 if isinstance(event, FaultEvent) else _LAST if isinstance(event, EntryEvent) else 2


def said_by(probes: Probes, functions: Iterable[str]) -> Iterator[Said]:
    """What probes of these functions can say."""
    for function in functions:
        for known in (probes.entries, probes.returns):
            if function in known:
                yield known[function].says


def functions_of(source: str | Path, progress: Callable[[int], None] | None = None) -> Counter[str]:
    """How often each probed function was hit, calls and returns together."""
    counted: Counter[str] = Counter()
    stats = ReadStats()
    for number, event in enumerate(read_text(source, stats=stats)):
        if event.body.startswith("(") and (place := probed(event)) is not None:
            counted[place[0]] += 1
        if progress is not None and number % 4096 == 0:
            progress(stats.bytes)
    return counted


def beside(recording: str | Path) -> Path | None:
    """The recording of probes in the same folder: ``aux.txt[.gz]``, or one called as *recording* with ``aux`` in the
    place of ``trace``."""
    path = Path(recording)
    names = (path.name.replace("trace", "aux"), "aux.txt", "aux.txt.gz")
    return next((path.with_name(n) for n in names if n != path.name and path.with_name(n).is_file()), None)
