"""Addresses and numbers of the model, each a type of its own.

All are plain ``int`` at run time. Addresses count bytes; frame numbers count pages *of the
host* (4K, 16K or 64K, the kernel's ``gpa >> PAGE_SHIFT``), whatever granule a table uses.
"""

from __future__ import annotations

from typing import Annotated, Final, NewType, TypeAlias

__all__ = ["EHWPOISON", "U64", "AddressBits", "Errno", "Gfn", "Gpa", "Gva", "Hpa", "Hva", "Pfn", "Size", "WalkLevel"]

Gpa = NewType("Gpa", int)
"""Guest-physical address, bytes. arm64 calls it IPA."""
Gva = NewType("Gva", int)
"""Guest-virtual address, bytes."""
Hva = NewType("Hva", int)
"""Address in the user space that runs the VM, bytes."""
Hpa = NewType("Hpa", int)
"""Host-physical address, bytes."""
Gfn = NewType("Gfn", int)
"""Guest frame number: a Gpa in units of the host's pages."""
Pfn = NewType("Pfn", int)
"""Host frame number (the kernel's kvm_pfn_t without its error encodings)."""

Errno: TypeAlias = Annotated[int, "errno"]
"""A positive error number, spelled by its name."""
Size: TypeAlias = Annotated[int, "bytes"]
"""A power of two of bytes, at least 4K, spelled as 2M."""
AddressBits: TypeAlias = Annotated[int, range(16, 65)]
"""Width of addresses: no less than a page of 64K, no more than a register. (Settings accept what the range has.)"""
WalkLevel: TypeAlias = Annotated[int, range(-2, 4)]
"""Level of a walk of the guest's first stage; those above level 0 are for addresses of more than 48 bits."""

EHWPOISON: Final = 133
"""Linux's number; Python's errno has no name for it."""
U64: Final = (1 << 64) - 1
"""All ones in 64 bits: the width of every register word of the model."""
