"""The steps that only x86 has, for the places of the path that no policy value can fill.

Kernel: kvm_mmu_page_fault and kvm_mmu_do_page_fault around the fault machinery, page_fault_can_be_fast,
the APIC page and async page faults inside kvm_faultin_pfn, kvm_mmu_write_protect_fault after it.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EINVAL
from functools import cache
from typing import Final

from arch.x86.guest import nested_entry, shadow_entry, walk_ept, walk_guest, walk_npt
from arch.x86.pferr import GPT_WRITE
from kvmfault.contract.backend import Conclude, Joint, Joints
from kvmfault.contract.fault import MmioFault, PageFault
from kvmfault.contract.format import PROTS, R, W, X
from kvmfault.contract.outcome import (
    Emulate,
    Error,
    Exit,
    Fixed,
    Inject,
    NeedsGuestWalk,
    Outcome,
    Reason,
    Retry,
    Spurious,
    WriteProtected,
)
from kvmfault.contract.ports import GuestTranslation, MapResult, MmioNote, Ports, Repair, VmFacts, VmView
from kvmfault.contract.progress import Progress
from kvmfault.path.commit import mapped
from kvmfault.path.lookup import memory_fault
from kvmfault.types import Gfn, Gpa, Pfn

APIC_ACCESS_PAGE: Final = 32764 + 1
"""Slot id of the page that KVM maps behind the local APIC (APIC_ACCESS_PAGE_PRIVATE_MEMSLOT)."""


def _address(fault: PageFault) -> Gpa:
    # what KVM calls cr2_or_gpa: the physical address, or the virtual one of a shadow fault
    gpa = fault.kvm_get_fault_gpa()
    return gpa if gpa is not None else Gpa(fault.gva or 0)


def check_root(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A vCPU without a root cannot have faulted; the kernel warns and lets it run on. (kvm_mmu_page_fault)"""
    if vm.facts.root_valid or fault.is_prefetch:
        return None
    vm.warn("a fault without a valid root page")
    return Retry("the vCPU has no valid root page")


def known_mmio(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A reserved bit marks MMIO: emulate what vCPU or table remember, unless it is out of date.

    Kernel: head of kvm_mmu_page_fault, handle_mmio_page_fault.
    """
    if not fault.is_reserved or fault.is_prefetch:
        return None
    if fault.is_private:
        vm.warn("a reserved-bit fault on a private access")
        return Error(EFAULT, "MMIO is shared only, yet the access is private")
    address = _address(fault)
    match vm.find_mmio(address):
        case MmioNote.CACHED:
            return Emulate(why="the vCPU remembers the address as MMIO")
        case MmioNote.CURRENT:
            _note_again(vm, fault, address)
            return Emulate(why="the entry says MMIO, of the current memslot generation")
        case MmioNote.STALE:
            return None
        case MmioNote.ABSENT if _is_virtual(vm, fault) and vm.walk_guest(address) is None:
            return NeedsGuestWalk("without the guest's tables there is no shadow table to look the address up in")
        case MmioNote.ABSENT:
            return Retry("the entry that faulted is no MMIO entry any more")
        case MmioNote.BROKEN:
            vm.warn("reserved bits in an entry that is not MMIO")
            return Error(EINVAL, "reserved bits in an entry that is not MMIO")


def known_mmio_ept(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """As ``known_mmio``. A misconfiguration while an event was delivered cannot be emulated: the VMM is told, and the
    event is lost. A violation in the same situation is handled like any other. (vmx_handle_exit)"""
    if fault.is_reserved and vm.facts.event_reinjected and not fault.is_prefetch:
        why = "MMIO was accessed while an event was delivered (KVM_INTERNAL_ERROR_DELIVERY_EV)"
        return Exit(Reason.INTERNAL_ERROR, why=why)
    return known_mmio(vm, fault, at)


def _is_virtual(vm: VmView, fault: PageFault) -> bool:
    return vm.facts.guest_paging and fault.kvm_get_fault_gpa() is None


def _note_again(vm: Ports, fault: PageFault, address: Gpa) -> None:
    # the kernel takes the frame from the entry; the vCPU remembers a virtual address only of a shadowed guest
    virtual = _is_virtual(vm, fault)
    guest = vm.walk_guest(address) if virtual or vm.facts.nested else None
    gpa = guest.gpa if isinstance(guest, GuestTranslation) else address
    vm.note_mmio(Gfn(gpa >> vm.page_shift), fault.gva if virtual else None)


def _is_indirect(vm: VmView, at: Progress) -> bool:
    # the table translates what the guest's own tables translate first (root_role.direct is clear)
    return at.guest is not None and vm.facts.guest_paging


def can_fast(fault: PageFault, vm: VmView, private: bool, gfn: Gfn) -> bool:
    """Whether a fault may be fixed without the lock: a write to a present entry, or with software accessed bits an
    entry that is not present. The kind of access must be the frame's. Fetches do not count. (page_fault_can_be_fast)
    """
    if fault.is_reserved or (vm.facts.private_memory and private != vm.is_private(gfn)):
        return False
    if fault.is_permission:
        return fault.is_write
    return not vm.facts.hardware_access_dirty


def fast_page_fault(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Give back write permission or the accessed state by compare-and-swap. (fast_page_fault)

    Never where the guest's tables are shadowed: entries that belong to them change under the lock only.
    """
    if (at.guest is not None and _is_indirect(vm, at)) or not can_fast(fault, vm, at.private, at.gfn):
        return None
    match vm.repair_fast(at.at, write=fault.is_write, execute=fault.is_exec):
        case MapResult() as result:
            return mapped(at, result)
        case Repair.FIXED:
            prot, size, _ = vm.find_leaf(at.at) or (R | W | X, 1 << vm.page_shift, None)
            return Fixed(size, PROTS[prot], "fixed without the lock")
        case Repair.SPURIOUS:
            return Spurious("the entry already allows the access")
        case Repair.NOT_HERE:
            return None


def apic_page(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """KVM's own page behind the local APIC: no memory for a nested guest, emulated without APIC virtualisation.

    Kernel: kvm_faultin_pfn.
    """
    if at.slot is None or at.slot.id != APIC_ACCESS_PAGE:
        return None
    if vm.facts.nested:
        at.slot = None  # KVM does not expose its APIC page to the guest's guest
        return None
    if not vm.facts.apic_virtualised:
        return Emulate(private=at.private, why="APIC accesses are not virtualised: nothing is cached")
    return None


def can_defer(facts: VmFacts) -> bool:
    """Whether the vCPU can do without the page for a while: it runs something else, or is halted until an interrupt.
    (kvm_can_do_async_pf)"""
    if not facts.interrupt_controller or facts.event_reinjected or facts.exception_pending:
        return False
    return facts.interrupts_allowed and (facts.halt_exits or facts.async_delivery)


def async_page_fault(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Let the guest run something else while the page is read in. A read-only slot is never queued: the address for
    that is asked for with write semantics. (__kvm_faultin_pfn, kvm_arch_setup_async_pf, kvm_setup_async_pf)"""
    if at.slot is None or not can_defer(vm.facts) or not vm.defer(fault, at.gfn, queue=not at.slot.readonly):
        return None
    return Retry("the page is fetched in the background")


def emulate_private(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
    """Private memory cannot be emulated: the VMM is told instead. (kvm_mmu_do_page_fault)"""
    if isinstance(outcome, Emulate) and at.private:
        return memory_fault(vm, at, EFAULT, "the access has to be emulated, but is private")
    return outcome


@cache
def unprotect(gpt_write: Callable[[PageFault], bool]) -> Conclude:
    """What follows WRITE_PROTECTED; *gpt_write*: see ``GPT_WRITE``."""

    def conclude(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
        """Kernel: kvm_mmu_write_protect_fault. With shadowed tables an event in flight cannot wait for the emulator."""
        if not isinstance(outcome, WriteProtected) or fault.is_prefetch:
            return outcome
        lifts = vm.facts.event_reinjected if _is_indirect(vm, at) else gpt_write(fault)
        return _write_protect_fault(vm, fault, at, unprotects=lifts)

    return conclude


def _write_protect_fault(vm: Ports, fault: MmioFault, at: Progress, *, unprotects: bool) -> Outcome:
    if vm.facts.repeats_unprotect:
        return Emulate(why="unprotecting did not help last time")
    if vm.find_mmio(_address(fault)) is MmioNote.CACHED:
        vm.warn("a write-protected frame is remembered as MMIO")
        return Emulate(why="the vCPU remembers the address as MMIO")
    if unprotects and vm.unprotect(at.gfn):
        return Retry("the frame is not write-protected any more")
    return Emulate(allow_retry=not vm.facts.nested, why="the write is emulated")


def _npf_gpt_write(fault: PageFault) -> bool:
    return fault.syndrome & GPT_WRITE == GPT_WRITE


def _ept_gpt_write(fault: PageFault) -> bool:
    return fault.is_permission and fault.is_write and fault.is_table_walk


def huge_page_disallowed(fault: PageFault, vm: VmView) -> bool:
    """Whether the workaround for a CPU erratum keeps a fetch from being given a block (fault->huge_page_disallowed)."""
    return fault.is_exec and vm.facts.small_exec


def stay_small(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A block does not replace a table page that was made for a fetch: one level down, and the bits of the frame number
    that this level translates are put back. (disallowed_hugepage_adjust)"""
    if not vm.facts.small_exec or at.slot is None:
        return None
    while at.size > 1 << vm.page_shift and vm.fetched_small(at.at, at.size):
        larger, at.size = at.size, at.size >> _LEVEL_BITS
        between = larger - at.size
        at.at = Gpa(at.at | at.gpa & between)
        at.pfn = Pfn(at.pfn | (at.gpa & between) >> vm.page_shift)
    return None


_LEVEL_BITS: Final = 9


def rmp_handler_runs(fault: PageFault, outcome: Outcome) -> bool:
    """Whether npf_interception goes on to the handler of RMP faults: after any fault that KVM_RUN survives, whether or
    not the guest is encrypted (the handler gives up by itself where the frame is shared)."""
    return bool(fault.syndrome >> 31 & 1) and not (isinstance(outcome, Error | Exit | Inject) and outcome.errno)


def _nested(mmio: Joint, walk: Joint, gpt_write: Callable[[PageFault], bool]) -> Joints:
    return Joints(
        screen=(check_root, mmio),
        translate=(walk,),
        repair=(fast_page_fault,),
        special_slot=(apic_page,),
        defer=(async_page_fault,),
        prepare_page=(stay_small, nested_entry),
        conclude=(emulate_private, unprotect(gpt_write)),
    )


EPT_JOINTS: Final = {
    "6.12": _nested(known_mmio_ept, walk_ept(later=False), _ept_gpt_write),
    "7.4": _nested(known_mmio_ept, walk_ept(later=True), _ept_gpt_write),
}
NPT_JOINTS: Final = {
    "6.12": _nested(known_mmio, walk_npt(later=False), _npf_gpt_write),
    "7.4": _nested(known_mmio, walk_npt(later=True), _npf_gpt_write),
}
_SHADOW: Final = Joints(
    screen=(check_root, known_mmio),
    translate=(walk_guest,),
    repair=(fast_page_fault,),
    special_slot=(apic_page,),
    defer=(async_page_fault,),
    prepare_page=(stay_small, shadow_entry),
    conclude=(emulate_private, unprotect(lambda fault: False)),  # a #PF does not tell walks of the guest's tables
)
SHADOW_JOINTS: Final = {"6.12": _SHADOW, "7.4": _SHADOW}
