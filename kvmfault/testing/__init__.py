"""Conformance: what every backend keeps, as functions that return findings.

Needs no pytest. ``check_backend(BACKEND)`` gives a Report; ``kvmfault backend check`` prints it;
`kvmfault.pytest_plugin` makes a test of each case. docs/recipe.md leads from an empty folder to a backend that
conforms.
"""

from __future__ import annotations

from kvmfault.testing.checks import CHECKS, cases, check_backend, load_backend, missing
from kvmfault.testing.report import Case, Check, Finding, Missing, Report, Result, State, Step
from kvmfault.testing.samples import any_rows, reachable_rows
from kvmfault.testing.shapes import shapes, told

__all__ = [
    "CHECKS",
    "Case",
    "Check",
    "Finding",
    "Missing",
    "Report",
    "Result",
    "State",
    "Step",
    "any_rows",
    "cases",
    "check_backend",
    "load_backend",
    "missing",
    "reachable_rows",
    "shapes",
    "told",
]
