"""For pytest: every conformance check of a backend as a test. Loaded by itself where kvmfault is installed.

A test that takes ``conformance`` becomes one test for each check and target of the backends named by
``@pytest.mark.kvmfault_backend("mypkg:BACKEND", ...)``, or else by ``kvmfault_backends`` in the configuration::

    def test_conforms(conformance: Case) -> None:
        conformance()
"""

from __future__ import annotations

import pytest

__all__ = ["pytest_addoption", "pytest_configure", "pytest_generate_tests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``kvmfault_backends``."""
    help_ = "backends that a test with the argument `conformance` checks: MODULE:ATTRIBUTE, or installed ones by name"
    parser.addini("kvmfault_backends", help_, type="args", default=[])


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker."""
    config.addinivalue_line(
        "markers", "kvmfault_backend(*names): what the argument `conformance` checks, MODULE:ATTRIBUTE or a name"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case."""
    if "conformance" not in metafunc.fixturenames:
        return
    from kvmfault.errors import UsageError
    from kvmfault.testing import cases, load_backend

    marks = list(metafunc.definition.iter_markers("kvmfault_backend"))
    names = [str(name) for mark in marks for name in mark.args] or metafunc.config.getini("kvmfault_backends")
    if not names:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: which backends? name them by @pytest.mark.kvmfault_backend(...) or by "
            "kvmfault_backends in the configuration"
        )
    try:
        found = [case for name in names for case in cases(load_backend(name))]
    except UsageError as e:
        raise pytest.UsageError(str(e)) from e
    metafunc.parametrize("conformance", found, ids=str)
