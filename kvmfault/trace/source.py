"""Where a recording in text form comes from: a file, a pipe or standard input; plain or gzipped, as pieces of bytes."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from kvmfault.errors import UsageError
from kvmfault.trace.recording import ReadStats

__all__ = ["ByteStream", "Source", "is_text", "no_device", "open_bytes", "source_name"]

_CHUNK: Final = 1 << 18


class ByteStream(Protocol):
    """A file opened for reading bytes."""

    def read(self, n: int = -1, /) -> bytes:
        """Up to *n* bytes; nothing at the end."""
        ...


Source: TypeAlias = str | Path | ByteStream
"""A path ("-" is standard input) or an open binary stream."""


def source_name(source: Source) -> str:
    """How errors name *source*."""
    if isinstance(source, str | Path):
        return "<stdin>" if str(source) == "-" else str(source)
    return str(getattr(source, "name", "<stream>"))


def no_device(path: str | Path) -> None:
    """Raises `UsageError` if *path* is a device: it may never end, and holds no recording."""
    if Path(path).is_char_device() or Path(path).is_block_device():
        raise UsageError(f"{path}: a device, which holds no recording: give a file or a pipe")


def is_text(path: str | Path) -> bool:
    """Whether the file *path* is text, or gzip, which text may be in: there is no NUL at its beginning, as there is in
    any binary recording. Raises `UsageError` if it cannot be opened."""
    if Path(path).is_dir():
        return False
    try:
        with Path(path).open("rb") as file:
            first = file.read(64)
    except OSError as e:
        raise UsageError(f"{path}: {e.strerror or e}") from e
    return first.startswith(b"\x1f\x8b") or b"\0" not in first


def open_bytes(source: Source, stats: ReadStats) -> Generator[bytes, None, None]:
    """The content of *source* in pieces, decompressed if it is gzip (told by its first bytes).

    What can be read of a damaged file is given, then ``stats.damage`` says what was wrong. Raises `UsageError` if
    the file cannot be opened or read.
    """
    try:
        with _open(source) as stream:
            # read1 gives what a pipe has now; read would wait for a full chunk.
            read: Callable[[int], bytes] = getattr(stream, "read1", stream.read)
            first = read(_CHUNK)
            while 0 < len(first) < 2 and (more := read(_CHUNK)):
                first += more
            stats.bytes += len(first)
            yield from (_inflate if first.startswith(b"\x1f\x8b") else _plain)(first, read, stats)
    except OSError as e:
        raise UsageError(f"{source_name(source)}: {e.strerror or e}") from e


def _open(source: Source) -> AbstractContextManager[ByteStream]:
    if not isinstance(source, str | Path):
        return nullcontext(source)
    if str(source) == "-":
        return nullcontext(sys.stdin.buffer)
    no_device(source)
    return Path(source).open("rb")


def _plain(piece: bytes, read: Callable[[int], bytes], stats: ReadStats) -> Iterator[bytes]:
    while piece:
        yield piece
        piece = read(_CHUNK)
        stats.bytes += len(piece)


def _inflate(piece: bytes, read: Callable[[int], bytes], stats: ReadStats) -> Iterator[bytes]:
    # zlib and not gzip: the module's reader loses what it had when the file ends early.
    inflate = zlib.decompressobj(31)
    try:
        while piece or not inflate.eof:
            if out := inflate.decompress(piece, _CHUNK):
                yield out
            piece = inflate.unconsumed_tail
            if inflate.eof:
                piece = inflate.unused_data.lstrip(b"\0")
            if not piece:
                piece = read(_CHUNK)
                stats.bytes += len(piece)
            if inflate.eof and piece:
                inflate = zlib.decompressobj(31)  # files joined by cat are one
            elif not inflate.eof and not piece:
                stats.damage = f"the compressed file ends early, after {stats.bytes} bytes"
                yield inflate.flush()
                return
    except zlib.error as e:
        stats.damage = f"the compressed file is corrupt: {e}"
