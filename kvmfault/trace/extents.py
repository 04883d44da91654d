"""Pieces of a file that hold ring-buffer pages, and their records: what can be done apart, in another process too."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from kvmfault.errors import TraceError, UsageError
from kvmfault.trace.binary import Cursor, File
from kvmfault.trace.frames import Block, Plan, read_pages
from kvmfault.trace.ring import I64Col

__all__ = [
    "LARGEST_CHUNK",
    "Clock",
    "Extent",
    "Inflate",
    "PageRange",
    "Part",
    "Stream",
    "codec",
    "counts_ns",
    "first_pages",
    "pages",
    "read_extent",
]

LARGEST_CHUNK: Final = 1 << 25
"""Bytes that one compressed chunk may become; trace-cmd makes them of 10 pages."""


class Part(NamedTuple):
    """Pages in a file: ``stored`` bytes at ``offset``, which are ``size`` bytes of pages."""

    offset: int
    stored: int
    size: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive pages of one CPU."""

    path: str
    cpu: int
    codec: str
    """How each part is compressed: ``none``, ``zstd`` or ``zlib``."""
    parts: tuple[Part, ...]
    whole: int
    """Bytes of the file, to know it again."""

    @property
    def size(self) -> int:
        """Bytes of its pages."""
        return sum(part.size for part in self.parts)


class Stream(Protocol):
    """What a recording holds of one CPU."""

    @property
    def cpu(self) -> int:
        """Its number."""
        ...

    def extents(self, size: int) -> Iterator[Extent]:
        """All of it in order, each about *size* bytes of pages. Raises TraceError where it cannot go on."""
        ...


_NS: Final = frozenset(("local", "global", "perf", "mono", "mono_raw", "boot", "tai"))


def counts_ns(clock: str | None) -> bool:
    """Whether stamps of the kernel's *clock* are nanoseconds; a clock that is not told is the usual one."""
    return clock is None or clock in _NS


@dataclass(frozen=True, slots=True)
class Clock:
    """How stamps become times: ``(stamp * multiplier >> shift) + offset``."""

    multiplier: int = 0
    """0: stamps are not scaled."""
    shift: int = 0
    offset: int = 0

    def times(self, stamps: I64Col) -> I64Col:
        """The times, ns."""
        if self.multiplier:
            high, low = stamps >> 32, stamps & 0xFFFF_FFFF
            if self.shift <= 32:
                stamps = (high * self.multiplier << 32 - self.shift) + (low * self.multiplier >> self.shift)
            else:
                stamps = (high * self.multiplier + (low * self.multiplier >> 32)) >> self.shift - 32
        return stamps + self.offset if self.offset else stamps


def read_extent(extent: Extent, plan: Plan, clock: Clock) -> Block:
    """The records of *extent*; damage says where in the file. A function of its arguments alone."""
    damage: list[tuple[int, str]] = []
    block = read_pages(pages(extent, plan.layout.page, damage), extent.cpu, plan)
    block.time = clock.times(block.time)
    block.damage = damage + [_in_file(where, what, extent, plan.layout.page) for where, what in block.damage]
    return block


def pages(extent: Extent, page: int, damage: list[tuple[int, str]] | None = None) -> bytes:
    """The pages of *extent*, decompressed; what is wrong, and at which byte of the file, is added to *damage*."""
    damage = [] if damage is None else damage
    file = File(extent.path)
    inflate = codec(extent.codec)
    pieces = []
    for part in extent.parts:
        stored = file.upto(part.offset, part.stored)
        if len(stored) < part.stored:
            damage.append((part.offset + len(stored), "the file ends early"))
        if inflate is not None:
            stored, wrong = inflate(stored, part.size)
            if wrong:
                damage.append((part.offset, wrong))
        pieces.append(stored)
        if cut := -len(stored) % page:  # what is missing must not move the pages after it
            pieces.append(bytes(cut))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _in_file(where: int, what: str, extent: Extent, page: int) -> tuple[int, str]:
    for part in extent.parts:
        size = part.size + -part.size % page
        if where < size:
            inside = f"{what} (at {where:#x} of the decompressed chunk)"
            return (part.offset + where, what) if extent.codec == "none" else (part.offset, inside)
        where -= size
    return extent.parts[-1].offset, what


@dataclass(frozen=True, slots=True)
class PageRange:
    """The pages of one CPU in a file: ``size`` bytes from ``at``, as they are stored."""

    file: File
    cpu: int
    codec: str
    at: int
    size: int
    page: int

    def extents(self, size: int) -> Iterator[Extent]:
        """See `Stream.extents`."""
        if not self.size:
            return
        parts: list[Part] = []
        total = 0
        wrong = None
        try:
            for part in self._plain(size) if self.codec == "none" else self._chunks():
                parts.append(part)
                total += part.size
                if total >= size:
                    yield Extent(self.file.path, self.cpu, self.codec, tuple(parts), self.file.size)
                    parts, total = [], 0
        except TraceError as e:
            wrong = e
        if parts:
            yield Extent(self.file.path, self.cpu, self.codec, tuple(parts), self.file.size)
        if wrong is not None:
            raise wrong

    def ends(self) -> int:
        """Where the last whole chunk of compressed pages ends."""
        end = self.at
        try:
            for part in self._chunks():
                end = part.offset + part.stored
        except TraceError:
            return self.file.size
        return end

    def _plain(self, size: int) -> Iterator[Part]:
        step = max(size // self.page, 1) * self.page
        end = min(self.at + self.size, self.file.size)
        for at in range(self.at, end, step):
            yield Part(at, min(step, end - at), min(step, end - at))
        if end < self.at + self.size:
            raise self.file.wrong(f"the file ends here, CPU {self.cpu} should go on to {self.at + self.size:#x}", end)

    def _chunks(self) -> Iterator[Part]:
        head = Cursor(self.file, self.at, self.file.size)
        for _ in range(head.u32()):
            at = head.at
            if at - self.at > self.size:
                raise self.file.wrong(f"more chunks than CPU {self.cpu} has bytes", at)
            stored, full = head.u32(), head.u32()
            if full > LARGEST_CHUNK or stored > LARGEST_CHUNK:
                raise self.file.wrong(f"a chunk of {stored} bytes, {full} decompressed, cannot be right", at)
            yield Part(head.at, stored, full)
            head.skip(stored)


def first_pages(file: File, at: int, page: int, most: int) -> list[int]:
    """Where the pages of each CPU begin in *file*, and where those of the last end, if pages of *page* bytes follow
    each other from *at*: there time goes back, as each CPU began with the recording. *most* CPUs have pages."""
    starts: list[int] = []
    before = -1
    for offset in range(at, file.size, step := page << 6):
        data = file.upto(offset, step)
        for start in range(0, len(data) - 7, page):
            stamp = int.from_bytes(data[start : start + 8], "little")
            if not starts or stamp < before:
                starts.append(offset + start)
                if len(starts) > most:
                    return starts
            before = stamp
    return [*starts, file.size]


Inflate = Callable[[bytes, int], tuple[bytes, str | None]]
"""From stored bytes and the size they should become: the bytes, and what was wrong."""


def codec(name: str) -> Inflate | None:
    """How to decompress; None: nothing to do. Raises UsageError for a method that is not known, or not installed."""
    if name == "none":
        return None
    if name == "zlib":
        return _zlib
    if name != "zstd":
        raise UsageError(f"compressed with {name!r}; expected none, zlib or zstd")
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=1 << 27)

    def zstd(stored: bytes, size: int) -> tuple[bytes, str | None]:
        try:
            if zstandard.frame_content_size(stored) > size:
                return b"", "zstd: the chunk is larger than it says"
            data = context.decompress(stored, max_output_size=size)
        except zstandard.ZstdError as e:
            return b"", f"zstd: {e}"
        return data, _length(data, size)

    return zstd


def _zlib(stored: bytes, size: int) -> tuple[bytes, str | None]:
    inflate = zlib.decompressobj()
    try:
        data = inflate.decompress(stored, size)
    except zlib.error as e:
        return b"", f"zlib: {e}"
    return data, _length(data, size)


def _length(data: bytes, size: int) -> str | None:
    return None if len(data) == size else f"a chunk of {len(data)} bytes, not {size} as it says"
