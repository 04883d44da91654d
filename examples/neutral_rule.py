"""A feature written once for every architecture: KVM Userfault, a check in the fault path that names none of them.

User space keeps a bitmap of the pages of a slot that it has not fetched yet. A fault on such a page leaves KVM_RUN with
KVM_EXIT_MEMORY_FAULT; other pages are mapped one by one, so that no block covers a page that is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT

from kvmfault import PATH, Access, Cause, Exit, Gfn, Outcome, PageFault, Ports, Target, Vm, backend, backends
from kvmfault.contract.outcome import MemoryFault, Reason
from kvmfault.contract.ports import GuestTranslation
from kvmfault.contract.progress import Progress
from kvmfault.path.run import BoundPath, Step
from kvmfault.replay.verdict import outcome_text
from kvmfault.types import Gpa, Gva

USERFAULT_FLAG = 1 << 4
"""KVM_MEMORY_EXIT_FLAG_USERFAULT of the proposal."""
GPA, SIZE, HVA = 0x4000_0000, 1 << 30, 0x7F00_0000_0000
TOUCHED = 0x4123_4000


class World(Vm):
    """A VM whose guest maps every address to itself: shadow paging asks for the guest's tables."""

    def walk_guest(self, gpa: Gpa) -> GuestTranslation:
        """See Ports."""
        return GuestTranslation(gpa, 1 << 30)


def userfault(missing: set[Gfn]) -> Callable[[Ports, PageFault, Progress], Outcome | None]:
    """The step for one slot. *missing*: frames whose bit is set."""

    def step(vm: Ports, fault: PageFault, at: Progress) -> Outcome | None:
        """The bit of the faulting page decides. Proposal: kvm_do_userfault."""
        if at.slot is None:
            return None
        at.page_only = True
        if at.gfn not in missing:
            return None
        detail = MemoryFault(Gpa(at.gfn << vm.page_shift), 1 << vm.page_shift, USERFAULT_FLAG)
        return Exit(Reason.MEMORY_FAULT, detail, EFAULT, why="user space has not fetched the page yet")

    return step


def with_userfault(target: Target, missing: set[Gfn]) -> BoundPath:
    """The target's path with the step in its place: the sequence is sampled, the page not yet asked for."""
    step = Step("userfault", userfault(missing), "user space has the page")
    before = next(i for i, s in enumerate(PATH) if isinstance(s, Step) and s.name == "bound_size")
    return BoundPath(target.policy, target.joints, (*PATH[:before], step, *PATH[before:]))


def main() -> None:
    store = Access(
        gpa=Gpa(TOUCHED), offset=8, gva=Gva(TOUCHED + 8), read=False, write=True, exec=False, cause=Cause.MISSING
    )
    print(f"{'':<19}{'without the step':<19}{'its bit set':<27}its bit cleared")
    for name in backends():
        target = backend(name)
        fault = target.encode(store).fault
        vm = World(target)
        vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE, "thp")
        missing = {Gfn(TOUCHED >> vm.page_shift)}
        path = with_userfault(target, missing)

        without = outcome_text(vm.resolve(fault))
        vm.table.clear()
        bit_set = outcome_text(path.resolve(vm, fault))
        missing.clear()  # user space fetched the page, and cleared its bit
        cleared = outcome_text(path.resolve(vm, fault))
        print(f"{target.name:<19}{without:<19}{bit_set:<27}{cleared}")


if __name__ == "__main__":
    main()
