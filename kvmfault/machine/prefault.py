"""KVM_PRE_FAULT_MEMORY: pages are mapped before the guest asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from errno import EAGAIN, EINTR, EINVAL, ENOENT, EOPNOTSUPP

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.outcome import Emulate, Error, Exit, Fixed, Retry, Signal, Spurious, WriteProtected
from kvmfault.contract.values import Prefault, Unbacked
from kvmfault.machine.guest import TRIES, Guest
from kvmfault.types import U64, Gfn, Gpa, Gva

__all__ = ["PrefaultAnswer", "Prefaulting"]


@dataclass(frozen=True, slots=True)
class PrefaultAnswer:
    """What KVM_PRE_FAULT_MEMORY gives: errno, and the range that is left to do."""

    errno: int
    gpa: int
    size: int
    exit: Exit | None = None
    """What it left in kvm_run."""


class Prefaulting(Guest):
    """The vCPU ioctl."""

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
        gfn = Gfn(gpa >> self.page_shift)
        if self.target.policy.unbacked is Unbacked.LEAVE and self.find_slot(gfn) is None:
            return 0, ENOENT, None  # looked for before there is a fault that could leave to a device
        private = gfn in self.private
        address = Gpa(gpa & -4096)
        access = Access(
            gpa=address, gva=Gva(address), offset=0, final=True, cause=Cause.MISSING, prefetch=True, private=private
        )
        for _ in range(TRIES):
            run = self._path.handle(self, self.target.encode(access).fault)  # no statistic counts it
            match run.outcome:
                case Fixed(size=size):
                    return size, 0, None
                case Spurious() | WriteProtected():
                    return max(run.progress.size, 1 << self.page_shift), 0, None
                case Retry(waits=True) | Retry(signal=Signal()):
                    return 0, EINTR, None  # a signal: the SIGBUS, or one that ends the waiting
                case Retry():
                    found = self.table.leaf(gpa)  # the entry is there already: EAGAIN of the walker, no failure
                    if found is not None:
                        return 1 << found.shift, 0, None
                case Emulate():
                    return 0, ENOENT, None
                case Error(errno):
                    return 0, errno, None
                case Exit() as left:
                    return 0, left.errno, left
                case _:
                    return 0, ENOENT, None
        return 0, EAGAIN, None
