"""What comes through a pipe, kept for as long as it is read: a recording is read several times."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Final

from kvmfault.errors import TraceError, UsageError
from kvmfault.trace.source import ByteStream, no_device, source_name
from kvmfault.trace.text import looks_recorded

__all__ = ["seekable"]

_PIECE: Final = 1 << 18
_ROOM: Final = 1 << 28  # bytes that a pipe leaves free where it is kept
_HOPELESS: Final = 1 << 26  # bytes of a pipe that does not begin as a recording does


def _keep(pipe: ByteStream, kept: IO[bytes], name: str) -> None:
    first, size, checked, limit = b"", 0, 0, _HOPELESS
    while piece := pipe.read(_PIECE):
        if not first:
            first = _begins(piece)
            limit >>= 6 * (first is not piece)  # of what is compressed much less is much
        size += len(piece)
        if size - checked > limit:
            checked = size
            if not looks_recorded(first):
                what = "not a recording: nothing where it begins reads as an event"
                raise TraceError(f"{what}, and it does not end in {size} bytes", path=name)
            if shutil.disk_usage(tempfile.gettempdir()).free < _ROOM:
                raise UsageError(
                    f"{name}: no room in {tempfile.gettempdir()} for more than {size} bytes of it: give a file"
                )
        kept.write(piece)


def _begins(piece: bytes) -> bytes:
    # what a stream begins with, once it is decompressed
    if not piece.startswith(b"\x1f\x8b"):
        return piece
    try:
        return zlib.decompressobj(31).decompress(piece, _PIECE)
    except zlib.error:
        return piece


@contextmanager
def seekable(source: str) -> Generator[str]:
    """A path that can be read several times: standard input and pipes are kept in a temporary file."""
    if source != "-" and not Path(source).exists():
        raise UsageError(f"{source}: no such file")
    if source != "-" and (Path(source).is_file() or Path(source).is_dir()):
        yield source
        return
    no_device(source)
    with tempfile.NamedTemporaryFile(prefix="kvmfault-") as kept:
        with nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb") as pipe:
            _keep(pipe, kept, source_name(source))
        kept.flush()
        try:
            yield kept.name
        except TraceError as e:
            raise TraceError(
                e.message, path=source_name(source), line=e.line, column=e.column, offset=e.offset
            ) from None
