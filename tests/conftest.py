"""Where the tests find their data, and how hard hypothesis tries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

ROOT: Final = Path(__file__).resolve().parents[1]
VECTORS: Final = ROOT / "tests" / "vectors"
"""Answers of real kernels; tests/vectors/PROVENANCE.md says what each file holds."""
TRACES: Final = ROOT.parent / "shared" / "traces"
"""Recordings too large for the repository. Only `recording` and `recordings` may use it."""

ABSENT: Final = "recordings not present: ../shared/traces"

# No time limit anywhere: a slow machine is not a failure.
settings.register_profile(
    "default", deadline=None, max_examples=60, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

collect_ignore_glob = ["typing/*"]  # misuses on purpose: read by mypy in test_typing.py, never imported


def pytest_configure(config: pytest.Config) -> None:
    """The plugin is loaded by its entry point; in a checkout that is not installed, here."""
    if not config.pluginmanager.has_plugin("kvmfault"):
        config.pluginmanager.import_plugin("kvmfault.pytest_plugin")


def recording(name: str) -> Path:
    """The file or folder ``name`` of the large recordings; skips the test where there are none at all."""
    if not TRACES.is_dir():
        pytest.skip(ABSENT)
    path = TRACES / name
    assert path.exists(), f"no such recording: {path}"
    return path


LARGEST = ("vm2-linux_guest_thp_dirty", "b1-dirty_log_split")
"""Folders of the two recordings with the most events of their architecture."""


def recordings(pattern: str, *, largest: bool = True) -> list[pytest.ParameterSet]:
    """Parameters for every large recording that matches the glob ``pattern``, or one that is skipped.

    Without *largest* those are left to `make long`: where another test reads them, too.
    """
    if not TRACES.is_dir():
        return [pytest.param(TRACES, id="absent", marks=pytest.mark.skip(reason=ABSENT))]
    found = sorted(TRACES.glob(pattern))
    assert found, f"no recording matches {pattern}"
    long = {path for path in found if not largest and path.parent.name in LARGEST}
    return [
        pytest.param(path, id=str(path.relative_to(TRACES)), marks=[pytest.mark.long] if path in long else [])
        for path in found
    ]


class Cluster(NamedTuple):
    """A dask scheduler, and its workers, one thread each."""

    address: str
    workers: list[subprocess.Popen[bytes]]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler and two workers, each a process of its own, in folders of their own."""
    from distributed import Client

    where = tmp_path / "scheduler.json"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(what: str, *options: str) -> subprocess.Popen[bytes]:
        common = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(where)]
        run = [sys.executable, "-m", f"distributed.cli.{what}", *common, *options]
        return subprocess.Popen(run, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL)

    scheduler = start("dask_scheduler", "--port", "0")
    workers = [start("dask_worker", "--no-nanny", "--nthreads", "1") for _ in range(2)]
    try:
        with Client(scheduler_file=str(where), timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            address = client.scheduler.address
        yield Cluster(address, workers)
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
