"""--jobs and --scheduler: what comes out is the same, wherever the work is done and whoever dies."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Final, TypeVar

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmfault.cli import replay as replay_cli
from kvmfault.cli import summary as summary_cli
from kvmfault.cli.render import to_json
from kvmfault.errors import TraceError, UsageError
from kvmfault.parallel import ALONE, Workers, workers
from kvmfault.replay.run import replay
from kvmfault.summary import run as summary_run
from kvmfault.summary.run import summarise
from kvmfault.trace import merge, stretches
from kvmfault.trace.convert import convert
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.opening import open_recording
from kvmfault.trace.recording import Frames, Meta, ReadStats, Recording
from kvmfault.trace.slotfile import read_slots
from tests import summaries
from tests.cli import Cli
from tests.conftest import ROOT, Cluster, recordings
from tests.ringfile import DatFile, fault, page, record

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], object]

SMALL: Final = sorted((ROOT / "tests/data/fuzz").glob("*.dat"))
NPT: Final = ROOT / "examples/recordings/x86-npt-longmode2.trace.txt.gz"


class Pickled(Workers):
    """Workers apart as far as anyone can see, in this process: all that goes to them and back is pickled."""

    jobs = 2
    apart = True

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T], *, ahead: int | None = None) -> Iterator[R]:
        for task in tasks:
            call: Callable[[], R] = pickle.loads(pickle.dumps(partial(function, task)))
            yield pickle.loads(pickle.dumps(call()))


@pytest.fixture
def finely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small recordings are read in many runs."""
    monkeypatch.setattr(merge, "_SMALLEST", 4096)
    monkeypatch.setattr(merge, "AT_ONCE", 1 << 13)
    monkeypatch.setattr(stretches, "RUN", 1 << 14)


def summary_of(path: Path, where: Workers, progress: Progress = lambda _: None) -> str:
    return to_json(summary_cli.as_data(summarise(str(path), where=where, progress=progress)))


def table_of(path: Path, where: Workers, out: Path, progress: Progress = lambda _: None) -> bytes:
    return written(open_recording(str(path)), where, out, progress)


def written(source: Recording, where: Workers, out: Path, progress: Progress = lambda _: None) -> bytes:
    convert(source, out, faults=FaultColumns.of(), where=where, progress=progress)
    return out.read_bytes()


@pytest.mark.usefixtures("finely")
@pytest.mark.parametrize("path", [*SMALL, NPT], ids=lambda path: path.name)
def test_apart_is_as_alone(path: Path, tmp_path: Path) -> None:
    assert summary_of(path, Pickled()) == summary_of(path, ALONE)
    assert table_of(path, Pickled(), tmp_path / "a") == table_of(path, ALONE, tmp_path / "b")


@pytest.mark.parametrize("path", recordings("*/*demand_paging*/trace.dat"))
def test_large_recordings_apart_are_as_alone(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "AT_ONCE", 1 << 17)
    monkeypatch.setattr(stretches, "RUN", 1 << 18)
    assert summary_of(path, Pickled()) == summary_of(path, ALONE)
    assert table_of(path, Pickled(), tmp_path / "a") == table_of(path, ALONE, tmp_path / "b")


def test_rows_stay_in_order_whoever_encodes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # of each page a run; of some there is enough for a row group at once
    monkeypatch.setattr(merge, "_SMALLEST", 4096)
    monkeypatch.setattr(merge, "AT_ONCE", 4096)
    monkeypatch.setattr(stretches, "RUN", 4096)
    monkeypatch.setattr("kvmfault.trace.convert.ENOUGH", 5)
    counts = [2, 6, 1, 7, 9, 1]
    pages = [page(1000 * n, b"".join(record(fault(k), 1) for k in range(count))) for n, count in enumerate(counts)]
    path = tmp_path / "trace.dat"
    path.write_bytes(DatFile({0: pages}).build())
    assert table_of(path, Pickled(), tmp_path / "a") == table_of(path, ALONE, tmp_path / "b")
    assert pl.read_parquet(tmp_path / "a")["place"].to_list() == list(range(1, sum(counts) + 1))


def test_damaged_files_apart_are_as_alone(tmp_path: Path, finely: None) -> None:
    whole = (ROOT / "tests/data/fuzz/v7-none.dat").read_bytes()
    path = tmp_path / "damaged.dat"
    for at in range(len(whole) // 2, len(whole), 1111):
        path.write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
        try:
            alone = summary_of(path, ALONE)
        except TraceError as e:
            with pytest.raises(type(e)):
                summary_of(path, Pickled())
        else:
            assert summary_of(path, Pickled()) == alone


@pytest.mark.usefixtures("finely")
@pytest.mark.parametrize("jobs", [2, 3])
def test_processes_give_the_same_with_one_killed(jobs: int, tmp_path: Path) -> None:
    path = SMALL[-1]
    with workers(jobs=jobs) as where:

        def kill_one(read: int) -> None:
            if not killed:
                victim = active_children()[0].pid
                assert victim is not None
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

        killed: list[int] = []
        assert summary_of(path, where, kill_one) == summary_of(path, ALONE)
        killed.clear()
        assert table_of(path, where, tmp_path / "a", kill_one) == table_of(path, ALONE, tmp_path / "b")
        assert killed


@pytest.mark.usefixtures("finely")
def test_a_cluster_gives_the_same_with_a_worker_killed(cluster: Cluster, tmp_path: Path) -> None:
    path = SMALL[-1]
    with workers(scheduler=cluster.address) as where:
        assert summary_of(path, where) == summary_of(path, ALONE)
        relative = Path(os.path.relpath(path))
        assert table_of(relative, where, tmp_path / "a") == table_of(path, ALONE, tmp_path / "b")
        assert replayed(where, ["arm64:16k"]) == replayed(ALONE, ["arm64:16k"])
        assert table_of(path, where, tmp_path / "c", lambda _: cluster.workers[0].kill()) == table_of(
            path, ALONE, tmp_path / "d"
        )
        assert cluster.workers[0].wait(60)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_the_commands(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    trace, small = str(NPT), str(SMALL[-1])
    for words in (
        ("trace", "summary", small, "--json"),
        ("compare", "traces", small, trace),
        ("trace", "convert", small, str(out)),
        ("replay", trace, "--backend", "arm64:16k", "--json"),
    ):
        alone, apart = cli(*words), cli(*words, "--jobs", "2")
        assert (alone.status, alone.out) == (apart.status, apart.out)
        cli(*words, "--jobs", "-1").refused("--jobs -1", "expected 0")
        cli(*words, "--jobs", "2", "--scheduler", "tcp://h:1").refused("give one")


def replayed(where: Workers, targets: Sequence[str], *given: str, slots: bool = False) -> tuple[str, str]:
    known = read_slots(str(NPT).replace(".trace", ".aux")) if slots else None
    report = replay(os.path.relpath(NPT), targets, known, settings=given, where=where)
    return replay_cli.render(report), to_json(replay_cli.as_data(report))


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(
    ("targets", "given"), [((), ()), (("x86-ept", "arm64:16k"), ()), (("x86-npt",), ("dirty-log=on", "precheck=no"))]
)
def test_replay_apart_is_as_alone(targets: tuple[str, ...], given: tuple[str, ...], slots: bool) -> None:
    assert replayed(Pickled(), targets, *given, slots=slots) == replayed(ALONE, targets, *given, slots=slots)


class Moved(Pickled):
    """The file is another one, or not there, where the work is done."""

    def __init__(self, path: Path, becomes: bytes | None) -> None:
        self._path = path
        self._becomes = becomes

    def in_order(self, function: Callable[[T], R], tasks: Iterable[T], *, ahead: int | None = None) -> Iterator[R]:
        some = iter(tasks)
        first = next(some)
        self._path.unlink(missing_ok=True)
        if self._becomes is not None:
            self._path.write_bytes(self._becomes)
        yield from super().in_order(function, [first, *some], ahead=ahead)


@pytest.mark.parametrize(("becomes", "said"), [(None, "No such file"), (b"abc", "3 bytes, but 17,817")])
def test_a_worker_that_has_not_the_file(becomes: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "t.dat"
    path.write_bytes(SMALL[-1].read_bytes())
    with pytest.raises(UsageError, match=rf"worker on .*: {path}: {said}.*; every worker needs the recording"):
        summary_of(path, Moved(path, becomes))


class Made:
    """A recording of made-up events, cut as told."""

    path = "made"
    meta = Meta(kind="made")

    def __init__(self, parts: Sequence[Frames]) -> None:
        self._parts = parts

    def frames(self, wanted: Collection[str] | None = None, *, stats: ReadStats | None = None) -> Iterator[Frames]:
        return iter(self._parts)


def check_cuts(events: Sequence[summaries.Made], cuts: Iterable[int], monkeypatch: pytest.MonkeyPatch) -> str:
    source = Made([part for part in summaries.stretches(events, cuts) if part])
    with monkeypatch.context() as patched:
        patched.setattr(summary_run, "open_recording", lambda *args, **named: source)
        alone = summary_of(Path("made"), ALONE)
        assert summary_of(Path("made"), Pickled()) == alone
    return alone


def test_a_fault_whose_exit_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    # the worker that meets the fault knows nothing of its task: what it made of it is done again
    between = [event for n in range(4) for event in summaries.handled(n, pid=2)]
    events = [summaries.exit_(), *between, summaries.fault(7), summaries.entry()]
    told = check_cuts(events, range(1, len(events), 3), monkeypatch)
    assert '"faults": 5' in told


def test_a_fault_whose_address_comes_late(monkeypatch: pytest.MonkeyPatch) -> None:
    between = [event for n in range(4) for event in summaries.handled(n, pid=2)]
    events = [summaries.misconfigured(), *between, summaries.mmio(0x5000, 2), summaries.entry()]
    told = check_cuts(events, range(1, len(events), 3), monkeypatch)
    assert '"faults": 5' in told


TASKS: Final = st.integers(1, 3)
EVENTS: Final = st.lists(
    st.one_of(
        st.builds(summaries.exit_, TASKS, st.sampled_from([0x400, 0x4E, 0x60])),
        st.builds(lambda gfn, pid: summaries.fault(gfn, pid=pid), st.integers(0, 3), TASKS),
        st.builds(summaries.entry, TASKS),
        st.builds(summaries.misconfigured, TASKS),
        st.builds(lambda page, pid: summaries.mmio(page << 12, 2, pid=pid), st.integers(0, 3), TASKS),
    ),
    min_size=1,
    max_size=40,
)


@given(EVENTS, st.integers(1, 6))
@settings(max_examples=40)
def test_any_history_in_any_cuts(events: list[summaries.Made], every: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        check_cuts(events, range(every, len(events), every), patched)
