"""Writes small trace.dat files and ring-buffer pages, with whatever the kernel may put there."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import zstandard

HEADER_PAGE = """\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:{};\tsigned:0;
"""
COMMON = """\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""


def format_text(name: str, number: int, fields: Sequence[str], print_format: str = '""') -> bytes:
    """A format; each field as ``u64 gpa;8;8;0``: declaration, offset, size, signed."""
    lines = "".join("\tfield:{};\toffset:{};\tsize:{};\tsigned:{};\n".format(*text.split(";")) for text in fields)
    return f"name: {name}\nID: {number}\nformat:\n{COMMON}{lines}\nprint fmt: {print_format}\n".encode()


GPA = format_text("fault", 7, ["u64 gpa;8;8;0", "int level;16;4;1"])
NOTE = format_text("note", 9, ["__data_loc char[] text;8;4;0", "u8 raw[3];12;3;0"])
FORMATS = {"kvm": [GPA, NOTE]}


def fault(gpa: int, level: int = 1, pid: int = 42) -> bytes:
    """The data of an event ``fault``."""
    return struct.pack("<HBBiQi", 7, 0, 0, pid, gpa, level)


def note(text: bytes, raw: bytes = b"abc", pid: int = 42) -> bytes:
    """The data of an event ``note``."""
    return struct.pack("<HBBiI3sx", 9, 0, 0, pid, len(text) << 16 | 16, raw) + text


def record(data: bytes, delta: int = 0) -> bytes:
    """A record, short or long as its data are."""
    padded = data + bytes(-len(data) % 4)
    if 0 < len(padded) <= 112 and len(padded) == len(data):
        return struct.pack("<I", len(data) // 4 | delta << 5) + data
    return struct.pack("<II", delta << 5, len(data) + 4) + padded


def extend(time: int) -> bytes:
    """A time extend."""
    return struct.pack("<II", 30 | (time & 0x7FFFFFF) << 5, time >> 27)


def stamp(time: int) -> bytes:
    """An absolute stamp."""
    time &= (1 << 59) - 1
    return struct.pack("<II", 31 | (time & 0x7FFFFFF) << 5, time >> 27)


def discarded(size: int, delta: int) -> bytes:
    """A record that was thrown away: *size* bytes after its header."""
    return struct.pack("<II", 29 | delta << 5, size) + bytes(size - 4)


def page(time: int, records: bytes, size: int = 4096, *, missed: int | None = None, stored: bool = False) -> bytes:
    """A page; *missed* events were lost before it, told as a number if *stored*."""
    flags = (1 << 31 if missed is not None else 0) | (1 << 30 if stored else 0)
    body = struct.pack("<QQ", time, len(records) | flags) + records
    if stored:
        body += struct.pack("<Q", missed)
    assert len(body) <= size
    return body + bytes(size - len(body))


CODECS: Mapping[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zlib": zlib.compress,
    "zstd": zstandard.ZstdCompressor().compress,
}


@dataclass
class DatFile:
    """A trace.dat to be."""

    cpus: Mapping[int, Sequence[bytes]]
    """Pages by CPU."""
    version: int = 7
    codec: str = "none"
    packed: bool = False
    """Sections compressed, too."""
    page: int = 4096
    formats: Mapping[str, Sequence[bytes]] = field(default_factory=lambda: FORMATS)
    options: Sequence[tuple[int, bytes]] = ()
    comms: str = "42 vcpu 0\n"
    clock: str = "mono"
    instances: Mapping[str, Mapping[int, Sequence[bytes]]] = field(default_factory=dict)
    pages_a_chunk: int = 2
    early: bool = False
    """As trace-cmd writes it: options before the pages, and those of the buffers at the end."""

    def build(self) -> bytes:
        """The file."""
        start = b"\x17\x08\x44tracing" + f"{self.version}".encode() + b"\0\0\x08" + struct.pack("<I", 4096)
        return self._version7(start) if self.version == 7 else self._version6(start)

    def begin(self) -> bytes:
        """An uncompressed file of version 7 up to its pages, for pages that someone else writes. The 8 bytes at `first`
        must become the offset of what `end` gives."""
        out = b"\x17\x08\x44tracing7\0\0\x08" + struct.pack("<I", 4096) + b"none\0\0" + bytes(8)
        self._begun: list[tuple[int, bytes]] = []
        for number, body in ((16, self._header()), (17, bytes(4)), (18, self._formats()), (21, self._comms())):
            self._begun.append((number, struct.pack("<Q", len(out))))
            out += self._section(number, body)
        return out

    first: ClassVar[int] = 24

    def end(self, ranges: Mapping[int, tuple[int, int]]) -> bytes:
        """The options that say where the pages of each CPU are: offset and size."""
        entries = b"".join(struct.pack("<IQQ", cpu, at, size) for cpu, (at, size) in ranges.items())
        head = bytes(9) + self.clock.encode() + b"\0" + struct.pack("<II", self.page, len(ranges))
        return self._section(0, self._options([*self._begun, (3, head + entries)]) + self._done(0))

    def _header(self) -> bytes:
        text = HEADER_PAGE.format(self.page - 16).encode()
        return b"header_page\0" + struct.pack("<Q", len(text)) + text + b"header_event\0" + bytes(8)

    def _formats(self) -> bytes:
        out = struct.pack("<I", len(self.formats))
        for system, texts in self.formats.items():
            out += system.encode() + b"\0" + struct.pack("<I", len(texts))
            out += b"".join(struct.pack("<Q", len(text)) + text for text in texts)
        return out

    def _comms(self) -> bytes:
        return struct.pack("<Q", len(self.comms)) + self.comms.encode()

    def _section(self, number: int, body: bytes) -> bytes:
        if self.packed:
            small = CODECS[self.codec](body)
            body = struct.pack("<II", len(small), len(body)) + small
        return struct.pack("<HHIQ", number, self.packed, 0, len(body)) + body

    def _data(self, pages: Sequence[bytes]) -> tuple[bytes, int]:
        if self.codec == "none":
            return b"".join(pages), sum(map(len, pages))
        chunks = [b"".join(pages[n : n + self.pages_a_chunk]) for n in range(0, len(pages), self.pages_a_chunk)]
        out = b""
        for chunk in chunks:
            small = CODECS[self.codec](chunk)
            out += struct.pack("<II", len(small), len(chunk)) + small
        return struct.pack("<I", len(chunks)) + out, len(out)

    def _version7(self, out: bytes) -> bytes:
        out += b"none\0\0" if self.codec == "none" else self.codec.encode() + b"\x001.0\0"
        first = len(out)
        out += bytes(8)
        options = list(self.options)
        for number, body in ((16, self._header()), (17, bytes(4)), (18, self._formats()), (21, self._comms())):
            options.append((number, struct.pack("<Q", len(out))))
            out += self._section(number, body)
        early = len(out) if self.early else 0
        link = 0
        if early:  # what they say is known before the pages are
            out += self._section(0, self._options(options) + self._done(0))
            link = len(out) - 8
            out += struct.pack("<HHIQ", 3, 0, 0, 0)
            options = []
        for name, cpus in {"": self.cpus, **self.instances}.items():
            entries = b""
            for cpu, pages in cpus.items():
                out += bytes(-len(out) % (4096 if early else 64))
                data, size = self._data(pages)
                entries += struct.pack("<IQQ", cpu, len(out), size)
                out += data
            head = bytes(8) + name.encode() + b"\0" + self.clock.encode() + b"\0"
            options.append((3, head + struct.pack("<II", self.page, len(cpus)) + entries))
        out = out[:first] + struct.pack("<Q", early or len(out)) + out[first + 8 :]
        if early:
            last = self._section(0, self._options(options) + self._done(0))
            return out[:link] + struct.pack("<Q", len(out)) + out[link + 8 :] + last
        half = len(options) // 2  # two sections of options
        body = self._options(options[:half])
        size = len(body) + 14 + 16
        if self.packed:  # one: where the second would begin is not known before the first is compressed
            return out + self._section(0, self._options(options) + self._done(0))
        return (
            out
            + self._section(0, body + self._done(len(out) + size))
            + self._section(0, self._options(options[half:]) + self._done(0))
        )

    @staticmethod
    def _options(options: Sequence[tuple[int, bytes]]) -> bytes:
        return b"".join(struct.pack("<HI", number, len(data)) + data for number, data in options)

    @staticmethod
    def _done(at: int) -> bytes:
        return struct.pack("<HIQ", 0, 8, at)

    def _version6(self, out: bytes) -> bytes:
        out += self._header() + bytes(4) + self._formats() + bytes(8) + self._comms()
        out += struct.pack("<I", len(self.cpus))
        clocked = any(number == 4 for number, _ in self.options)
        if self.options:
            out += b"options  \0" + self._options(self.options) + bytes(2)
        out += b"flyrecord\0"
        clock = f"[{self.clock}]".encode()
        tail = struct.pack("<Q", len(clock)) + clock if clocked else b""
        at = len(out) + 16 * len(self.cpus) + len(tail)
        entries, data = b"", b""
        for pages in self.cpus.values():
            body = b"".join(pages)
            entries += struct.pack("<QQ", at + len(data), len(body))
            data += body
        return out + entries + tail + data
