"""The steps that only arm64 has, the same for every kernel: where kernels differ, they read the policy.

Syndrome bits are read through the same expressions as the facts.
"""

from __future__ import annotations

from errno import EAGAIN, EFAULT, ENOSYS
from typing import Final

from arch.arm64 import inject
from arch.arm64.accessors import SANITISED, exclusive_atomic, needs_r, needs_w, needs_x
from arch.arm64.capture import sources
from arch.arm64.facts import FSC, ISV, S1PTW, external_walk, iabt
from arch.arm64.mmio import access_and_completion
from arch.arm64.registers import ESR_EL2
from arch.arm64.syndrome import holds, value, with_status
from kvmfault.algebra.expr import NEVER
from kvmfault.contract.backend import Joints, needed_where
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import PROTS
from kvmfault.contract.outcome import (
    Done,
    Error,
    Exit,
    ExternalAbort,
    Fixed,
    Inject,
    Outcome,
    Reason,
    Resume,
    Retry,
    UndecodedMmio,
)
from kvmfault.contract.ports import GuestWalkFault, Ports, WalkEnd
from kvmfault.contract.progress import Progress
from kvmfault.contract.values import ExternalAborts, NestedWalkError, TagRefusal, UnsupportedAtomics, WideAccesses
from kvmfault.types import Gpa

_PAGE_OFFSET: Final = 0xFFF
_is_iabt: Final = holds(iabt)
_is_exclusive_atomic: Final = holds(exclusive_atomic)
_needs_r, _needs_w, _needs_x = holds(needs_r), holds(needs_w), holds(needs_x)
_sanitised: Final = value(SANITISED)
_far_is_invalid: Final = holds(ESR_EL2["FnV"].is_set)
_is_register_page: Final = holds(ESR_EL2["VNCR"].is_set)
_on_second_stage_walk: Final = holds(external_walk & S1PTW)
# bits 12:11 tell which load or store of 64 bytes it was, with the status codes of translation, access flag, permission
_is_wide: Final = holds(ISV & ~ESR_EL2["SET"].is_(0) & FSC.one_of((*range(0x04, 0x10), 0x2A, 0x2B)))
_EXTERNAL_ABORT_BITS: Final = sum(ESR_EL2[name].mask for name in ("EC", "IL", "SET", "FnV", "EA", "CM", "WnR", "FSC"))


def _byte_address(gpa: Gpa, fault: MmioFault) -> Gpa:
    return Gpa(gpa | (fault.gva or 0) & _PAGE_OFFSET)


# screen


def lose_address(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Where the address has to be translated again and is not, the hypervisor resumes the guest. (__get_fault_info)"""
    if not vm.facts.retranslation_fails:
        return None
    policy = at.policy
    again, _ = sources(
        policy.address_capture, policy.distrusted_faults, policy.root_address_size, misreports=vm.facts.misreports
    )
    if again is NEVER or not holds(again)(fault):
        return None
    return Retry("the faulting address no longer translates through the guest's first stage: the guest faults again")


def external_abort(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The host's error handling, the VMM if it asked, or the guest as an SError. (kvm_handle_guest_sea)

    6.12 has it after the range checks, which are for translation faults only, so no fault notices.
    """
    if not fault.is_external_abort:
        return None
    facts = vm.facts
    if facts.host_claims_aborts:
        return Resume(Done.CLAIMED, "the host's error handling took the external abort")
    asked = at.policy.external_aborts is ExternalAborts.VMM_IF_ASKED and facts.vmm_takes_aborts
    if not asked:
        return inject.serror("an external abort that nobody claims becomes an SError of the guest")
    # without RAS only accesses of the host's own are taken to it
    if not facts.ras or (facts.in_hypervisor and _is_register_page(fault)) or _on_second_stage_walk(fault):
        return inject.serror("an external abort on an access of the host's own becomes an SError of the guest")
    gva = 0 if _far_is_invalid(fault) else fault.gva or 0
    detail = ExternalAbort(fault.syndrome & _EXTERNAL_ABORT_BITS, gva, fault.kvm_get_fault_gpa())
    return Exit(Reason.EXTERNAL_ABORT, detail, why="an external abort that nobody claims: the VMM asked for it")


def beyond_limits(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Addresses that the host, or this VM's table, does not have; translation faults only.

    Kernel: the range checks of kvm_handle_guest_abort; kvm_inject_size_fault.
    """
    gpa = fault.kvm_get_fault_gpa()
    if gpa is None or not fault.is_translation:
        return None
    facts = vm.facts
    if gpa >> facts.ipa_limit_bits:
        why = "the IPA is beyond what the host supports"
        return inject.size_fault(vm, fault, at.policy, _byte_address(gpa, fault), why, fetch=_is_iabt(fault))
    if gpa >> facts.table_bits or gpa >> vm.format.gpa_bits:
        why = "the IPA is beyond the VM's table"
        return inject.external(vm, fault, at.policy, _byte_address(gpa, fault), why, fetch=_is_iabt(fault))
    return None


def unsupported_status(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Only translation, permission and access-flag faults go on, and atomics by policy.

    "Unsupported FSC" of kvm_handle_guest_abort.
    """
    if fault.is_translation or fault.is_permission or fault.is_access_flag:
        return None
    if at.policy.unsupported_atomics is UnsupportedAtomics.TO_GUEST and _is_exclusive_atomic(fault):
        return None
    return Error(EFAULT, "KVM does not handle faults with this status")


# translate


def walk_nested(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Through the second stage of a nested guest's own hypervisor. (kvm_walk_nested_s2, kvm_s2_handle_perm_fault)

    A table that cannot be read injects the walk's status and fails KVM_RUN as well.
    """
    if not vm.facts.nested:
        return None
    gpa = fault.kvm_get_fault_gpa()
    walked = vm.walk_guest(gpa) if gpa is not None else None
    if gpa is None or walked is None:
        return None
    if isinstance(walked, GuestWalkFault):
        status, errno = walk_status(walked)
        if errno == EAGAIN and at.policy.nested_walk_error is NestedWalkError.RETRY_IF_RACED:
            return Retry("the nested guest's table changed during the walk")
        return _forward(fault, status, "the nested guest's own table does not translate", errno)
    missing = (
        (_needs_r(fault) and not walked.readable)
        or (_needs_w(fault) and not walked.writable)
        or (_needs_x(fault) and not walked.may_execute(vm.facts.user_level))
    )
    if missing:
        status = _PERMISSION_LEVEL_0 + (walked.level & 3)
        return _forward(fault, status, "the nested guest's own table forbids the access", 0)
    at.guest = walked
    at.tag = walked.level
    at.at = gpa
    return None


_PERMISSION_LEVEL_0: Final = 0x0C
_WALK_LEVEL_0: Final = {WalkEnd.ADDRESS_SIZE: 0x00, WalkEnd.NOT_ACCESSED: 0x08}


def walk_status(walked: GuestWalkFault) -> tuple[int, int]:
    """(status code, errno) of a walk that failed; anything malformed is a translation fault.

    Kernel: walk_nested_s2_pgd, compute_fsc.
    """
    if walked.status is not None:
        return walked.status, walked.errno
    if walked.end is WalkEnd.UNREADABLE:
        return 0, walked.errno or EFAULT
    return _WALK_LEVEL_0.get(walked.end, 0x04) | walked.level & 3, 0


def _forward(fault: MmioFault, status: int, why: str, errno: int) -> Inject:
    # struct kvm_s2_trans keeps the syndrome in 32 bits: ISS2 is not forwarded
    syndrome = with_status(fault, status) & 0xFFFF_FFFF
    return Inject("s2_fault", fault.gva or 0, syndrome, errno, why=why)


# repair


def set_access_flag(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Mark the entry young at the faulting address. (handle_access_fault)"""
    if not (fault.is_access_flag and at.backed):
        return None
    leaf = vm.find_leaf(at.at)
    vm.repair_young(at.at)
    if leaf is None:
        return Retry("the entry is gone")
    return Fixed(leaf.size, PROTS[leaf.prot], "access flag set")


# unbacked


def refuse_unbacked(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Fetches (by class, so also a fetch's table walk), table walks, and cache operations outside slots.

    Kernel: what kvm_handle_guest_abort asks before io_mem_abort.
    """
    if _is_iabt(fault):
        return inject.external(vm, fault, at.policy, fault.gva, "a fetch from where no memory is", fetch=True)
    if fault.is_table_walk:
        why = "a guest table where no memory is, or a write to a read-only one"
        return inject.external(vm, fault, at.policy, fault.gva, why, fetch=False)
    if at.slot is None and fault.is_cache_op:
        return Resume(Done.SKIPPED, "a cache operation where no memory is does nothing")
    return None


def decode_access(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The syndrome describes a load or store, or user space, the guest, or nobody can tell. (io_mem_abort)"""
    gpa = Gpa(at.gpa | (fault.gpa_offset or 0))
    if fault.mmio_size is not None:
        if at.policy.wide_accesses is WideAccesses.TO_VMM and _is_wide(fault):
            detail = UndecodedMmio(with_status(fault, 0), gpa)
            return Exit(Reason.WIDE_MMIO, detail, why="a device access of 64 bytes: user space decodes it")
        access, completion = access_and_completion(vm, fault, gpa, at.policy)
        return Exit(Reason.MMIO, access, completion=completion, why="no memory there: a device access")
    if vm.facts.protected:
        why = "an undescribed device access of a protected VM"
        return inject.external(vm, fault, at.policy, fault.gva, why, fetch=False)
    if vm.facts.undecoded_mmio_exits:
        detail = UndecodedMmio(_sanitised(fault), gpa)
        why = "the syndrome does not describe the access: user space decodes it"
        return Exit(Reason.UNDECODED_MMIO, detail, why=why)
    return Error(ENOSYS, "a device access that the syndrome does not describe (ISV = 0)")


# before the entry


def refuse_device_fetch(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Code does not run from device memory. (-ENOEXEC of user_mem_abort)"""
    return inject.external(vm, fault, at.policy, fault.gva, "a fetch from device memory", fetch=True)


@needed_where(lambda policy: policy.unsupported_atomics is UnsupportedAtomics.TO_GUEST)
def refuse_exclusive(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Memory that does not support the access gives it back to the guest; a page of a file is mapped all the same.

    Kernel: kvm_s2_fault_compute_prot; gmem_abort has no such test.
    """
    if fault.is_translation or at.from_file or not _is_exclusive_atomic(fault):
        return None
    return inject.atomic(vm, fault, at.policy, "this memory does not support the exclusive or atomic access")


@needed_where(lambda policy: policy.tag_refusal is TagRefusal.BEFORE_LOCK)
def refuse_tags(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A guest that uses memory tags gets no memory that may not hold them. (kvm_vma_mte_allowed)"""
    if not vm.facts.tagging or fault.is_permission or at.device or at.area is None or at.area.tags_allowed:
        return None
    return Error(EFAULT, "the guest uses memory tags, which the host area does not allow")


def prepare_tags(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Memory tags are initialised before the guest sees the page. (sanitise_mte_tags)"""
    if not vm.facts.tagging or fault.is_permission or at.device or at.from_file:
        return None
    refused = refuse_tags(vm, fault, at) if at.policy.tag_refusal is TagRefusal.UNDER_LOCK else None
    if refused is None:
        vm.prepare_page(at.pfn, at.size)
    return refused


JOINTS: Final = Joints(
    screen=(lose_address, external_abort, beyond_limits, unsupported_status),
    translate=(walk_nested,),
    repair=(set_access_flag,),
    reject_unbacked=(refuse_unbacked,),
    decode_mmio=(decode_access,),
    refuse_fetch=(refuse_device_fetch,),
    refuse_page=(refuse_exclusive, refuse_tags),
    prepare_page=(prepare_tags,),
)
