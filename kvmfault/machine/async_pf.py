"""Pages that a vCPU does not wait for: faults whose page is fetched in the background (asynchronous page faults)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from kvmfault.contract.fault import MmioFault, prefetched
from kvmfault.types import Gfn

__all__ = ["MOST", "AsyncPageFaults", "Waiting"]

MOST: Final = 64
"""ASYNC_PF_PER_VCPU: pages that one vCPU may have outstanding."""
_COUNTER: Final = 1 << 20


class Waiting(NamedTuple):
    """One page on its way."""

    gfn: Gfn
    fault: MmioFault
    """What is handled when the page is there: the fault as it was, and nobody waits for it any more."""
    token: int
    """What the guest is told, now and when the page is there."""
    shadowed: bool = False
    """The vCPU ran on a table that shadows one of the guest's. (not arch.direct_map)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncPageFaults:
    """The outstanding pages of one vCPU. Immutable and hashable: a change gives a new value."""

    vcpu_id: int = 0
    counter: int = 1
    """Tokens given so far and one: the next token is ``counter << 12 | vcpu_id``. Never 0, as tokens must not be."""
    waiting: tuple[Waiting, ...] = ()
    """Oldest first."""

    @property
    def oldest(self) -> Waiting | None:
        """What has been outstanding for longest."""
        return self.waiting[0] if self.waiting else None

    def find(self, gfn: Gfn) -> Waiting | None:
        """The fetch of *gfn* that runs already: the vCPU halts until something is there. (kvm_find_async_pf_gfn)"""
        return next((w for w in self.waiting if w.gfn == gfn), None)

    def queue(self, gfn: Gfn, fault: MmioFault, *, shadowed: bool = False) -> AsyncPageFaults:
        """Begin to fetch the page of *fault*. Refused where 64 are outstanding; the token is used up all the same.

        The caller has seen to it that the slot is writable: the kernel asks for the host address with write semantics.
        Kernel: kvm_arch_setup_async_pf, alloc_apf_token, kvm_setup_async_pf.
        """
        after = replace(self, counter=(self.counter + 1) % _COUNTER or 1)
        if len(self.waiting) >= MOST:
            return after
        token = self.counter << 12 | self.vcpu_id
        return replace(after, waiting=(*self.waiting, Waiting(gfn, prefetched(fault), token, shadowed)))

    def ready(self, done: Waiting) -> AsyncPageFaults:
        """The page has arrived; ValueError if it was not outstanding. (kvm_check_async_pf_completion)"""
        rest = list(self.waiting)
        rest.remove(done)
        return replace(self, waiting=tuple(rest))

    def cleared(self) -> AsyncPageFaults:
        """Nothing is outstanding any more. (kvm_clear_async_pf_completion_queue)"""
        return replace(self, waiting=())
