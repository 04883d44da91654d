"""Tap: events of this machine as they happen, pages of each CPU's ring buffer at a time."""

from __future__ import annotations

import os
import select
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fcntl import F_SETPIPE_SZ, fcntl
from pathlib import Path
from typing import Final, NamedTuple

from kvmfault.live import tasks
from kvmfault.live.tracefs import Instance, Say, choose, instance, refused, tracefs
from kvmfault.trace.datwriter import Described

__all__ = ["CLOCK", "Counts", "Tap", "Wanted", "tap"]

CLOCK: Final = "mono"
"""Of all CPUs alike, and what the time of other tools can be compared with."""
_PIPE: Final = 1 << 20
_MOST_MEMORY_KB: Final = 256 << 10
_LEAST_KB: Final = 1408
_MOST_KB: Final = 8192
_WAKE_PERCENT: Final = "20"
"""How full a buffer is when it wakes the reader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is recorded."""

    events: tuple[str, ...] = ()
    """See tracefs.choose."""
    lenient: bool = False
    """Events that this kernel has not are left out."""
    pids: tuple[int, ...] = ()
    """Only what these processes do, their threads, and their children; none: everybody."""
    buffer_kb: int | None = None
    """Size of each CPU's buffer; None: by the number of CPUs."""


class Counts(NamedTuple):
    """Events up to now."""

    events: int
    """In the buffers or read from them."""
    lost: int
    """Overwritten before they were read, or dropped."""


class Tap:
    """An instance that records. Made by ``tap``."""

    def __init__(
        self, made: Instance, chosen: Mapping[str, Sequence[str]], pipes: Mapping[int, int], through: tuple[int, int]
    ) -> None:
        self._instance = made
        self._pipes = pipes
        self._through = through
        self.chosen = chosen
        size = _text(made.path / "buffer_subbuf_size_kb")
        self.page_size: int = int(size) << 10 if size else os.sysconf("SC_PAGESIZE")
        """Bytes of one page of events."""
        self.buffer_kb: int = int(made.text("buffer_size_kb").split()[0])
        """Size of each CPU's buffer."""
        self._waker = select.poll()
        for pipe in pipes.values():
            self._waker.register(pipe, select.POLLIN)

    @property
    def cpus(self) -> tuple[int, ...]:
        """Every CPU that may record."""
        return tuple(self._pipes)

    def start(self) -> None:
        """Record from now on."""
        self._instance.write("tracing_on", "1")

    def stop(self) -> None:
        """Record no more. What is in the buffers stays."""
        self._instance.write("tracing_on", "0")

    def wait(self, seconds: float, *others: int) -> set[int]:
        """Return when a buffer fills up, when one of the files *others* can be read, or after *seconds*; which can."""
        for other in others:
            self._waker.register(other, select.POLLIN)
        ready = {fd for fd, _ in self._waker.poll(seconds * 1000)}
        for other in others:
            self._waker.unregister(other)
        return ready.intersection(others)

    def pages(self, *, partial: bool) -> Iterator[tuple[int, bytes]]:
        """What is in the buffers now: (CPU, whole pages), for each CPU in order of time.

        Without *partial* a page that is not full yet waits until it is, so that few events take little room.
        """
        for cpu, pipe in self._pipes.items():
            while pages := self._full(pipe):
                yield cpu, pages
            while partial and (page := _read(pipe, self.page_size)):
                yield cpu, page

    def _full(self, pipe: int) -> bytes:
        # pages change hands without being copied; so only full ones do
        out, into = self._through
        with suppress(BlockingIOError):
            if os.splice(pipe, into, _PIPE, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE):
                return os.read(out, _PIPE)
        return b""

    def stats(self) -> Mapping[int, str]:
        """per_cpu/cpuN/stats by CPU."""
        return {cpu: self._instance.text(f"per_cpu/cpu{cpu}/stats") for cpu in self._pipes}

    def counts(self) -> Mapping[int, Counts]:
        """What each CPU recorded up to now."""
        return {cpu: _counts(text) for cpu, text in self.stats().items()}

    def described(self, comms: Mapping[int, str]) -> Described:
        """What the kernel says of itself and of its events. *comms*: names of tasks beside those that it has saved."""
        one, events = self._instance, self._instance.root / "events"
        saved = (line.split(" ", 1) for line in _text(one.root / "saved_cmdlines").splitlines())
        system, node, release, _, machine = os.uname()
        return Described(
            header_page=_bytes(events / "header_page"),
            header_event=_bytes(events / "header_event"),
            ftrace=[_bytes(path) for path in sorted((events / "ftrace").glob("*/format"))],
            formats={name: [_bytes(path) for path in sorted((events / name).glob("*/format"))] for name in self.chosen},
            printk=_bytes(one.root / "printk_formats"),
            comms={**comms, **{int(pid): comm for pid, comm in saved}},
            clock=CLOCK,
            clocks=one.text("trace_clock").strip(),
            uname=f"{system} {node} {release} {machine}",
            page_size=self.page_size,
            stats=self.stats(),
        )


@contextmanager
def tap(wanted: Wanted, say: Say) -> Generator[Tap]:
    """An instance of its own with what is *wanted*, and nothing left of it afterwards; it has not started.

    Raises LiveError where that cannot be had; *say* takes what else the user should know.
    """
    tasks.check(wanted.pids)
    with tracefs(say) as root, instance(root, say) as made, ExitStack() as stack:
        cpus = sorted(int(path.name.removeprefix("cpu")) for path in (made.path / "per_cpu").iterdir())
        chosen = choose(root / "events", wanted.events, lenient=wanted.lenient)
        made.write("tracing_on", "0")
        made.write("trace_clock", CLOCK)
        made.offer("buffer_subbuf_size_kb", _text(root / "buffer_subbuf_size_kb"))  # header_page tells that one
        made.write("buffer_size_kb", str(wanted.buffer_kb or _usual_kb(len(cpus))))
        made.offer("buffer_percent", _WAKE_PERCENT)
        if wanted.pids:
            made.write("options/event-fork", "1")
            _follow(made, wanted.pids)
        for system, events in chosen.items():
            for event in events:
                made.write(f"events/{system}/{event}/enable", "1")
        pipes = {cpu: _open(made.path / "per_cpu" / f"cpu{cpu}" / "trace_pipe_raw", stack) for cpu in cpus}
        through = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for end in through:
            stack.callback(os.close, end)
        with suppress(OSError):  # more at once, where that is allowed
            fcntl(through[1], F_SETPIPE_SZ, _PIPE)
        yield Tap(made, chosen, pipes, through)


def _follow(made: Instance, pids: Sequence[int]) -> None:
    # threads that begin while this runs are followed once their parent is, or are found by looking again
    known: set[int] = set()
    while not (found := tasks.family(pids)) <= known:
        known |= found
        made.write("set_event_pid", " ".join(map(str, sorted(known))))


def _counts(stats: str) -> Counts:
    each = dict(line.split(": ") for line in stats.splitlines())
    return Counts(
        int(each["entries"]) + int(each["read events"]),
        int(each["overrun"]) + int(each["commit overrun"]) + int(each["dropped events"]),
    )


def _usual_kb(cpus: int) -> int:
    return min(max(_MOST_MEMORY_KB // cpus, _LEAST_KB), _MOST_KB)


def _open(path: Path, stack: ExitStack) -> int:
    try:
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise refused(path, e) from None
    stack.callback(os.close, pipe)
    return pipe


def _read(pipe: int, size: int) -> bytes:
    with suppress(BlockingIOError):
        return os.read(pipe, size)
    return b""


def _bytes(path: Path) -> bytes:
    with suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace").strip()
