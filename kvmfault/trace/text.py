"""Recordings in text form, read as a stream: lines to `TextEvent`, bodies to `Fields`.

Understood are tracefs ``trace``, ``trace-cmd report`` (with -l, -t, -R, -N, several files) and
``perf script``, plain or gzipped, in bounded memory. Which events exist, and how their bodies read,
is declared by the caller (`Pattern`); this module knows no event.

>>> from io import BytesIO
>>> lines = BytesIO(b"        vcpu 0-7-12    [001] d....    14.194088: fault: ipa 0x180000, hsr 0x82000084\\n")
>>> [(event, fields)] = read_fields(lines, {"fault": Pattern("ipa {ipa:x}, hsr {hsr:x}")})
>>> event.comm, event.pid, event.cpu, event.time, hex(fields.numbers["ipa"])
('vcpu 0-7', 12, 1, 14194088000, '0x180000')
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Final

from kvmfault.errors import TraceError
from kvmfault.trace.pattern import Fields, Misfit, Pattern
from kvmfault.trace.recording import Lost, ReadStats, RecordedEvent
from kvmfault.trace.source import Source, open_bytes, source_name

__all__ = [
    "MAX_LINE",
    "TextEvent",
    "looks_recorded",
    "misread",
    "parse_line",
    "read_fields",
    "read_text",
    "row_of",
    "text_rows",
]

MAX_LINE: Final = 64 * 1024
"""Longer lines are dropped and counted as unreadable; the kernel's own limit is one page."""
_SAMPLES: Final = 5
# Where reading stops: lines without one event among them, characters without the end of a line.
_HOPELESS_LINES: Final = 10_000
_HOPELESS_LINE: Final = 1 << 26


@dataclass(frozen=True, slots=True)
class TextEvent:
    """One event of a recording, its body still text.

    ``time`` is in ns; where the recording's clock prints no point (cycle counters, ``--raw-ts``) it is
    that clock's ticks. ``line`` and ``column`` (where the body begins) count from 1.
    """

    line: int
    comm: str
    pid: int
    cpu: int
    time: int
    name: str
    column: int
    body: str


# After the task: tgid column, [cpu], flag characters, stamp, --ts-diff column, system, name. Groups of
# every form: comm, pid, cpu, seconds or ticks, fraction, name. A comm is at most 16 columns wide, and
# anything may stand in it, so the last "-pid" within those columns counts.
_STAMP: Final = r" *(\d{1,20})(?:\.(\d{1,9}))?: +(?:\(\+?\d+\) +)?(?:[\w-]+:)?([\w.-]+):(?: +|$)"
_CPU: Final = r" +(?:\([ \d-]+\) +)?\[(\d{1,6})\] *(?:[^\s\d]\S{3,} )?"
_FORMS: Final = tuple(
    re.compile(source, re.ASCII).match
    for source in (
        r"(.{16})-(\d{1,10})" + _CPU + _STAMP,
        r"\S{1,255}: (.{16})-(\d{1,10})" + _CPU + _STAMP,  # of several files
        r"(.{1,16})-(\d{1,10})" + _CPU + _STAMP,  # padded to 16 bytes, not characters
        r"(?:\S{1,255}: )?(.{8})-(\d{1,10}) +(\d{1,6})[^\s\d]\S{3,}" + _STAMP,
        r"(.{1,16}) +(?:\d{1,10}/)?(\d{1,10})" + _CPU + _STAMP,
    )
)
_QUIET: Final = re.compile(
    r"(?:\S{1,255}: )?(?:#|cpus=\d|CPU \d+ is empty|version = )|\s+(?:=> |[0-9a-f]{6,16} \S)"
).match
_LOST: Final = re.compile(r"(?:\S{1,255}: )?CPU:(\d{1,6}) \[(?:LOST )?(?:(\d{1,20}) )?EVENTS(?: DROPPED)?\]").match
_ENTRIES: Final = re.compile(r"# entries-in-buffer/entries-written: (\d{1,19})/(\d{1,19})\s").match
_MARK: Final = "tracing_mark_write"  # the function whose name the kernel prints instead of the event's
_GAPS: Final = 10_000
_VOTES: Final = 100
_CHARACTERS: Final = 1 << 18
_CPUS: Final = 1 << 13
_EXPECTED: Final = "'task-pid [cpu] flags seconds: event: text' of tracefs, trace-cmd report or perf script"
_BINARY: Final = {
    b"\x17\x08\x44tracing": "a binary trace.dat: give the output of `trace-cmd report -R` instead",
    b"PERFILE2": "a binary perf.data: give the output of `perf script --ns` instead",
}


def read_text(
    source: Source,
    *,
    wanted: Collection[str] | None = None,
    stats: ReadStats | None = None,
    strict: bool = False,
) -> Iterator[TextEvent]:
    """The events of *source* in file order; only those named in *wanted*, if given. All are counted.

    Raises `UsageError` if the file cannot be opened, `TraceError` if it is no recording (nothing in it
    reads as an event, and no header says that it is empty), and with *strict* also at the first line
    that is neither event nor header, where it is otherwise counted and told as damage. So is an event whose stamp is
    in seconds where most are in ticks, or the reverse.
    """
    stats = ReadStats() if stats is None else stats
    header = yield from _events(source, wanted, stats, strict=strict)
    if not stats.events and (stats.unreadable or not header):
        found = stats.damage or (f"{stats.lines} lines that are not" if stats.lines else "nothing")
        raise TraceError(f"not a recording: expected {_EXPECTED}, found {found}", path=source_name(source), line=1)
    if stats.unreadable:
        lost = f"{stats.unreadable:,} lines could not be read, first at line {stats.unreadable_lines[0]}"
        stats.damage = f"{lost}; {stats.damage}" if stats.damage else lost


def _events(
    source: Source, wanted: Collection[str] | None, stats: ReadStats, *, strict: bool
) -> Generator[TextEvent, None, bool]:
    # Returns whether there was a header.
    path = source_name(source)
    match, header = _FORMS[0], False
    events, skipped, number = stats.events, stats.skipped, 0
    losses = _Losses(stats)
    lines = _lines(source, stats)
    first, stats.ticks = _clock(lines)
    ticks = stats.ticks
    for line in chain(first, lines):
        number += 1
        if (m := match(line)) is None or len(line) > MAX_LINE:
            stats.lines = number
            if len(line) > MAX_LINE:
                _unreadable(path, line, stats, strict=strict)
                continue
            match = next((form for form in _FORMS if form(line)), match)
            if (m := match(line)) is None:
                if losses.read(line) or _QUIET(line):
                    header = True
                elif line and not line.isspace():
                    _unreadable(path, line, stats, strict=strict)
                    if not events and stats.unreadable >= _HOPELESS_LINES:
                        break
                continue
        fraction, name = m[5], m[6]
        if (fraction is None) is not ticks:
            stats.lines = number
            _unreadable(path, line, stats, strict=strict)
            continue
        if name == _MARK:
            name = "print"
        events[name] += 1
        losses.passed(int(m[3]), m[4], fraction)
        if wanted is not None and name not in wanted:
            skipped[name] += 1
            continue
        stats.lines = number
        yield _event(m, number, line)
    losses.end()
    stats.lines = number
    return header


def parse_line(line: str, number: int = 0) -> TextEvent | None:
    """One line as an event, or None: a header, a mark, or no event at all. Never raises."""
    for form in _FORMS:
        if m := form(line[: MAX_LINE + 1]):
            return _event(m, number, line)
    return None


def _clock(lines: Iterator[str]) -> tuple[list[str], bool]:
    # The first lines, and whether their stamps are ticks, without a point. One clock stamps a whole recording, so most
    # of its first events tell: not one whose stamp was garbled.
    first, votes, length = [], [], 0
    for line in lines:
        first.append(line)
        length += len(line) + 1
        if m := next(filter(None, (form(line) for form in _FORMS)), None):
            votes.append(m[5] is None)
        if (votes and len(first) >= _VOTES) or length > _CHARACTERS:
            break
    return first, 2 * sum(votes) > len(votes)


def _event(m: re.Match[str], number: int, line: str) -> TextEvent:
    comm, pid, cpu, seconds, fraction, name = m.groups()
    time = _time(seconds, fraction)
    name = "print" if name == _MARK else name
    return TextEvent(number, comm.strip(" "), int(pid), int(cpu), time, name, m.end() + 1, line[m.end() :].rstrip())


def read_fields(
    source: Source,
    patterns: Mapping[str, Pattern],
    *,
    stats: ReadStats | None = None,
    strict: bool = True,
) -> Iterator[tuple[TextEvent, Fields]]:
    """The events named in *patterns* with their fields. A body that fits none raises `TraceError`, or is counted."""
    stats = ReadStats() if stats is None else stats
    path = source_name(source)
    for event in read_text(source, wanted=patterns.keys(), stats=stats, strict=strict):
        fields = patterns[event.name].read(event.body)
        if isinstance(fields, Fields):
            yield event, fields
        else:
            misread(path, event, fields, stats, strict=strict)


def text_rows(
    source: Source,
    patterns: Mapping[str, Pattern],
    *,
    bare: Collection[str] = (),
    stats: ReadStats | None = None,
    strict: bool = False,
) -> Iterator[RecordedEvent]:
    """The events named in *patterns* as rows; of those in *bare* no fields are read. A body that fits none raises
    `TraceError` if *strict*, and is counted otherwise."""
    stats = ReadStats() if stats is None else stats
    for event in read_text(source, wanted=patterns.keys(), stats=stats, strict=strict):
        row = row_of(event, {} if event.name in bare else patterns[event.name])
        if isinstance(row, RecordedEvent):
            yield row
        else:
            misread(source_name(source), event, row, stats, strict=strict)


def row_of(event: TextEvent, pattern: Pattern | Mapping[str, int]) -> RecordedEvent | Misfit:
    """A line as a row, or where its body stops to fit *pattern*; fields in its place are taken as they are."""
    fields: Mapping[str, int | str | bytes]
    if isinstance(pattern, Pattern):
        read = pattern.read(event.body)
        if isinstance(read, Misfit):
            return read
        fields = {**read.numbers, **read.words} if read.words else read.numbers
    else:
        fields = pattern
    return RecordedEvent(event.line, event.time, event.cpu, event.pid, event.name, fields)


def misread(path: str, event: TextEvent, misfit: Misfit, stats: ReadStats, *, strict: bool) -> None:
    """Count a body that fits no pattern; with *strict*, raise `TraceError`."""
    if strict:
        raise TraceError(f"{event.name}: {misfit}", path=path, line=event.line, column=event.column + misfit.at)
    stats.misfits[event.name] += 1
    if len(stats.misfit_lines) < _SAMPLES:
        stats.misfit_lines.append(event.line)


def looks_recorded(content: bytes) -> bool:
    """Whether *content*, the beginning of a file, is of a recording: text that can be read, or binary that cannot."""
    if content.startswith(tuple(_BINARY)):
        return True
    lines = content[:MAX_LINE].decode(errors="replace").split("\n")
    return any(line.startswith(("# tracer:", "cpus=")) or any(form(line) for form in _FORMS) for line in lines)


class _Losses:
    # Which CPU lost how many events, and between which of its events.
    def __init__(self, stats: ReadStats) -> None:
        self._stats = stats
        self._last: dict[int, tuple[str, str | None]] = {}
        self._open: list[tuple[int, int | None, int | None]] = []

    def read(self, line: str) -> bool:
        """Whether *line* tells of a loss."""
        if m := _ENTRIES(line):
            self._stats.overwritten += max(int(m[2]) - int(m[1]), 0)
            return True
        if (m := _LOST(line)) is None:
            return False
        cpu, events = int(m[1]), int(m[2]) if m[2] else None
        if events is None:
            self._stats.lost_unknown += 1
        else:
            self._stats.lost[cpu] += events
        if len(self._stats.gaps) + len(self._open) < _GAPS:
            last = self._last.get(cpu)
            self._open.append((cpu, events, _time(*last) if last else None))
        return True

    def passed(self, cpu: int, seconds: str, fraction: str | None) -> None:
        """An event of *cpu*, at this time."""
        if cpu < _CPUS:
            self._last[cpu] = seconds, fraction
        if self._open:
            self._close(cpu, _time(seconds, fraction))

    def end(self) -> None:
        """Nothing follows."""
        self._close(None, None)

    def _close(self, cpu: int | None, time: int | None) -> None:
        over = [loss for loss in self._open if cpu is None or loss[0] == cpu]
        self._stats.gaps += [Lost(*loss, time) for loss in over]
        self._open = [loss for loss in self._open if loss not in over]


def _time(seconds: str, fraction: str | None) -> int:
    return int(seconds if fraction is None else seconds + fraction.ljust(9, "0"))


def _unreadable(path: str, line: str, stats: ReadStats, *, strict: bool) -> None:
    if strict:
        what = f"longer than {MAX_LINE} characters" if len(line) > MAX_LINE else repr(line[:60])
        raise TraceError(f"expected {_EXPECTED}, found {what}", path=path, line=stats.lines, column=1)
    stats.unreadable += 1
    if len(stats.unreadable_lines) < _SAMPLES:
        stats.unreadable_lines.append(stats.lines)


def _lines(source: Source, stats: ReadStats) -> Iterator[str]:
    # Lines without their end. One that is too long comes once, cut just above the limit.
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    rest, dropped = "", 0
    for n, piece in enumerate(open_bytes(source, stats)):
        if n == 0 and (what := next((w for magic, w in _BINARY.items() if piece.startswith(magic)), None)):
            raise TraceError(what, path=source_name(source), line=1)
        lines = (rest + decode(piece)).split("\n")
        rest = lines.pop()
        if dropped and lines:
            del lines[0]
            dropped = 0
        for line in lines:
            yield line[: MAX_LINE + 1]
        if not dropped and len(rest) > MAX_LINE:
            yield rest[: MAX_LINE + 1]
            dropped = 1
        if dropped:
            dropped, rest = dropped + len(rest), ""
            if dropped > _HOPELESS_LINE:
                stats.damage = f"no end of line in {dropped} characters"
                return
    rest += decode(b"", final=True)
    if rest and not dropped and not stats.damage:  # what is left of a line that was cut is no line
        yield rest
