"""The guest's side: an access meets TLB and table as on hardware; what faults goes through the path until it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from errno import EINTR
from typing import Final

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Kind, R, W, X
from kvmfault.contract.outcome import (
    Done,
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Resume,
    Retry,
    Signal,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.ports import GuestWalkFault, PinError
from kvmfault.contract.target import Target
from kvmfault.errors import ModelError
from kvmfault.machine.emulator import Emulator
from kvmfault.machine.tlb import Cached
from kvmfault.path.run import Run
from kvmfault.types import U64, Gfn, Gpa, Gva, Pfn

__all__ = ["TRIES", "AccessRun", "Ended", "Guest", "transfer_register", "wanted_access"]

TRIES: Final = 16
"""Faults of one access after which it is taken to be stuck."""


class Ended(Enum):
    """How an access of the guest ended."""

    DONE = "done"
    """The guest goes on: memory, a device inside the kernel, or the emulator answered, or the VMM after its exits."""
    FAILED = "KVM_RUN failed"
    INJECTED = "the guest got an exception"
    EXITED = "left to the VMM"
    """With an exit that is not a device access."""
    SIGNALLED = "the VMM got a signal"
    """SIGBUS, for memory that failed: KVM_RUN returns EINTR."""
    WAITS = "waits for its page"
    """A userfaultfd handler has to supply it, or it is fetched in the background (``Guest.page_ready``)."""
    STUCK = "faults for ever"


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRun:
    """One access. *faults*: what the path made of each; *exits*: what KVM_RUN returned, in order."""

    ended: Ended
    faults: tuple[Run, ...] = ()
    exits: tuple[Outcome, ...] = ()
    pfns: tuple[Pfn, ...] = ()
    """Frames that the guest itself reached, one for each page touched."""

    @property
    def outcome(self) -> Outcome | None:
        """What decided: the last exit, or else the last fault's outcome; None without a fault."""
        if self.exits:
            return self.exits[-1]
        return self.faults[-1].outcome if self.faults else None


def transfer_register(target: Target) -> int:
    """The register that instructions load and store here: the first that keeps what is written."""
    return 1 if target.backend.zero_register == 0 else 0


def wanted_access(
    size: int,
    *,
    write: bool = False,
    fetch: bool = False,
    exchange: bool = False,
    private: bool = False,
    described: bool = True,
    transfer: int = 0,
    **known: object,
) -> Access:
    """What an instruction asks for, before anything is known of where it goes. See ``Guest.access``.

    *transfer*: number of the register that it loads or stores.
    """
    write = write or exchange
    plain = described and size in (1, 2, 4, 8) and not fetch
    wanted = Access(
        read=exchange or not (write or fetch),
        write=write,
        exec=fetch,
        final=True,
        private=private or None,
        size=size if plain else None,
        register=transfer if plain else None,
        wide=size == 8 if plain else None,
    )
    return wanted.with_(**known)


class Guest(Emulator):
    """What vCPUs do. One runs at a time, each access from its start to its end."""

    def handle(self, fault: MmioFault) -> Run:
        """Run the path with every step recorded, and count the fault as KVM's statistics do."""
        run = self._path.handle(self, fault)
        if run.machinery is not None:
            self._count(run, prefetch=fault.is_prefetch)
        return run

    def _count(self, run: Run, *, prefetch: bool) -> None:
        # kvm_mmu_page_fault counts what it ends with; kvm_arch_async_page_ready only what it fixed, which nothing else
        # would count
        counters = self.vcpu.counters
        counters["pf_taken"] += not prefetch
        counters["pf_fixed"] += isinstance(run.outcome, Fixed)
        counters["pf_emulate"] += isinstance(run.outcome, Emulate) and not prefetch
        counters["pf_spurious"] += isinstance(run.outcome, Spurious) and not prefetch
        counters["pf_fast"] += any(step.name == "repair" and step.outcome is not None for step in run.steps)

    def resolve(self, fault: MmioFault) -> Outcome:
        """Run the path, nothing recorded and nothing counted: the fast way."""
        return self._path.resolve(self, fault)

    def access(
        self,
        gpa: int,
        size: int = 1,
        *,
        write: bool = False,
        fetch: bool = False,
        vcpu: int | None = None,
        data: int | None = None,
        private: bool = False,
        described: bool = True,
        emulated: bool = False,
        exchange: bool = False,
        **known: object,
    ) -> AccessRun:
        """The guest reads, writes or fetches *size* bytes at *gpa*, on *vcpu* (default: the one that ran last).

        *data*: what a store writes. *described*: the instruction is one that a syndrome can describe. *emulated*: KVM's
        emulator runs the guest, so that no table is used. *exchange*: one instruction reads, then writes. *known*: more
        members of Access, such as ``gva``, ``on_walk`` or ``cache_op``. ModelError for an impossible access.
        """
        if vcpu is not None or not self.vcpus:
            self.use_vcpu(vcpu or 0)
        if gpa < 0 or not 1 <= size <= 1 << self.page_shift or gpa + size > 1 << 64:
            raise ModelError(f"an access of {size} bytes at {gpa:#x}: 1 to {1 << self.page_shift} bytes below 2^64")
        transfer = transfer_register(self.target)
        wanted = wanted_access(
            size,
            write=write,
            fetch=fetch,
            exchange=exchange,
            private=private,
            described=described,
            transfer=transfer,
            **known,
        )
        if data is not None and wanted.write:
            registers = self.vcpu.registers
            self.vcpu.registers = (*registers[:transfer], data & U64, *registers[transfer + 1 :])
        full = self.ring_is_full() if emulated else None
        if full is not None:
            return AccessRun(ended=Ended.EXITED, exits=(full,))
        if emulated:
            return self._emulated(Gpa(gpa), size, wanted, data or 0)
        return self._run(Gpa(gpa), size, wanted, data or 0)

    def _run(self, gpa: Gpa, size: int, wanted: Access, data: int) -> AccessRun:
        faults: list[Run] = []
        pfns: list[Pfn] = []
        page = 1 << self.page_shift
        at = int(gpa)
        entered = False
        while at < gpa + size:
            full = None if entered else self.ring_is_full()
            if full is not None:
                return AccessRun(ended=Ended.EXITED, faults=tuple(faults), exits=(full,), pfns=tuple(pfns))
            entered = True
            met = self._translate(Gpa(at), wanted)
            if isinstance(met, Cached):
                pfns.append(Pfn(met.pfn + (at - met.gpa >> self.page_shift)))
                at = (at & -page) + page
                continue
            run = self.handle(self.target.encode(self._as_access(wanted, at, met)).fault)
            faults.append(run)
            entered = False
            if isinstance(run.outcome, Emulate):
                missing = self._missed_by_emulator(at, gpa + size, wanted)
                if missing is not None:
                    run = missing
                    faults.append(run)
            ended = self._ended(run, gpa, size, wanted, data)
            if ended is not None:
                return replace(ended, faults=tuple(faults), pfns=tuple(pfns))
            if len(faults) >= TRIES:
                return AccessRun(ended=Ended.STUCK, faults=tuple(faults), pfns=tuple(pfns))
        return AccessRun(ended=Ended.DONE, faults=tuple(faults), pfns=tuple(pfns))

    def _missed_by_emulator(self, at: int, end: int, wanted: Access) -> Run | None:
        # the emulator walks the guest's tables for the other pages too, and gives the guest the fault of the first
        # that they do not map (emulator_read_write, inject_emulated_exception); None: they map all
        page = 1 << self.page_shift
        for other in range((at & -page) + page, end, page):
            if isinstance(self.walk_guest(Gpa(other)), GuestWalkFault):
                return self.handle(self.target.encode(self._as_access(wanted, other, (Cause.MISSING, page))).fault)
        return None

    def _as_access(self, wanted: Access, at: int, met: tuple[Cause, int]) -> Access:
        gva = wanted.gva if wanted.gva is not None else at
        cause, granule = met
        return replace(
            wanted, gpa=Gpa(at & -4096), offset=at & 4095, gva=Gva(gva), cause=wanted.cause or cause, granule=granule
        )

    def _translate(self, gpa: Gpa, wanted: Access) -> Cached | tuple[Cause, int]:
        # as the hardware does: the TLB, then the table, whose entry goes into the TLB; or why not, and at which size
        need = X if wanted.exec else W if wanted.write else R
        tlb = self.vcpu.tlb
        cached = tlb.find(gpa)
        if cached is not None and cached.prot & need and (cached.dirty or not wanted.write):
            return cached
        fmt = self.format
        if gpa >> fmt.gpa_bits:
            return Cause.MISSING, 1 << self.page_shift  # the walk would not look at the upper bits
        found = self.table.walk(gpa)
        size = 1 << found.shift
        match fmt.kind(found.desc, found.shift):
            case Kind.MMIO:
                return Cause.RESERVED, size
            case Kind.LEAF:
                pass
            case _:
                tlb.drop(gpa)
                return Cause.MISSING, size
        desc = found.desc
        prot = fmt.prot(desc)
        if not prot & need:
            tlb.drop(gpa)
            return (Cause.PERMISSION if prot else Cause.MISSING), size
        if not fmt.is_young(desc):
            if self.facts.hardware_access_dirty:
                self.table.make_young(gpa)
            elif fmt.old_faults:
                return Cause.ACCESS_FLAG, size
        if wanted.write and self.table.set_dirty(gpa) and self.facts.page_modification_log:
            self._log_by_hardware(Gfn(gpa >> self.page_shift))
        pfn = Pfn(fmt.hpa(desc, found.shift) >> self.page_shift)
        entry = Cached(found.gpa, found.shift, pfn, prot, dirty=wanted.write is True)
        tlb.fill(entry)
        return entry

    def _log_by_hardware(self, gfn: Gfn) -> None:
        # what the CPU put into its log is marked at the next exit (vmx_flush_pml_buffer); never for a nested guest,
        # whose writes are caught by protection
        slot = self.find_slot(gfn) if self.table is self.own_table else None
        if slot is not None:
            self.mark_dirty(slot, gfn, Pfn(0))

    def page_ready(self, gfn: Gfn | None = None) -> Run | None:
        """Page *gfn*, or the oldest that the vCPU did not wait for, has arrived: its fault is handled as a prefetch.

        None: nothing is outstanding, user space has yet to supply it, or the vCPU does not run on the table where it
        faulted, and nothing is mapped. Kernel: kvm_check_async_pf_completion, kvm_arch_async_page_ready.
        """
        deferred = self.vcpu.deferred
        done = deferred.oldest if gfn is None else deferred.find(gfn)
        if done is None or self._has_to_wait(done.gfn):
            return None
        self.vcpu.deferred = deferred.ready(done)
        return self.handle(done.fault) if done.shadowed is self.shadowed else None

    def _has_to_wait(self, gfn: Gfn) -> bool:
        # who fetches the page waits for user space (async_pf_execute, with write semantics)
        slot = self.find_slot(gfn)
        if slot is None:
            return False
        pin = self.pin(slot, gfn, slot.hva_of(gfn), write=True, nowait=False, interruptible=False)
        return pin.error is PinError.WAITS

    def _ended(self, run: Run, gpa: Gpa, size: int, wanted: Access, data: int) -> AccessRun | None:
        # None: the guest tries again
        outcome = run.outcome
        match outcome:
            case Fixed() | Spurious() | WriteProtected():
                return None
            case Retry(waits=True):
                return AccessRun(ended=Ended.WAITS)
            case Retry(signal=Signal()):
                return AccessRun(ended=Ended.SIGNALLED, exits=(Exit(Reason.INTR, errno=EINTR, why=outcome.why),))
            case Retry() if run.steps[-1].name == "wait":
                # the page is fetched in the background: the guest was told, and runs something else; or its vCPU is
                # halted until the page is there, and who fetches it may wait for user space
                gfn = run.progress.gfn
                if not self.facts.async_delivery:
                    self.page_ready(gfn)
                return AccessRun(ended=Ended.WAITS) if self.vcpu.deferred.find(gfn) is not None else None
            case Retry():
                return None
            case Emulate():
                return self._emulated(gpa, size, wanted, data)
            case Exit(reason=Reason.MMIO):
                return AccessRun(ended=Ended.DONE, exits=(outcome,))
            case Exit():
                return AccessRun(ended=Ended.FAILED if outcome.errno else Ended.EXITED, exits=(outcome,))
            case Error():
                return AccessRun(ended=Ended.FAILED, exits=(outcome,))
            case Inject():
                return AccessRun(ended=Ended.FAILED if outcome.errno else Ended.INJECTED)
            case Resume(Done.SIGNALLED):
                return None
            case Resume():
                return AccessRun(ended=Ended.DONE)
            case NeedsGuestWalk():
                return AccessRun(ended=Ended.FAILED)

    def _emulated(self, gpa: Gpa, size: int, wanted: Access, data: int) -> AccessRun:
        exits = self.emulate(gpa, size, wanted, data)
        if exits is None:
            return AccessRun(ended=Ended.WAITS)
        full = self.ring_is_full() if exits else None
        if full is not None and _after(exits) is Ended.DONE:  # met where the VMM runs the vCPU again
            return AccessRun(ended=Ended.EXITED, exits=(*exits, full))
        return AccessRun(ended=_after(exits), exits=exits)


def _after(exits: tuple[Outcome, ...]) -> Ended:
    failed = any(isinstance(left, Exit) and left.reason is Reason.INTERNAL_ERROR for left in exits)
    return Ended.EXITED if failed else Ended.DONE
