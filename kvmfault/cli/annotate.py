"""``kvmfault annotate``."""

from __future__ import annotations

import gzip
import sys
import zlib
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from kvmfault.annotate import annotate
from kvmfault.errors import UsageError

__all__ = ["run"]


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
    if not Path(file).exists() or Path(file).is_dir():
        raise UsageError(f"{file}: {'a directory' if Path(file).is_dir() else 'no such file'}")
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(file, "rt", encoding="utf-8", errors="surrogateescape") as lines:
            _copy(lines, target)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise UsageError(f"{file}: the compressed file is damaged: {e}") from None
    return 0


def _copy(lines: TextIO, target: str | None) -> None:
    for line in annotate(lines, target):
        print(line)
