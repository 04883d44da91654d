"""The VM that a scenario describes, on one target."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, Memslot, VmFacts
from kvmfault.contract.target import Target
from kvmfault.contract.values import MemfdSource
from kvmfault.errors import ModelError
from kvmfault.machine.vm import Vm
from kvmfault.scenario.fields import error_name
from kvmfault.scenario.model import HVA_BASE, Machine, Memfd, Scenario, Slot, Translation
from kvmfault.scenario.settings import cap, member
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.dirty import INITIALLY_SET, MANUAL_PROTECT
from kvmfault.vm.guest_tables import GuestEntry, GuestTables, WalkEnd
from kvmfault.vm.memslot import slot_number

__all__ = ["Misuse", "Subject", "World"]


class Misuse(ModelError):
    """The scenario asks for what no kernel, host or VMM could do. *place*: keys and indexes in the file."""

    def __init__(self, message: str, *place: int | str) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True, slots=True)
class Subject:
    """What a scenario runs on: a target with the decisions, facts and limits that the scenario asks for."""

    name: str
    """The target as it was named."""
    target: Target
    caps: HostCaps

    @classmethod
    def of(cls, scenario: Scenario, target: Target, settings: Iterable[str] = ()) -> Subject:
        """*settings*: ``KEY=VALUE``, after those of the scenario. Raises UsageError for one that is none."""
        machine, caps = scenario.machine, target.backend.host(target.format)
        changed = target.with_policy(**{n: member(Policy, n, v) for n, v in machine.policy.items()})
        host: dict[str, object] = {}
        if machine.private_memory is not None:
            if not changed.has_private:
                raise Misuse(f"no VM of {target.name} can have private memory", "machine", "private_memory")
            by_attribute = machine.private_memory == "by_attribute"
            changed = changed.with_facts(private_memory=True, private_by_attribute=by_attribute)
            host = {"guest_memfd": True, "memory_attributes": True, "nr_address_spaces": 1}
        changed = changed.with_facts(**{n: member(VmFacts, n, v) for n, v in machine.facts.items()})
        host |= {name: cap(caps, name, value) for name, value in machine.host.items()}
        caps = replace(caps, **host)  # type: ignore[arg-type]  # cap has looked at each
        return cls(target.name, changed.with_settings(settings), caps)


class World(Vm):
    """A Vm whose guest's own tables map every address to itself, and whose kernel can be made to forget flushes."""

    guest_tables: GuestTables | None
    forgetful: bool = False
    """Nothing is flushed from TLBs."""

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        """See Ports."""
        tables = self.guest_tables  # what the guest's own tables do otherwise
        if tables is not None and any(entry.address <= gpa < entry.stop for entry in tables.entries):
            return tables.walk(gpa)
        return GuestTranslation(gpa, 1 << 30)

    def flush_stale(self) -> None:
        """See Surroundings."""
        if self.forgetful:
            self.take_stale()
        else:
            super().flush_stale()

    def frame_now(self, gpa: Gpa) -> Pfn | None:
        """The frame that the memory under *gpa* has now. Asking brings nothing in."""
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.slots.find(gfn)
        if slot is None:
            return None
        if slot.gmem is not None and self._is_file(gfn):
            return self.pin_memfd(slot, gfn).pfn
        return self.host.fork().pin(slot.hva_of(gfn), write=False).pfn

    def _is_file(self, gfn: Gfn) -> bool:
        source = self.target.policy.memfd_source
        return source is MemfdSource.SLOT or (source is MemfdSource.PRIVATE_ACCESS and gfn in self.private)

    def slot_at(self, gpa: int) -> Memslot | None:
        """The slot over *gpa* in the first address space."""
        return self.slots.find(Gfn(gpa >> self.page_shift))

    def hva_of(self, gpa: int) -> Hva:
        """User address of a guest address. ModelError: no slot is there."""
        slot = self.slot_at(gpa)
        if slot is None:
            raise ModelError(f"no slot covers gpa {gpa:#x}, so it has no user address")
        return Hva(slot.hva_of(Gfn(gpa >> self.page_shift)) + (gpa & (1 << self.page_shift) - 1))

    @classmethod
    def build(cls, scenario: Scenario, subject: Subject) -> Self:
        """The machine before the first event. Raises Misuse for what KVM would refuse."""
        machine = scenario.machine
        vm = cls(subject.target, caps=subject.caps)
        vm.invalidations.seq = machine.invalidations
        vm._log(machine)
        for n, file in enumerate(scenario.memfd):
            vm._try(partial(vm._open, file), "memfd", n)
        for n, m in enumerate(scenario.memory):
            vm._try(partial(vm.back, m.hva, m.size, m.kind, readonly=m.readonly), "memory", n)
        for n, slot in enumerate(scenario.slot):
            vm._try(partial(vm._add, slot, n), "slot", n)
        vm._try(partial(vm._translations, scenario.guest), "guest")
        vm.devices = tuple((Gpa(d.gpa), d.size, d.value) for d in scenario.device)
        return vm

    def _log(self, machine: Machine) -> None:
        if machine.manual_protect:
            self.enable_manual_protect(MANUAL_PROTECT | (INITIALLY_SET if machine.initially_set else 0))
        if machine.dirty_ring is not None:
            errno = self.enable_dirty_ring(machine.dirty_ring)
            if errno:
                raise Misuse(f"KVM_CAP_DIRTY_LOG_RING gives {error_name(errno)}", "machine", "dirty_ring")

    def _translations(self, runs: tuple[Translation, ...]) -> None:
        entries = (
            GuestEntry(
                address=run.address,
                size=run.size,
                gpa=Gpa(run.address if run.gpa is None else run.gpa),
                block=min(run.size, run.block),
                readable=run.readable,
                writable=run.writable,
                executable=run.executable,
                user=run.user,
                end=None if run.present else WalkEnd.MISSING,
            )
            for run in runs
        )
        self.guest_tables = GuestTables(tuple(entries))

    @property
    def hva_base(self) -> int:
        """User address of guest address 0, where the scenario does not say."""
        return HVA_BASE if self.caps.user_top > HVA_BASE else self.caps.user_top >> 1

    def _open(self, file: Memfd) -> None:
        errno = self.create_guest_memfd(file.id, file.size)
        if errno:
            raise ModelError(f"KVM_CREATE_GUEST_MEMFD gives {error_name(errno)}; see machine.private_memory")

    def _add(self, slot: Slot, number: int) -> None:
        hva = self.hva_base + slot.gpa if slot.hva is None else slot.hva
        if slot.memory != "none":
            self.back(hva, slot.size, slot.memory)
        self.add_memslot(
            slot_number(slot.as_id, number if slot.id is None else slot.id),
            gpa=slot.gpa,
            size=slot.size,
            hva=hva,
            readonly=slot.readonly,
            log_dirty=slot.log_dirty,
            userfault=slot.userfault,
            memfd=slot.memfd,
            memfd_offset=slot.memfd_offset,
        )

    def _try(self, do: Callable[[], object], *place: int | str) -> None:
        try:
            do()
        except ModelError as e:
            raise Misuse(str(e), *place) from e
