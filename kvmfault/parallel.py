"""Work spread over processes or machines. One seam: any `concurrent.futures.Executor`, local or of a cluster.

What is spread is a pure function over a sequence of tasks; results come back in the order of the tasks, so whatever
is made of them is the same with one process, several, or a cluster. Function, tasks and results must pickle. A worker
that dies costs time, not results: what it had not returned is done again.

>>> with workers(jobs=1) as alone:
...     list(alone.in_order(abs, [-3, -1, -2]))
[3, 1, 2]
"""

from __future__ import annotations

import os
import re
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import contextmanager
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar, cast

from kvmfault.errors import UsageError, needs

__all__ = ["ALONE", "MAX_JOBS", "Workers", "workers"]

T = TypeVar("T")
R = TypeVar("R")

MAX_JOBS: Final = 256
_LIVES: Final = 3
"""A task that kills this many workers in a row is given up: the fault is then its own."""
_PATIENCE: Final = 5
"""Seconds that a scheduler has to answer."""
_DYING: Final = "worker processes keep dying: out of memory? fewer --jobs need less"


class Workers(ABC):
    """Where work is done."""

    @property
    @abstractmethod
    def jobs(self) -> int:
        """How many tasks are done at the same time."""

    @property
    @abstractmethod
    def apart(self) -> bool:
        """Whether they are done in other processes, so that what goes there and back costs."""

    @abstractmethod
    def in_order(self, function: Callable[[T], R], tasks: Iterable[T], *, ahead: int | None = None) -> Iterator[R]:
        """``function`` of every task, in the order of the tasks.

        Tasks are taken from their iterable as results are: never more than *ahead* of them, by default twice ``jobs``,
        are under way or waiting to be fetched. An exception of the function is raised here, at its task's turn. The
        tasks may themselves be made of what another call gives.
        """


class _Alone(Workers):
    @property
    def jobs(self) -> int:
        return 1

    @property
    def apart(self) -> bool:
        return False

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T], *, ahead: int | None = None) -> Iterator[R]:
        return map(function, tasks)


class _Given(NamedTuple, Generic[T, R]):
    # A task, what will be its result, and who has it.
    task: T
    future: Future[R]
    to: Executor

    def returned(self) -> bool:
        done = self.future.done() and not self.future.cancelled()
        return done and not isinstance(self.future.exception(), BrokenExecutor)


class _Pool(Workers):
    # *make* gives an executor; one whose processes died is replaced by another. *gone*: what it raises for a task that
    # kills worker after worker, where it tries by itself.
    def __init__(self, jobs: int, make: Callable[[], Executor], gone: tuple[type[BaseException], ...] = ()) -> None:
        self._jobs = jobs
        self._make = make
        self._gone = gone
        self._executor = make()

    @property
    def jobs(self) -> int:
        return self._jobs

    @property
    def apart(self) -> bool:
        return True

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T], *, ahead: int | None = None) -> Iterator[R]:
        waiting: deque[_Given[T, R]] = deque()
        source = iter(tasks)
        most = ahead or 2 * self._jobs
        lives = _LIVES
        try:
            while True:
                for task in islice(source, most - len(waiting)):
                    waiting.append(self._give(function, task))
                if not waiting:
                    return
                first = waiting[0]
                try:
                    result = first.future.result()
                except BrokenExecutor:
                    lives -= 1
                    if not lives:
                        raise UsageError(_DYING) from None
                    self._renew(first.to)
                    waiting = deque(g if g.returned() else self._give(function, g.task) for g in waiting)
                    continue
                except self._gone:
                    raise UsageError(_DYING) from None
                except CancelledError:
                    raise UsageError("the scheduler is gone, or has cancelled the work") from None
                lives = _LIVES
                waiting.popleft()
                yield result
        finally:
            for given in waiting:
                given.future.cancel()

    def _give(self, function: Callable[[T], R], task: T) -> _Given[T, R]:
        to = self._executor
        try:
            return _Given(task, to.submit(function, task), to)
        except BrokenExecutor:
            self._renew(to)
            return _Given(task, self._executor.submit(function, task), self._executor)

    def _renew(self, broken: Executor) -> None:
        if broken is self._executor:  # or another call has found out before
            broken.shutdown(wait=False, cancel_futures=True)
            self._executor = self._make()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


ALONE: Final[Workers] = _Alone()
"""This process."""


@contextmanager
def workers(*, jobs: int | None = None, scheduler: str | None = None) -> Generator[Workers]:
    """Where to work: this process (*jobs* 1 or None), *jobs* processes of this machine (0: one for each CPU), or the
    workers of a dask *scheduler* (``tcp://host:port``).

    Raises UsageError for a number out of range, an address that nobody answers at, and both given.
    """
    if scheduler is not None:
        if jobs is not None:
            raise UsageError("--jobs is for this machine and --scheduler for others: give one of them")
        with _cluster(scheduler) as pool:
            yield pool
        return
    if jobs is not None and not 0 <= jobs <= MAX_JOBS:
        raise UsageError(f"--jobs {jobs}: expected 0 (one for each CPU) to {MAX_JOBS}")
    count = len(os.sched_getaffinity(0)) if jobs == 0 else jobs or 1
    if count == 1:
        yield ALONE
        return
    from concurrent.futures import ProcessPoolExecutor  # takes long to load, and most commands work in one process
    from multiprocessing import get_context

    # not fork: libraries that compute columns have threads of their own, which a forked child lacks
    context = get_context("forkserver")
    local = _Pool(count, lambda: ProcessPoolExecutor(count, mp_context=context, initializer=_one_thread))
    try:
        yield local
    finally:
        local.close()


@contextmanager
def _cluster(address: str) -> Generator[Workers]:
    with needs("cluster", "--scheduler"):
        from distributed import Client, KilledWorker
    _reach(address)
    try:
        client = Client(address, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError) as e:
        raise UsageError(f"--scheduler {address}: nobody answers there: {e}") from e
    with client:
        threads = sum(cast("Mapping[str, int]", client.nthreads()).values())  # declared for both uses, awaited or not
        if not threads:
            raise UsageError(f"--scheduler {address}: it has no workers")
        try:
            client.run(_able)
        except Exception as e:  # whatever their Python says
            raise UsageError(f"--scheduler {address}: its workers cannot run kvmfault: {e}") from e
        # dask does work of a lost worker again by itself
        yield _Pool(threads, lambda: client.get_executor(pure=False), (KilledWorker,))


def _one_thread() -> None:
    # A worker is one of many: libraries that bring threads of their own, and ask when they are first imported.
    os.environ.setdefault("POLARS_MAX_THREADS", "1")


def _reach(address: str) -> None:
    # Before the client does: where nobody is, it takes long to say so, and says much.
    told = re.fullmatch(r"(?:tcp|tls)://(?:\[([0-9A-Fa-f:]+)\]|([^:/\[\]]+)):(\d{1,5})", address)
    if told is None:
        raise UsageError(f"--scheduler {address}: expected tcp://HOST:PORT")
    try:
        socket.create_connection((told[1] or told[2], int(told[3])), _PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as e:
        raise UsageError(f"--scheduler {address}: nobody answers there: {e}") from e


def _able() -> bool:
    # That it can be called at all says what is asked.
    return True
