"""Membership in a set of numbers as few tests ``x & mask == value``: what columns and C compare with."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

__all__ = ["cubes"]


def cubes(values: AbstractSet[int], width: int) -> list[tuple[int, int]]:
    """(mask, value) pairs, one of which fits each number of *width* bits in *values*, and none fits any other.

    No pair fits what another fits. Not always the fewest; a run that is aligned to its length is always one.

    >>> [(hex(mask), hex(value)) for mask, value in cubes({0xC, 0xD, 0xE, 0xF, 0x2B}, 6)]
    [('0x3c', '0xc'), ('0x3f', '0x2b')]
    """
    if not values:
        return []
    if len(values) == 1 << width:
        return [(0, 0)]
    top = 1 << width - 1
    low, high = {v for v in values if not v & top}, {v ^ top for v in values if v & top}
    if low == high:  # the top bit makes no difference
        return cubes(low, width - 1)
    ends = ((0, low), (top, high))
    return [(top | mask, bit | value) for bit, half in ends for mask, value in cubes(half, width - 1)]
