"""Walks of the guest's own tables: the paging of a shadowed guest, and the second stage of a nested guest's hypervisor.

What the walk refuses is the guest's to know: a #PF, or the EPT violation, EPT misconfiguration or nested page fault
that the nested guest's hypervisor would have got. Otherwise the guest's rights bound those of the new entry.
Kernel: arch/x86/kvm/mmu/paging_tmpl.h. Protection keys take no part: KVM offers them only where nothing is shadowed.
"""

from __future__ import annotations

from typing import Final

from arch.x86.pferr import FETCH, GUEST_FINAL, GUEST_PAGE, PRESENT, RSVD, USER, WRITE
from arch.x86.spte import TAG_NESTED, TAG_SUPERVISOR
from kvmfault.contract.backend import Joint
from kvmfault.contract.fault import MmioFault, PageFault
from kvmfault.contract.format import R, W, X
from kvmfault.contract.outcome import Inject, NeedsGuestWalk, Outcome, Retry
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, Ports, VmFacts, WalkEnd
from kvmfault.contract.progress import Progress
from kvmfault.types import Gpa

_NONPAGING_BLOCK: Final = 2 << 20
_LOW: Final = 0xFFFF_FFFF
_STAGE: Final = GUEST_FINAL | GUEST_PAGE
_MISSING: Final = "the guest's own tables do not map the address"
_FORBIDDEN: Final = "the guest's own tables forbid the access"


def forbidden(code: int, guest: GuestTranslation, facts: VmFacts, *, write_protect: bool) -> bool:
    """Whether the guest's paging refuses an access; *code*: its WRITE, USER and FETCH bits.

    Kernel: permission_fault, update_permission_bitmask.
    """
    user, write, fetch = bool(code & USER), bool(code & WRITE), bool(code & FETCH)
    if user and not guest.user:
        return True
    if write and not guest.writable and (user or write_protect):
        return True
    if fetch and not guest.executable and facts.guest_no_execute:
        return True
    if not write and not fetch and not guest.readable:
        return True
    supervisor_on_user = guest.user and not user
    return supervisor_on_user and (facts.guest_smep if fetch else facts.guest_smap)


def _walk_code(walked: GuestWalkFault) -> int:
    if walked.status is not None:
        return walked.status
    return PRESENT | RSVD if walked.end in (WalkEnd.RESERVED, WalkEnd.ADDRESS_SIZE) else 0


def _error_code(code: int, access: int, facts: VmFacts) -> int:
    fetches = facts.guest_no_execute or facts.guest_smep  # else bit 4 is reserved
    return code | access & (WRITE | USER | (FETCH if fetches else 0))


def _access(fault: PageFault) -> int:
    return (WRITE if fault.is_write else 0) | (USER if fault.is_user else 0) | (FETCH if fault.is_exec else 0)


def _reflect(fault: PageFault, what: str, address: int, syndrome: int, why: str) -> Outcome:
    if fault.is_prefetch:
        return Retry(f"{why}; nobody waits for the page")
    return Inject(what, address, syndrome, why=why)


# Shadow paging.


def walk_guest(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """CR2 to a guest frame through the guest's own tables, or the #PF that the guest gets.

    A guest without paging has physical addresses already, in blocks of at most 2M. Kernel: FNAME(walk_addr) and
    FNAME(page_fault); nonpaging_page_fault.
    """
    gva, facts = fault.gva, vm.facts
    if gva is None:
        return _NEEDS_WALK
    if facts.guest_paging:
        guest = vm.walk_guest(Gpa(gva))
        if guest is None:
            return _NEEDS_WALK
        access = _access(fault)
        if isinstance(guest, GuestWalkFault):
            return _reflect(fault, "#PF", gva, _error_code(_walk_code(guest), access, facts), _MISSING)
        if forbidden(access, guest, facts, write_protect=facts.guest_write_protect):
            return _reflect(fault, "#PF", gva, _error_code(PRESENT, access, facts), _FORBIDDEN)
    else:
        guest = GuestTranslation(Gpa(gva), _NONPAGING_BLOCK)
    at.guest = guest
    at.at = Gpa(gva & -(1 << vm.page_shift))  # the shadow table is indexed by virtual address
    return None


_NEEDS_WALK: Final = NeedsGuestWalk("the address is virtual: CR2 and the guest's tables are needed to go on")


def shadow_entry(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Under the lock: the guest's entry is still what the walk found, and bounds the new one.

    Where CR0.WP is clear, the supervisor's write to a read-only page makes an entry for the supervisor alone.
    Kernel: FNAME(gpte_changed) in FNAME(fetch); FNAME(page_fault).
    """
    guest, facts = at.guest, vm.facts
    if guest is None or not facts.guest_paging:
        return None
    if vm.walk_guest(Gpa(fault.gva or 0)) != guest:
        return _CHANGED
    writable, user, executable = guest.writable, guest.user, guest.executable
    if fault.is_write and not writable and not facts.guest_write_protect and not fault.is_user and at.slot is not None:
        writable, user = True, False
        executable = executable and not facts.guest_smep
    _bound(at, writable=writable, user=user, executable=executable)
    if not user:
        at.tag = TAG_SUPERVISOR
    return None


_CHANGED: Final = Retry("the guest changed its tables meanwhile")


def _bound(at: Progress, *, writable: bool, user: bool, executable: bool) -> None:
    if at.slot is None:  # an MMIO entry keeps what the guest allows; "read" is kept in the place of "user"
        at.prot = (W if writable else 0) | (R if user else 0)
        return
    if writable and at.guest is not None and not at.guest.writable and at.map_writable:
        at.prot |= W  # by CR0.WP, against the guest's entry
    at.prot &= R | (W if writable else 0) | (X if executable else 0)


# Nested paging: the guest's guest runs on a shadow of its hypervisor's second stage.


def _nested_address(fault: PageFault) -> Gpa | None:
    gpa = fault.kvm_get_fault_gpa()
    return None if gpa is None else Gpa(gpa | (fault.gpa_offset or 0))


def nested_entry(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """As ``shadow_entry``, for a nested guest; with a page-modification log its writes are found by protection.

    Kernel: FNAME(fetch); kvm_mmu_page_ad_need_write_protect.
    """
    guest = at.guest
    if guest is None:
        return None
    if vm.walk_guest(_nested_address(fault) or Gpa(0)) != guest:
        return _CHANGED
    _bound(at, writable=guest.writable, user=guest.readable, executable=guest.executable)
    if vm.facts.page_modification_log:
        at.tag = TAG_NESTED
    return None


def _walk_nested(vm: Ports, fault: MmioFault) -> tuple[Gpa, GuestTranslation | GuestWalkFault] | None:
    # a nested guest's address, and what its hypervisor's tables say of it
    address = _nested_address(fault) if vm.facts.nested else None
    guest = vm.walk_guest(address) if address is not None else None
    return None if address is None or guest is None else (address, guest)


def _translated(vm: Ports, at: Progress, address: Gpa, guest: GuestTranslation) -> None:
    at.guest = guest
    at.at = Gpa(address & -(1 << vm.page_shift))


def walk_ept(*, later: bool) -> Joint:
    """The walk of a nested guest's EPT. *later*: the qualification as kernels after 6.12 make it."""

    def walk_nested_ept(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """Kernel: the EPT build of FNAME(walk_addr) and FNAME(page_fault); nested_ept_inject_page_fault."""
        walked = _walk_nested(vm, fault)
        if walked is None:
            return None
        address, guest = walked
        if isinstance(guest, GuestWalkFault):
            if _walk_code(guest) & RSVD:
                return _reflect(fault, "ept_misconfig", address, 0, "the nested guest's own EPT is misconfigured")
            qualification = ept_qualification(fault, guest.granted, later=later)
            return _reflect(fault, "ept_violation", address, qualification, _MISSING)
        granted = (R if guest.readable else 0) | (W if guest.writable else 0) | (X if guest.executable else 0)
        if granted & W and not granted & R:  # Intel SDM, "EPT Misconfigurations"
            return _reflect(fault, "ept_misconfig", address, 0, "the nested guest's own EPT is misconfigured")
        wanted = (R if fault.is_read else 0) | (W if fault.is_write else 0) | (X if fault.is_exec else 0)
        if wanted & ~granted:
            qualification = ept_qualification(fault, granted, later=later)
            return _reflect(fault, "ept_violation", address, qualification, _FORBIDDEN)
        _translated(vm, at, address, guest)
        return None

    return walk_nested_ept


def ept_qualification(fault: PageFault, granted: int, *, later: bool) -> int:
    """Exit qualification for the nested guest's hypervisor. *granted*: R, W, X bits of its own entries.

    Bits 2:0 tell the access, 5:3 the entries, the rest is the real qualification's: bits 8:7, and *later* 11:9. *later*
    kernels report one kind of access, and a read with every access of a walk.
    """
    access = fault.is_read | fault.is_write << 1 | fault.is_exec << 2
    kept = 0x180
    if later:
        access = (2 if fault.is_write else 4 if fault.is_exec else 1) | fault.is_table_walk
        kept = 0xF80
    rights = (granted >> 2 & 1) | (granted & 2) | (granted & 1) << 2
    return access | rights << 3 | fault.syndrome & kept


def walk_npt(*, later: bool) -> Joint:
    """The walk of a nested guest's NPT. *later*: EXITINFO1 as kernels after 6.12 make it."""

    def walk_nested_npt(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """Kernel: the 64-bit build of FNAME(walk_addr) and FNAME(page_fault); nested_svm_inject_npf_exit."""
        walked = _walk_nested(vm, fault)
        if walked is None:
            return None
        address, guest = walked
        access = fault.syndrome & (WRITE | USER | FETCH)
        if isinstance(guest, GuestWalkFault):
            code, why = _walk_code(guest), _MISSING
        elif forbidden(access, guest, vm.facts, write_protect=False):  # CR0.WP counts for nothing here
            code, why = PRESENT, _FORBIDDEN
        else:
            _translated(vm, at, address, guest)
            return None
        place = _place(vm, fault) if later else fault.syndrome & ~_LOW
        return _reflect(fault, "npf", address, place | _error_code(code, access, vm.facts), why)

    return walk_nested_npt


def _place(vm: Ports, fault: PageFault) -> int:
    place = fault.syndrome & _STAGE
    if place in (GUEST_FINAL, GUEST_PAGE):
        return place
    if not fault.is_prefetch:
        vm.warn("a nested page fault that is neither of a walk nor of the final access, or both")
    return GUEST_FINAL
