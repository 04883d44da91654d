"""A little of `make fuzz`: what was found before, and a few hundred files that are damaged anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmfault.errors import KvmfaultError
from tests.fuzz import limited, rows, run, seeds


@pytest.mark.parametrize("path", seeds(), ids=lambda p: p.name)
def test_the_corpus_is_read(path: Path) -> None:
    with limited():
        try:
            got, stats = rows(path)
        except KvmfaultError:
            assert path.name.startswith("found-")
            return
    if not path.name.startswith("found-"):
        assert got
        assert stats.damage is None


def test_damaged_files() -> None:
    assert run(lambda number: number < 300) == 300
