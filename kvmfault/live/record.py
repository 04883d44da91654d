"""Recording the events of this machine's KVM into a trace.dat."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from kvmfault.errors import LiveError
from kvmfault.live import tasks
from kvmfault.live.stopping import Stop
from kvmfault.live.tap import Counts, Tap, Wanted, tap
from kvmfault.live.tracefs import Say
from kvmfault.trace.datwriter import PLAIN, Compression, Spool, write, zstd

__all__ = ["Progress", "Recorded", "Report", "record", "total"]

_TICK: Final = 0.1
_PAUSE: Final = 0.01
_LOOK: Final = 0.25
_SPARE: Final = 32 << 20
_GRACE: Final = 5.0


class Progress(NamedTuple):
    """How far a recording is."""

    counts: Counts
    bytes: int
    """In the file, once it is written."""
    seconds: float


Report: TypeAlias = Callable[[Progress], None]
"""Told now and then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What came of it."""

    file: Path
    counts: Counts
    bytes: int
    seconds: float
    lost: Mapping[int, int]
    """Events by CPU, where any were lost."""
    buffer_kb: int
    """Size of each CPU's buffer."""
    status: int | None
    """How the command ended; None: none was run, or it was ended with the recording."""


def record(
    wanted: Wanted,
    file: Path,
    *,
    stop: Stop,
    say: Say,
    seconds: float | None = None,
    command: Sequence[str] = (),
    progress: Report | None = None,
) -> Recorded:
    """Record until *stop*, for *seconds*, or until the *command* or every process of ``wanted.pids`` has ended.

    Raises LiveError where that cannot be done or *file* not be written; then no file, instance or mount is left.
    """
    compression = zstd() or PLAIN
    if command:  # followed as a child of this process, which itself does nothing that is recorded
        wanted = replace(wanted, pids=(*wanted.pids, os.getpid()))
    with _beside(file) as folder, ExitStack() as files:
        with tap(wanted, say) as source:
            with _writing(file):
                spools = {cpu: _spool(folder / str(cpu), compression, source.page_size, files) for cpu in source.cpus}
            run = _Run(source, spools, file, folder, progress)
            names = dict(tasks.names(wanted.pids or None))
            source.start()
            with _running(command) as child:
                run.until(stop, seconds, [child.pid] if child else wanted.pids, say)
                status = child.poll() if child else None
            source.stop()
            took = run.seconds
            run.drain(partial=True)
            counts = source.counts()
            described = source.described({**names, **tasks.names(wanted.pids or None)})
        whole = folder / "whole"
        with _writing(file), whole.open("wb") as out:
            write(out, described, spools, compression)
            size = out.tell()
            whole.replace(file.resolve())
    return Recorded(
        file=file,
        counts=total(counts),
        bytes=size,
        seconds=took,
        lost={cpu: c.lost for cpu, c in counts.items() if c.lost},
        buffer_kb=source.buffer_kb,
        status=status,
    )


class _Run:
    def __init__(
        self,
        source: Tap,
        spools: Mapping[int, Spool],
        file: Path,
        folder: Path,
        progress: Report | None,
    ) -> None:
        self._source, self._spools, self._file, self._folder = source, spools, file, folder
        self._progress = progress
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def until(self, stop: Stop, seconds: float | None, pids: Iterable[int], say: Say) -> None:
        """Read until one of the ends."""
        with ExitStack() as stack:
            alive = {_opened(pid, stack) for pid in pids}
            has_ends = bool(alive)
            next_look = 0.0
            while not stop.asked and (alive or not has_ends) and (seconds is None or self.seconds < seconds):
                left = _TICK if seconds is None else min(_TICK, max(seconds - self.seconds, 0))
                alive -= self._source.wait(left, stop.fd, *alive)
                if not self.drain(partial=False):
                    time.sleep(_PAUSE)  # where a kernel wakes for less than asked
                if self.seconds >= next_look:
                    next_look = self.seconds + _LOOK
                    if not self._look():
                        say(f"{self._file}: the recording ends here: the disk has no room for more")
                        return

    def drain(self, *, partial: bool) -> bool:
        """Take what is in the buffers; whether there was anything."""
        found = False
        for cpu, pages in self._source.pages(partial=partial):
            found = True
            with _writing(self._file):
                self._spools[cpu].add(pages)
        return found

    def _look(self) -> bool:
        # tell how far it is; whether there is room to put all together
        size = sum(spool.size for spool in self._spools.values())
        if self._progress:
            self._progress(Progress(total(self._source.counts()), size, self.seconds))
        return shutil.disk_usage(self._folder).free > size + _SPARE


def total(counts: Mapping[int, Counts]) -> Counts:
    """The sum over all CPUs."""
    return Counts(sum(c.events for c in counts.values()), sum(c.lost for c in counts.values()))


@contextmanager
def _running(command: Sequence[str]) -> Generator[subprocess.Popen[bytes] | None]:
    if not command:
        yield None
        return
    try:
        child = subprocess.Popen(command)
    except OSError as e:
        raise LiveError(f"{command[0]}: {e.strerror}") from None
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(_GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _opened(pid: int, stack: ExitStack) -> int:
    # a file that can be read once the process has ended
    try:
        fd = os.pidfd_open(pid)
    except OSError as e:
        raise LiveError(f"process {pid}: {e.strerror}") from None
    stack.callback(os.close, fd)
    return fd


@contextmanager
def _beside(file: Path) -> Generator[Path]:
    # a folder on the same file system: nothing is recorded that could not be written, and the file appears at once
    if file.exists() and not file.is_file():
        raise LiveError(f"{file} is no file that could be written: give another one with -o")
    with ExitStack() as stack:
        with _writing(file):
            yet = tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.resolve().parent)
            folder = stack.enter_context(yet)
        yield Path(folder)


@contextmanager
def _writing(file: Path) -> Generator[None]:
    try:
        yield
    except OSError as e:
        raise LiveError(f"{file} cannot be written: {e.strerror}") from None


def _spool(path: Path, compression: Compression, page_size: int, files: ExitStack) -> Spool:
    return Spool(files.enter_context(path.open("x+b")), compression, page_size)
