"""What events mean to the machine: addresses, requests, and what the host does to memory."""

from __future__ import annotations

from collections.abc import Iterator

from kvmfault.errors import ModelError
from kvmfault.scenario import events
from kvmfault.scenario.world import World
from kvmfault.types import Gpa, Hva
from kvmfault.vm.area import AreaKind, HvaRange
from kvmfault.vm.guest_tables import GuestEntry, GuestTables
from kvmfault.vm.hostmem import HostMemory
from kvmfault.vm.memslot import MemslotFlag, slot_number
from kvmfault.vm.memslot_request import NO_FILE, MemslotRequest

__all__ = ["bits_to_clear", "change_guest_map", "change_host", "known", "place", "slot_request"]


def place(vm: World, event: events.Host | events.Back) -> Hva:
    """User address that the event is about."""
    if event.hva is not None:
        return Hva(event.hva)
    gpa = event.gpa or 0
    return vm.hva_of(gpa) if vm.slot_at(gpa) is not None else Hva(vm.hva_base + gpa)


def change_host(host: HostMemory, event: events.Host | events.Back, hva: Hva) -> Iterator[HvaRange | None]:
    """Carry the event out at *hva*; what each part of it invalidates, right after that part."""
    size = event.size
    match event.do:
        case "back":
            yield host.back(hva, size, AreaKind(event.kind), readonly=event.readonly)
        case "unmap":
            yield host.unback(hva, size)
        case "cow" | "zero":
            yield host.make_cow(hva, size, zero=event.do == "zero")
        case "evict":
            yield host.evict(hva, size)
        case "missing":
            yield host.make_missing(hva, size)
        case "protect":
            yield host.write_protect(hva, size)
        case "supply":
            host.supply(hva, size)
        case "migrate" | "break_cow" | "poison":
            vma = host.vma(hva)
            unit = vma.unit if vma is not None else 1 << host.page_shift
            change = {"migrate": host.migrate, "break_cow": host.break_cow, "poison": host.poison}[event.do]
            for start in range(hva, hva + size, unit):
                yield change(Hva(start))
        case "split":
            yield host.split(hva)
        case "collapse":
            yield host.collapse(hva)


def slot_request(vm: World, event: events.SetSlot | events.DeleteSlot) -> MemslotRequest:
    """The ioctl's argument. ModelError: the slot is new, and the event does not say where it is."""
    number = slot_number(event.as_id, event.id)
    old = vm.slots.by_id(event.id, event.as_id) if event.as_id < vm.caps.nr_address_spaces else None
    if isinstance(event, events.DeleteSlot):
        return MemslotRequest(slot=number, gpa=Gpa(0), size=0, hva=Hva(0))
    if old is None and (event.gpa is None or event.size is None):
        raise ModelError(f"slot {event.id} does not exist: a new one needs gpa and size")
    base = Gpa(old.base_gfn << vm.page_shift) if old is not None else Gpa(0)
    gpa = base if event.gpa is None else Gpa(event.gpa)
    made_up = Hva(vm.hva_base + gpa) if old is None else old.hva
    size = event.size if event.size is not None or old is None else old.npages << vm.page_shift
    memfd = event.memfd if event.memfd is not None else old.gmem.fd if old and old.gmem else None
    return MemslotRequest(
        slot=number,
        flags=_slot_flags(event, old.flags if old is not None else MemslotFlag(0), memfd),
        gpa=gpa,
        size=size or 0,
        hva=made_up if event.hva is None else Hva(event.hva),
        memfd=NO_FILE if memfd is None else memfd,
        memfd_offset=event.memfd_offset,
    )


def _slot_flags(event: events.SetSlot, old: MemslotFlag, memfd: int | None) -> int:
    wanted = (
        (MemslotFlag.READONLY, event.readonly),
        (MemslotFlag.LOG_DIRTY, event.log_dirty),
        (MemslotFlag.USERFAULT, event.userfault),
        (MemslotFlag.GUEST_MEMFD, memfd is not None),
    )
    return sum(int(flag) for flag, on in wanted if (flag in old if on is None else on))


def change_guest_map(vm: World, event: events.GuestMap) -> None:
    """The guest's own tables as the event leaves them."""
    entry = GuestEntry(address=event.address, size=event.size, gpa=Gpa(event.gpa))
    vm.guest_tables = (vm.guest_tables or GuestTables()).put(entry)


def bits_to_clear(event: events.ClearLog) -> int:
    """The bitmap of KVM_CLEAR_DIRTY_LOG. ModelError: a page that it does not hold."""
    bits = (1 << event.count) - 1
    if event.pages is not None:
        bits = 0
        for first, last in event.pages:
            if first < event.first or last >= event.first + event.count:
                raise ModelError(f"page {last} is outside the {event.count} pages from {event.first} on")
            bits |= (1 << last + 1 - first) - 1 << first - event.first
    return bits


def known(event: events.Access) -> dict[str, object]:
    """Members of Access that the event tells, beside what every access has."""
    told: dict[str, object] = {
        name: value for name in ("on_walk", "cache_op", "user") if (value := getattr(event, name)) is not None
    }
    if event.on_walk:
        told["final"] = False
    if event.described and event.do != "fetch" and event.size in (1, 2, 4, 8):
        told |= {"sign_extend": event.sign_extend, "wide": event.wide}
    return told
