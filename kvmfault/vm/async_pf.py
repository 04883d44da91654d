"""Pages that a vCPU does not wait for: faults whose page is fetched in the background (asynchronous page faults)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

from kvmfault.types import Gfn

MOST: Final = 64
"""ASYNC_PF_PER_VCPU: pages that one vCPU may have outstanding."""
_COUNTER: Final = 1 << 20


class Waiting(NamedTuple):
    """One page on its way. When it is there, the fault is handled again as a prefetch."""

    gfn: Gfn
    address: int
    """What faulted: the guest-physical address, or the virtual one of a shadowed guest."""
    token: int
    """What the guest is told, now and when the page is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncPageFaults:
    """The outstanding pages of one vCPU. Immutable and hashable: a change gives a new value."""

    vcpu_id: int = 0
    counter: int = 1
    """Tokens given so far and one: the next token is ``counter << 12 | vcpu_id``. Never 0, as tokens must not be."""
    waiting: tuple[Waiting, ...] = ()
    """Oldest first."""

    def find(self, gfn: Gfn) -> Waiting | None:
        """The fetch of *gfn* that runs already: the vCPU halts until something is there. (kvm_find_async_pf_gfn)"""
        return next((w for w in self.waiting if w.gfn == gfn), None)

    def queue(self, gfn: Gfn, address: int) -> AsyncPageFaults:
        """Begin to fetch a page. Refused where 64 are outstanding; the token is used up all the same.

        The caller has seen to it that the slot is writable: the kernel asks for the host address with write semantics.
        Kernel: kvm_arch_setup_async_pf, alloc_apf_token, kvm_setup_async_pf.
        """
        after = replace(self, counter=(self.counter + 1) % _COUNTER or 1)
        if len(self.waiting) >= MOST:
            return after
        token = self.counter << 12 | self.vcpu_id
        return replace(after, waiting=(*self.waiting, Waiting(gfn, address, token)))

    def ready(self, done: Waiting) -> AsyncPageFaults:
        """The page has arrived; ValueError if it was not outstanding. (kvm_check_async_pf_completion)"""
        rest = list(self.waiting)
        rest.remove(done)
        return replace(self, waiting=tuple(rest))

    def cleared(self) -> AsyncPageFaults:
        """Nothing is outstanding any more. (kvm_clear_async_pf_completion_queue)"""
        return replace(self, waiting=())
