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
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context
from typing import Final, TypeVar, cast

from kvmfault.errors import UsageError

T = TypeVar("T")
R = TypeVar("R")

MAX_JOBS: Final = 256
_LIVES: Final = 3
"""A task that kills this many workers in a row is given up: the fault is then its own."""


class Workers(ABC):
    """Where work is done."""

    @property
    @abstractmethod
    def jobs(self) -> int:
        """How many tasks are done at the same time."""

    @abstractmethod
    def in_order(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """``function`` of every task, in the order of the tasks.

        Tasks are taken from their iterable as results are: never more than twice ``jobs`` of them are under way or
        waiting to be fetched. An exception of the function is raised here, at its task's turn.
        """


class _Alone(Workers):
    @property
    def jobs(self) -> int:
        return 1

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        return map(function, tasks)


class _Pool(Workers):
    # *make* gives an executor; one whose processes died is replaced by another
    def __init__(self, jobs: int, make: Callable[[], Executor]) -> None:
        self._jobs = jobs
        self._make = make
        self._executor = make()

    @property
    def jobs(self) -> int:
        return self._jobs

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        waiting: deque[tuple[T, Future[R]]] = deque()
        source = iter(tasks)
        lives = _LIVES
        try:
            while True:
                for task in islice(source, 2 * self._jobs - len(waiting)):
                    waiting.append((task, self._submit(function, task)))
                if not waiting:
                    return
                task, future = waiting[0]
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lives -= 1
                    if not lives:
                        raise UsageError("worker processes keep dying: out of memory? fewer --jobs need less") from None
                    self._renew()
                    waiting = deque((t, f if _returned(f) else self._submit(function, t)) for t, f in waiting)
                    continue
                lives = _LIVES
                waiting.popleft()
                yield result
        finally:
            for _, future in waiting:
                future.cancel()

    def _submit(self, function: Callable[[T], R], task: T) -> Future[R]:
        try:
            return self._executor.submit(function, task)
        except BrokenProcessPool:
            self._renew()
            return self._executor.submit(function, task)

    def _renew(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._executor = self._make()

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _returned(future: Future[R]) -> bool:
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


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
        yield _Alone()
        return
    # not fork: libraries that compute columns have threads of their own, which a forked child lacks
    local = _Pool(count, lambda: ProcessPoolExecutor(count, mp_context=get_context("forkserver")))
    try:
        yield local
    finally:
        local.close()


@contextmanager
def _cluster(address: str) -> Generator[Workers]:
    try:
        from distributed import Client
    except ImportError as e:
        raise UsageError("--scheduler needs the extra 'cluster': pip install 'kvmfault[cluster]'") from e
    try:
        client = Client(address, timeout=5, set_as_default=False)
    except (OSError, ValueError) as e:
        raise UsageError(f"--scheduler {address}: nobody answers there: {e}") from e
    with client:
        threads = sum(cast("Mapping[str, int]", client.nthreads()).values())  # declared for both uses, awaited or not
        if not threads:
            raise UsageError(f"--scheduler {address}: it has no workers")
        # dask does work of a lost worker again by itself
        yield _Pool(threads, lambda: client.get_executor(pure=False))
