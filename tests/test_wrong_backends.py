"""Each backend with one mistake fails the check that is meant for it, and no other."""

from __future__ import annotations

import pytest

from kvmfault.testing import CHECKS, State, check_backend
from tests.wrong_backends import WRONG, Wrong


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_check_meant_for_it_finds_it(wrong: Wrong) -> None:
    report = check_backend(wrong.backend)
    found = {r.check.name: [f.what for f in r.findings] for r in report.results if r.state is State.FOUND}
    assert found.keys() == {wrong.check}, found
    assert not report.conforms
    waits = {r.waits_for for r in report.results if r.state is State.WAITS}
    assert waits <= {wrong.check}
    for finding in report.findings:
        assert finding.what
        assert "\n" not in finding.what


def test_every_check_has_a_backend_that_fails_it() -> None:
    assert {wrong.check for wrong in WRONG} == {check.name for check in CHECKS}
