"""Check: the recorded faults through the path, beside what the kernel then did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvmfault.check.calls import CallsCheck
from kvmfault.check.episodes import Episodes
from kvmfault.check.fitting import fitting
from kvmfault.check.judge import Judge
from kvmfault.check.pairs import Pairs
from kvmfault.check.tally import MAIN, Tally
from kvmfault.contract.probes import Probes, Said
from kvmfault.contract.target import Target, backend, backends
from kvmfault.errors import UsageError
from kvmfault.replay.kept import seekable
from kvmfault.replay.run import Opened, survey
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.assemble import opened as open_binary
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.slotfile import read_slots, recorded_slots
from kvmfault.trace.slots import SlotSource
from kvmfault.trace.source import source_name
from kvmfault.trace.truth import (
    ProbeReader,
    ProbeSource,
    Truth,
    beside,
    functions_of,
    probe_events,
    read_truth,
    said_by,
)

__all__ = ["CheckReport", "Progress", "check"]

Progress = Callable[[str, int], None]

_CALLS: Final = frozenset({Said.MAPPING, Said.RELAXING, Said.MAKING_YOUNG, Said.DEVICE})
"""What tells that calls were recorded which the host's answers led to."""


@dataclass(slots=True)
class CheckReport:
    """What a check found."""

    recording: str
    aux: str | None
    """The recording of probes, if it is another one."""
    probed: int
    """How often probed functions were hit."""
    target: Target
    slots: SlotSource
    tally: Tally
    faults: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    """Faults by kind that could not be followed: nothing tells what the host answered."""
    taken: Counter[str] = field(default_factory=Counter)
    """Answers that were taken from the recording, by kind: the host's, and what the guest's tables held."""
    mended: int = 0
    """Entries that were put as recorded after a disagreement."""
    unpaired: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    damage: str | None = None

    @property
    def unexplained(self) -> int:
        """Disagreements that nothing missing in the recording explains."""
        return self.tally.unexplained


def check(
    recording: str,
    target: str | None = None,
    aux: str | None = None,
    *,
    slots: SlotSource | None = None,
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> CheckReport:
    """Check *recording*. *target*: what recorded it, if not as found out; *aux*: the recording of probes, if not the
    one beside it; *slots*: if not those of the probes, or else inferred ones.

    Where nobody says which kernel it was, each that is modelled is tried, and the one that differs least is reported.
    Raises UsageError, TraceError.
    """
    if aux is not None and not Path(aux).is_file():
        raise UsageError(f"{aux}: no such file")
    named = [backend(target)] if target is not None else []
    with seekable(recording) as path:
        opened = Opened(path, source_name(recording))
        itself: ProbeSource = path if opened.recording is None else opened.recording
        known = [own.backend.probes for own in named] or [source.probes for source in backends().values()]
        seen, found = Counter[str](), aux
        if aux is None and opened.recording is not None:
            seen = functions_of(itself, known)
        if not seen and aux is None and recording != "-" and (near := beside(recording)) is not None:
            found = str(near)
        probes = itself if found is None else _probes_in(found)
        if found is not None or opened.recording is None:
            seen = functions_of(probes, known)
        own = _of_calls(named, seen)
        by_calls = own is not None  # neither slots nor host were recorded
        if own is None:
            own, otherwise, _ = survey(opened, named, strict=False, progress=progress)
            own = next((t for t in named if t.backend is own.backend), own)
        else:
            otherwise = SlotSource("what KVM did", (), made_up=True)
        recorded = seen.keys() & own.backend.probes.slots
        chosen = slots or (_slots_in(probes, known) if recorded else otherwise)
        source = _Source(opened, found, probes, seen, chosen, by_calls)
        if target is not None and "@" in target:
            return _check_on(own, source, settings, progress)
        only = opened.kernel(own)
        kernels = [backend(_other_kernel(own, k)) for k in ([only] if only else reversed(own.backend.kernels))]
        reports = [_check_on(kernel, source, settings, progress) for kernel in kernels]
    best = min(reports, key=lambda r: (r.unexplained, r.tally.differing(MAIN), len(r.tally.disagreements)))
    best.notes[:0] = opened.stands_for(best.target.kernel)
    others = ", ".join(f"{r.target.kernel}: {len(r.tally.disagreements)}" for r in reports if r is not best)
    if others:
        mine = len(best.tally.disagreements)
        best.notes.insert(
            0, f"kernel {best.target.kernel}: differs in {mine} places ({others}); --backend says otherwise"
        )
    return best


def _probes_in(path: str) -> ProbeSource:
    found = open_binary(path)
    return path if found is None else found


def _slots_in(source: ProbeSource, every: Sequence[Probes]) -> SlotSource:
    if isinstance(source, str | Path):
        return read_slots(source)
    asked = {function for probes in every for function in probes.slots}
    return recorded_slots(source, [n for n, function in probe_events(source, every).items() if function in asked])


def _other_kernel(own: Target, kernel: str) -> str:
    plain, plus, settings = own.name.partition("+")
    return plain.partition("@")[0] + f"@{kernel}" + plus + settings


@dataclass(frozen=True, slots=True)
class _Source:
    """What is checked."""

    opened: Opened
    aux: str | None
    """The file of the probes, if it is another one."""
    probes: ProbeSource
    seen: Counter[str]
    """Probed functions."""
    slots: SlotSource
    by_calls: bool


def _check_on(own: Target, source: _Source, settings: Sequence[str], progress: Progress | None) -> CheckReport:
    opened = source.opened
    own, notes = fitting(own, source.probes) if source.by_calls else (own, [])
    own = _as_seen(own, source.seen, settings)
    known = frozenset(said_by(own.backend.probes, source.seen))
    stats, aux_stats, reader = ReadStats(), ReadStats(), ProbeReader(own.backend)
    assembler = Assembler([own.backend], told=own.backend.name)
    apart = source.probes if source.aux is not None else None
    told = read_truth(opened.path, opened.recording, apart, assembler, reader, stats=stats, aux_stats=aux_stats)
    told = _watched(told, stats, progress)
    pairs = Pairs(own)
    if Said.FAULT in known:
        told = pairs.watched(told)
    elif source.aux is not None:
        others = (name for name, known in backends().items() if Said.FAULT in said_by(known.probes, source.seen))
        if (other := next(others, None)) is not None:
            raise UsageError(
                f"{source.aux}: probes of {other} or its like, where {opened.name} is of {own.backend.name}"
            )
    report = CheckReport(opened.name, source.aux, source.seen.total(), own, source.slots, Tally(), notes=notes)
    (_check_calls if source.by_calls else _check_episodes)(report, told, known)
    report.notes += pairs.judge(opened.name, source.aux, report.tally)
    report.damage = stats.damage or aux_stats.damage
    _remark(report, stats, aux_stats, reader)
    return report


def _of_calls(named: Sequence[Target], seen: Counter[str]) -> Target | None:
    # whose calls to map were recorded, if the host's answers were not
    for own in named or [backend(name) for name in backends()]:
        said = frozenset(said_by(own.backend.probes, seen))
        if said & _CALLS and Said.PINNED not in said:
            return own
    return None


def _check_episodes(report: CheckReport, told: Iterator[Truth], known: frozenset[Said]) -> None:
    judge = Judge(report.target, known)
    episodes = Episodes(report.target, report.slots, judge, known)
    for event in told:
        episodes.feed(event)
    episodes.finish()
    report.tally, report.faults = judge.tally, episodes.faults
    for vm in episodes.vms.values():
        report.taken.update(vm.taken)
    report.mended, report.unpaired, report.unknown = judge.mended, episodes.unpaired, judge.unknown


def _check_calls(report: CheckReport, told: Iterator[Truth], known: frozenset[Said]) -> None:
    checked = CallsCheck(report.target, report.slots.changes)
    report.tally = checked.run(told)
    report.faults, report.taken = checked.faults, checked.taken
    missing = "the host was not" if report.slots.changes else "neither memslots nor host were"
    report.notes.append(
        f"{missing} recorded: {checked.predicted} of {checked.faults} faults follow from what KVM did before and the "
        f"page's frame, the others also from what was taken from the recording"
    )
    if checked.cut_short:
        report.notes.append(f"{checked.cut_short} faults whose handler's return was not recorded")


def _watched(told: Iterator[Truth], stats: ReadStats, progress: Progress | None) -> Iterator[Truth]:
    for number, event in enumerate(told):
        if progress is not None and number % 1024 == 0:
            progress("check", stats.bytes)
        yield event


def _as_seen(own: Target, seen: Counter[str], settings: Sequence[str]) -> Target:
    shown = [setting for name, shown in own.backend.probes.settings.items() if name in seen for setting in shown]
    return own.with_settings([*shown, *settings])


def _remark(report: CheckReport, stats: ReadStats, aux_stats: ReadStats, reader: ProbeReader) -> None:
    notes = report.notes
    if not report.probed:
        notes.append("no recording of probes: compared with trace events alone (give one with --aux)")
    notes.extend(report.slots.notes)
    lost = sum(stats.lost.values()) + sum(aux_stats.lost.values())
    if lost or stats.lost_unknown or aux_stats.lost_unknown:
        notes.append(f"the kernel lost {lost or 'some'} events of this recording")
    misfits = sum(stats.misfits.values()) + sum(reader.stats.misfits.values())
    if misfits:
        notes.append(f"{misfits} events read differently: {', '.join({**stats.misfits, **reader.stats.misfits})}")
    for what, count in report.unpaired.items():
        notes.append(f"{count} {what}")
    if strange := [name for name in reader.unnamed if stats.events[name] or aux_stats.events[name]]:
        notes.append(f"kprobe events whose name tells no function that is known: {', '.join(sorted(strange))}")
    if report.unknown:
        notes.append(f"{report.unknown.total()} faults could not be followed: nothing tells what the host answered")
    if report.damage:
        notes.append(f"the file is damaged: {report.damage}")
