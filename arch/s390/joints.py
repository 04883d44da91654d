"""The steps that only s390 has, by kernel.

A guest is never told a translation fault of KVM's own tables: what cannot be mapped is an addressing exception, or
fails KVM_RUN. There is no device access, so nothing is decoded.
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, EINTR, EOPNOTSUPP
from typing import Final

from arch.s390.registers import ADDRESSING, DAT, NON_SECURE_ACCESS, SECURE_ACCESS, SECURE_VIOLATION
from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import PROTS
from kvmfault.contract.outcome import Done, Error, Fixed, Inject, Outcome, Resume, Retry, Spurious
from kvmfault.contract.ports import MapResult, PinError, Ports, Repair
from kvmfault.contract.progress import Progress
from kvmfault.path.commit import mapped

_CODE_MASK: Final = 0x7F
_AS_SHIFT: Final = 16


def addressing(why: str) -> Inject:
    """An addressing exception; the guest's PSW is moved past the instruction. (vcpu_post_run_addressing_exception)"""
    return Inject("addressing", 0, ADDRESSING, why=why)


# screen


def nobody_waits(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A page that was fetched in the background is mapped when the guest touches it. (kvm_arch_async_page_ready)"""
    return Retry("the page is there: the guest is told, and nothing is mapped") if fault.is_prefetch else None


def sort_codes(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Which interruptions are faults of the guest's memory. (vcpu_post_run_handle_fault)

    An address space other than the primary one marks the VM as broken (KVM_BUG), and the fault is handled all the same.
    """
    code = fault.syndrome & _CODE_MASK
    if code == 0:
        return Retry("no program interruption: the guest runs on")
    if code not in (*DAT, SECURE_ACCESS, NON_SECURE_ACCESS, SECURE_VIOLATION):
        vm.warn("an unexpected program interruption: the VM is marked as broken")
        return Resume(Done.SIGNALLED, "an unexpected program interruption: SIGSEGV")
    if fault.syndrome >> _AS_SHIFT & 3:
        vm.warn("the fault is not in the primary address space: the VM is marked as broken")
    return None


def secure_storage(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Pages of protected guests. One left by an earlier guest is destroyed; one not secure yet is imported if it is
    there, else it is first mapped for writing. (kvm_s390_pv_destroy_page, kvm_s390_pv_convert_to_secure)

    Both can fail with a SIGSEGV, where a page belongs to two guests; the model does not know the ultravisor's answer.
    """
    code = fault.syndrome & _CODE_MASK
    if code in (SECURE_ACCESS, SECURE_VIOLATION):
        return Retry("the page of an earlier protected guest is destroyed")
    gpa = fault.kvm_get_fault_gpa()
    if code == NON_SECURE_ACCESS and gpa is not None and vm.find_leaf(gpa) is not None:
        return Retry("the page is imported into the protected guest")
    return None


# repair


def minor_fault(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A leaf is there, and only old or protected for tracking. No memslot is asked. (gmap_try_fixup_minor)"""
    match vm.repair_fast(at.at, write=fault.is_write, execute=False):
        case MapResult() as result:
            return mapped(at, result)
        case Repair.SPURIOUS:
            return Spurious("the entry already allows the access")
        case Repair.FIXED:
            leaf = vm.find_leaf(at.at)
            size, prot = (leaf.size, leaf.prot) if leaf is not None else (1 << vm.page_shift, 0)
            return Fixed(size, PROTS[prot], "young or dirty again")
        case Repair.NOT_HERE:
            return None


# unbacked


def no_memory(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Outside of memory there is nothing. (is_noslot_pfn; in 6.12 no segment of gmap)"""
    return addressing("no memory there") if at.slot is None else None


# wait


def pfault(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Let the guest run something else while the page is read in. (kvm_arch_setup_async_pf)

    Only if the guest asked by DIAGNOSE 258 and can take the interruption now.
    """
    facts = vm.facts
    if not (facts.async_delivery and facts.interrupts_allowed) or not vm.defer(fault, at.gfn, queue=True):
        return None
    return Retry("the page is fetched in the background")


# after the path


def all_addressing(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
    """6.12: whatever the host cannot give, failed memory too, is an addressing exception. (EFAULT of gmap_fault)"""
    failed = isinstance(outcome, Error) and outcome.errno == EFAULT and at.pin is not None
    return addressing(outcome.why) if isinstance(outcome, Error) and failed else outcome


def signal_is_eagain(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
    """6.18: KVM_RUN fails with EAGAIN, and not with EINTR, where a signal is pending. (KVM_PFN_ERR_SIGPENDING)"""
    if isinstance(outcome, Error) and outcome.errno == EINTR:
        return Error(EAGAIN, outcome.why)
    return outcome


def other_errors(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
    """7.4: as 6.18, and writing to memory that the host has read-only is EOPNOTSUPP. (kvm_s390_faultin_gfn)"""
    pin = at.pin
    if isinstance(outcome, Error) and pin is not None and pin.error is PinError.RO_FAULT:
        return Error(EOPNOTSUPP, outcome.why)
    return signal_is_eagain(vm, fault, at, outcome)


_SCREEN: Final = (nobody_waits, sort_codes, secure_storage)
JOINTS: Final = {
    "6.12": Joints(screen=_SCREEN, reject_unbacked=(no_memory,), defer=(pfault,), conclude=(all_addressing,)),
    "6.18": Joints(screen=_SCREEN, reject_unbacked=(no_memory,), defer=(pfault,), conclude=(signal_is_eagain,)),
    "7.4": Joints(
        screen=_SCREEN,
        repair=(minor_fault,),
        reject_unbacked=(no_memory,),
        defer=(pfault,),
        conclude=(other_errors,),
    ),
}
