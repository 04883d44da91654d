"""Faults of a recording beside those of the probes in another one, to know that both are of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from kvmfault.check.handled import MOST_WAITING
from kvmfault.check.tally import Aspect, Disagreement, Tally
from kvmfault.contract.probes import Said
from kvmfault.contract.target import Target
from kvmfault.errors import UsageError
from kvmfault.trace.events import FaultEvent
from kvmfault.trace.truth import Told, Truth
from kvmfault.types import U64

__all__ = ["Pairs"]


class Pairs:
    """By task, and by what both tell of a fault: registers, or the address alone."""

    def __init__(self, own: Target) -> None:
        self.faults: int = 0
        self.probed: int = 0
        self._own = own
        self._names = frozenset(register.name for register in own.backend.registers) | {"address"}
        self._left: Counter[tuple[int, ...]] = Counter()
        """Faults that the other has not shown (yet): of the recording positive, of the probes negative."""
        self._spans: dict[bool, tuple[int, int]] = {}
        """When the faults of the recording (False) and of the probes (True) were: first and last."""
        self._shown: tuple[str, ...] = ()
        """What the probes tell of a fault."""
        self._early: list[FaultEvent] = []
        """Faults from before the first one of the probes."""
        self._unseen = 0
        """More of these than are kept."""
        self._open: dict[int, Told] = {}
        self._waiting: dict[int, FaultEvent] = {}
        self._compared = 0
        self._different: list[Disagreement] = []

    def watched(self, told: Iterator[Truth]) -> Iterator[Truth]:
        """The same, looked at."""
        for event in told:
            if isinstance(event, FaultEvent) and event.target == self._own.backend.name:
                self.faults += 1
                self._see(event.time, probe=False)
                if self._shown:
                    self._event(event)
                elif len(self._early) < MOST_WAITING:
                    self._early.append(event)
                else:
                    self._unseen += 1
            elif isinstance(event, Told) and event.says is Said.FAULT:
                self.probed += 1
                self._see(event.time, probe=True)
                self._probe(event)
            elif isinstance(event, Told) and event.says is Said.RETURNED:
                self._open.pop(event.pid, None)
            yield event

    def _see(self, time: int, *, probe: bool) -> None:
        first, last = self._spans.get(probe, (time, time))
        self._spans[probe] = min(first, time), max(last, time)

    def _event(self, event: FaultEvent) -> None:
        pid, values = int(event.vcpu), self._of_event(event)
        self._count(pid, values, 1)
        if (told := self._open.pop(pid, None)) is not None:
            self._compare(told, values)
        else:
            self._waiting[pid] = event

    def _probe(self, told: Told) -> None:
        if not self._shown:
            self._shown = tuple(sorted(self._names & told.values.keys()))
            for event in self._early:
                self._event(event)
            self._early.clear()
        self._count(told.pid, told.values, -1)
        # stamps of a text are in us: the handler may have been called in the same one
        waiting = self._waiting.get(told.pid)
        if waiting is not None and waiting.time == told.time:
            self._compare(told, self._of_event(waiting))
            del self._waiting[told.pid]
        else:
            self._open[told.pid] = told

    def _of_event(self, event: FaultEvent) -> Mapping[str, object]:
        address = event.registers.get(self._own.backend.probes.address)
        return event.registers if address is None else {**event.registers, "address": address}

    def _key(self, values: Mapping[str, object]) -> Iterator[int]:
        # the registers that a trace event does not tell are left out; bit 63 may tell the state of the VM
        return (value & U64 >> 1 for name in self._shown if (value := _number(values.get(name))) is not None)

    def _count(self, pid: int, values: Mapping[str, object], by: int) -> None:
        key = (pid, *self._key(values))
        self._left[key] += by
        if not self._left[key]:
            del self._left[key]

    def _compare(self, told: Told, values: Mapping[str, object]) -> None:
        self._compared += 1
        mine, theirs = tuple(self._key(values)), tuple(self._key(told.values))
        if mine != theirs:
            told_twice = [" ".join(f"{value:#x}" for value in shown) for shown in (mine, theirs)]
            self._different.append(
                Disagreement(
                    aspect=Aspect.REPEATED,
                    line=told.line,
                    what=f"registers of a fault ({', '.join(self._shown)})",
                    model=told_twice[0],
                    kernel=told_twice[1],
                )
            )

    def judge(self, name: str, aux: str | None, tally: Tally) -> list[str]:
        """What only one of them has; *aux*: the file of the probes, if it is another one. Raises UsageError where they
        are not of one run."""
        if not (self.faults and self.probed):
            return []
        notes = [] if aux is None else self._refused(name, aux)
        for found in self._different:
            tally.differ(found)
        tally.compared[Aspect.REPEATED, "registers"] += self._compared
        tally.agreed[Aspect.REPEATED, "registers"] += self._compared - len(self._different)
        return notes

    def _refused(self, name: str, aux: str) -> list[str]:
        (first, last), (begin, end) = self._spans[False], self._spans[True]
        if last < begin or end < first:
            times = [f"{t / 1e9:.6f}" for t in (begin, end, first, last)]
            raise UsageError(
                f"{aux}: its faults are from {times[0]} to {times[1]} s, those of {name} from {times[2]} to {times[3]} "
                "s: give the probes of the same run, on the same clock"
            )
        alone = sum(n for n in self._left.values() if n > 0) + self._unseen
        other = -sum(n for n in self._left.values() if n < 0)
        if alone == self.faults:
            raise UsageError(f"{aux}: none of the {alone} faults of {name} is in it: give the probes of the same run")
        if alone * 2 > self.faults and other * 2 > self.probed:
            raise UsageError(
                f"{aux}: only {self.faults - alone} of the {self.faults} faults of {name} are in it, and of its "
                f"{self.probed} {other} are not in {name}: give the probes of the same run"
            )
        notes = []
        if alone:
            notes.append(f"{alone} of {self.faults} faults of {name} are not in {aux}: they were not checked")
        if other:
            notes.append(f"{other} of {self.probed} faults of {aux} are not in {name}")
        return notes


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None
