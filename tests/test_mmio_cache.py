"""What a vCPU remembers of MMIO."""

from __future__ import annotations

import pytest

from kvmfault.types import Gfn
from kvmfault.vm.mmio_cache import MmioCache

KNOWN = MmioCache().noted(Gfn(0x1234), 0x7FFF_1234_5678, 4, 12)


@pytest.mark.parametrize(
    ("cache", "address", "generation", "where", "hit"),
    [
        (KNOWN, 0x123_4FFF, 4, "direct", True),
        (KNOWN, 0x123_5000, 4, "direct", False),
        (KNOWN, 0x123_4000, 6, "direct", False),  # slots changed since
        (KNOWN, 0x123_4000, 4, "shadow", False),
        (KNOWN, 0x7FFF_1234_5000, 4, "shadow", True),
        (KNOWN, 0x7FFF_1234_6000, 4, "shadow", False),
        (KNOWN, 0x7FFF_1234_5000, 4, "direct", False),
        (KNOWN, 0x123_4000, 4, "nested", False),
        (KNOWN, 0x7FFF_1234_5000, 4, "nested", False),
        (MmioCache().noted(Gfn(0), 0, 4, 12), 0, 4, "direct", False),  # frame 0 never hits
        (MmioCache().noted(Gfn(0), 0, 4, 12), 0, 4, "shadow", False),
        (MmioCache().noted(Gfn(5), None, 4, 12), 0, 4, "shadow", False),
        (MmioCache().noted(Gfn(5), None, 4, 12), 0x5000, 4, "direct", True),
        (MmioCache(), 0, 0, "direct", False),
    ],
)
def test_hits(cache: MmioCache, address: int, generation: int, where: str, hit: bool) -> None:
    assert cache.hits(address, generation, 12, direct=where != "shadow", nested=where == "nested") is hit


def test_nothing_is_noted_while_slots_change() -> None:
    assert KNOWN.noted(Gfn(7), None, 1 << 63 | 5, 12) is KNOWN
    assert KNOWN.noted(Gfn(7), None, 6, 12) == MmioCache(Gfn(7), 0, 6)
    assert hash(KNOWN) == hash(MmioCache(Gfn(0x1234), 0x7FFF_1234_5000, 4))
