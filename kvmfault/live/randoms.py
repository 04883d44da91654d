"""Random sequences: operations on a few small slots and the memory under them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Final

from kvmfault.contract.live import Touch
from kvmfault.live.script import (
    POOL,
    ClearDirtyLog,
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
from kvmfault.live.sequences import Sequence, access, region
from kvmfault.vm.memslot import MemslotFlag

__all__ = ["random_sequence", "random_sequences"]

_PAGE: Final = 4096
_LOG, _READONLY = MemslotFlag.LOG_DIRTY, MemslotFlag.READONLY


def random_sequence(random: Random, fill: int, length: int = 40) -> Sequence:
    """*length* operations on a few small slots; stores repeat the byte *fill*, so that code anywhere stays code."""
    ring = random.random() < 0.2
    manual = 0 if ring else random.choice((0, 0, 1, 3))
    options: Sequence = (DirtyRing(1 << 16),) * ring + (ManualProtect(manual),) * bool(manual)
    slots = (_random_region(random, slot) for slot in range(4))
    return (*options, *slots, *(_random_operation(random, fill, ring) for _ in range(length)))


def _random_operation(random: Random, fill: int, ring: bool) -> Operation:
    kind = random.random()
    if kind < 0.55:
        gpa = random.randrange(0, 72) * _PAGE + random.choice((0, 8, 0x7FE, 0xFFD, 0xFFE, 0xFFF))
        touch = random.choice(tuple(Touch))
        size = 1 if touch is Touch.FETCH else random.choice((1, 2, 4))
        return access(touch, gpa, size, fill * 0x01010101)
    if kind < 0.67:
        return _random_region(random, random.randrange(5))
    if kind < 0.75:
        action = random.choice(_ACTIONS)
        return Host(action, POOL + random.randrange(64) * _PAGE, random.choice((1, 1, 1, 3)) * _PAGE)
    if ring and kind < 0.95:
        return random.choice((HarvestRing(), ResetRings()))
    if kind < 0.9:
        return GetDirtyLog(random.randrange(5), random.random() < 0.05)
    if kind < 0.96:
        first, count = random.choice((0, 0, 0, 64, 1)), random.choice((64, 16, 32, 8, 1))
        return ClearDirtyLog(random.randrange(5), first, count, random.getrandbits(count))
    if kind < 0.98:
        return Prefault(random.randrange(0, 72) * _PAGE, random.choice((0, 1, 2, 16)) * _PAGE)
    return SetAttributes(random.randrange(0, 72) * _PAGE, _PAGE, random.choice((0, 8)))


_ACTIONS: Final = tuple(action for action in HostAction if action is not HostAction.DISCARD)
"""Of those that leave memory full of code."""


def _random_region(random: Random, slot: int) -> SetRegion:
    # slots of 16 pages in five places, mostly apart, over memory that slots may share
    base = random.randrange(5) * 16 + random.choice((0, 0, 0, 0, 1))
    pages = random.choice((16, 16, 16, 16, 8, 0))
    flags = random.choice((_LOG, _LOG, 0, _READONLY, _LOG | _READONLY))
    return region(slot, base * _PAGE, pages * _PAGE, random.choice((0, 16, 32, 48)) * _PAGE, flags)


def random_sequences(seed: int, count: int, fill: int) -> Iterator[tuple[str, Sequence]]:
    """*count* of them with their names; the same for the same *seed* and *fill*."""
    for number in range(count):
        yield f"random {seed}.{number}", random_sequence(Random(f"{seed}.{number}"), fill)
