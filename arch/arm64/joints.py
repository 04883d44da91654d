"""The steps that only arm64 has. Syndrome bits are read through the same expressions as the facts.

Addresses of injected aborts are those that 6.12 puts into the guest's FAR_EL1. Syndromes are as for a guest at EL1;
7.4 gives a fault on a walk the level at which the guest's own walk stopped, which needs the guest's tables: here it
stays a plain external abort.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from errno import EAGAIN, EFAULT, ENOSYS
from typing import Final

from arch.arm64.accessors import SANITISED, exclusive_atomic, needs_r, needs_w, needs_x
from arch.arm64.codes import DABT_CUR, EXCLUSIVE_ATOMIC, EXTERNAL, IABT_CUR
from arch.arm64.facts import FSC, iabt
from arch.arm64.mmio import access_and_completion
from arch.arm64.registers import ESR_EL2, compose
from kvmfault.algebra.expr import Pred, Word
from kvmfault.algebra.scalar import compile_pred, compile_word
from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import PROTS, X
from kvmfault.contract.outcome import Done, Error, Exit, Fixed, Inject, Outcome, Reason, Resume, Retry, UndecodedMmio
from kvmfault.contract.ports import GuestWalkFault, Ports
from kvmfault.contract.progress import Progress
from kvmfault.types import Gpa

_PAGE_OFFSET: Final = 0xFFF
_ESR: Final = (ESR_EL2.name,)


def _holds(pred: Pred) -> Callable[[MmioFault], bool]:
    compiled = compile_pred(pred, _ESR)
    return lambda fault: compiled((fault.syndrome,))


def _value(word: Word) -> Callable[[MmioFault], int]:
    compiled = compile_word(word, _ESR)
    return lambda fault: compiled((fault.syndrome,))


_is_iabt = _holds(iabt)
_is_exclusive_atomic = _holds(exclusive_atomic)
_needs_r, _needs_w, _needs_x = _holds(needs_r), _holds(needs_w), _holds(needs_x)
_sanitised = _value(SANITISED)
_il = _value(ESR_EL2["IL"])
_outside_status = _value(ESR_EL2.field_at(63, 6) << 6)
assert FSC.hi == 5  # what _outside_status leaves out


def _inject(fault: MmioFault, address: int | None, why: str, *, fetch: bool, status: int = EXTERNAL) -> Inject:
    syndrome = compose(ESR_EL2, EC=IABT_CUR if fetch else DABT_CUR, IL=_il(fault), FSC=status)
    return Inject("pabt" if fetch else "dabt", address or 0, syndrome, why=why)


def _byte_address(gpa: Gpa, fault: MmioFault) -> Gpa:
    return Gpa(gpa | (fault.gva or 0) & _PAGE_OFFSET)


# screen


def beyond_limits(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Addresses that the host, or this VM's table, does not have; translation faults only.

    Kernel: the range checks of kvm_handle_guest_abort; kvm_inject_size_fault.
    """
    gpa = fault.kvm_get_fault_gpa()
    if gpa is None or not fault.is_translation:
        return None
    facts = vm.facts
    if gpa >> facts.ipa_limit_bits:
        size_fault = _inject(fault, _byte_address(gpa, fault), "", fetch=_is_iabt(fault), status=0)
        return replace(size_fault, what="size_fault", why="the IPA is beyond what the host supports")
    if gpa >> facts.table_bits or gpa >> vm.format.gpa_bits:
        why = "the IPA is beyond the VM's table"
        return _inject(fault, _byte_address(gpa, fault), why, fetch=_is_iabt(fault))
    return None


def external_abort(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The host's error handling takes the abort, or the guest gets an SError. (kvm_handle_guest_sea)"""
    if not fault.is_external_abort:
        return None
    if vm.facts.host_claims_aborts:
        return Resume(Done.CLAIMED, "the host's error handling took the external abort")
    return Inject("vabt", 0, why="an external abort that nobody claims becomes an SError of the guest")


def unsupported_status(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Only translation, permission and access-flag faults go on ("Unsupported FSC" of kvm_handle_guest_abort)."""
    if fault.is_translation or fault.is_permission or fault.is_access_flag:
        return None
    return Error(EFAULT, "KVM handles translation, permission and access-flag faults only")


def unsupported_status_74(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """As above, and unsupported exclusive or atomic accesses. Kernel: "KVM: arm64: Handle DABT caused by LS64*"."""
    refused = unsupported_status(vm, fault, at)
    return None if refused is None or _is_exclusive_atomic(fault) else refused


# translate


def walk_nested(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Through the second stage of a nested guest's own hypervisor. (kvm_walk_nested_s2, kvm_s2_handle_perm_fault)

    6.12 quirk: a table that cannot be read injects the walk's status and fails KVM_RUN as well.
    """
    if not vm.facts.nested:
        return None
    gpa = fault.kvm_get_fault_gpa()
    walked = vm.walk_guest(gpa) if gpa is not None else None
    if gpa is None or walked is None:
        return None
    if isinstance(walked, GuestWalkFault):
        return _forward(fault, walked.status, "the nested guest's own table does not translate", walked.errno)
    missing = (
        (_needs_r(fault) and not walked.readable)
        or (_needs_w(fault) and not walked.writable)
        or (_needs_x(fault) and not walked.executable)
    )
    if missing:
        status = _PERMISSION_LEVEL_0 + (walked.level & 3)
        return _forward(fault, status, "the nested guest's own table forbids the access", 0)
    at.guest = walked
    at.at = gpa
    return None


_PERMISSION_LEVEL_0: Final = 0x0C


def walk_nested_74(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """As in 6.12, but a walk that lost a race resumes the guest."""
    outcome = walk_nested(vm, fault, at)
    if isinstance(outcome, Inject) and outcome.errno == EAGAIN:
        return Retry("the nested guest's table changed during the walk")
    return outcome


def _forward(fault: MmioFault, status: int, why: str, errno: int) -> Inject:
    # struct kvm_s2_trans keeps the syndrome in 32 bits: ISS2 is not forwarded
    syndrome = (_outside_status(fault) | status) & 0xFFFF_FFFF
    return Inject("s2_fault", fault.gva or 0, syndrome, errno, why=why)


# repair


def set_access_flag(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Mark the entry young at the faulting address. (handle_access_fault)"""
    if not (fault.is_access_flag and at.backed):
        return None
    entry = vm.entry_prot(at.at)
    vm.repair_young(at.at)
    if entry is None:
        return Retry("the entry is gone")
    prot, size = entry
    return Fixed(size, PROTS[prot], "access flag set")


# unbacked


def refuse_unbacked(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Fetches (by class, so also a fetch's table walk), table walks, and cache operations outside slots.

    Kernel: what kvm_handle_guest_abort asks before io_mem_abort.
    """
    if _is_iabt(fault):
        return _inject(fault, fault.gva, "a fetch from where no memory is", fetch=True)
    if fault.is_table_walk:
        return _inject(fault, fault.gva, "a guest table where no memory is, or a write to a read-only one", fetch=False)
    if at.slot is None and fault.is_cache_op:
        return Resume(Done.SKIPPED, "a cache operation where no memory is does nothing")
    return None


def decode_access(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The syndrome describes a load or store, or user space, the guest, or nobody can tell. (io_mem_abort)"""
    gpa = Gpa(at.gpa | (fault.gpa_offset or 0))
    if fault.mmio_size is not None:
        access, completion = access_and_completion(vm, fault, gpa, at.policy)
        return Exit(Reason.MMIO, access, completion=completion, why="no memory there: a device access")
    if vm.facts.protected:
        return _inject(fault, fault.gva, "an undescribed device access of a protected VM", fetch=False)
    if vm.facts.undecoded_mmio_exits:
        return _undecoded(fault, gpa)
    return Error(ENOSYS, "a device access that the syndrome does not describe (ISV = 0)")


def decode_access_74(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """As above; LD64B and ST64B always go to user space (KVM_EXIT_ARM_LDST64B, which has the same payload)."""
    if _is_exclusive_atomic(fault):
        return _undecoded(fault, Gpa(at.gpa | (fault.gpa_offset or 0)))
    return decode_access(vm, fault, at)


def _undecoded(fault: MmioFault, gpa: Gpa) -> Exit:
    detail = UndecodedMmio(_sanitised(fault), gpa)
    return Exit(Reason.UNDECODED_MMIO, detail, why="the syndrome does not describe the access: user space decodes it")


# before the entry


def refuse_device_fetch(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Code does not run from device memory. (-ENOEXEC of user_mem_abort)"""
    return _inject(fault, fault.gva, "a fetch from device memory", fetch=True)


def refuse_exclusive(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Memory that does not support the access gives it back to the guest. (kvm_inject_dabt_excl_atomic)

    The kernel decides this just before it takes the lock.
    """
    if fault.is_translation or not _is_exclusive_atomic(fault):
        return None
    why = "this memory does not support the exclusive or atomic access"
    return _inject(fault, fault.gva, why, fetch=False, status=EXCLUSIVE_ATOMIC)


def prepare_tags(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Memory tags are initialised before the guest sees the page. (sanitise_mte_tags; 7.4 refuses before the lock)"""
    if not vm.facts.tagging or fault.is_permission or at.pin is None or at.pin.device:
        return None
    if at.area is not None and not at.area.tags_allowed:
        return Error(EFAULT, "the guest uses memory tags, which the host area does not allow")
    vm.prepare_page(at.pfn, at.size)
    return None


def trim_nested_fetch(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """What the nested guest's own table makes non-executable stays so; 6.12 forgot that for fetches."""
    if at.guest is not None and not at.guest.executable:
        at.prot &= ~X
    return None


JOINTS_612: Final = Joints(
    screen=(beyond_limits, external_abort, unsupported_status),
    translate=(walk_nested,),
    repair=(set_access_flag,),
    reject_unbacked=(refuse_unbacked,),
    decode_mmio=(decode_access,),
    refuse_fetch=(refuse_device_fetch,),
    prepare_page=(prepare_tags,),
)
JOINTS_74: Final = Joints(
    screen=(external_abort, beyond_limits, unsupported_status_74),
    translate=(walk_nested_74,),
    repair=(set_access_flag,),
    reject_unbacked=(refuse_unbacked,),
    decode_mmio=(decode_access_74,),
    refuse_fetch=(refuse_device_fetch,),
    prepare_page=(refuse_exclusive, prepare_tags, trim_nested_fetch),
)
