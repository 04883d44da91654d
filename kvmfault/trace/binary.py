"""Binary files read at offsets: what is not there is an error that says where."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final, Protocol

from kvmfault.errors import TraceError, UsageError

__all__ = ["LARGEST_TEXT", "WINDOW", "Bytes", "Cursor", "File", "Memory", "expect"]

WINDOW: Final = 1 << 18
LARGEST_TEXT: Final = 1 << 26
"""Bytes of a text inside a file; no format or table of names is larger."""


class Bytes(Protocol):
    """Something with bytes at offsets."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly *size* bytes; raises TraceError if they are not there."""
        ...

    def wrong(self, message: str, offset: int) -> TraceError:
        """The error that says what is wrong at *offset*."""
        ...


class File:
    """A file, not held open: small reads come from the window around the last one.

    Raises UsageError if it cannot be opened or read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._at = 0
        self._window = b""
        try:
            self.size: int = Path(path).stat().st_size
            if Path(path).is_fifo():
                raise UsageError(f"{path}: a pipe, of which a binary recording cannot be read: save it as a file first")
            self._read(0, 1)
        except OSError as e:
            raise UsageError(f"{path}: {e.strerror or e}") from e

    def read(self, offset: int, size: int) -> bytes:
        """Exactly *size* bytes."""
        if offset + size > self.size:
            raise self.wrong(f"{size} bytes should be here, but the file ends at {self.size:#x}", offset)
        return self.upto(offset, size)

    def upto(self, offset: int, size: int) -> bytes:
        """At most *size* bytes."""
        start = offset - self._at
        if start < 0 or start + size > len(self._window):
            if size >= WINDOW:
                return self._read(offset, size)
            self._at, self._window, start = offset, self._read(offset, WINDOW), 0
        return self._window[start : start + size]

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with Path(self.path).open("rb", buffering=0) as file:
                file.seek(min(offset, self.size))
                return file.read(size)
        except OSError as e:
            raise UsageError(f"{self.path}: {e.strerror or e}") from e

    def wrong(self, message: str, offset: int) -> TraceError:
        """See `Bytes.wrong`."""
        return TraceError(message, path=self.path, offset=offset)


def expect(path: str, size: int | None) -> None:
    """Raise UsageError, in words for where work is given out, unless this machine has the file *path*, of *size* bytes
    if that is told."""
    try:
        have = Path(path).stat().st_size
        wrong = None if size in {None, have} else f"{have:,} bytes, but {size:,} where the work is given out"
    except OSError as e:
        wrong = e.strerror or str(e)
    if wrong is not None:
        where = f"worker on {socket.gethostname()}: {path}: {wrong}"
        raise UsageError(f"{where}; every worker needs the recording under this path")


class Memory:
    """Bytes that were decompressed from what a file has at ``offset``."""

    def __init__(self, path: str, data: bytes, offset: int) -> None:
        self.path = path
        self.offset = offset
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        """Exactly *size* bytes."""
        if offset + size > len(self._data):
            raise self.wrong(f"{size} bytes should be here", offset)
        return self._data[offset : offset + size]

    def wrong(self, message: str, offset: int) -> TraceError:
        """See `Bytes.wrong`."""
        return TraceError(f"{message} (at {offset:#x} of what is decompressed)", path=self.path, offset=self.offset)


class Cursor:
    """Reads little-endian values one after the other, from *at* up to *end*."""

    def __init__(self, data: Bytes, at: int, end: int) -> None:
        self._data = data
        self.at: int = at
        self.end = end

    @property
    def empty(self) -> bool:
        """Nothing is left."""
        return self.at >= self.end

    def take(self, size: int) -> bytes:
        """The next *size* bytes."""
        if self.at + size > self.end:
            where = f"the file ends at {self.end:#x}" if self.at > self.end else f"{self.end - self.at} are left"
            raise self.wrong(f"{size} bytes should be here, but {where}")
        data = self._data.read(self.at, size)
        if len(data) < size:
            raise self.wrong(f"{size} bytes should be here, {len(data)} could be read")
        self.at += size
        return data

    def u8(self) -> int:
        """A number of 1 byte."""
        return self.take(1)[0]

    def u16(self) -> int:
        """A number of 2 bytes."""
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        """A number of 4 bytes."""
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        """A number of 8 bytes."""
        return int.from_bytes(self.take(8), "little")

    def string(self, most: int) -> str:
        """Text up to a NUL, of at most *most* bytes."""
        data = self._data.read(self.at, min(most, max(self.end - self.at, 0)))
        text, nul, _ = data.partition(b"\0")
        if not nul:
            raise self.wrong(f"a name that does not end within {most} bytes")
        self.at += len(text) + 1
        return text.decode(errors="replace")

    def text(self, size: int) -> bytes:
        """The next *size* bytes, if that is a likely size for text."""
        if size > LARGEST_TEXT:
            raise self.wrong(f"a text of {size} bytes")
        return self.take(size)

    def skip(self, size: int) -> None:
        """Over *size* bytes."""
        if self.at + size > self.end:
            raise self.wrong(f"{size} bytes should be here, but {max(self.end - self.at, 0)} are left")
        self.at += size

    def part(self, size: int) -> Cursor:
        """A cursor over the next *size* bytes; this one goes on after them."""
        at = self.at
        self.skip(size)
        return Cursor(self._data, at, self.at)

    def rest(self) -> bytes:
        """All that is left; the cursor stays."""
        return self._data.read(self.at, self.end - self.at)

    def wrong(self, message: str, at: int | None = None) -> TraceError:
        """The error that says what is wrong at *at*, or here."""
        return self._data.wrong(message, self.at if at is None else at)
