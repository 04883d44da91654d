"""Work over processes and a cluster: results in order, tasks taken as needed, killed workers cost nothing."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmfault.errors import DecodeError, KvmfaultError, TraceError, UsageError
from kvmfault.parallel import workers
from tests.conftest import Cluster

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def square(n: int) -> int:
    return n * n


def slowly_square(n: int) -> int:
    """Some are still under way when a worker dies."""
    time.sleep(0.1)
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


def test_tasks_that_another_call_gives_with_a_worker_killed(tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    with workers(jobs=2) as where:
        inner = where.in_order(die_once, [(n, mark) for n in range(20)], ahead=3)
        assert list(where.in_order(slowly_square, inner)) == [n * n for n in range(20)]
    assert Path(mark).exists()


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:8786", "http://h:1", "tcp://h", "tcp://:1", "tcp://h:x"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="expected tcp://HOST:PORT"), workers(scheduler=address):
        pass


@pytest.mark.parametrize(
    "error", [UsageError("no"), TraceError("bad", path="f", offset=4), DecodeError("bad", register="R", value=1)]
)
def test_an_error_of_another_process_is_the_same(error: KvmfaultError) -> None:
    got = pickle.loads(pickle.dumps(error))
    assert (type(got), str(got), vars(got)) == (type(error), str(error), vars(error))


def test_a_cluster_with_a_worker_killed_half_way(cluster: Cluster, tmp_path: Path) -> None:
    mark = str(tmp_path / "died")
    with workers(scheduler=cluster.address) as where:
        assert where.jobs == 2
        assert list(where.in_order(die_once, [(n, mark) for n in range(20)])) == list(range(20))
    assert Path(mark).exists()
