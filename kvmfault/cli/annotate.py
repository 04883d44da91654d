"""``kvmfault annotate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from kvmfault.annotate import annotate
from kvmfault.errors import UsageError


def run(file: str, target: str | None) -> int:
    """Copy *file* ("-": standard input) to standard output, annotated."""
    if file == "-":
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a text file, unless a caller replaced it
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # so that "tail -f |" shows lines at once
        _copy(sys.stdin, target)
        return 0
    if not Path(file).is_file():
        raise UsageError(f"{file}: no such file")
    with Path(file).open(encoding="utf-8", errors="replace") as lines:
        _copy(lines, target)
    return 0


def _copy(lines: TextIO, target: str | None) -> None:
    for line in annotate(lines, target):
        print(line)
