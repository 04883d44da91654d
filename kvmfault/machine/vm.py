"""Vm: one VM as its user builds and drives it. What faults is run through the path; what follows stays in the VM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import Memslot, VmFacts
from kvmfault.contract.target import Target, backend
from kvmfault.contract.values import SlotFlush
from kvmfault.errors import ModelError
from kvmfault.machine.prefault import Prefaulting
from kvmfault.machine.private import PrivateMemory
from kvmfault.types import Gpa, Hva
from kvmfault.vm.area import AreaKind, HvaRange
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.memslot import MemslotFlag
from kvmfault.vm.memslot_change import ChangeResult, Stage
from kvmfault.vm.memslot_request import MemslotRequest
from kvmfault.vm.memslots import Memslots

__all__ = ["Vm"]


class Vm(PrivateMemory, Prefaulting):
    """A VM on a TARGET: memslots, host memory, second-stage table, vCPUs with their TLBs, logs and attributes.

    ``add_memslot`` and ``back`` build one, ``access`` lets the guest run, ``handle`` runs one fault through the path.
    """

    facts: VmFacts
    format: Stage2Format
    caps: HostCaps
    slots: Memslots
    userfault: Mapping[int, FrameSet]

    @classmethod
    def on(cls, target: str | Target, *, caps: HostCaps | None = None, facts: VmFacts | None = None) -> Self:
        """An empty VM on a TARGET. Raises UsageError for an unknown one."""
        return cls(backend(target) if isinstance(target, str) else target, caps=caps, facts=facts)

    def with_facts(self, **facts: object) -> Self:
        """This VM with some of its facts changed; returns itself. TypeError for an unknown fact."""
        self.facts = replace(self.facts, **facts)  # type: ignore[arg-type]  # names are checked at run time by replace
        self.format = self.target.format.with_hardware_ad(self.facts.hardware_access_dirty)
        for table in (self.own_table, self.shadow_table):
            if table is not None:
                table.format = self.format
        return self

    def with_caps(self, **caps: object) -> Self:
        """This VM, still without slots, on another host; returns itself. TypeError for an unknown one, ModelError if
        the VM has slots."""
        if any(self.slots.slots(as_id) for as_id in range(self.caps.nr_address_spaces)):
            raise ModelError("what the host offers cannot change under a VM that has slots")
        self.caps = replace(self.caps, **caps)  # type: ignore[arg-type]  # as above
        self.slots = type(self.slots)(self.caps)
        self.host.thp_size = self.caps.thp_size or self.host.thp_size
        return self

    # Memslots.

    def add_memslot(
        self,
        slot: int,
        *,
        gpa: int,
        size: int,
        hva: int,
        readonly: bool = False,
        log_dirty: bool = False,
        userfault: bool = False,
        memfd: int | None = None,
        memfd_offset: int = 0,
    ) -> Self:
        """Create or change a slot (KVM_SET_USER_MEMORY_REGION2); sizes in bytes. ModelError if KVM would refuse."""
        wanted = (
            (MemslotFlag.READONLY, readonly),
            (MemslotFlag.LOG_DIRTY, log_dirty),
            (MemslotFlag.USERFAULT, userfault),
            (MemslotFlag.GUEST_MEMFD, memfd is not None),
        )
        request = MemslotRequest(
            slot=slot, flags=sum(flag for flag, on in wanted if on), gpa=Gpa(gpa), size=size, hva=Hva(hva)
        )
        if memfd is not None:
            request = replace(request, memfd=memfd, memfd_offset=memfd_offset)
        result = self.set_region(request)
        if result.errno:
            raise ModelError(f"memslot {slot}: {result}")
        return self

    def remove_memslot(self, slot: int) -> Self:
        """Delete a slot. ModelError if KVM would refuse."""
        result = self.set_region(MemslotRequest(slot=slot, gpa=Gpa(0), size=0, hva=Hva(0)))
        if result.errno:
            raise ModelError(f"memslot {slot}: {result}")
        return self

    def set_region(self, request: MemslotRequest, *, flush: SlotFlush | None = None) -> ChangeResult:
        """Carry out a memslot request, with what the table loses on the way. Never raises; the result has the errno.

        *flush*: what a deletion or move drops, if not as the target's policy says.
        """
        done = self.slots.begin(request)
        while done is None:
            if self.slots.next_stage is Stage.FLUSH:
                self._flush_changing(flush or self.target.policy.slot_flush)
            done = self.slots.step(self.host)
        if done.kind is not None and not done.errno:
            self.slot_published(done.old, done.new)
            self.slot_changed(done.old, done.new)
            self.change_userfault(done.old, done.new)
        return done

    def _flush_changing(self, flush: SlotFlush) -> None:
        old, _ = self.slots.changing
        if flush is SlotFlush.TABLE:
            self.clear_tables()
        elif old is not None:
            self.drop(old.base_gfn, old.end_gfn)
        self.flush_stale()

    def change_userfault(self, old: Memslot | None, new: Memslot | None) -> None:
        """After a memslot change: with the userfault flag every page of the slot is asked for again."""
        was, now = old is not None and old.userfault, new is not None and new.userfault
        if old is not None and not now and (was or new is None):
            self.userfault = {slot: pages for slot, pages in self.userfault.items() if slot != old.number}
        if new is not None and now and not was:
            self.drop(new.base_gfn, new.end_gfn)
            self.flush_stale()
        if new is not None and was and not now:
            self.recover_blocks(new)

    # Host memory.

    def back(self, hva: int, size: int, kind: str = "anon", *, readonly: bool = False) -> Self:
        """Put host memory under a range: anon, thp, hugetlb-2m, hugetlb-1g, pfnmap. Invalidates what was there."""
        try:
            area = AreaKind(kind)
        except ValueError:
            raise ModelError(
                f"no kind of host memory {kind!r}; there is: {', '.join(k.value for k in AreaKind)}"
            ) from None
        self.invalidate(self.host.back(Hva(hva), size, area, readonly=readonly))
        return self

    def age(self, span: HvaRange, *, test_only: bool = False) -> bool:
        """Whether the guest used pages of a host range; forgets it unless *test_only*. (kvm_age_gfn)

        Most kernels flush no TLB: a page that is only used through a TLB may look old.
        """
        used = False
        for hit in self.slots.in_hva_range(span.start, span.end):
            for table, start, end in self.tables_over(hit.start, hit.end):
                used |= table.age(start, end, test_only=test_only)
                if self.target.policy.age_flushes and not test_only:
                    for vcpu in self.every_vcpu():
                        vcpu.tlb.flush(start, end)
        return used
