"""Work over processes and a cluster: results in order, tasks taken as needed, killed workers cost nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

from kvmfault.errors import UsageError
from kvmfault.parallel import workers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def square(n: int) -> int:
    return n * n


def die_once(task: tuple[int, str]) -> int:
    """Kills its process the first time that number 5 is asked for."""
    number, mark = task
    if number == 5 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_the_order_of_the_tasks(jobs: int) -> None:
    with workers(jobs=jobs) as where:
        assert where.jobs == jobs
        assert list(where.in_order(square, range(40))) == [n * n for n in range(40)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_tasks_are_taken_only_as_results_are(jobs: int) -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for n in range(1000):
            taken.append(n)
            yield n

    with workers(jobs=jobs) as where:
        results = where.in_order(square, tasks())
        assert [next(results) for _ in range(10)] == [n * n for n in range(10)]
        assert len(taken) <= 10 + 2 * jobs


def test_an_error_comes_at_its_tasks_turn() -> None:
    with workers(jobs=2) as where:
        results = where.in_order(fail_at_three, range(6))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="three"):
            next(results)


def test_a_killed_worker_costs_no_result(tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    with workers(jobs=2) as where:
        assert list(where.in_order(die_once, [(n, mark) for n in range(20)])) == list(range(20))
    assert Path(mark).exists()


def test_a_task_that_kills_every_worker_is_given_up() -> None:
    with workers(jobs=2) as where, pytest.raises(UsageError, match="keep dying"):
        list(where.in_order(die, range(3)))


@pytest.mark.parametrize(("jobs", "scheduler", "said"), [(-1, None, "--jobs -1"), (2, "tcp://h:1", "give one")])
def test_what_cannot_be(jobs: int, scheduler: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said), workers(jobs=jobs, scheduler=scheduler):
        pass


def test_nobody_at_the_address() -> None:
    with pytest.raises(UsageError, match="nobody answers"), workers(scheduler="tcp://127.0.0.1:9"):
        pass


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """A scheduler and two workers, each a process of its own."""
    run = [sys.executable, "-m"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    where = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(where)]
    started = [
        subprocess.Popen(
            [*run, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", *common],
            env=env,
            cwd=tmp_path,
            stderr=subprocess.DEVNULL,
        )
    ]
    worker = ["--no-dashboard", "--no-nanny", "--nthreads", "1", "--host", "127.0.0.1", *common]
    started += [
        subprocess.Popen(
            [*run, "distributed.cli.dask_worker", *worker], env=env, cwd=tmp_path, stderr=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    try:
        with Client(scheduler_file=str(where), timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield address
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


def test_a_cluster_with_a_worker_killed_half_way(cluster: str, tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    with workers(scheduler=cluster) as where:
        assert where.jobs == 2
        assert list(where.in_order(die_once, [(n, mark) for n in range(20)])) == list(range(20))
    assert Path(mark).exists()
