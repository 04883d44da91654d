"""``make demo``: the bundled recordings, each on its own backend and on another one, and one fault step by step.

``demo.toml`` beside the recordings says what is replayed; this module knows no recording and no target.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from os.path import relpath
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from tomllib import loads

from kvmfault.cli.main import _guarded
from kvmfault.cli.render import grid
from kvmfault.cli.replay import render
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backends
from kvmfault.decode import headline
from kvmfault.errors import UsageError
from kvmfault.path.explain import StepRecord
from kvmfault.path.run import PATH, Locked, Run
from kvmfault.replay.machine import ReplayTarget
from kvmfault.replay.run import Report, replay
from kvmfault.replay.verdict import outcome_text
from kvmfault.trace.assemble import Assembler, assemble
from kvmfault.trace.events import FaultEvent
from kvmfault.trace.slotfile import read_slots

__all__ = ["RECORDINGS", "WIDTH", "Explained", "Show", "demo", "main", "shows"]

RECORDINGS = Path(__file__).parents[2] / "examples" / "recordings"
WIDTH = 100
"""Columns of the output, less on a narrower terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Show:
    """One entry of ``demo.toml``."""

    title: str
    file: str
    targets: list[str]
    explain: int
    """Line of the fault that is explained."""
    slots: str | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """One fault on one target."""

    target: Target
    fault: Raw
    run: Run


def shows(folder: Path) -> list[Show]:
    """What is to be shown. UsageError where the recordings are not: an installed package has none."""
    manifest = folder / "demo.toml"
    if not manifest.is_file():
        raise UsageError(f"the demo needs the recordings of a checkout, and there is no {manifest}")
    return [Show(**entry) for entry in loads(manifest.read_text(encoding="utf-8"))["recording"]]


def demo(folder: Path) -> int:
    """Show everything; status 1 if an outcome contradicts its recording."""
    width = min(WIDTH, get_terminal_size((WIDTH, 0)).columns)
    unexplained = 0
    for number, show in enumerate(shows(folder)):
        print("\n" * bool(number) + "\n".join(wrap(f"== {show.title}", width, subsequent_indent="   ")))
        path = relpath(folder / show.file)
        slots = relpath(folder / show.slots) if show.slots is not None else None
        options = [f"--backend {target}" for target in show.targets] + ([f"--slots {slots}"] if slots else [])
        print(" \\\n    ".join([f"$ kvmfault replay {path}", *options]))
        report = replay(path, show.targets, read_slots(slots) if slots is not None else None)
        print("\n".join(_wrapped(render(report), width)))
        print(f"\n-- the fault on line {show.explain}, step by step")
        print("\n".join(_explanation(_explain(report, _fault_at(path, show.explain)), width)))
        unexplained += report.unexplained
    return 1 if unexplained else 0


def _wrapped(text: str, width: int) -> Iterator[str]:
    for line in text.splitlines():
        yield from wrap(line, width, subsequent_indent="  ") if len(line) > width else [line]


def _fault_at(path: str, line: int) -> FaultEvent:
    for event in assemble(path, Assembler(backends().values())):
        if isinstance(event, FaultEvent) and event.line == line:
            return event
    raise UsageError(f"{path}:{line}: no fault on this line")


def _explain(report: Report, event: FaultEvent) -> list[Explained]:
    # on an empty table, with the memslots as they are at the time of the fault
    own = report.own
    fault = own.decode(**event.registers)
    explained = []
    for result in report.results:
        world = ReplayTarget(result.target, own)
        for change in report.slots.changes:
            if not change.ret and (not report.slots.timed or change.time <= event.time):
                world.set_slot(change, made_up=report.slots.made_up)
        met = fault if result.is_own else result.target.encode(own.access(fault)).fault
        explained.append(Explained(result.target, met, world.vm.handle(met)))
    return explained


def _explanation(explained: Sequence[Explained], width: int) -> Iterator[str]:
    for e in explained:
        yield from wrap(f"{e.target.name}: {headline(e.target.access(e.fault))}", width, subsequent_indent="  ")
    steps = {name: [_record(e.run.steps, name) for e in explained] for name in _names(explained)}
    told = {name: found for name, found in steps.items() if any(s.changes or s.outcome for s in chain(*found))}
    rows = [("step", *(e.target.name for e in explained))]
    rows += [(name, *("\n".join(s.because for s in found) or "-" for found in row)) for name, row in told.items()]
    rows.append(("outcome", *(outcome_text(e.run.outcome) for e in explained)))
    yield from grid(rows, width)
    yield from wrap(f"nothing to note: {', '.join(n for n in steps if n not in told)}", width, subsequent_indent="  ")


def _names(explained: Iterable[Explained]) -> list[str]:
    # steps that were run on some target, in PATH's order
    order: list[str] = []
    for entry in PATH:
        order += ["lock", *(step.name for step in entry.steps)] if isinstance(entry, Locked) else [entry.name]
    run = {step.name for e in explained for step in e.run.steps}
    return [name for name in (*order, "conclude") if name in run]


def _record(steps: Iterable[StepRecord], name: str) -> list[StepRecord]:
    return [step for step in steps if step.name == name]


def main() -> int:
    """Run the demo on standard output; the status is that of the command line."""
    return _guarded(lambda: demo(RECORDINGS))


if __name__ == "__main__":
    sys.exit(main())
