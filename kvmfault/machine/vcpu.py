"""What one vCPU has of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from kvmfault.errors import ModelError
from kvmfault.machine.async_pf import AsyncPageFaults
from kvmfault.machine.tlb import Tlb
from kvmfault.vm.dirty import RingEntry
from kvmfault.vm.memslot import Memslot, SlotSet
from kvmfault.vm.mmio_cache import MmioCache

__all__ = ["Vcpu"]


class Vcpu:
    """State of one vCPU, as far as faults read or change it. Plain values."""

    __slots__ = ("as_id", "counters", "deferred", "mmio", "registers", "ring", "slot", "slot_set", "tlb")

    def __init__(self) -> None:
        self.as_id: int = 0
        """Address space that it uses."""
        self.registers: tuple[int, ...] = (0,) * 32
        """General registers by number; who reads them knows which one is always zero."""
        self.mmio: MmioCache = MmioCache()
        """The frame last found to be MMIO."""
        self.deferred: AsyncPageFaults = AsyncPageFaults()
        """Pages that are fetched in the background while the guest runs on."""
        self.slot: Memslot | None = None
        self.slot_set: SlotSet | None = None
        self.tlb: Tlb = Tlb()
        self.ring: tuple[RingEntry, ...] = ()
        """Entries of the dirty ring that the kernel may not use again yet, oldest first."""
        self.counters: Counter[str] = Counter()
        """KVM's own statistics of this vCPU: pf_taken, pf_fixed, pf_fast, pf_spurious, pf_emulate."""

    def push(self, entry: RingEntry, entries: int) -> None:
        """Put an entry on the ring; ModelError: it is full, the vCPU ran on beyond the limit. (kvm_dirty_ring_push)"""
        if len(self.ring) >= entries:
            raise ModelError(f"the dirty ring of {entries} entries is full: a vCPU above its soft limit may not run")
        self.ring += (entry,)

    def fork(self) -> Vcpu:
        """An independent copy."""
        new = Vcpu()
        new.as_id, new.registers, new.mmio, new.deferred = self.as_id, self.registers, self.mmio, self.deferred
        new.slot, new.slot_set, new.ring = self.slot, self.slot_set, self.ring
        new.tlb, new.counters = self.tlb.fork(), self.counters.copy()
        return new

    def key(self) -> Hashable:
        """All state, hashable. Statistics and the last slot change no behaviour, so they take no part."""
        return self.as_id, self.registers, self.mmio, self.deferred, self.tlb.key(), self.ring
