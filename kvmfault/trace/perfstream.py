"""The stream of records in a perf.data, piece by piece, decompressed where perf compressed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from kvmfault.errors import TraceError
from kvmfault.trace.binary import File
from kvmfault.trace.merge import Damage
from kvmfault.trace.perfwalk import AUXTRACE, COMPRESSED, COMPRESSED2, TRACING_DATA, Found, find, walk
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.ring import U32Col

__all__ = ["AT_ONCE", "Chunk", "Stream"]

AT_ONCE: Final = 1 << 22
"""Bytes that are looked at together."""
_SLICE: Final = 256
"""Compressed bytes taken at once: a block of 4 bytes can stand for 128 KiB, so this much never for more than 8 MiB."""


class Chunk(NamedTuple):
    """Whole records: the bytes they stand in, and where they begin."""

    data: bytes
    words: U32Col
    found: Found

    def bytes(self, number: int) -> bytes:
        """One record, its header included."""
        at = int(self.found.at[number])
        return self.data[at : at + int(self.found.size[number])]

    def record(self, number: int) -> tuple[int, ...]:
        """What follows the header of one record, as numbers of 8 bytes; what is left over is no number."""
        body = self.bytes(number)[8:]
        return tuple(memoryview(body[: len(body) // 8 * 8]).cast("Q"))


class Stream:
    """The bytes [at, end) of *file*. What is damaged is noted; nothing is read after it."""

    def __init__(self, file: File, at: int, end: int, stats: ReadStats, damage: Damage) -> None:
        self._file = file
        self._at = at
        self._end = end
        self._stats = stats
        self._damage = damage
        self._inflate: Callable[[bytes], bytes] | None = None
        self._inner = b""

    def chunks(self) -> Iterator[Chunk]:
        """All records, in the order of the file."""
        at, rest = self._at, b""
        try:
            while at < self._end:
                piece = self._file.upto(at, min(AT_ONCE, self._end - at))
                at += len(piece)
                self._stats.bytes += len(piece)
                data = rest + piece
                start = at - len(data)
                chunk = _chunk(data)
                yield from self._plain(chunk, start)
                self._check(chunk.found.wrong, start + chunk.found.end)
                skip = _behind(chunk)
                if skip is None:
                    rest = data[chunk.found.end :]
                else:
                    at, rest = start + chunk.found.end + skip, b""
                if not piece:
                    break
            if rest or self._inner:
                raise self._file.wrong("the file ends inside a record", self._end - len(rest))
            if at > self._file.size:
                raise self._file.wrong("the file ends here, inside data that it says it has", self._file.size)
        except TraceError as e:
            self._damage.add(e)

    def _plain(self, chunk: Chunk, start: int) -> Iterator[Chunk]:
        found = chunk.found
        packed = (found.type == COMPRESSED) | (found.type == COMPRESSED2)
        if not packed.any() and not (found.at & 7).any():
            yield chunk
            return
        whole: list[bytes] = []
        held = 0
        try:
            for number, is_packed in enumerate(packed.tolist()):
                offset = start + int(found.at[number])
                pieces = self._unpacked(_payload(chunk, number), offset) if is_packed else [chunk.bytes(number)]
                for piece in pieces:
                    whole.append(piece if is_packed else _padded(piece))
                    held += len(piece)
                    if held > AT_ONCE:
                        yield _chunk(b"".join(whole))
                        whole.clear()
                        held = 0
        except TraceError:
            yield _chunk(b"".join(whole))  # what was read before the damage
            raise
        yield _chunk(b"".join(whole))

    def _check(self, wrong: str | None, offset: int) -> None:
        if wrong is not None:
            raise self._file.wrong(wrong, offset)

    def _unpacked(self, packed: bytes, offset: int) -> Iterator[bytes]:
        # whole records; the beginning of another waits for what follows
        pieces, size = [self._inner], len(self._inner)
        for at in range(0, len(packed), _SLICE):
            pieces.append(self._decompress(packed[at : at + _SLICE], offset))
            size += len(pieces[-1])
            if size > AT_ONCE or at + _SLICE >= len(packed):
                data = b"".join(pieces)
                _, end, wrong = find(data)
                yield data[:end]
                self._check(wrong, offset)
                pieces, size = [data[end:]], len(data) - end
        self._inner = b"".join(pieces)

    def _decompress(self, packed: bytes, offset: int) -> bytes:
        import zstandard

        if self._inflate is None:
            # one stream over all records, flushed at the end of each
            self._inflate = (
                zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(read_across_frames=True).decompress
            )
        try:
            return self._inflate(packed)
        except zstandard.ZstdError as e:
            raise self._file.wrong(f"compressed records cannot be decompressed: {e}", offset) from None


def _chunk(data: bytes) -> Chunk:
    return Chunk(data, np.frombuffer(data, "<u4", len(data) // 4), walk(data))


def _padded(record: bytes) -> bytes:
    # as long as it has to be for the next one to lie where records do
    size = len(record) + -len(record) % 8
    return record[:6] + size.to_bytes(2, "little") + record[8:].ljust(size - 8, b"\0")


def _payload(chunk: Chunk, number: int) -> bytes:
    data = chunk.bytes(number)
    if chunk.found.type[number] == COMPRESSED:
        return data[8:]
    size = int.from_bytes(data[8:16], "little")
    return data[16 : 16 + min(size, len(data))]


def _behind(chunk: Chunk) -> int | None:
    # bytes of data, which are no record, behind the last one
    if not len(chunk.found.type):
        return None
    kind, last = int(chunk.found.type[-1]), chunk.bytes(-1)
    if kind == TRACING_DATA:
        return -(-int.from_bytes(last[8:12], "little") // 8) * 8
    return int.from_bytes(last[8:16], "little") if kind == AUXTRACE else None
