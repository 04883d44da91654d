"""Writing trace.dat version 7, which trace-cmd reads: what the kernel says of its events, then its pages as they are.

The pages of each CPU stand together in the file, but arrive mixed: a ``Spool`` takes those of one CPU into a file of
its own, in the form that they will have, and ``write`` puts everything together. Memory is bounded by one chunk.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from io import SEEK_END
from struct import pack
from typing import BinaryIO, Final

from kvmfault.trace.datparts import Option

__all__ = ["CHUNK", "PLAIN", "ZLIB", "Compression", "Described", "Spool", "write", "zstd"]

CHUNK: Final = 256 << 10
"""Bytes of pages that are compressed at once, about."""


@dataclass(frozen=True, slots=True)
class Compression:
    """How pages and texts are stored; ``compress`` None: as they are."""

    name: str = "none"
    version: str = ""
    compress: Callable[[bytes], bytes] | None = None


PLAIN: Final = Compression()
ZLIB: Final = Compression("zlib", zlib.ZLIB_VERSION, zlib.compress)


def zstd() -> Compression | None:
    """One zstd frame for each chunk, or None where the package zstandard is not installed."""
    if find_spec("zstandard") is None:
        return None
    package = import_module("zstandard")
    version = ".".join(map(str, package.ZSTD_VERSION))
    return Compression("zstd", version, package.ZstdCompressor(level=1).compress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a recording says beside its events: texts of tracefs, as they are there."""

    header_page: bytes
    header_event: bytes
    ftrace: Sequence[bytes] = ()
    """Formats of tracefs' own events."""
    formats: Mapping[str, Sequence[bytes]]
    """Formats of the other events, by system."""
    kallsyms: bytes = b""
    printk: bytes = b""
    comms: Mapping[int, str] = field(default_factory=dict)
    """Names of tasks by pid."""
    clock: str
    clocks: str = ""
    """All clocks there are, the one used in brackets."""
    uname: str
    page_size: int
    """Bytes of one page of events."""
    stats: Mapping[int, str] = field(default_factory=dict)
    """per_cpu/cpuN/stats by CPU, after the end."""


class Spool:
    """The pages of one CPU, in *file*, which is open for reading and writing and empty."""

    def __init__(self, file: BinaryIO, compression: Compression, page_size: int) -> None:
        self._file = file
        self._compress = compression.compress
        self._page = page_size
        self._chunk = max(CHUNK // page_size, 1) * page_size
        self._waiting = bytearray()
        self.chunks: int = 0

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._file.tell()

    def add(self, pages: bytes) -> None:
        """Whole pages, in the order of their time. Raises OSError if they cannot be written."""
        self._waiting += pages
        while len(self._waiting) >= self._chunk:
            self._put(bytes(self._waiting[: self._chunk]))
            del self._waiting[: self._chunk]

    def finish(self, out: BinaryIO) -> tuple[int, int]:
        """Write everything to *out*, page-aligned; its offset there, and its size as trace-cmd counts it."""
        if self._waiting:
            self._put(bytes(self._waiting))
            self._waiting.clear()
        at, size = _pad(out, self._page), self.size
        if self._compress and self.chunks:
            out.write(pack("<I", self.chunks))  # which the size leaves out
        self._file.seek(0)
        shutil.copyfileobj(self._file, out, CHUNK)
        self._file.close()
        return at, size

    def _put(self, pages: bytes) -> None:
        self.chunks += 1
        if self._compress is None:
            self._file.write(pages)
        else:
            packed = self._compress(pages)
            self._file.write(pack("<II", len(packed), len(pages)) + packed)


def write(out: BinaryIO, described: Described, spools: Mapping[int, Spool], compression: Compression) -> None:
    """A whole trace.dat into *out*, which can seek; the spools are used up. Raises OSError if it cannot be written."""
    d = described
    out.write(b"\x17\x08\x44tracing7\0" + pack("<BBI", 0, 8, os.sysconf("SC_PAGESIZE")))
    out.write(f"{compression.name}\0{compression.version}\0".encode())
    place_of_options = out.tell()
    out.write(bytes(8))
    bodies = {
        Option.HEADER_INFO: b"header_page\0" + _counted(d.header_page) + b"header_event\0" + _counted(d.header_event),
        Option.FTRACE_EVENTS: pack("<I", len(d.ftrace)) + b"".join(map(_counted, d.ftrace)),
        Option.EVENT_FORMATS: _systems(d.formats),
        Option.KALLSYMS: pack("<I", len(d.kallsyms)) + d.kallsyms if d.kallsyms else b"",
        Option.PRINTK: pack("<I", len(d.printk)) + d.printk,
        Option.CMDLINES: _counted("".join(f"{pid} {comm}\n" for pid, comm in sorted(d.comms.items())).encode()),
    }
    options = [(id_, pack("<Q", _section(out, id_, body, compression))) for id_, body in bodies.items() if body]
    options += [
        (Option.TRACECLOCK, (d.clocks or f"[{d.clock}]").encode() + b"\0"),
        (Option.UNAME, d.uname.encode() + b"\0"),
        (Option.TRACEID, os.urandom(8)),
        *((Option.CPUSTAT, f"CPU: {cpu}\n{text}\0".encode()) for cpu, text in sorted(d.stats.items())),
        (Option.CPUCOUNT, pack("<I", max(spools, default=-1) + 1)),
        (Option.BUFFER, _buffer(out, d, spools, compression)),
        (Option.DONE, bytes(8)),
    ]
    at = _section(out, Option.DONE, b"".join(pack("<HI", id_, len(data)) + data for id_, data in options), PLAIN)
    out.seek(place_of_options)
    out.write(pack("<Q", at))
    out.seek(0, SEEK_END)


def _buffer(out: BinaryIO, d: Described, spools: Mapping[int, Spool], compression: Compression) -> bytes:
    # the section with all pages; returns the option that tells where they are
    start = out.tell()
    out.write(bytes(16))
    places = [(cpu, *spool.finish(out)) for cpu, spool in sorted(spools.items())]
    end = out.tell()
    out.seek(start)
    out.write(_head(Option.BUFFER, end - start - 16, compression))
    out.seek(end)
    head = pack("<Q", start) + b"\0" + d.clock.encode() + b"\0" + pack("<II", d.page_size, len(places))
    return head + b"".join(pack("<IQQ", *place) for place in places)


def _section(out: BinaryIO, id_: Option, body: bytes, compression: Compression) -> int:
    # returns its offset
    at = out.tell()
    if compression.compress is not None:
        packed = compression.compress(body)
        body = pack("<II", len(packed), len(body)) + packed
    out.write(_head(id_, len(body), compression) + body)
    return at


def _head(id_: Option, size: int, compression: Compression) -> bytes:
    return pack("<HHIQ", id_, compression.compress is not None, 0, size)


def _systems(formats: Mapping[str, Sequence[bytes]]) -> bytes:
    each = (
        name.encode() + b"\0" + pack("<I", len(texts)) + b"".join(map(_counted, texts))
        for name, texts in formats.items()
    )
    return pack("<I", len(formats)) + b"".join(each)


def _counted(text: bytes) -> bytes:
    return pack("<Q", len(text)) + text


def _pad(out: BinaryIO, page_size: int) -> int:
    out.write(bytes(-out.tell() % page_size))
    return out.tell()
