"""``kvmfault annotate``."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from kvmfault.annotate import annotate
from kvmfault.errors import UsageError


def run(file: str, target: str | None) -> int:
    """Copy *file* ("-": standard input) to standard output, annotated. Bytes that are no UTF-8 pass through too."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # not so where a caller replaced it
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    if file == "-":
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True)  # so that "tail -f |" shows lines at once
        _copy(sys.stdin, target)
        return 0
    if not Path(file).is_file():
        raise UsageError(f"{file}: no such file")
    with Path(file).open(encoding="utf-8", errors="surrogateescape") as lines:
        _copy(lines, target)
    return 0


def _copy(lines: TextIO, target: str | None) -> None:
    for line in annotate(lines, target):
        print(line)
