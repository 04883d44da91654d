"""``kvmfault trace record``."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn

from kvmfault.cli.render import to_json
from kvmfault.live.record import Progress, Recorded, Report, record
from kvmfault.live.stopping import stopping
from kvmfault.live.tap import Wanted

__all__ = ["done_as_data", "run", "say", "told"]


def run(wanted: Wanted, file: str, seconds: float | None, command: Sequence[str], *, json: bool) -> int:
    """Record and say what came of it; status 1 if the command that was run failed."""
    with stopping() as stop, _shown(quiet=bool(command)) as progress:
        done = record(wanted, Path(file), stop=stop, say=say, seconds=seconds, command=command, progress=progress)
    if json:
        print(to_json(done_as_data(done)))
    else:
        print(f"{done.file}: {told(Progress(done.counts, done.bytes, done.seconds))}")
    if done.lost:
        where = ", ".join(f"{events} on CPU {cpu}" for cpu, events in done.lost.items())
        say(f"{done.counts.lost} events were lost ({where}): more than {done.buffer_kb} for --buffer-size helps")
    if not done.counts.events:
        say("none of these events happened: was a VM running" + (" in these processes?" if wanted.pids else "?"))
    if done.status:
        say(f"{command[0]} ended with status {done.status}")
    return 1 if done.status else 0


def say(line: str) -> None:
    """A line for the user that is not the result."""
    print(f"kvmfault: {line}", file=sys.stderr)


def told(p: Progress) -> str:
    """How far it is, as words."""
    lost = f", {p.counts.lost:,} lost" if p.counts.lost else ""
    return f"{p.counts.events:,} events{lost}, {decimal(p.bytes)}, {p.seconds:.1f} s"


def done_as_data(done: Recorded) -> dict[str, object]:
    """For --json."""
    return {
        "file": str(done.file),
        "events": done.counts.events,
        "lost": {str(cpu): events for cpu, events in done.lost.items()},
        "bytes": done.bytes,
        "seconds": round(done.seconds, 3),
        "buffer_kb": done.buffer_kb,
        "status": done.status,
    }


@contextmanager
def _shown(*, quiet: bool) -> Generator[Report | None]:
    # a line on the terminal that is written anew
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with Bar(SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("starting")
        yield lambda p: bar.update(task, description=f"recording: {told(p)}; Ctrl-C ends")
