"""Where the tests find their data, and how hard hypothesis tries."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

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


def recording(name: str) -> Path:
    """The file or folder ``name`` of the large recordings; skips the test where there are none at all."""
    if not TRACES.is_dir():
        pytest.skip(ABSENT)
    path = TRACES / name
    assert path.exists(), f"no such recording: {path}"
    return path


def recordings(pattern: str) -> list[pytest.ParameterSet]:
    """Parameters for every large recording that matches the glob ``pattern``, or one that is skipped."""
    if not TRACES.is_dir():
        return [pytest.param(TRACES, id="absent", marks=pytest.mark.skip(reason=ABSENT))]
    found = sorted(TRACES.glob(pattern))
    assert found, f"no recording matches {pattern}"
    return [pytest.param(path, id=str(path.relative_to(TRACES))) for path in found]
