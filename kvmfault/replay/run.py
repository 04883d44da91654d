"""Replay a recording: read it, find or take its memslots, run every fault on every target."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from errno import EFAULT
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kvmfault.contract.access import kind
from kvmfault.contract.format import size_text
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import TraceError, UsageError
from kvmfault.parallel import ALONE, Workers
from kvmfault.replay.kept import seekable
from kvmfault.replay.machine import ReplayTarget
from kvmfault.replay.settings import AS_RECORDED, HostSettings, split_settings
from kvmfault.replay.whatif import Variant
from kvmfault.trace.assemble import Assembler, AssembleStats, assemble, opened
from kvmfault.trace.binary import expect
from kvmfault.trace.events import (
    AgeEvent,
    EntryEvent,
    Event,
    ExitEvent,
    FaultEvent,
    MmioEvent,
    SlotEvent,
    UnmapEvent,
    UserspaceExitEvent,
)
from kvmfault.trace.recording import ReadStats, Recording
from kvmfault.trace.slots import SlotComparison, SlotSource, compare_slots, infer_slots
from kvmfault.trace.source import source_name
from kvmfault.trace.truth import beside

__all__ = ["Opened", "Progress", "Report", "replay", "seekable", "survey"]

Progress = Callable[[str, int], None]
"""Called now and then with the name of the pass and the bytes read so far."""


@dataclass(slots=True)
class Report:
    """What a replay found."""

    recording: str
    own: Target
    unit: str = "line"
    """What the places of findings number: a line of text, or a record."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Faults by cause and access."""
    read: ReadStats = field(default_factory=ReadStats)
    assembled: AssembleStats = field(default_factory=AssembleStats)
    slots: SlotSource = field(default_factory=lambda: SlotSource("none", ()))
    results: list[ReplayTarget] = field(default_factory=list)
    variants: list[Variant] = field(default_factory=list)
    """The accesses made again: on the recorded machine first, then on what was asked for."""
    inference: SlotComparison | None = None
    """What inference would have found, beside the slots that were given."""
    foreign: Counter[str] = field(default_factory=Counter)
    """Faults of another backend than ``own``: not replayed."""
    no_memory: frozenset[int] = frozenset()
    """Lines of faults for which KVM_RUN failed with EFAULT: the host had no memory there."""
    host_events: int = 0
    """Unmappings and agings in the recording."""
    notes: list[str] = field(default_factory=list)

    @property
    def unexplained(self) -> int:
        """Outcomes on the own backend that contradict the recording."""
        return sum(r.unexplained_count for r in self.results)


def replay(
    source: str,
    targets: Sequence[str] = (),
    slots: SlotSource | None = None,
    *,
    settings: Sequence[str] = (),
    strict: bool = False,
    where: Workers = ALONE,
    progress: Progress | None = None,
) -> Report:
    """Replay the recording *source* ("-" for standard input) on *targets*; its own backend always comes first.
    *where* works on the machines, one task each; the report is the same wherever that is.

    Without *slots* those that probes beside the recording tell are used, or else inferred ones; with them, the report
    says what inference would have missed or invented.
    *settings*: ``KEY=VALUE`` for every target, the recording's own included; with them, or with targets, the report
    also compares what the recorded accesses cost there and on the recorded machine. Raises UsageError, TraceError.
    """
    host, settings = split_settings(settings)
    named = [backend(t).with_settings(settings) for t in targets]
    with seekable(source) as path:
        found = Opened(path, source_name(source))
        own, inferred, no_memory = survey(found, named, strict=strict, progress=progress)
        recorded = own
        if own not in named:
            own = own.with_settings(settings)
        chosen = [own, *(t for t in named if t is not own)]
        known = slots or _slots_beside(source) or inferred
        report = Report(found.name, own, found.unit, slots=known, no_memory=no_memory)
        if slots is not None:
            report.inference = compare_slots(inferred, slots, page_size=1 << own.format.page_shift)
        report.results = [ReplayTarget(t, own) for t in chosen]
        if named or settings or host != AS_RECORDED:
            others = (Variant(t, own, host=host) for t in (named or [own]))
            as_recorded = Variant(recorded, own, host=AS_RECORDED)
            report.variants = [as_recorded, *(v for v in others if v.name != as_recorded.name)]
        if where.apart and len(report.results) + len(report.variants) > 1:
            _spread(_Task(os.path.abspath(path), found.name, named, strict), report, where, progress)  # noqa: PTH100
        else:
            _run(found, report, _assembler(named), strict=strict, progress=progress)
    _remark(report)
    report.notes[:0] = found.stands_for(own.kernel)
    if own not in named:
        page = size_text(1 << own.format.page_shift)
        report.notes.insert(
            0, f"assumed: kernel {own.kernel}, format {own.format.name} ({page} pages); --backend says otherwise"
        )
    return report


def _slots_beside(source: str) -> SlotSource | None:
    # what a recording of probes beside this one tells of memslots
    from kvmfault.trace.slotfile import read_slots

    near = beside(source) if source != "-" else None
    if near is None:
        return None
    try:
        return read_slots(str(near))
    except (TraceError, UsageError):  # it tells of other things
        return None


class Opened:
    """A recording of any kind, opened to be read twice; errors call it *name*."""

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self.recording: Recording | None = opened(path)
        self.unit = "line" if self.recording is None else "record"
        self.page_size: int | None = self.recording.meta.page_size if self.recording is not None else None
        self.release: str | None = self.recording.meta.release if self.recording is not None else None

    def stands_for(self, kernel: str) -> list[str]:
        """A note, where the kernel that recorded is another one than *kernel*, the one it is taken for."""
        if self.release is None or _version(self.release) == _version(kernel):
            return []
        newer = _version(self.release) > _version(kernel)
        why = "the newest modelled that is not newer" if newer else "the oldest that is modelled"
        return [f"recorded by kernel {self.release}, taken as {kernel}: {why}; what changed between them may differ"]

    def kernel(self, target: Target) -> str | None:
        """The newest kernel modelled that is not newer than the recorded one; None: that is not known."""
        if self.release is None:
            return None
        kernels = sorted(target.backend.kernels, key=_version)
        return max(
            (k for k in kernels if _version(k) <= _version(self.release or "")), key=_version, default=kernels[0]
        )

    def events(self, assembler: Assembler, stats: ReadStats, *, strict: bool) -> Iterator[Event]:
        """The neutral events, in order."""
        return assemble(self.path, assembler, recording=self.recording, stats=stats, strict=strict)


def survey(
    source: Opened, chosen: list[Target], *, strict: bool, progress: Progress | None
) -> tuple[Target, SlotSource, frozenset[int]]:
    """The first pass: whose faults these are, which memory they need, and the lines of those that the host had none
    for. Raises UsageError, TraceError."""
    assembler = _assembler(chosen)
    stats = ReadStats()
    events = _watched(source.events(assembler, stats, strict=strict), stats, progress, "survey")
    decoders = {name: _named(name, chosen) or backend(name) for name in backends()}
    highest = 0

    def decode(event: FaultEvent) -> Raw:
        nonlocal highest
        fault = decoders[event.target].decode(**event.registers)
        highest = max(highest, fault.kvm_get_fault_gpa() or 0)
        return fault

    page = max((1 << t.format.page_shift for t in chosen), default=source.page_size or 4096)
    failed: set[int] = set()
    inferred = infer_slots(_noting_failures(events, failed), decode, page_size=page)
    counted = assembler.stats.faults
    if not counted:
        raise TraceError(_no_faults(assembler.stats, stats, source.unit), path=source.name)
    own = counted.most_common(1)[0][0]
    fitting = _fitting(backend(own), source, highest)
    told = next((t for t in chosen if t.backend.name == own and _may_have_recorded(t, fitting, source)), None)
    return told or fitting, inferred, frozenset(failed)


def _noting_failures(events: Iterable[Event], failed: set[int]) -> Iterator[Event]:
    last: dict[str, int] = {}
    for event in events:
        match event:
            case FaultEvent():
                last[event.vcpu] = event.line
            case EntryEvent() | ExitEvent():
                last.pop(event.vcpu, None)
            case UserspaceExitEvent() if event.errno == EFAULT and event.vcpu in last:
                failed.add(last.pop(event.vcpu))
            case _:
                pass
        yield event


def _fitting(target: Target, source: Opened, gpa: int) -> Target:
    # nobody named it: the first format with the host's pages, if known, whose table reaches the highest address
    page_shift = target.format.page_shift if source.page_size is None else source.page_size.bit_length() - 1
    fits = [n for n, f in target.backend.formats.items() if f.page_shift == page_shift and gpa >> f.gpa_bits == 0]
    kernel = source.kernel(target) or target.kernel
    return backend(f"{target.backend.name}:{fits[0] if fits else target.format.name}@{kernel}")


def _version(release: str) -> tuple[int, ...]:
    # 6.12.117+deb12-cloud-arm64 -> (6, 12)
    return tuple(int(n) for n in re.findall(r"\d{1,6}", release)[:2])


def _no_faults(made: AssembleStats, read: ReadStats, unit: str) -> str:
    if made.unclaimed:
        name, count = made.unclaimed.most_common(1)[0]
        return (
            f"{count} {name} events, but no exit before them tells how their error code is encoded: "
            f"say what they are with --backend (first at {unit} {made.unclaimed_lines[0]})"
        )
    seen = ", ".join(name for name, _ in read.events.most_common(4)) or "none"
    return f"no guest fault in this recording; events: {seen}"


def _named(name: str, chosen: Iterable[Target]) -> Target | None:
    return next((t for t in chosen if t.backend.name == name), None)


def _may_have_recorded(target: Target, fitting: Target, source: Opened) -> bool:
    # it is as the recording says, as far as that does
    return (source.page_size is None or target.format == fitting.format) and (
        source.release is None or target.kernel == fitting.kernel
    )


def _assembler(chosen: Sequence[Target]) -> Assembler:
    return Assembler(backends().values(), told=chosen[0].backend.name if chosen else None)


class _Task(NamedTuple):
    # What all machines have in common.
    path: str
    name: str
    named: list[Target]
    strict: bool


def _spread(task: _Task, report: Report, where: Workers, progress: Progress | None) -> None:
    # Each machine by itself, over the whole recording.
    path = Path(task.path)
    size = path.stat().st_size if path.is_file() else None
    count = len(report.results)
    empty = replace(report, results=[], variants=[])
    alone: list[tuple[Report, Target, HostSettings | None]] = [(empty, r.target, None) for r in report.results]
    alone += [(empty, v.target, v.host) for v in report.variants]
    done: list[Report] = []
    for one in where.in_order(partial(_one, task, size), alone):
        done.append(one)
        if progress is not None:
            progress("replay", (size or 0) * len(done) // len(alone))
    first = done[0]
    report.results = [r for one in done[:count] for r in one.results]
    report.variants = [v for one in done[count:] for v in one.variants]
    report.kinds, report.read, report.assembled = first.kinds, first.read, first.assembled
    report.foreign, report.host_events = first.foreign, first.host_events


def _one(task: _Task, size: int | None, machine: tuple[Report, Target, HostSettings | None]) -> Report:
    expect(task.path, size)
    report, target, host = machine
    if host is None:
        report.results = [ReplayTarget(target, report.own)]
    else:
        report.variants = [Variant(target, report.own, host=host)]
    _run(Opened(task.path, task.name), report, _assembler(task.named), strict=task.strict, progress=None)
    return report


def _run(source: Opened, report: Report, assembler: Assembler, *, strict: bool, progress: Progress | None) -> None:
    report.assembled = assembler.stats
    waiting = iter(report.slots.changes)
    change = next(waiting, None)
    own = report.own
    read = source.events(assembler, report.read, strict=strict)
    for event in _watched(read, report.read, progress, "replay"):
        while change is not None and (not report.slots.timed or change.time <= event.time):
            _apply(report, change)
            change = next(waiting, None)
        _dispatch(report, own, event)
    for result in report.results:
        result.finish()


def _apply(report: Report, change: SlotEvent) -> None:
    if not change.ret:  # refused ones changed nothing
        for machine in (*report.results, *report.variants):
            machine.set_slot(change, made_up=report.slots.made_up)


def _dispatch(report: Report, own: Target, event: Event) -> None:
    if isinstance(event, FaultEvent):
        if event.target != own.backend.name:
            report.foreign[event.target] += 1
            return
        report.kinds[kind(own.access(own.decode(**event.registers)))] += 1
    report.host_events += isinstance(event, UnmapEvent | AgeEvent)
    for result in report.results:
        match event:
            case FaultEvent():
                result.fault(event, no_memory=event.line in report.no_memory)
            case MmioEvent():
                result.device(event.vcpu, event.gpa, undecoded=event.size == 0)
            case UserspaceExitEvent():
                result.returned(event.vcpu, event.errno, event.reason)
            case EntryEvent() | ExitEvent():
                result.settle(event.vcpu)
            case _:
                pass
    if isinstance(event, FaultEvent):
        for variant in report.variants:
            variant.fault(event)
    elif not report.slots.made_up:
        for machine in (*report.results, *report.variants):
            machine.host_did(event)


def _remark(report: Report) -> None:
    notes = report.notes
    read, made = report.read, report.assembled
    notes.extend(report.slots.notes)
    notes.append("host memory is assumed anonymous, in pages of the host")
    if report.no_memory:
        notes.append(f"{len(report.no_memory)} faults ended in EFAULT: the host is taken to have had no memory there")
    if report.slots.made_up and report.host_events:
        text = f"{report.host_events} unmappings and agings of host memory were not replayed"
        notes.append(f"{text}: the slots' user addresses are not known")
    if read.lost or read.lost_unknown or read.overwritten:
        count = sum(read.lost.values()) + read.overwritten
        notes.append(f"the kernel lost {count or 'some'} events of this recording")
    if read.misfits:
        where = f", first at line {read.misfit_lines[0]}" if read.misfit_lines else ""
        notes.append(f"{sum(read.misfits.values())} events read differently{where}")
    if read.damage:
        notes.append(f"the file is damaged: {read.damage}")
    if made.unclaimed:
        where = f"first at {report.unit} {made.unclaimed_lines[0]}"
        notes.append(f"{sum(made.unclaimed.values())} faults of unknown encoding were not replayed, {where}")
    if made.without_address:
        notes.append(f"{made.without_address} faults had no address in the recording and were not replayed")
    for name, count in report.foreign.items():
        notes.append(f"{count} faults of {name} were not replayed")
    for result in report.results:
        for why, count in result.refused_slots.items():
            notes.append(f"{result.target.name}: {count} memslot changes refused: {why}")


def _watched(events: Iterable[Event], stats: ReadStats, progress: Progress | None, name: str) -> Iterator[Event]:
    for number, event in enumerate(events):
        if progress is not None and number % 512 == 0:
            progress(name, stats.bytes)
        yield event
    if progress is not None:
        progress(name, stats.bytes)
