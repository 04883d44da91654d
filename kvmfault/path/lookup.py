"""Steps before any page is asked for: which slot, and whether the access belongs to memory at all."""

from __future__ import annotations

from errno import EFAULT, ENOSYS

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import R, W, X
from kvmfault.contract.outcome import (
    Completion,
    Done,
    Emulate,
    Error,
    Exit,
    MemoryFault,
    MmioAccess,
    Outcome,
    Reason,
    Resume,
    Retry,
    WriteProtected,
)
from kvmfault.contract.ports import Pin, PinError, Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.values import InvalidSlot, MemfdSource, Topup
from kvmfault.types import Gfn, Gpa, Hva

__all__ = [
    "PRIVATE_FLAG",
    "USERFAULT_FLAG",
    "become_mmio",
    "check_private",
    "explain_permission",
    "leave_unbacked",
    "lookup",
    "memory_fault",
    "settle_slot",
    "snapshot",
    "topup",
    "track_write",
]

_AS_NONE, _RETRY = InvalidSlot.AS_NONE, InvalidSlot.RETRY
_ALWAYS, _UNLESS_PERMISSION = Topup.ALWAYS, Topup.UNLESS_PERMISSION
_SLOT = MemfdSource.SLOT
_NO_SLOT = Pin(None, PinError.NO_SLOT)
PRIVATE_FLAG = 1 << 3
"""KVM_MEMORY_EXIT_FLAG_PRIVATE."""
USERFAULT_FLAG = 1 << 4
"""KVM_MEMORY_EXIT_FLAG_USERFAULT (proposed)."""


def lookup(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Resolve frame, slot, host address and what the slot allows. Nothing is refused here.

    Kernel: gfn_to_memslot, gfn_to_hva_memslot_prot, memslot_is_logging in kvm_handle_guest_abort;
    kvm_mmu_do_page_fault, kvm_vcpu_gfn_to_memslot.
    """
    if at.guest is None:
        gpa = fault.kvm_get_fault_gpa()
        if gpa is None:
            return Error(EFAULT, "hardware reported no guest-physical address for this fault")
        at.at = at.gpa = gpa
    else:
        at.gpa = at.guest.gpa  # the joint that walked has set ``at``
    shift = vm.page_shift
    at.gfn = gfn = Gfn(at.gpa >> shift)
    slot = vm.find_slot(gfn)
    if slot is not None and not (slot.invalid and at.policy.invalid_slot is _AS_NONE):
        at.slot = slot
        at.from_file = at.policy.memfd_source is _SLOT and slot.gmem is not None
        at.hva = Hva(slot.hva + (gfn - slot.base_gfn << shift))
        at.slot_writable = writable = not slot.readonly
        at.logged = slot.logs_dirty and (writable or at.policy.readonly_slot_logs)
        at.backed = writable or not fault.is_write
    at.private = fault.is_private
    if vm.facts.private_by_attribute and not (at.private or fault.is_reserved or fault.is_prefetch):
        at.private = vm.is_private(gfn)
    at.looked_up = True
    return None


def track_write(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A write to a present page of a frame whose writes are tracked. Kernel: page_fault_handle_page_track."""
    if fault.is_write and fault.is_permission and at.slot is not None and vm.is_tracked(at.gfn):
        return WriteProtected("writes to this frame are tracked")
    return None


def leave_unbacked(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """No usable memory: the guest's mistake, a device inside the kernel, or the VMM's.

    Kernel: the block for a bad hva or a write to a read-only slot in kvm_handle_guest_abort; io_mem_abort.
    """
    if at.backed:
        return None
    for joint in at.joints.reject_unbacked:
        outcome = joint(vm, fault, at)
        if outcome is not None:
            return outcome
    for joint in at.joints.decode_mmio:
        outcome = joint(vm, fault, at)
        if isinstance(outcome, Exit) and isinstance(outcome.detail, MmioAccess) and outcome.completion is not None:
            return _offer_to_bus(vm, outcome, outcome.detail, outcome.completion)
        if outcome is not None:
            return outcome
    return Error(ENOSYS, "no memory there, and nothing decodes the access as MMIO")


def _offer_to_bus(vm: Ports, leave: Exit, access: MmioAccess, completion: Completion) -> Outcome:
    value = vm.bus(access)
    if value is None:
        return leave
    return Resume(Done.BUS, "a device inside the kernel took the access", completion=completion, value=value)


def explain_permission(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A permission fault that neither writes nor fetches should not exist. Kernel: head of user_mem_abort."""
    if fault.is_permission and not fault.is_write and not fault.is_exec:
        return Error(at.policy.unexplained_permission or EFAULT, "permission fault that neither writes nor fetches")
    return None


def topup(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Put page-table pages in reserve while sleeping is allowed.

    Kernel: kvm_mmu_topup_memory_cache in user_mem_abort; mmu_topup_memory_caches.
    """
    rule = at.policy.topup
    if rule is not _ALWAYS and fault.is_permission:
        needed = at.logged and (rule is not _UNLESS_PERMISSION or fault.is_write)
        if not needed:
            return None
    errno = vm.topup()
    return Error(errno, "no memory for page-table pages") if errno else None


def snapshot(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Copy what is needed of the host area (none backs a page of a guest_memfd), then sample the sequence number, last.

    Everything that an invalidation can change is asked for after this, or repeated under the lock.
    Kernel: the mmap-lock section of user_mem_abort; mmu_seq in kvm_faultin_pfn.
    """
    if at.policy.area_sizes is not None and at.slot is not None and not at.from_file:
        at.area = vm.area(at.hva)
        if at.area is None:
            return Error(EFAULT, "no host area at the slot's address")
    at.seq = vm.invalidations.seq
    return None


def check_private(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The kind of access must be the kind of the frame; the VMM converts and tries again. Kernel: kvm_faultin_pfn."""
    if at.private != vm.is_private(at.gfn):
        return memory_fault(vm, at, EFAULT, "the access is private and the frame shared, or the other way round")
    return None


def settle_slot(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Slots in deletion, slots that are not memory, and no slot at all: go on as an MMIO entry.

    Kernel: kvm_faultin_pfn, kvm_handle_noslot_fault.
    """
    if at.slot is None:
        return become_mmio(vm, fault, at)
    if at.slot.invalid and at.policy.invalid_slot is _RETRY:
        return Retry("the slot is being deleted or moved")
    for joint in at.joints.special_slot:
        outcome = joint(vm, fault, at)
        if outcome is not None:
            return outcome
        if _dropped(at):
            return become_mmio(vm, fault, at)
    return None


def _dropped(at: Progress) -> bool:
    return at.slot is None  # a joint may take the slot away


def become_mmio(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """From here the fault installs an entry that remembers MMIO. Kernel: kvm_handle_noslot_fault."""
    if at.private:
        return memory_fault(vm, at, EFAULT, "private access without a slot")
    # a virtual address is remembered only where it is what the table translates
    vm.note_mmio(at.gfn, None if at.guest is None or vm.facts.nested else fault.gva)
    at.slot = None
    at.prot = R | W | X
    at.logged = at.map_writable = False
    at.pin = _NO_SLOT
    if not vm.facts.mmio_caching or at.gfn > vm.facts.max_gfn:
        at.held = False
        return Emulate(why="no slot, and MMIO cannot be kept in the table")
    at.held = True  # the kernel releases the no-slot frame like any other
    return None


def memory_fault(vm: Ports, at: Progress, errno: int, why: str, flags: int = 0) -> Exit:
    """KVM_EXIT_MEMORY_FAULT for the page of the fault. Kernel: kvm_mmu_prepare_memory_fault_exit; gmem_abort."""
    page = 1 << vm.page_shift
    if at.from_file:  # the address that faulted, of a nested guest too, and never private
        return Exit(Reason.MEMORY_FAULT, MemoryFault(Gpa(at.at & -page), page, flags), errno, why=why)
    detail = MemoryFault(Gpa(at.gfn << vm.page_shift), page, flags | (PRIVATE_FLAG if at.private else 0))
    return Exit(Reason.MEMORY_FAULT, detail, errno, why=why)
