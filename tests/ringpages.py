"""Ring-buffer pages and event formats made by hand, as a kernel would have written them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from struct import pack
from typing import Final

from kvmfault.trace.datwriter import Described

HEADER_PAGE: Final = b"""\
\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:%d;\tsigned:0;
"""
_COMMON: Final = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""


@dataclass(frozen=True)
class Event:
    """An event whose fields are all u64."""

    system: str
    name: str
    id: int
    fields: tuple[str, ...]

    @property
    def format(self) -> bytes:
        lines = (
            f"\tfield:u64 {name};\toffset:{8 + 8 * n};\tsize:8;\tsigned:0;\n" for n, name in enumerate(self.fields)
        )
        shown = " ".join(f"{name}=%llx" for name in self.fields)
        arguments = "".join(f", REC->{name}" for name in self.fields)
        text = (
            f'name: {self.name}\nID: {self.id}\nformat:\n{_COMMON}{"".join(lines)}\nprint fmt: "{shown}"{arguments}\n'
        )
        return text.encode()

    def __call__(self, pid: int, **values: int) -> bytes:
        return pack("<HBBi", self.id, 0, 0, pid) + b"".join(pack("<Q", values[name]) for name in self.fields)


def pages(records: Iterable[bytes], *, start: int = 1000, size: int = 4096) -> bytes:
    """Whole pages with *records*, one each 10 ns from *start* on."""
    done, data, stamp, now = b"", b"", start, start
    for record in records:
        assert len(record) <= 28 * 4
        if len(data) + 4 + len(record) > size - 16:
            done += _page(stamp, data, size)
            data, stamp = b"", now
        data += pack("<I", (10 if data else 0) << 5 | len(record) // 4) + record
        now += 10
    return done + _page(stamp, data, size)


def _page(stamp: int, data: bytes, size: int) -> bytes:
    return (pack("<QQ", stamp, len(data)) + data).ljust(size, b"\0")


def described(events: Iterable[Event], *, comms: Mapping[int, str] | None = None, page_size: int = 4096) -> Described:
    """What a kernel with these events says of itself."""
    formats: dict[str, list[bytes]] = {}
    for event in events:
        formats.setdefault(event.system, []).append(event.format)
    return Described(
        header_page=HEADER_PAGE % (page_size - 16),
        header_event=b"# compressed entry header\n",
        formats=formats,
        comms=comms or {},
        clock="mono",
        clocks="local [mono]",
        uname="Linux here 6.18.0 x86_64",
        page_size=page_size,
        stats={0: "entries: 0\n"},
    )
