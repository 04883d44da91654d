"""`kvmfault decode` answers at once: it imports none of the heavy packages."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

from tests.conftest import ROOT

HEAVY: Final = frozenset({"numpy", "polars", "pydantic", "pydantic_core", "pandas", "pyarrow", "altair"})
REPORT: Final = "import sys; sys.stderr.write(' '.join(sys.modules))"


def loaded(code: str) -> set[str]:
    """Which of HEAVY a fresh Python has imported after ``code``, which must exit with status 0."""
    script = f"try:\n  {code}\nfinally:\n  {REPORT}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(HEAVY.intersection(done.stderr.split()))


@pytest.mark.parametrize("arguments", ["decode arm64 0x9200004f", "decode x86-ept 0x182", "--help"])
def test_decode_imports_nothing_heavy(arguments: str) -> None:
    argv = ["kvmfault", *arguments.split()]
    assert loaded(f"import sys; from kvmfault.cli.main import main; sys.argv = {argv}; sys.exit(main())") == set()


def test_a_heavy_import_is_noticed() -> None:
    assert loaded("import numpy") == {"numpy"}
