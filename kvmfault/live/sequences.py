"""Sequences to compare a KVM with the model by: how their operations are written, and the standing list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final, TypeAlias

from kvmfault.contract.live import GuestAccess, Touch
from kvmfault.live.script import (
    POOL,
    Access,
    ClearDirtyLog,
    CreateMemfd,
    DirtyRing,
    GetDirtyLog,
    HarvestRing,
    Host,
    HostAction,
    ManualProtect,
    Operation,
    Prefault,
    ResetRings,
    SetAttributes,
    SetRegion,
)
from kvmfault.types import Gpa, Hva
from kvmfault.vm.memslot import MemslotFlag
from kvmfault.vm.memslot_request import MemslotRequest, Via

__all__ = ["STANDING", "Sequence", "access", "exchange", "fetch", "read", "region", "write"]

Sequence: TypeAlias = tuple[Operation, ...]

_K: Final = 1 << 10
_PAGE: Final = 4 * _K
_LOG, _READONLY, _MEMFD = MemslotFlag.LOG_DIRTY, MemslotFlag.READONLY, MemslotFlag.GUEST_MEMFD
_RAM, _LOGGED, _ROM, _HOLE = 0, 0x40000, 0x60000, 0x80000
"""Where the sequences have memory, logged memory, a read-only slot and nothing."""


def region(slot: int, gpa: int, size: int, offset: int, flags: int = 0, via: Via = Via.REGION1) -> SetRegion:
    """A request whose memory is *offset* bytes into the pool, by the ioctl that every kernel has."""
    return SetRegion(MemslotRequest(slot=slot, flags=flags, gpa=Gpa(gpa), size=size, hva=Hva(POOL + offset), via=via))


def access(touch: Touch, gpa: int, size: int = 1, value: int = 0x44332211) -> Access:
    """An access; of *value* it uses as much as it stores."""
    stored = value & ((1 << 8 * size) - 1) if touch in (Touch.WRITE, Touch.EXCHANGE) else 0
    return Access(GuestAccess(Gpa(gpa), size, touch, stored))


_Touching: TypeAlias = "partial[Access]"
read: _Touching = partial(access, Touch.READ)
write: _Touching = partial(access, Touch.WRITE)
exchange: _Touching = partial(access, Touch.EXCHANGE)
fetch: _Touching = partial(access, Touch.FETCH)

_MEMORY: Final[Sequence] = (
    region(0, _RAM, 256 * _K, 0),
    region(1, _LOGGED, 128 * _PAGE // 4, 1 << 20, _LOG),
    region(2, _ROM, 16 * _K, 2 << 20, _READONLY),
)


def _pages(operation: str, offset: int, pages: int = 1) -> Host:
    return Host(HostAction[operation], POOL + offset, pages * _PAGE)


def _bound(slot: int, gpa: int, size: int, fd: int, offset: int, flags: int = 0) -> SetRegion:
    # a slot whose private memory comes from a file
    request = region(slot, gpa, size, 0, flags | _MEMFD, Via.REGION2).request
    return SetRegion(replace(request, memfd=fd, memfd_offset=offset))


def _manual(flags: int) -> Sequence:
    return (
        ManualProtect(flags),
        region(0, _RAM, 128 * _PAGE, 0, _LOG),
        region(1, 0x200000, 70 * _PAGE, 1 << 20, _LOG),
        GetDirtyLog(0),
        write(0x10000),
        write(0x11000),
        read(0x12000),
        write(0x64000),
        GetDirtyLog(0),
        GetDirtyLog(0),
        ClearDirtyLog(0, 0, 64, 1 << 16),
        GetDirtyLog(0),
        write(0x10000),
        write(0x11000),
        GetDirtyLog(0),
        *(ClearDirtyLog(0, first, count, 0) for first, count in _CLEARS),
        *(ClearDirtyLog(1, first, count, 0) for first, count in ((64, 6), (64, 7), (64, 5), (0, 70), (64, 64))),
        ClearDirtyLog(7, 0, 64, 0),
        ClearDirtyLog(0, 64, 64, (1 << 64) - 1),
        GetDirtyLog(0),
        region(0, _RAM, 128 * _PAGE, 0),
        GetDirtyLog(0),
        region(0, _RAM, 128 * _PAGE, 0, _LOG),
        GetDirtyLog(0),
        write(0x64000),
        read(0x65000),
        GetDirtyLog(0),
    )


_CLEARS: Final = ((1, 64), (32, 64), (64, 63), (64, 64), (64, 1), (0, 32), (128, 64), (64, 128), (0, 129), (0, 0))

STANDING: Final[Mapping[str, Sequence]] = {
    "slots: create, change, refuse": (
        *_MEMORY,
        region(0, _RAM, 256 * _K, 0),
        region(0, _RAM, 128 * _K, 0),
        region(0, _RAM, 256 * _K, 0, _READONLY),
        region(0, _RAM, 256 * _K, 0, _LOG),
        region(0, _RAM, 256 * _K, 0x1000),
        region(3, 0x3F000, 8 * _K, 3 << 20),
        region(3, 0x100001, 4 * _K, 3 << 20),
        region(3, 0x100000, 4 * _K + 1, 3 << 20),
        region(3, 0x100000, 4 * _K, (3 << 20) + 1),
        region(3, 0x100000, 4 * _K, 3 << 20, 1 << 3),
        region(3, 0x100000, 4 * _K, 3 << 20, _MEMFD),
        region(3, 0x100000, 4 * _K, 3 << 20, _MEMFD, Via.REGION2),
        region(3, 0x100000, 4 * _K, 3 << 20, _LOG, Via.REGION2),
        region(3, 0x100000, 0, 3 << 20, via=Via.REGION2),
        region(3, 0x100000, 0, 3 << 20),
        region(0x10000, 0x100000, 4 * _K, 3 << 20),
        region(0x20000, 0x100000, 4 * _K, 3 << 20),
        region(0x7FFF, 0x100000, 4 * _K, 3 << 20),
        region(0xFFFF, 0x100000, 4 * _K, 3 << 20),
        region(3, (1 << 64) - 0x1000, 4 * _K, 3 << 20),
        region(3, (1 << 64) - 0x1000, 8 * _K, 3 << 20),
        region(3, 1 << 52, 4 * _K, 3 << 20),
        region(3, 0x100000, 4 * _K, (1 << 47) - POOL),
        region(3, 0x100000, 4 * _K, (1 << 63) - POOL),
    ),
    "slots: delete, create anew, move": (
        *_MEMORY,
        region(3, 0x100000, 8 * _K, 3 << 20),
        read(0x100000, 2),
        region(3, 0x100000, 0, 3 << 20),
        read(0x100000, 2),
        region(3, 0x100000, 8 * _K, 4 << 20),
        read(0x100000, 2),
        write(0x101FFF, 2),
        region(3, 0x110000, 8 * _K, 4 << 20),
        read(0x100000, 2),
        write(0x110000, 2),
    ),
    "exits: where no slot is": (
        *_MEMORY,
        *(touch(_HOLE + 0x10, size) for touch in (read, write, exchange) for size in (1, 2, 4)),
        read(_HOLE + 0x11, 2),
        read(_HOLE + 0xFFF, 2),
        write(_HOLE + 0xFFE, 4),
        exchange(_HOLE + 0xFFD, 4),
        read(0x5FFFE, 4),
        write(_HOLE - 1, 2),
        read(0x63FFF, 2),
        write(0x63FFE, 4),
        fetch(_HOLE),
        read(_HOLE),
    ),
    "exits: memory and read-only slots": (
        *_MEMORY,
        *(touch(gpa, size) for gpa in (0x1000, _LOGGED) for touch in (read, write, exchange) for size in (1, 2, 4)),
        write(_LOGGED - 1, 2),
        fetch(0x5000),
        *(touch(_ROM + 4, size) for touch in (read, write, exchange) for size in (1, 2, 4)),
        write(_ROM + 0xFFF, 2),
        fetch(_ROM),
    ),
    "exits: host memory unmapped or protected": (
        *_MEMORY,
        write(0x10000, 2),
        _pages("UNMAP", 0x10000),
        read(0x10000, 2),
        write(0x10000, 2),
        _pages("MAP", 0x10000),
        read(0x10000, 2),
        _pages("READ_ONLY", 0x10000, 2),
        read(0x10000, 2),
        write(0x10000, 2),
        exchange(0x11000, 2),
        _pages("NO_ACCESS", 0x10000),
        read(0x10000, 2),
        _pages("WRITABLE", 0x10000, 2),
        write(0x10000, 2),
        write(0x11000, 2),
        _pages("UNMAP", 0x12000),
        _pages("WRITABLE", 0x12000),
        read(0x12000, 2),
    ),
    "dirty log: bitmap": (
        *_MEMORY,
        GetDirtyLog(1),
        write(_LOGGED + 0x10000),
        write(_LOGGED + 0x12000),
        write(_LOGGED + 0x13FFF, 2),
        GetDirtyLog(1),
        GetDirtyLog(1),
        write(_LOGGED + 0x10000),
        read(_LOGGED + 0x14000),
        fetch(_LOGGED + 0x15000),
        exchange(_LOGGED + 0x16000, 4),
        _pages("STORE", (1 << 20) + 0x1E000),
        GetDirtyLog(1),
        write(_LOGGED + 0x14000),
        write(_LOGGED + 0x15000),
        GetDirtyLog(1),
        region(1, _LOGGED, 128 * _K, 1 << 20),
        write(_LOGGED + 0x16000),
        GetDirtyLog(1),
        region(1, _LOGGED, 128 * _K, 1 << 20, _LOG),
        GetDirtyLog(1),
        write(_LOGGED + 0x16000),
        region(1, _LOGGED, 128 * _K, 1 << 20, _LOG),
        GetDirtyLog(1),
        write(_LOGGED + 0x17000),
        GetDirtyLog(1, bad_pointer=True),
        GetDirtyLog(1),
        *(GetDirtyLog(slot) for slot in (0, 5, 0x7FFB, 0x7FFC, 0x7FFF, 0xFFFF, 0x20000, 0xFFFFFFFF)),
    ),
    "dirty log: memory that is not present": (
        *_MEMORY,
        write(_LOGGED + 0x2000),
        _pages("DISCARD", 1 << 20, 8),
        GetDirtyLog(1),
        read(_LOGGED),
        write(_LOGGED + 0x1000),
        read(_LOGGED + 0x2000),
        exchange(_LOGGED + 0x3000),
        GetDirtyLog(1),
        write(_LOGGED),
        read(_LOGGED + 0x1000),
        GetDirtyLog(1),
        _pages("STORE", (1 << 20) + 0x4000),
        read(_LOGGED + 0x4000),
        write(_LOGGED + 0x5FFE, 4),
        GetDirtyLog(1),
    ),
    "dirty log: moves, read-only slots, clear": (
        *_MEMORY,
        region(3, 0x90000, 16 * _K, 3 << 20, _LOG),
        write(0x90000),
        write(0x92000),
        region(3, 0xA0000, 16 * _K, 3 << 20, _LOG),
        GetDirtyLog(3),
        write(0xA1000),
        GetDirtyLog(3),
        region(4, 0xB0000, 16 * _K, 4 << 20, _LOG | _READONLY),
        read(0xB1000),
        write(0xB0000, 2),
        GetDirtyLog(4),
        write(_LOGGED + 0x10000),
        write(_LOGGED + 0x11000),
        ClearDirtyLog(1, 0, 32, 1 << 16),
        GetDirtyLog(1),
        ClearDirtyLog(1, 0, 64, 1 << 16),
        _pages("UNMAP", (1 << 20) + 0x12000),
        write(_LOGGED + 0x12000),
        GetDirtyLog(1),
    ),
    "dirty log: manual protect": _manual(1),
    "dirty log: manual protect, all set at first": _manual(3),
    "dirty log: manual protect, flags refused": (
        ManualProtect(2),
        ManualProtect(4),
        ManualProtect(1),
        ManualProtect(0),
        region(0, _RAM, 64 * _K, 0, _LOG),
        write(0x1000),
        GetDirtyLog(0),
        GetDirtyLog(0),
    ),
    "dirty ring": (
        DirtyRing(3000),
        DirtyRing(2048),
        DirtyRing(1 << 25),
        DirtyRing(1 << 16),
        DirtyRing(1 << 16),
        region(0, _RAM, 256 * _K, 0, _LOG),
        write(0x10000),
        write(0x12000),
        write(0x13FFF, 2),
        read(0x20000),
        HarvestRing(),
        write(0x10000),
        ResetRings(),
        write(0x10000),
        HarvestRing(),
        HarvestRing(),
        ResetRings(),
        write(0x10000),
        _pages("WRITABLE", 0x10000),
        write(0x10000),
        _pages("READ_ONLY", 0x10000),
        _pages("WRITABLE", 0x10000),
        write(0x10000),
        HarvestRing(),
        GetDirtyLog(0),
        ClearDirtyLog(0, 0, 64, 1),
    ),
    "dirty ring: full": (
        DirtyRing(1 << 14),
        region(0, 0, 500 * _PAGE, 0, _LOG),
        region(1, 0x400000, 500 * _PAGE, 2 << 20, _LOG),
        *(write(gpa + page * _PAGE) for gpa in (0, 0x400000) for page in range(490)),
        read(0x80000000),
        HarvestRing(),
        write(0),
        ResetRings(),
        write(0),
        HarvestRing(),
        ResetRings(),
    ),
    "dirty ring: full by an emulated store": (
        DirtyRing(1 << 14),
        region(0, 0, 500 * _PAGE, 0, _LOG),
        region(1, 0x400000, 500 * _PAGE, 2 << 20, _LOG),
        *(write(gpa + page * _PAGE) for gpa in (0, 0x400000) for page in range(10, 489)),
        write(499 * _PAGE),
        write(500 * _PAGE - 2, 4),
        read(0x80000000),
        HarvestRing(),
    ),
    "memory attributes": tuple(
        SetAttributes(gpa, size, attributes, flags)
        for gpa, size, attributes, flags in (
            (0, 0x1000, 8, 0),
            (0, 0x1000, 0, 0),
            (0, 0x1000, 1, 0),
            (1, 0x1000, 0, 0),
            (0, 0, 0, 0),
            (0, 0x1001, 0, 0),
            (0, 0x1000, 0, 1),
            ((1 << 64) - 0x1000, 0x2000, 0, 0),
        )
    ),
    "guest_memfd: files": tuple(
        CreateMemfd(fd, size, flags)
        for fd, (size, flags) in enumerate(
            (
                *((0x1000, flags) for flags in range(6)),
                (0, 0),
                (0x1001, 0),
                (1 << 63, 0),
                ((1 << 64) - 0x1000, 0),
            ),
            100,
        )
    ),
    "guest_memfd: slots": (
        CreateMemfd(100, 64 * _K),
        _bound(0, 0, 16 * _K, 100, 0),
        read(0x1000),
        write(0x1FFE, 4),
        _bound(1, 0x100000, 16 * _K, 100, 16 * _K),
        _bound(2, 0x200000, 16 * _K, 100, 48 * _K + 0x800),
        _bound(2, 0x200000, 16 * _K, 100, 56 * _K),
        _bound(2, 0x200000, 16 * _K, 100, 64 * _K),
        _bound(2, 0x200000, 16 * _K, 100, (1 << 64) - 4 * _K),
        _bound(2, 0x200000, 16 * _K, 100, 32 * _K, _LOG),
        _bound(2, 0x200000, 16 * _K, 100, 32 * _K, _READONLY),
        _bound(2, 0x200000, 16 * _K, 101, 0),
        _bound(0, 0x300000, 16 * _K, 100, 0),
        _bound(0, 0, 16 * _K, 100, 0),
        region(0, 0, 16 * _K, 0, _LOG),
        region(0, 0, 0, 0),
        read(0x1000),
        _bound(0, 0x300000, 16 * _K, 100, 0),
        write(0x300000),
    ),
    "pre-fault": (
        *_MEMORY,
        *(
            Prefault(gpa, size, flags)
            for gpa, size, flags in (
                (0, 0x1000, 0),
                (0, 0x60000, 0),
                (0x5F000, 0x2000, 0),
                (_ROM, 0x4000, 0),
                (_HOLE, 0x1000, 0),
                (1, 0x1000, 0),
                (0, 1, 0),
                (0, 0, 0),
                (0, 0x1000, 1),
                ((1 << 64) - 0x1000, 0x2000, 0),
                (1 << 52, 0x1000, 0),
            )
        ),
        GetDirtyLog(1),
        read(0x1000),
    ),
}
"""By what they are about. Each starts with a VM of its own."""
