"""Check: the recorded faults through the path, beside what the kernel then did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvmfault.contract.target import Target, backend
from kvmfault.errors import UsageError
from kvmfault.replay.episodes import Episodes
from kvmfault.replay.judge import Judge
from kvmfault.replay.tally import Tally
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.slotfile import read_slots
from kvmfault.trace.slots import SlotSource
from kvmfault.trace.text import ReadStats
from kvmfault.trace.truth import ProbeReader, beside, functions_of, read_truth

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
    known = own.backend.probes.settings
    own = own.with_settings([s for f in functions for s in known.get(f, ())]).with_settings(settings)
    slots: SlotSource = read_slots(aux)
    judge = Judge(own)
    episodes = Episodes(own, slots.changes, judge, frozenset(functions))
    judge.probed = episodes.probed
    stats, aux_stats = ReadStats(), ReadStats()
    reader = ProbeReader(own.backend)
    assembler = Assembler([own.backend], told=own.backend.name)
    for number, event in enumerate(read_truth(recording, aux, assembler, reader, stats=stats, aux_stats=aux_stats)):
        episodes.feed(event)
        if progress is not None and number % 1024 == 0:
            progress("check", stats.bytes)
    report = CheckReport(str(recording), str(aux), own, judge.tally, episodes.faults)
    for vm in episodes.vms.values():
        report.taken.update(vm.taken)
    report.mended, report.unpaired = judge.mended, episodes.unpaired
    return report
