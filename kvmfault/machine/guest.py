"""The guest's side: an access meets TLB and table as on hardware; what faults goes through the path until it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from errno import EAGAIN, EINVAL, ENOENT, EOPNOTSUPP
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
    MmioAccess,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Resume,
    Retry,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.values import Prefault
from kvmfault.errors import ModelError
from kvmfault.machine.dirty import DirtyLogging
from kvmfault.machine.tlb import Cached
from kvmfault.path.run import Run
from kvmfault.types import U64, Gfn, Gpa, Gva, Pfn

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
    WAITS = "waits for user space"
    """For a page that a userfaultfd handler has to supply."""
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


@dataclass(frozen=True, slots=True)
class PrefaultAnswer:
    """What KVM_PRE_FAULT_MEMORY gives: errno, and the range that is left to do."""

    errno: int
    gpa: int
    size: int
    exit: Exit | None = None
    """What it left in kvm_run."""


class Guest(DirtyLogging):
    """What vCPUs do. One runs at a time, each access from its start to its end."""

    def handle(self, fault: MmioFault) -> Run:
        """Run the path with every step recorded, and count the fault as KVM's statistics do."""
        run = self._path.handle(self, fault)
        if run.machinery is not None:
            self._count(run, prefetch=fault.is_prefetch)
        return run

    def _count(self, run: Run, *, prefetch: bool) -> None:
        # kvm_mmu_do_page_fault: a pre-fault is no fault of the guest, but what it fixes would be counted nowhere else
        counters, machinery = self.vcpu.counters, run.machinery
        counters["pf_taken"] += not prefetch
        counters["pf_fixed"] += isinstance(machinery, Fixed)
        counters["pf_emulate"] += isinstance(machinery, Emulate) and not prefetch
        counters["pf_spurious"] += isinstance(machinery, Spurious) and not prefetch
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
        **known: object,
    ) -> AccessRun:
        """The guest reads, writes or fetches *size* bytes at *gpa*, on *vcpu* (default: the one that ran last).

        *data*: what a store writes. *described*: the instruction is one that a syndrome can describe. *known*: more
        members of Access, such as ``gva``, ``on_walk`` or ``cache_op``. ModelError for an impossible access.
        """
        if vcpu is not None or not self.vcpus:
            self.use_vcpu(vcpu or 0)
        if gpa < 0 or not 1 <= size <= 1 << self.page_shift or gpa + size > 1 << 64:
            raise ModelError(f"an access of {size} bytes at {gpa:#x}: 1 to {1 << self.page_shift} bytes below 2^64")
        full = self.ring_is_full()
        if full is not None:
            return AccessRun(ended=Ended.EXITED, exits=(full,))
        if data is not None and write:
            self.vcpu.registers = (data & U64, *self.vcpu.registers[1:])
        plain = described and size in (1, 2, 4, 8) and not fetch
        wanted = Access(
            read=not write and not fetch,
            write=write,
            exec=fetch,
            final=True,
            private=private or None,
            size=size if plain else None,
            register=0 if plain else None,
            wide=size == 8 if plain else None,
        )
        return self._run(Gpa(gpa), size, replace(wanted, **known), data or 0)  # type: ignore[arg-type]  # as Access.with_

    def _run(self, gpa: Gpa, size: int, wanted: Access, data: int) -> AccessRun:
        faults: list[Run] = []
        pfns: list[Pfn] = []
        page = 1 << self.page_shift
        at = int(gpa)
        while at < gpa + size:
            met = self._translate(Gpa(at), wanted)
            if isinstance(met, Cached):
                pfns.append(Pfn(met.pfn + (at - met.gpa >> self.page_shift)))
                at = (at & -page) + page
                continue
            run = self.handle(self.target.encode(self._as_access(wanted, at, met)).fault)
            faults.append(run)
            ended = self._ended(run.outcome, gpa, size, wanted, data)
            if ended is not None:
                return replace(ended, faults=tuple(faults), pfns=tuple(pfns))
            if len(faults) >= TRIES:
                return AccessRun(ended=Ended.STUCK, faults=tuple(faults), pfns=tuple(pfns))
        return AccessRun(ended=Ended.DONE, faults=tuple(faults), pfns=tuple(pfns))

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
        found = self.table.walk(gpa)
        fmt = self.format
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
            if not self.facts.hardware_access_dirty:
                return Cause.ACCESS_FLAG, size
            self.table.make_young(gpa)
        pfn = Pfn(fmt.hpa(desc, found.shift) >> self.page_shift)
        entry = Cached(found.gpa, found.shift, pfn, prot, dirty=wanted.write is True)
        tlb.fill(entry)
        return entry

    def _ended(self, outcome: Outcome, gpa: Gpa, size: int, wanted: Access, data: int) -> AccessRun | None:
        # None: the guest tries again
        match outcome:
            case Fixed() | Spurious() | WriteProtected():
                return None
            case Retry(waits=True):
                return AccessRun(ended=Ended.WAITS)
            case Retry():
                return None
            case Emulate():
                return self._emulate(gpa, size, wanted, data)
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

    def _emulate(self, gpa: Gpa, size: int, wanted: Access, data: int) -> AccessRun:
        """The emulator carries the access out: memory by itself, the rest as device accesses of at most 8 bytes.

        Kernel: emulator_read_write; the parts are those of the pages touched.
        """
        if wanted.exec:
            why = "the emulator cannot fetch the instruction"
            return AccessRun(ended=Ended.EXITED, exits=(Exit(Reason.INTERNAL_ERROR, why=why),))
        exits: list[Outcome] = []
        page, write = 1 << self.page_shift, wanted.write is True
        at, end = int(gpa), gpa + size
        while at < end:
            part = min(end, (at & -page) + page)
            if not self._emulated_in_memory(Gpa(at), write):
                for piece in range(at, part, 8):
                    exits += self._device(Gpa(piece), min(8, part - piece), write, data >> 8 * (piece - gpa))
            at = part
        return AccessRun(ended=Ended.DONE, exits=tuple(exits))

    def _emulated_in_memory(self, gpa: Gpa, write: bool) -> bool:
        gfn = Gfn(gpa >> self.page_shift)
        slot = self.find_slot(gfn)
        if slot is None or slot.invalid or (write and slot.readonly):
            return False
        got = self.host.pin(slot.hva_of(gfn), write=write)
        if got.invalidated is not None:
            self.invalidate(got.invalidated)
        if got.error is not None:
            return False
        if write:
            self.mark_dirty(slot, gfn, Pfn(0))
        return True

    def _device(self, gpa: Gpa, size: int, write: bool, data: int) -> tuple[Exit, ...]:
        value = (data & (1 << 8 * size) - 1).to_bytes(size, "little") if write else b""
        access = MmioAccess(gpa, size, write, value)
        return () if self.bus(access) is not None else (Exit(Reason.MMIO, access, why="a device access"),)

    def prefault(self, gpa: int, size: int, flags: int = 0, *, vcpu: int = 0) -> PrefaultAnswer:
        """KVM_PRE_FAULT_MEMORY: map ``[gpa, gpa + size)`` as reads of the vCPU would; one page done is success.

        Kernel: kvm_vcpu_pre_fault_memory, kvm_arch_vcpu_pre_fault_memory.
        """
        rule = self.target.policy.prefault
        page = 1 << self.page_shift
        if rule is Prefault.ABSENT or flags or (gpa | size) & (page - 1) or gpa + size & U64 <= gpa:
            return PrefaultAnswer(EINVAL, gpa, size)
        if rule is Prefault.REFUSED:
            return PrefaultAnswer(EOPNOTSUPP, gpa, size)
        self.use_vcpu(vcpu)
        start = gpa
        while size:
            done, errno, left = self._prefault_one(Gpa(gpa))
            if errno:
                return PrefaultAnswer(0 if gpa > start else errno, gpa, size, left)
            step = min(size, done - gpa % done)
            gpa, size = gpa + step, size - step
        return PrefaultAnswer(0, gpa, size)

    def _prefault_one(self, gpa: Gpa) -> tuple[int, int, Exit | None]:
        # (size mapped, errno, exit)
        private = Gfn(gpa >> self.page_shift) in self.private
        access = Access(
            gpa=Gpa(gpa & -4096), offset=0, read=True, final=True, cause=Cause.MISSING, prefetch=True, private=private
        )
        for _ in range(TRIES):
            run = self.handle(self.target.encode(access).fault)
            match run.outcome:
                case Fixed(size=size):
                    return size, 0, None
                case Spurious() | WriteProtected():
                    return max(run.progress.size, 1 << self.page_shift), 0, None
                case Retry():
                    continue
                case Emulate():
                    return 0, ENOENT, None
                case Error(errno):
                    return 0, errno, None
                case Exit() as left:
                    return 0, left.errno, left
                case _:
                    return 0, ENOENT, None
        return 0, EAGAIN, None
