"""The steps that only Book3S HV has (kvmppc_book3s_radix_page_fault, __kvmhv_nested_page_fault).

What the guest gets for a bad access is always a data storage interrupt, also where the access was a fetch: KVM does not
look at the vector there.
"""

from __future__ import annotations

from errno import EFAULT
from typing import Final

from arch.powerpc.instruction import CacheOp, LoadStore, decode, is_store
from arch.powerpc.mmio import access_and_completion
from arch.powerpc.registers import CANARY, HDSISR
from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import PROTS, Memory, R, W
from kvmfault.contract.outcome import Done, Error, Exit, Fixed, Inject, Outcome, Reason, Resume, Retry
from kvmfault.contract.ports import GuestWalkFault, Ports, WalkEnd
from kvmfault.contract.progress import Progress
from kvmfault.types import Gpa, Pfn

_ISSTORE, _PROTFAULT, _BADACCESS = (HDSISR[name].mask for name in ("ISSTORE", "PROTFAULT", "BADACCESS"))
_NOHPTE, _NOEXEC, _SET_RC = (HDSISR[name].mask for name in ("NOHPTE", "NOEXEC_OR_G", "SET_RC"))
_UNSUPP_MMU, _PRTABLE = (HDSISR[name].mask for name in ("UNSUPP_MMU", "PRTABLE"))
_FOUND: Final = _PROTFAULT | _BADACCESS | _NOEXEC | HDSISR["BAD_COPYPASTE"].mask
"""Hardware found an entry, which refuses the access."""
_OTHER_CAUSES: Final = (
    _NOHPTE
    | _PROTFAULT
    | sum(
        HDSISR[name].mask
        for name in (
            *("BAD_DIRECT_ST", "BADACCESS", "BAD_EXT_CTRL", "ATTR_CONFLICT", "UNSUPP_MMU", "PRTABLE", "ICSWX_NO_CT"),
            *("BAD_COPYPASTE", "BAD_AMO", "BAD_CI_LDST"),
        )
    )
)
"""What keeps a fault going on after the reference and change bits were set (DSISR_BAD_FAULT_64S and two more)."""


def _dsisr(fault: MmioFault) -> int:
    return fault.syndrome & 0xFFFF_FFFF


def _instruction(fault: MmioFault) -> int:
    return fault.syndrome >> 32


def dsi(fault: MmioFault, dsisr: int, why: str) -> Inject:
    """A data storage interrupt at the effective address. (kvmppc_core_queue_data_storage)"""
    return Inject("dsi", fault.gva or 0, dsisr, why=why)


# screen


def unusual_errors(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """What is no fault to be handled: HDSISR was not written, the tree is malformed, the access is never allowed.

    Kernel: the canary in kvmppc_handle_exit_hv; head of kvmppc_book3s_radix_page_fault. For a nested guest nobody looks
    at the last two before its tables are walked.
    """
    dsisr = _dsisr(fault)
    if dsisr == CANARY and not fault.is_exec:
        return Retry("the CPU did not write HDSISR: the guest faults again")
    if vm.facts.nested:
        return None
    if dsisr & _UNSUPP_MMU:
        return Error(EFAULT, "the tree's configuration is one that the MMU does not support")
    if dsisr & _BADACCESS:
        return dsi(fault, dsisr, "the access is not allowed to such memory")
    return None


# translate


def walk_nested(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Through the partition-scoped tree of a nested guest's own hypervisor. (kvmhv_translate_addr_nested)

    That hypervisor gets the same interrupt, with the direction of the access. Where hardware found an entry, only a
    stale one can be at fault: it goes, and the guest tries again. The model's trees have no reference and change bits:
    that these are missing is never the hypervisor's business here (kvmhv_handle_nested_set_rc).
    """
    gpa = fault.kvm_get_fault_gpa()
    if not vm.facts.nested or gpa is None:
        return None
    walked = vm.walk_guest(gpa)
    if walked is None:
        return None
    if isinstance(walked, GuestWalkFault):
        return _to_hypervisor(vm, fault, gpa, _WALK_FLAGS.get(walked.end, _NOHPTE), "does not translate")
    if fault.is_write:
        missing = 0 if walked.writable else _PROTFAULT
    elif fault.is_exec:
        missing = 0 if walked.may_execute(vm.facts.user_level) else _NOEXEC
    else:
        missing = 0 if walked.readable or walked.writable else _PROTFAULT
    if missing:
        return _to_hypervisor(vm, fault, gpa, missing, "forbids the access")
    at.guest = walked
    at.at = gpa
    return None


def _to_hypervisor(vm: Ports, fault: MmioFault, gpa: Gpa, flags: int, why: str) -> Outcome:
    if _dsisr(fault) & _FOUND:
        vm.drop_leaf(gpa)
        return Retry(f"hardware found an entry, but the nested guest's own tree {why}: the entry goes")
    kind = "hisi" if fault.is_exec else "hdsi"
    return Inject(kind, fault.gva or 0, _dsisr(fault) & _ISSTORE | flags, why=f"the nested guest's own tree {why}")


_WALK_FLAGS: Final = {WalkEnd.UNREADABLE: _PRTABLE, WalkEnd.RESERVED: _UNSUPP_MMU}


# repair


def set_reference_and_change(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Do what the hardware could not: set the reference bit, and for a store the change bit. (kvmppc_hv_handle_set_rc)

    Other causes reported with it still need an entry of their own.
    """
    if not (_dsisr(fault) & _SET_RC and at.backed):
        return None
    leaf = vm.find_leaf(at.at)
    if leaf is None or (fault.is_write and not leaf.prot & W):
        return None
    vm.repair_young(at.at)
    if fault.is_write:
        vm.relax(at.at, W, Memory.NORMAL)
    if _dsisr(fault) & _OTHER_CAUSES:
        return None
    return Fixed(leaf.size, PROTS[leaf.prot], "reference and change bits set")


# unbacked


def reject_unbacked(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The guest's own tables where no memory is, and stores to a read-only slot. (kvmppc_book3s_radix_page_fault)

    A nested guest gets its interrupts itself, its hypervisor none. (__kvmhv_nested_page_fault)
    """
    dsisr = _dsisr(fault)
    if vm.facts.nested and dsisr & _SET_RC:
        return Retry("there is no entry to set reference and change bits in: the nested guest's goes")
    if at.slot is not None:
        return dsi(fault, _ISSTORE | _PROTFAULT, "a store to a read-only slot")
    if dsisr & (_PRTABLE | _BADACCESS | _SET_RC):
        return dsi(fault, dsisr, "a bad address in the guest's own tables")
    return None


def emulate_access(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Fetch the instruction that faulted and carry it out. (kvmppc_hv_emulate_mmio, kvmppc_emulate_mmio)

    The instruction may have changed since it faulted: one of the other direction is not emulated, the guest runs it.
    """
    if fault.is_exec:
        return Retry("there is no instruction to fetch where no memory is: the guest faults for ever")
    word = _instruction(fault)
    if word and is_store(word) != fault.is_write:
        return Retry("the instruction found does not go in the direction of the fault: the guest runs it again")
    match decode(word):
        case LoadStore() as found:
            gpa = Gpa(at.gpa | (fault.gpa_offset or 0))
            access, completion = access_and_completion(vm, found, gpa)
            return Exit(Reason.MMIO, access, completion=completion, why="no memory there: a device access")
        case CacheOp():
            return Resume(Done.SKIPPED, "a cache operation where no memory is does nothing")
        case None:
            flags = _BADACCESS | (_ISSTORE if fault.is_write else 0)
            return dsi(fault, flags, "a device access by an instruction that KVM does not know or emulate")


# under the lock


def refuse_incongruent(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A block of the host is mapped as one where guest and user address are congruent, or else one page of it.

    Nothing looks whether the slot covers the block: it may reach into host memory outside of the slot.
    Kernel: the level chosen in kvmppc_book3s_instantiate_page.
    """
    page = 1 << vm.page_shift
    if at.size > page and (at.gpa ^ at.hva) & (at.size - 1) & -page:
        inside = at.size - page
        at.at = Gpa(at.at | at.gpa & inside)
        at.pfn = Pfn(at.pfn | (at.hva & inside) >> vm.page_shift)
        at.size = page
    return None


JOINTS: Final = Joints(
    screen=(unusual_errors,),
    translate=(walk_nested,),
    repair=(set_reference_and_change,),
    reject_unbacked=(reject_unbacked,),
    decode_mmio=(emulate_access,),
    prepare_page=(refuse_incongruent,),
)
assert R == 4  # the protection bits above are the library's
