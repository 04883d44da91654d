"""A VM whose memslots and host memory nobody recorded: what is known of them is what KVM did so far.

Everything that KVM decides comes from the path. What user space and the host decide is answered from `Known`, or as a
`Trial` says, which tries one assumption about them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from errno import EFAULT
from typing import Final

from kvmfault.check.handled import Call
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import Emulate, Error, Exit, Inject, MmioAccess, Outcome, Resume, UndecodedMmio
from kvmfault.contract.ports import Area, MapResult, Memslot, Pin, PinError, VmFacts
from kvmfault.contract.probes import FIXED, RETRY, Said
from kvmfault.contract.target import Target
from kvmfault.machine.vm import Vm
from kvmfault.types import Gfn, Gpa, Hva, Pfn
from kvmfault.vm.frames import FrameSet
from kvmfault.vm.memslot import MemslotFlag, SlotSet

__all__ = ["MEMORY_SHIFT", "NO_SLOT", "InferredVm", "Known", "Trial", "returned"]

_AWAY: Final = 1 << 56
"""User address of guest address 0: congruent for every size of block."""
_SPAN: Final = 1 << 40
"""Bytes of the slot that stands for whichever there is: where it ends is not known, so it forbids no block."""
_ANSWERS: Final = {MapResult.FIXED: FIXED, MapResult.UNCHANGED: RETRY, MapResult.LOST: RETRY}
NO_SLOT: Final = -1
MEMORY_SHIFT: Final = 21
"""log2 of the bytes in which the host's memory and its devices do not mix."""
_SLOTS: Final = 32
"""Former slots remembered, the latest."""


@dataclass(slots=True)
class Known:
    """What is known of memslots and host, in frames of the guest."""

    given: SlotSet | None = None
    """The memslots, where they were recorded after all."""

    absent: FrameSet = field(default_factory=FrameSet)
    """No slot is there."""
    readonly: FrameSet = field(default_factory=FrameSet)
    logged: FrameSet = field(default_factory=FrameSet)
    """Their slots log writes."""
    frames: dict[int, int] = field(default_factory=dict)
    """Where their pages are."""
    unwritable: set[int] = field(default_factory=set)
    """Frames of the host that may only be read, such as the one that stands for all untouched memory."""
    written: set[int] = field(default_factory=set)
    """Frames of the guest whose pages the host lets be written: they were mapped so, and not taken away since."""
    blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First frame of a block of the host's page table -> pages, and where the first is."""
    devices: set[int] = field(default_factory=set)
    """Pages (of 4 KiB) of devices inside the kernel."""
    special: dict[int, str] = field(default_factory=dict)
    """Memory type of frames that are no host memory."""

    memory: set[int] = field(default_factory=set)
    """Stretches of ``1 << MEMORY_SHIFT`` bytes of the host in which something was mapped as memory."""

    slots: deque[range] = field(default_factory=lambda: deque(maxlen=_SLOTS))
    """Frames of slots that were there once: user space often makes the same again."""
    doubted: dict[range, int] = field(default_factory=dict)
    """Of these: the first frame of the host in it that could only be read."""

    def is_memory(self, hpa: int) -> bool:
        """A device would lie in the midst of what was mapped as memory."""
        return hpa >> MEMORY_SHIFT in self.memory

    def flags(self, gfn: int) -> int:
        """Flags of the slot of a frame; NO_SLOT: there is none."""
        if self.given is not None:
            slot = self.given.find(Gfn(gfn))
            return NO_SLOT if slot is None else int(slot.flags)
        if gfn in self.absent:
            return NO_SLOT
        logged = MemslotFlag.LOG_DIRTY if gfn in self.logged else 0
        return int(logged | (MemslotFlag.READONLY if gfn in self.readonly else 0))

    def forget_pages(self, start: int, end: int) -> None:
        """The host took these away: they may come back as other pages."""
        for number in _within(self.frames, start, end):
            del self.frames[number]
            self.written.discard(number)
            self.special.pop(number, None)
        for first, (pages, _) in list(self.blocks.items()):
            if first < end and start < first + pages:
                del self.blocks[first]

    def frame(self, gfn: int) -> int | None:
        """Where a page is, if that is known."""
        frame = self.frames.get(gfn)
        if frame is None and self.blocks:
            block = self.block(gfn)
            return None if block is None else block[1] + gfn % block[0]
        return frame

    def block(self, gfn: int) -> tuple[int, int] | None:
        """The block of the host's page table that holds a page, if one is known."""
        for pages in {pages for pages, _ in self.blocks.values()}:
            found = self.blocks.get(gfn & -pages)
            if found is not None and found[0] == pages:
                return found
        return None

    def doubt(self, gfn: int, frame: int) -> None:
        """A page could only be read. Two in a slot of which nothing was ever mapped writable: the slot is read-only."""
        for slot in self.slots:
            if gfn in slot and not any(g in slot for g in self.written):
                if self.doubted.setdefault(slot, frame) != frame:
                    self.readonly.add(slot.start, slot.stop)
                return

    def forget_slot(self, start: int, end: int, *, whole: bool) -> None:
        """The slot of these frames (just that, if *whole*) is gone: the next one there may be of another kind."""
        slot = range(start, end)
        if whole and slot not in self.slots:
            self.slots.appendleft(slot)
        self.doubted.pop(slot, None)
        self.absent.discard(start, end)
        self.readonly.discard(start, end)
        self.logged.discard(start, end)


def _within(table: Collection[int], start: int, end: int) -> list[int]:
    # the smaller of the two is looked through
    return (
        [n for n in table if start <= n < end]
        if len(table) < end - start
        else [n for n in range(start, end) if n in table]
    )


@dataclass(slots=True, kw_only=True)
class Trial:
    """Answers of one run; None: as known."""

    flags: int | None = None
    frame: int | None = None
    writable: bool | None = None
    block: int | None = None
    special: str | None = None
    fails: bool = False
    """The host gives no page."""
    invalidated: bool = False
    """The page is invalidated after it was looked up."""
    loses: bool = False
    """Another vCPU changes the entry first."""
    device: bool = False
    """A device inside the kernel takes the access."""
    coherent: bool = False
    """Instruction caches are coherent."""
    table_bits: int | None = None
    """Guest addresses of more bits are outside the VM's table."""

    def answering(self, answers: Mapping[str, object]) -> Trial:
        """This trial with other answers, by name."""
        changed = copy(self)
        for name, value in answers.items():
            setattr(changed, name, value)
        return changed


class InferredVm(Vm):
    """The ports, answered from what is known. ``did`` collects what KVM's probed functions would have told."""

    facts: VmFacts

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.known: Known = Known()
        self.trial: Trial = Trial()
        self.did: list[Call] = []
        self.mapped: Pfn | None = None
        self._here: Memslot | None = None
        self._slots: dict[tuple[int, int], Memslot] = {}

    def run(self, fault: MmioFault, trial: Trial) -> Outcome:
        """The path's answer, and its calls in ``did``."""
        self.trial, self.did, self.mapped = trial, [], None
        facts = self.facts
        if trial.coherent:
            self.facts = replace(facts, coherent_icache=True)
        if trial.table_bits is not None:
            self.facts = replace(facts, table_bits=trial.table_bits)
        outcome = self.resolve(fault)
        self.facts = facts
        address = _device_address(fault, outcome)
        if address is not None:
            self.did.append(Call(Said.DEVICE, address))
        if isinstance(outcome, Inject):
            self.did.append(Call(Said.INJECTED, outcome.address, kind=outcome.what))
        self.table.stale.clear()  # nobody has a TLB here
        return outcome

    def forget(self) -> None:
        """Another VM: nothing is mapped, nothing is known of its slots."""
        self.table.clear()
        self.table.stale.clear()
        self.known = Known(given=self.known.given, unwritable=self.known.unwritable)

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        """See Ports."""
        if self.known.given is not None:
            self._here = self.known.given.find(gfn) or self._here
            return self.known.given.find(gfn)
        flags = self.known.flags(gfn) if self.trial.flags is None else self.trial.flags
        if flags == NO_SLOT:
            return None
        pages = _SPAN >> self.page_shift
        base = gfn & -pages
        slot = self._slots.get((base, flags))
        if slot is None:
            slot = self._slots[base, flags] = Memslot(
                id=0,
                as_id=0,
                base_gfn=Gfn(base),
                npages=pages,
                hva=Hva(_AWAY + (base << self.page_shift)),
                flags=MemslotFlag(flags),
                page_shift=self.page_shift,
            )
        self._here = slot
        return slot

    def _gpa(self, hva: int) -> int:
        # of the slot that was found last: nobody asks for another one's pages
        slot = self._here
        return hva if slot is None else hva - slot.hva + (slot.base_gfn << self.page_shift)

    def area(self, hva: Hva) -> Area:
        """See Ports: huge pages of an area matter beyond the sizes that the look at the host's page table may give."""
        block, page = self._block(self._gpa(hva)), 1 << self.page_shift
        fixed = block not in self.target.policy.fit_sizes
        return Area(block if fixed else page, any_uncached=self._special(hva) == Memory.NONCACHEABLE.name)

    def mapping_size(self, hva: Hva) -> int:
        """See Ports."""
        return self._block(self._gpa(hva))

    def _block(self, gpa: int) -> int:
        if self.trial.block is not None:
            return self.trial.block
        block = self.known.block(gpa >> self.page_shift)
        return (block[0] if block is not None else 1) << self.page_shift

    def _special(self, hva: int) -> str:
        if self.trial.special is not None:
            return self.trial.special
        return self.known.special.get(self._gpa(hva) >> self.page_shift, "")

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        """See Ports."""
        trial = self.trial
        if trial.fails:
            return Pin(None, PinError.FAULT, errno=EFAULT)
        if trial.invalidated:
            self.invalidations.begin()
            self.invalidations.add(gfn, Gfn(gfn + 1))
            self.invalidations.end()
        frame = trial.frame if trial.frame is not None else self.known.frame(gfn) or 0
        writable = trial.writable if trial.writable is not None else frame not in self.known.unwritable
        return Pin(Pfn(frame), writable=write or (writable and not slot.readonly), device=bool(self._special(hva)))

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult:
        """See Ports."""
        result = MapResult.LOST
        if not self.trial.loses:
            result = self.table.map(gpa, size, pfn, prot, memory, host_writable=host_writable, young=young, tag=tag)
        self.did.append(Call(Said.MAPPING, gpa, size, prot, memory.name, _ANSWERS.get(result, result.value)))
        self.mapped = pfn
        return result

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult:
        """See Ports."""
        self.did.append(Call(Said.RELAXING, gpa, 0, prot, memory.name))
        return self.table.relax(gpa, prot)

    def repair_young(self, gpa: Gpa) -> None:
        """See Ports."""
        self.did.append(Call(Said.MAKING_YOUNG, gpa))
        self.table.make_young(gpa)

    def bus(self, access: MmioAccess) -> int | None:
        """See Ports."""
        return 0 if self.trial.device or access.gpa >> 12 in self.known.devices else None


def _device_address(fault: MmioFault, outcome: Outcome) -> int | None:
    # where the path took the access for one to a device
    match outcome:
        case Exit(detail=MmioAccess(gpa=gpa) | UndecodedMmio(gpa=gpa)):
            return gpa
        case Resume(completion=completion) if completion is not None:
            return completion.access.gpa
        case Error(errno) if errno != EFAULT:
            page = fault.kvm_get_fault_gpa()
            return None if page is None else page | (fault.gpa_offset or 0)
        case _:
            return None


def returned(outcome: Outcome) -> int:
    """What the exit handler returns: 1 the guest runs on, 0 user space, a negative errno."""
    match outcome:
        case Error(errno):
            return -errno
        case Exit(errno=errno):
            return -errno
        case Inject(errno=errno) if errno:
            return -errno
        case Emulate():
            return 1
    return 1
