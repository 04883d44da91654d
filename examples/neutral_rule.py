"""A feature written once for every architecture: KVM_MEM_EXIT_ON_MISSING, as proposed in 2023, as one step of the path.

A fault on a page that the host does not have at hand leaves KVM_RUN with KVM_EXIT_MEMORY_FAULT, instead of waiting for
it inside the kernel; user space fetches the page and runs the vCPU again. The step names no architecture.
"""

from __future__ import annotations

from errno import EFAULT

from kvmfault import PATH, Access, Cause, Outcome, PageFault, Ports, Target, Vm, backend, backends
from kvmfault.contract.ports import GuestTranslation, PinError
from kvmfault.contract.progress import Progress
from kvmfault.path.lookup import memory_fault
from kvmfault.path.run import BoundPath, Step
from kvmfault.replay.verdict import outcome_text
from kvmfault.types import Gpa, Gva, Hva

GPA, SIZE, HVA = 0x4000_0000, 1 << 30, 0x7F00_0000_0000
TOUCHED = 0x4123_4000


class World(Vm):
    """A VM whose guest maps every address to itself: shadow paging asks for the guest's tables."""

    def walk_guest(self, gpa: Gpa) -> GuestTranslation:
        """See Ports."""
        return GuestTranslation(gpa, 1 << 30)


def exit_on_missing(vm: Ports, fault: PageFault, at: Progress) -> Outcome | None:
    """Ask for the page without waiting; what is not at hand is user space's business. (KVM_MEM_EXIT_ON_MISSING)"""
    if at.slot is None:
        return None
    got = vm.pin(at.slot, at.gfn, at.hva, write=fault.is_write, nowait=True, interruptible=False)
    if got.error is not PinError.NEEDS_IO:
        return None
    return memory_fault(vm, at, EFAULT, "the page is not at hand")


def with_the_step(target: Target) -> BoundPath:
    """The target's path with the step in its place: the sequence is sampled, the page not yet waited for."""
    step = Step("exit_on_missing", exit_on_missing, "the page is at hand")
    before = next(i for i, s in enumerate(PATH) if isinstance(s, Step) and s.name == "pin")
    return BoundPath(target.policy, target.joints, (*PATH[:before], step, *PATH[before:]))


def main() -> None:
    store = Access(
        gpa=Gpa(TOUCHED), offset=8, gva=Gva(TOUCHED + 8), read=False, write=True, exec=False, cause=Cause.MISSING
    )
    print(f"{'':<19}{'without the step':<19}{'with it':<27}after user space fetched the page")
    for name in backends():
        target = backend(name)
        fault = target.encode(store).fault
        vm = World(target)
        vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE, "thp")
        path = with_the_step(target)
        vm.invalidate(vm.host.evict(Hva(HVA + TOUCHED - GPA)))
        fork = vm.fork()

        without = outcome_text(fork.resolve(fault))
        missing = outcome_text(path.resolve(vm, fault))
        vm.host.pin(Hva(HVA + TOUCHED - GPA), write=True)  # user space touches it
        fetched = outcome_text(path.resolve(vm, fault))
        print(f"{target.name:<19}{without:<19}{missing:<27}{fetched}")


if __name__ == "__main__":
    main()
