"""Files as ``perf record`` writes them, made up: the tracepoint kvm_entry of two events, in rounds."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import zstandard

RAW_TYPE: Final = 0x107C7  # IDENTIFIER IP TID TIME ID CPU PERIOD STREAM_ID RAW
CHAIN_TYPE: Final = RAW_TYPE | 0x20
READ_TYPE: Final = RAW_TYPE | 0x10
SAMPLE_ID_ALL: Final = 1 << 18
FORMAT: Final = b"""name: kvm_entry
ID: 77
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned int vcpu_id;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned long rip;\toffset:16;\tsize:8;\tsigned:0;

print fmt: "vcpu %u, rip 0x%lx", REC->vcpu_id, REC->rip
"""
PAGE: Final = (
    b"\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
    b"\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
    b"\tfield: char data;\toffset:16;\tsize:4080;\tsigned:1;\n"
)


class Event(NamedTuple):
    """One entry of a guest."""

    time: int
    cpu: int
    pid: int
    rip: int
    id: int = 11


def attr(sample_type: int = RAW_TYPE, kind: int = 2, config: int = 77, read_format: int = 0) -> bytes:
    head = struct.pack("<IIQQQQQ", kind, 128, config, 1, sample_type, read_format, SAMPLE_ID_ALL)
    return head.ljust(128, b"\0")


def record(kind: int, body: bytes, misc: int = 0) -> bytes:
    return struct.pack("<IHH", kind, misc, 8 + len(body)) + body


def sample(event: Event, sample_type: int = RAW_TYPE, chain: Sequence[int] = (), read: bytes = b"") -> bytes:
    raw = struct.pack("<HBBiI4xQ", 77, 0, 0, event.pid, 3, event.rip)
    body = struct.pack("<QQIIQQQIIQ", event.id, 0xFFFF, event.pid, event.pid, event.time, event.id, 1, event.cpu, 0, 1)
    if sample_type & 0x10:
        body += read
    if sample_type & 0x20:
        body += struct.pack(f"<Q{len(chain)}Q", len(chain), *chain)
    if sample_type & 0x400:
        body += struct.pack("<I", len(raw) + 4) + raw + bytes(4)
    return record(9, body)


def lost(event: Event, count: int) -> bytes:
    behind = struct.pack("<IIQQQIIQ", event.pid, event.pid, event.time, event.id, 1, event.cpu, 0, event.id)
    return record(2, struct.pack("<QQ", event.id, count) + behind)


def comm(pid: int, name: str) -> bytes:
    text = name.encode() + b"\0"
    return record(3, struct.pack("<II", pid, pid) + text.ljust(-(-len(text) // 8) * 8, b"\0"))


ROUND: Final = record(68, b"")


def packed(records: bytes, *, kind: int = 81, each: int = 1000, level: int = 3) -> bytes:
    """*records* as perf -z writes them: one zstd stream, cut anywhere."""
    stream = zstandard.ZstdCompressor(level=level).compressobj()
    out = b""
    for at in range(0, len(records), each):
        data = stream.compress(records[at : at + each]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        if kind == 81:
            out += record(81, data)
        else:
            body = struct.pack("<Q", len(data)) + data
            out += record(83, body + bytes(-len(body) % 8))
    return out


def tracing() -> bytes:
    header = b"\x17\x08\x44tracing0.6\0\0\x08" + struct.pack("<I", 4096)
    header += b"header_page\0" + struct.pack("<Q", len(PAGE)) + PAGE + b"header_event\0" + struct.pack("<Q", 0)
    events = struct.pack("<I", 0) + struct.pack("<I", 1) + b"kvm\0" + struct.pack("<IQ", 1, len(FORMAT)) + FORMAT
    return header + events + struct.pack("<IIQ", 0, 0, 0)


def in_file(data: bytes, attrs: Iterable[tuple[bytes, Sequence[int]]] = ((attr(), (11,)),)) -> bytes:
    """A file around the records *data*."""
    known = list(attrs)
    at = 104
    ids, entries = b"", b""
    for made, numbers in known:
        entries += made + struct.pack("<QQ", at + len(ids), 8 * len(numbers))
        ids += struct.pack(f"<{len(numbers)}Q", *numbers)
    attrs_at = at + len(ids)
    data_at = attrs_at + len(entries)
    features = struct.pack("<4Q", 1 << 1 | 1 << 4 | 1 << 6, 0, 0, 0)
    head = b"PERFILE2" + struct.pack("<8Q", 104, 144, attrs_at, len(entries), data_at, len(data), 0, 0) + features
    told = [tracing(), struct.pack("<I", 8) + b"6.12.0\0\0", struct.pack("<I", 8) + b"x86_64\0\0"]
    table, sections = b"", b""
    first = data_at + len(data) + 16 * len(told)
    for section in told:
        table += struct.pack("<QQ", first + len(sections), len(section))
        sections += section
    return head + ids + entries + data + table + sections


def in_pipe(data: bytes, attrs: Iterable[tuple[bytes, Sequence[int]]] = ((attr(), (11,)),)) -> bytes:
    """A stream around the records *data*."""
    out = b"PERFILE2" + struct.pack("<Q", 16)
    for made, numbers in attrs:
        out += record(64, made + struct.pack(f"<{len(numbers)}Q", *numbers))
    out += record(80, struct.pack("<QI", 6, 7) + b"x86_64\0")  # as long as it likes
    told = tracing()
    told += bytes(-len(told) % 8)
    return out + record(66, struct.pack("<I", len(told))) + told + data
