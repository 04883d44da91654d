"""The toy conforms: one test for each check of kvmfault.testing."""

from __future__ import annotations

from kvmfault.testing import Case


def test_conforms(conformance: Case) -> None:
    conformance()
