"""Why the sequence number is sampled before the page is asked for, and looked at again under the lock.

The host replaces the page in the moment between the two. The path notices, and the guest faults again. With the retry
tests left out, every backend maps a frame that the host may have given to somebody else.
"""

from __future__ import annotations

from typing import Final

from kvmfault import PATH, Access, Cause, Gfn, Gpa, Gva, Hva, Retry, Target, Vm, backend, backends
from kvmfault.contract.ports import GuestTranslation, Memslot, Pin
from kvmfault.path.run import BoundPath, Locked, Step
from kvmfault.replay.verdict import outcome_text

GPA: Final = Gpa(0x4000_0000)
HVA: Final = Hva(0x7F00_0000_0000)
SIZE: Final = 1 << 20
TESTS: Final = ("precheck", "recheck", "stale")
Path = tuple[Step | Locked, ...]


class Raced(Vm):
    """A VM whose memory is replaced once, right after a page of it was obtained."""

    raced = False

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        """See Ports."""
        got = super().pin(slot, gfn, hva, write=write, nowait=nowait, interruptible=interruptible)
        if not self.raced:
            self.raced = True
            self.back(HVA, SIZE)  # other frames, and a whole notifier call: begin, unmap, end
        return got

    def walk_guest(self, gpa: Gpa) -> GuestTranslation:
        """See Ports. The guest maps every address to itself; only shadow paging asks."""
        return GuestTranslation(gpa, SIZE)


def without_tests(path: Path) -> Path:
    """The path, its retry tests left out."""
    kept = [Locked(tuple(s for s in e.steps if s.name not in TESTS)) if isinstance(e, Locked) else e for e in path]
    return tuple(e for e in kept if isinstance(e, Locked) or e.name not in TESTS)


def race(target: Target, path: Path) -> str:
    """What became of a store, until it is not retried; and whether the table maps what the host has there now."""
    store = Access(gpa=GPA, offset=0, gva=Gva(GPA), read=False, write=True, exec=False, cause=Cause.MISSING)
    fault = target.encode(store).fault
    vm = Raced(target)
    vm.add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE)
    bound = BoundPath(target.policy, target.joints, path)
    outcomes = [bound.resolve(vm, fault)]
    while isinstance(outcomes[-1], Retry):
        outcomes.append(bound.resolve(vm, fault))

    leaf, area = vm.table.leaf(GPA), vm.host.vma(HVA)
    assert leaf is not None
    assert area is not None
    is_current = vm.format.hpa(leaf.desc, leaf.shift) >> vm.page_shift == area.pfn_at(HVA)
    return f"{', '.join(map(outcome_text, outcomes))}: {'the right frame' if is_current else 'a stale frame'}"


def main() -> None:
    for name in backends():
        target = backend(name)
        print(f"{target.name:<19}as it is   {race(target, PATH)}")
        print(f"{'':<19}untested   {race(target, without_tests(PATH))}")


if __name__ == "__main__":
    main()
