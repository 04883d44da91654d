"""A user-space address where one belongs."""

from kvmfault.types import Hva


def vma_start(hva: Hva) -> Hva:
    return Hva(hva & ~0x1F_FFFF)


start: Hva = vma_start(Hva(0x7F00_0000_0000))
