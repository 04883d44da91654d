"""Saved: how the fault registers of a vCPU are found in a kernel's memory, live or dumped. Declared by backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

__all__ = ["Saved", "VcpuMemory"]


class VcpuMemory(Protocol):
    """The ``struct kvm_vcpu`` of one vCPU, read by the names of its members."""

    def number(self, path: str, within: str = "") -> int | None:
        """The number at *path*, members joined by dots; pointers are followed. None: this kernel has no such member, or
        its memory cannot be read.

        *within*: from the structure of that name on, in which the vCPU is the member ``vcpu`` (``to_svm``).
        """
        ...


Saved: TypeAlias = Callable[[VcpuMemory], Mapping[str, int] | None]
"""Registers of the vCPU's last exit, as KVM keeps them; None: it was no fault of this kind, or nothing is kept."""
