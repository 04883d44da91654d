"""Steps that obtain the page: size bound, pin, errors, permissions."""

from __future__ import annotations

from errno import EFAULT, EINTR

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Memory, R, W, X
from kvmfault.contract.outcome import Emulate, Error, Exit, Outcome, Reason, Retry, Signal
from kvmfault.contract.ports import Memslot, Pin, PinError, Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.values import (
    DeviceMemory,
    ExecGrant,
    LoggedSize,
    MemfdSource,
    NestedFetch,
    PoisonSpan,
    Reaction,
    ReadMaps,
    UnknownArea,
)
from kvmfault.path.lookup import USERFAULT_FLAG, become_mmio, memory_fault
from kvmfault.types import EHWPOISON, Gfn, Gpa, Hva

__all__ = ["bound_size", "fits", "judge_pfn", "permit", "pin", "precheck", "userfault", "wait"]

_PAGE_ON_WRITE, _ANY = LoggedSize.PAGE_ON_WRITE, LoggedSize.ANY
_PRIVATE_ACCESS = MemfdSource.PRIVATE_ACCESS
_NEEDS_IO = PinError.NEEDS_IO
_UNLESS_LOGGED, _NEVER = ReadMaps.UNLESS_LOGGED, ReadMaps.NEVER
_ALL_EXEC = ExecGrant.ALWAYS
_BY_AREA = DeviceMemory.BY_AREA
_LOST = NestedFetch.LOST
_DEVICE, _NONCACHEABLE = Memory.DEVICE, Memory.NONCACHEABLE


def bound_size(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Largest size allowed before the page is known; aligns frame and install address to it.

    Kernel: the vma_shift switch and the nested limit of user_mem_abort; early returns of kvm_mmu_hugepage_adjust.
    """
    slot = at.slot
    if slot is None:
        return None
    policy = at.policy
    page = 1 << vm.page_shift
    if at.logged:
        logged = policy.logged_size
        at.page_only = logged is not _ANY and (logged is not _PAGE_ON_WRITE or fault.is_write)
    if slot.userfault:
        at.page_only = True
    at.size = at.area_size = page
    area = at.area
    if area is None:  # sizes come from the host's page table alone, under the lock; guest_memfd gives pages
        at.page_only = at.page_only or at.from_file
        if at.guest is not None:
            at.max_size = at.guest.size
        return None
    if area.block != page and not at.page_only:
        outcome = _bound_by_area(vm, at, slot, area.block, page)
        if outcome is not None:
            return outcome
    at.area_size = at.size
    if at.guest is not None:
        _bound_by_guest(at, at.guest.size, page)
    size = at.size
    if size > page and size in (policy.area_sizes or {}):
        at.at = Gpa(at.at & -size)
        at.gpa = Gpa(at.gpa & -size)
        at.gfn = Gfn(at.gpa >> vm.page_shift)
    return None


def _bound_by_area(vm: Ports, at: Progress, slot: Memslot, block: int, page: int) -> Outcome | None:
    ladder = at.policy.area_sizes or {}
    if block not in ladder:
        if at.policy.unknown_area is UnknownArea.FAULT:
            return Error(EFAULT, "host area of an unknown block size")
        vm.warn(f"host area of an unknown block size {block:#x}")
        at.size = block
        return None
    for size in sorted(set(ladder.values()), reverse=True):
        if size <= ladder[block] and (size == page or not at.policy.check_geometry or fits(vm, slot, at.hva, size)):
            at.size = size
            at.page_only = size == page
            break
    return None


def _bound_by_guest(at: Progress, guest_block: int, page: int) -> None:
    sizes = sorted({page, *(at.policy.area_sizes or {}).values()})
    limit = min(guest_block, page if at.page_only else sizes[-1])
    limit = max((size for size in sizes if size <= limit), default=limit)
    at.page_only = limit == page
    at.size = min(at.size, limit)


def fits(vm: Ports, slot: Memslot, hva: Hva, size: int) -> bool:
    """Whether a block of *size* around *hva* lies in the slot, with gfn and hva congruent modulo it.

    Kernel: fault_supports_stage2_huge_mapping; the head, tail and misalignment rules of lpage_info.
    """
    start = slot.hva
    if (slot.base_gfn << vm.page_shift ^ start) & (size - 1):
        return False
    block = hva & -size
    return block >= start and block + size <= start + (slot.npages << vm.page_shift)


def precheck(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """An invalidation of this frame runs or ended: give up before the costly part. May miss; ``stale`` does not.

    Kernel: mmu_invalidate_retry_gfn_unsafe in kvm_faultin_pfn, before and after the page is obtained.
    """
    if at.slot is not None and vm.invalidations.retry_gfn_unsafe(at.seq, at.gfn):
        return Retry("an invalidation of this frame is running or just ended")
    return None


def userfault(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """User space asked to hear of this page before it is mapped: leave to it.

    After the sequence is sampled and before the page is asked for, on every architecture. Kernel: kvm_do_userfault
    (proposed, version 3 of June 2025).
    """
    slot = at.slot
    if slot is None or not slot.userfault:
        return None
    wanted = vm.userfault_wanted(slot, at.gfn)
    if wanted is None:
        return Error(EFAULT, "the userfault bitmap cannot be read")
    return memory_fault(vm, at, EFAULT, "user space marked the page in its bitmap", USERFAULT_FLAG) if wanted else None


def pin(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Obtain the page: from guest_memfd or from host memory. Everything may race with this.

    Kernel: __gfn_to_pfn_memslot; kvm_faultin_pfn_private; gmem_abort.
    """
    slot = at.slot
    if slot is None:
        return None
    if at.from_file or (at.private and at.policy.memfd_source is _PRIVATE_ACCESS):
        return _pin_memfd(vm, at, slot)
    at.pin = got = vm.pin(
        slot, at.gfn, at.hva, write=fault.is_write, nowait=at.policy.nowait_first, interruptible=False
    )
    if got.error is None and got.pfn is not None:
        at.pfn, at.held, at.map_writable = got.pfn, True, got.writable
    return None


def _pin_memfd(vm: Ports, at: Progress, slot: Memslot) -> Outcome | None:
    if slot.gmem is None:
        return memory_fault(vm, at, EFAULT, "private access to a slot without guest_memfd")
    got = vm.pin_memfd(slot, at.gfn)
    if got.error is not None:
        return memory_fault(vm, at, got.errno or EFAULT, "guest_memfd gave no page")
    _take(at, got)
    at.map_writable = at.slot_writable
    if got.max_size is not None:
        at.max_size = min(at.max_size, got.max_size)
    return None


def _take(at: Progress, got: Pin) -> None:
    at.pin = got
    if got.error is None and got.pfn is not None:
        at.pfn, at.held, at.map_writable = got.pfn, True, got.writable


def wait(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The page needs input: fetch it in the background if the guest can do something else, or wait for it.

    Kernel: __kvm_faultin_pfn.
    """
    slot = at.slot
    if slot is None or at.pin is None or at.pin.error is not _NEEDS_IO:
        return None
    if not fault.is_prefetch:
        for joint in at.joints.defer:
            outcome = joint(vm, fault, at)
            if outcome is not None:
                return outcome
    interruptible = at.policy.interruptible
    _take(at, vm.pin(slot, at.gfn, at.hva, write=fault.is_write, nowait=False, interruptible=interruptible))
    return None


def judge_pfn(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """What an error frame means. Kernel: after the pin in user_mem_abort; kvm_handle_error_pfn."""
    if at.pin is None or at.pin.error is None or at.slot is None:
        return None
    error = at.pin.error
    why = error.value
    if error is PinError.WAITS:
        return Retry(why, waits=True)
    reaction = at.policy.frame_reaction.get(error, Reaction.FAULT)
    if error is PinError.HWPOISON and fault.is_prefetch:
        reaction = at.policy.prefetch_poison or reaction
    match reaction:
        case Reaction.FAULT:
            return Error(EFAULT, why)
        case Reaction.EINTR:
            return Error(EINTR, why)
        case Reaction.POISONED:
            return Error(EHWPOISON, why)
        case Reaction.INTR:
            return Exit(Reason.INTR, errno=EINTR, why=why)
        case Reaction.EMULATE:
            return Emulate(why=why)
        case Reaction.SIGBUS:
            signal = Signal(at.hva, _poison_span(vm, at).bit_length() - 1)
            vm.signal(signal)
            return Retry(why, signal)
        case Reaction.UNBACKED:
            vm.warn("a slot gave the no-slot frame")
            return become_mmio(vm, fault, at)


def _poison_span(vm: Ports, at: Progress) -> int:
    match at.policy.poison_span:
        case PoisonSpan.PAGE:
            return 1 << vm.page_shift
        case PoisonSpan.AREA:
            return at.area.block if at.area is not None else 1 << vm.page_shift
        case PoisonSpan.MAPPED_AREA:
            return at.area_size
        case PoisonSpan.MAPPED:
            return at.size


def permit(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Permissions and memory type of the entry.

    Kernel: user_mem_abort around the lock; inputs of make_spte.
    """
    pin = at.pin
    if at.slot is None or pin is None:
        return None
    policy = at.policy
    fetch = fault.is_exec
    special = pin.device
    if special:
        outcome = _judge_device(vm, at)
        if outcome is not None:
            return outcome
        special = at.device or _raw(at)
    if fetch and at.device and not policy.fetch_from_device:
        for joint in at.joints.refuse_fetch:
            outcome = joint(vm, fault, at)
            if outcome is not None:
                return outcome
        return Error(EFAULT, "a fetch from device memory")
    maps = policy.read_maps_writable
    writable = at.map_writable
    if (maps is _UNLESS_LOGGED and at.logged and not special) or maps is _NEVER:
        writable = writable and fault.is_write
    prot = R | W if writable else R
    guest = at.guest
    if guest is not None:
        prot &= (R if guest.readable else 0) | (W if guest.writable else 0)
    if fetch or policy.exec_grant is _ALL_EXEC:
        prot |= X
    if at.device:
        uncached = at.area is not None and at.area.any_uncached
        at.memory = _NONCACHEABLE if uncached else _DEVICE
    elif vm.facts.coherent_icache:
        prot |= X
    forgets = fetch and policy.nested_fetch is _LOST
    if guest is not None and not forgets and not guest.may_execute(vm.facts.user_level):
        prot &= ~X
    at.prot = prot
    return None


def _judge_device(vm: Ports, at: Progress) -> Outcome | None:
    """Frames that are not host memory: device memory, unless their area says otherwise."""
    if at.policy.device_memory is not _BY_AREA:
        at.device = True
    elif _raw(at):
        at.device = at.area is None or not at.area.cacheable
        if not at.device and not vm.facts.cacheable_raw_frames:
            return Error(EFAULT, "a cacheable area of raw frames, which this host cannot map cacheable")
    return None


def _raw(at: Progress) -> bool:
    return at.area is not None and at.area.raw_frames
