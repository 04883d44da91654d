"""Check: the recorded faults through the path, beside what the kernel then did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmfault.contract.format import size_text
from kvmfault.contract.probes import Said
from kvmfault.contract.target import Target, backend
from kvmfault.errors import UsageError
from kvmfault.replay.calls import CallsCheck, fitting
from kvmfault.replay.episodes import Episodes
from kvmfault.replay.judge import Judge
from kvmfault.replay.tally import Tally
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.slotfile import read_slots
from kvmfault.trace.slots import SlotSource
from kvmfault.trace.text import ReadStats
from kvmfault.trace.truth import ProbeReader, Truth, beside, functions_of, read_truth

Progress = Callable[[str, int], None]


@dataclass(slots=True)
class CheckReport:
    """What a check found."""

    recording: str
    aux: str | None
    target: Target
    tally: Tally
    faults: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    """Answers of the host that were taken from the recording, by kind."""
    mended: int = 0
    unpaired: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def unexplained(self) -> int:
        """Disagreements without a cause that the recording lacks."""
        return self.tally.unexplained


def check(
    recording: str | Path,
    target: str | Target,
    aux: str | Path | None = None,
    *,
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> CheckReport:
    """Check *recording* on *target*; *aux*: the recording of probes, by itself the one beside it.

    Raises UsageError, TraceError.
    """
    aux = aux or beside(recording)
    if aux is None:
        raise UsageError(f"{recording}: no recording of probes beside it (aux.txt); give one with --aux")
    functions = functions_of(aux)
    own = backend(target) if isinstance(target, str) else target
    probes = own.backend.probes
    told = {probe.says for f in functions for probe in (probes.entries.get(f), probes.returns.get(f)) if probe}
    notes: list[str] = []
    if Said.MAPPING in told and Said.PINNED not in told:  # neither slots nor host: they are inferred
        own, notes = fitting(own, aux)
    own = own.with_settings([s for f in functions for s in probes.settings.get(f, ())]).with_settings(settings)
    reader = ProbeReader(own.backend)
    stats = ReadStats()
    assembler = Assembler([own.backend], told=own.backend.name)
    events = read_truth(recording, aux, assembler, reader, stats=stats, aux_stats=ReadStats())
    events = _watched(events, stats, progress)
    if Said.MAPPING in told and Said.PINNED not in told:
        return _of_calls(CheckReport(str(recording), str(aux), own, Tally(), notes=notes), events)
    slots: SlotSource = read_slots(aux)
    judge = Judge(own)
    episodes = Episodes(own, slots.changes, judge, frozenset(functions))
    judge.probed = episodes.probed
    for event in events:
        episodes.feed(event)
    report = CheckReport(str(recording), str(aux), own, judge.tally, episodes.faults)
    for vm in episodes.vms.values():
        report.taken.update(vm.taken)
    report.mended, report.unpaired = judge.mended, episodes.unpaired
    return report


def _of_calls(report: CheckReport, events: Iterator[Truth]) -> CheckReport:
    checked = CallsCheck(report.target)
    report.tally = checked.run(events)
    report.faults, report.taken = checked.faults, checked.taken
    page = size_text(1 << report.target.format.page_shift)
    report.notes += [
        f"neither memslots nor host were recorded: {checked.predicted} of {checked.faults} faults follow from what KVM "
        f"did before and the page's frame, the others also from what was taken from the recording",
        f"kernel {report.target.kernel}, pages of {page}",
    ]
    if checked.cut_short:
        report.notes.append(f"{checked.cut_short} faults whose handler's return was not recorded")
    return report


def _watched(events: Iterator[Truth], stats: ReadStats, progress: Progress | None) -> Iterator[Truth]:
    for number, event in enumerate(events):
        if progress is not None and number % 1024 == 0:
            progress("check", stats.bytes)
        yield event
