"""Assumptions about what was not recorded: memslots, and what the host answers. Nothing that KVM decides is assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from errno import EFAULT
from typing import Final

from kvmfault.check.handled import Call, Handled
from kvmfault.check.inferred import MEMORY_SHIFT, NO_SLOT, InferredVm
from kvmfault.contract.format import Memory, W, X, block_sizes
from kvmfault.contract.probes import RETRY, Said
from kvmfault.contract.shapes import Raw
from kvmfault.types import Gpa
from kvmfault.vm.memslot import MemslotFlag

__all__ = ["Assumed", "Assumption", "Seen", "assumptions", "learn", "reach", "remember"]

_LOG: Final = int(MemslotFlag.LOG_DIRTY)
_READONLY: Final = int(MemslotFlag.READONLY)


class Assumed(Enum):
    """What was taken from what KVM did, because nothing else tells it."""

    FRAME = "frame of a page"
    UNWRITABLE = "host: the page may only be read"
    WRITABLE = "host: the page may be written by now"
    BLOCK = "host: a block, which the slot allows"
    SPECIAL = "host: memory of a device"
    PIN_FAILED = "host: no page"
    INVALIDATION = "host: an invalidation still runs"
    INVALIDATED = "host: an invalidation is over"
    NO_SLOT = "memslots: none there"
    SLOT = "memslots: one is there by now"
    READONLY_SLOT = "memslots: read-only"
    LOGGED = "memslots: writes are logged"
    NOT_LOGGED = "memslots: writes are no longer logged"
    TABLE_BITS = "VM: how many address bits its table has"
    KERNEL_DEVICE = "VM: a device inside the kernel"
    COHERENT = "CPU: instruction caches are coherent"
    ORDER = "order: which of two vCPUs came first"
    NEW_VM = "VM: another one begins"


@dataclass(frozen=True, slots=True)
class Assumption:
    """One assumption and the answers of the ports under it (names of Trial)."""

    what: Assumed
    answers: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Seen:
    """A handled fault, decoded. *invalidated*: an invalidation may have met it; *starts_over*: one that other faults
    met still runs, as far as is known."""

    handled: Handled
    fault: Raw
    gpa: int
    gfn: int
    page: int
    invalidated: bool
    starts_over: bool

    @property
    def call(self) -> Call | None:
        """What KVM did; None: it only returned."""
        return self.handled.calls[-1] if self.handled.calls else None

    def frame(self, page_shift: int) -> int:
        """Frame of the faulting page, if it was mapped."""
        call = self.call
        if call is None or self.handled.hpa is None:
            return 0
        offset = (self.gpa & -self.page) - (call.address & -self.page)
        return self.handled.hpa + offset >> page_shift


_MEMSLOTS: Final = frozenset({Assumed.NO_SLOT, Assumed.SLOT, Assumed.READONLY_SLOT, Assumed.LOGGED, Assumed.NOT_LOGGED})


def assumptions(vm: InferredVm, seen: Seen) -> list[Assumption]:
    """What may be assumed for a fault that came out differently, the likeliest first."""
    found = _assumptions(vm, seen)
    return found if vm.known.given is None else [a for a in found if a.what not in _MEMSLOTS]


def _assumptions(vm: InferredVm, seen: Seen) -> list[Assumption]:
    flags, call = vm.known.flags(seen.gfn), seen.call
    if call is None:
        return _of_nothing(vm, seen)
    if call.does is Said.DEVICE:
        return _of_device(flags, seen)
    found: list[Assumption] = []
    if flags == NO_SLOT:
        if not seen.fault.is_write and not call.prot & W:  # so what was no memory for a write is read-only memory
            found.append(Assumption(Assumed.READONLY_SLOT, {"flags": _READONLY}))
        found.append(Assumption(Assumed.SLOT, {"flags": 0}))
    elif flags & _READONLY and seen.fault.is_write:
        found.append(Assumption(Assumed.SLOT, {"flags": flags & ~_READONLY}))
    if call.does in (Said.MAPPING, Said.RELAXING):
        if seen.starts_over:
            found.append(Assumption(Assumed.INVALIDATED, {"invalidated": False}))
        found += _of_entry(vm, seen, call, flags)
    if call.does is Said.INJECTED and flags != NO_SLOT:
        found.append(Assumption(Assumed.NO_SLOT, {"flags": NO_SLOT}))
        found.append(Assumption(Assumed.READONLY_SLOT, {"flags": flags | _READONLY}))
        found.append(Assumption(Assumed.SPECIAL, {"special": Memory.DEVICE.name}))
    inside = seen.gpa >> vm.facts.table_bits == 0
    if (call.does is Said.INJECTED) == inside:
        bits = seen.gpa.bit_length() - 1 if inside else vm.target.facts.table_bits
        found.append(Assumption(Assumed.TABLE_BITS, {"table_bits": bits}))
    return found


def _of_nothing(vm: InferredVm, seen: Seen) -> list[Assumption]:
    found = []
    if seen.handled.ret == 1 and seen.invalidated:
        found.append(Assumption(Assumed.INVALIDATION, {"invalidated": True}))
    if seen.handled.ret == -EFAULT:
        found.append(Assumption(Assumed.PIN_FAILED, {"fails": True}))
    if vm.known.flags(seen.gfn) == NO_SLOT:
        found.append(Assumption(Assumed.SLOT, {"flags": 0}))
    elif seen.fault.is_cache_op:
        found.append(Assumption(Assumed.NO_SLOT, {"flags": NO_SLOT}))
    return found


def _of_device(flags: int, seen: Seen) -> list[Assumption]:
    found = []
    if flags != NO_SLOT and not flags & _READONLY:
        found.append(Assumption(Assumed.NO_SLOT, {"flags": NO_SLOT}))
        found.append(Assumption(Assumed.READONLY_SLOT, {"flags": flags | _READONLY}))
    if seen.handled.ret == 1:
        found.append(Assumption(Assumed.KERNEL_DEVICE, {"device": True}))
    return found


def _of_entry(vm: InferredVm, seen: Seen, call: Call, flags: int) -> list[Assumption]:
    found, fault = [], seen.fault
    size = call.size if call.does is Said.MAPPING else fault.granule or seen.page
    if size > seen.page and size in block_sizes(vm.format):
        found.append(Assumption(Assumed.BLOCK, {"block": size}))
    if not call.prot & W and seen.gfn not in vm.known.written and (flags == NO_SLOT or not flags & _LOG):
        found.append(Assumption(Assumed.UNWRITABLE, {"writable": False}))
    elif call.prot & W and not fault.is_write:
        found.append(Assumption(Assumed.WRITABLE, {"writable": True}))
    if flags == NO_SLOT:
        pass
    elif flags & _LOG and (size > seen.page or not fault.is_write):
        found.append(Assumption(Assumed.NOT_LOGGED, {"flags": flags & ~_LOG}))
    elif not flags & _LOG and size == seen.page:
        found.append(Assumption(Assumed.LOGGED, {"flags": flags | _LOG}))
    if call.does is Said.MAPPING and call.kind != Memory.NORMAL.name and not vm.known.is_memory(seen.handled.hpa or 0):
        found.append(Assumption(Assumed.SPECIAL, {"special": call.kind}))
    if call.prot & X and not fault.is_exec and not vm.facts.coherent_icache:
        found.append(Assumption(Assumed.COHERENT, {"coherent": True}))
    if call.answer == RETRY and any(_meets(vm, seen.handled, rival) for rival in seen.handled.rivals):
        found.append(Assumption(Assumed.ORDER, {"loses": True}))
    return found


def _meets(vm: InferredVm, one: Handled, other: Handled) -> bool:
    """Both change the same entry, be it by putting a table there."""
    return _reaches(vm, one, other.calls[-1].address) or _reaches(vm, other, one.calls[-1].address)


def _reaches(vm: InferredVm, one: Handled, address: int) -> bool:
    first, last = one.reach or reach(vm, one)
    return first <= address < last


def reach(vm: InferredVm, handled: Handled) -> tuple[int, int]:
    """Addresses of the entry that a call to map changes first, with the table as it is now."""
    call = handled.calls[-1]
    size = max(call.size, 1 << vm.table.walk(Gpa(call.address)).shift)
    return call.address & -size, (call.address & -size) + size


def learn(vm: InferredVm, what: Assumed, seen: Seen) -> None:
    """Keep an assumption that explained a fault."""
    known, gfn, call = vm.known, seen.gfn, seen.call
    match what:
        case Assumed.NO_SLOT:
            known.absent.add(gfn)
        case Assumed.SLOT:
            known.absent.discard(gfn)
            known.readonly.discard(gfn)
        case Assumed.READONLY_SLOT:
            known.absent.discard(gfn)
            known.readonly.add(gfn)
        case Assumed.UNWRITABLE:
            known.doubt(gfn, seen.frame(vm.page_shift))
        case Assumed.LOGGED:
            known.logged.add(gfn)
        case Assumed.NOT_LOGGED:
            whole = next((r for r in known.logged.ranges() if gfn in r), range(gfn, gfn + 1))
            known.logged.discard(whole.start, whole.stop)
        case Assumed.KERNEL_DEVICE:
            known.devices.add((call.address if call is not None else seen.gpa) >> 12)
        case Assumed.SPECIAL:
            known.special[gfn] = call.kind if call is not None and call.does is Said.MAPPING else Memory.DEVICE.name
        case Assumed.TABLE_BITS:
            inside = seen.gpa >> vm.facts.table_bits == 0
            vm.with_facts(table_bits=seen.gpa.bit_length() - 1 if inside else vm.target.facts.table_bits)
        case Assumed.COHERENT:
            vm.with_facts(coherent_icache=True)
        case _:
            pass


def remember(vm: InferredVm, seen: Seen, page_shift: int) -> None:
    """What a call to map tells of the host, assumed or not, and whether or not another vCPU won."""
    known, call = vm.known, seen.call
    if call is None or call.does is not Said.MAPPING:
        return
    frame = seen.frame(page_shift)
    known.frames[seen.gfn] = frame
    if call.kind == Memory.NORMAL.name:
        known.memory.add((seen.handled.hpa or 0) >> MEMORY_SHIFT)
    if call.size > seen.page and call.size in block_sizes(vm.format):
        pages = call.size >> page_shift
        known.blocks[seen.gfn & -pages] = pages, frame - seen.gfn % pages
    if call.prot & W:
        known.written.add(seen.gfn)
        known.unwritable.discard(frame)
    elif not seen.fault.is_write and not known.flags(seen.gfn) & (_LOG | _READONLY):
        known.unwritable.add(frame)
