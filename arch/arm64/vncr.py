"""Aborts on the page of VNCR_EL2: a hypervisor in a guest reads and writes its registers in memory (FEAT_NV2).

KVM maps that page itself, by what it keeps of one walk of the hypervisor's own first stage (struct vncr_tlb). An abort
there has exception class 0x25 and goes to a handler of its own; what finds and obtains the page is the steps of PATH.

    vcpu = Vncr(register=0x1000, walk=lambda va: VncrWalk(GuestTranslation(Gpa(0x4000_0000), 4096)))
    run = handle_vncr_abort(target, vm, target.decode(ESR_EL2=0x9600_2047), vcpu)

Source: kvm_handle_vncr_abort and kvm_translate_vncr in arch/arm64/kvm/nested.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EACCES, EFAULT, EINVAL, EIO, ENOENT, ENOMEM
from typing import Final, TypeAlias

from arch.arm64 import inject
from arch.arm64.codes import DABT_CUR, EXTERNAL, PERMISSION
from arch.arm64.joints import external_abort, walk_status
from arch.arm64.registers import ESR_EL2
from arch.arm64.syndrome import holds, with_status
from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import R, W
from kvmfault.contract.outcome import Exit, Inject, Outcome, Reason, Retry, fixed
from kvmfault.contract.ports import GuestTranslation, GuestWalkFault, Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.target import Target
from kvmfault.contract.values import RegisterPage
from kvmfault.errors import ModelError
from kvmfault.path import commit, lookup, resolve
from kvmfault.path.run import BoundPath, Locked, Run, Step
from kvmfault.types import EHWPOISON, U64, Gpa, Pfn

_SIGN: Final = 48
"""VNCR_EL2 holds address bits 52:12; bit 48 is the sign of the virtual address."""
_LEVEL_0: Final = min(PERMISSION)
_GUESTS_FAULT: Final = frozenset({EFAULT, EIO, EHWPOISON, EINVAL, ENOENT, EACCES})
"""Errors of the walk that the guest is told; the other ones end in a resume."""
_FOR_VMM: Final = frozenset({ENOMEM, EFAULT, EIO, EHWPOISON})
"""Errors of guest_memfd that user space is told."""
_is_of_class: Final = holds(ESR_EL2["EC"].is_(DABT_CUR))
_is_register_page: Final = holds(ESR_EL2["VNCR"].is_set)


@dataclass(frozen=True, slots=True)
class VncrWalk:
    """What the hypervisor's own first stage says of the page. *asid*: of a non-global entry; None: a global one."""

    page: GuestTranslation
    asid: int | None = None


Walk: TypeAlias = Callable[[int], VncrWalk | GuestWalkFault]
"""The hypervisor's first-stage tables: a virtual address to its page, or the status and errno of the walk."""


@dataclass(slots=True)
class Vncr:
    """One vCPU: the register, the tables behind it, and what KVM keeps of the last walk."""

    register: int
    """VNCR_EL2."""
    walk: Walk
    asid: int = 0
    """Of the EL2&0 regime now."""
    kept: VncrWalk | None = field(default=None, init=False)
    """The last walk that succeeded; stays when the entry becomes invalid."""
    valid: bool = field(default=False, init=False)
    gva: int = field(default=0, init=False)
    pfn: Pfn = field(default=Pfn(0), init=False)
    host_writable: bool = field(default=False, init=False)

    @property
    def address(self) -> int:
        """The virtual address in VNCR_EL2, sign-extended. (read_vncr_el2)"""
        low = self.register & (2 << _SIGN) - 1
        return low | U64 & -(2 << _SIGN) if low >> _SIGN else low

    def hits(self) -> bool:
        """Whether what is kept translates the address now. (kvm_vncr_tlb_lookup)"""
        if not self.valid or self.kept is None or self.gva != self.address:
            return False
        return self.kept.asid in (None, self.asid)

    def invalidate(self, start: Gpa, end: Gpa) -> None:
        """The host takes memory in a guest-physical range; whoever unmaps it calls this. (kvm_invalidate_vncr_ipa)"""
        if self.kept is not None and start <= self.kept.page.gpa < end:
            self.valid = False

    @property
    def prot(self) -> int:
        """R and W bits with which the page is mapped on the next entry. (kvm_map_l1_vncr)"""
        if self.kept is None or not self.kept.page.readable:
            return 0
        return R | W if self.host_writable and self.kept.page.writable else R


def vncr_path(vcpu: Vncr) -> tuple[Step | Locked, ...]:
    """The steps for one vCPU."""
    steps = _Steps(vcpu)
    return (
        Step("screen", steps.screen, "an abort on the register page"),
        Step("find", steps.find, "nothing is kept that translates it"),
        Step("translate", steps.translate),
        Step("sample", steps.sample, "sequence sampled"),
        Step("lookup", lookup.lookup),
        Step("settle", steps.settle, "a slot that allows the access"),
        Step("pin", resolve.pin),
        Step("judge", steps.judge, "a page was obtained"),
        Locked((Step("stale", commit.stale, "nothing was invalidated since"), Step("keep", steps.keep))),
        Step("account", steps.account),
    )


def handle_vncr_abort(target: Target, vm: Ports, fault: MmioFault, vcpu: Vncr) -> Run:
    """An exit with exception class 0x25, every step recorded. *vcpu* is changed as the kernel changes it.

    Before 6.16 there is no handler, and the guest gets an undefined instruction. An injected exception goes to the
    guest's hypervisor, FAR_EL2 unchanged: the address of the outcome is 0. Raises ModelError for another class.
    """
    if not _is_of_class(fault):
        raise ModelError(f"syndrome {fault.syndrome:#x} is no abort of class {DABT_CUR:#x}: vm.handle() takes those")
    policy = target.policy
    if policy.register_page is RegisterPage.UNHANDLED:
        at = Progress(policy, Joints())
        return Run(inject.unhandled(fault, policy), None, (), at)
    joints = Joints(conclude=(_leave,))
    return BoundPath(policy, joints, vncr_path(vcpu)).handle(vm, fault)


def _give_back(fault: MmioFault, status: int, why: str) -> Inject:
    return Inject("vncr_el2", 0, with_status(fault, status), why=why)


class _Steps:
    # functions of one vCPU with the signature of a step

    def __init__(self, vcpu: Vncr) -> None:
        self.vcpu = vcpu

    def screen(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """External aborts, and what is no fault of a translation."""
        if not _is_register_page(fault):
            vm.warn("an abort of this class that is not on the register page")
        outcome = external_abort(vm, fault, at)
        if outcome is not None:
            return outcome
        if fault.is_permission:
            if at.policy.register_page is RegisterPage.LOOKUP:
                return self.forbid(fault)
        elif not fault.is_translation:
            vm.warn("an abort on the register page that nobody handles")
            return Retry("an abort on the register page that nobody handles")
        return None

    def forbid(self, fault: MmioFault) -> Inject:
        # kvm's handle_vncr_perm: with the level of the guest's own entry, not the host's
        vcpu = self.vcpu
        page = vcpu.kept.page if vcpu.kept is not None else None
        if fault.is_write and page is not None and page.writable and not vcpu.host_writable:
            return _give_back(fault, EXTERNAL, "the guest may write the page, the host's memory is read-only")
        level = page.level if page is not None else 0
        return _give_back(fault, _LEVEL_0 | level & 3, "the guest's own first stage forbids the access")

    def find(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """What is kept would translate the access, so it is one of permission."""
        if at.policy.register_page is RegisterPage.LOOKUP and self.vcpu.hits():
            return self.forbid(fault)
        return None

    def translate(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """Walk the hypervisor's first stage; its guest-physical addresses need no second one."""
        vcpu = self.vcpu
        vcpu.valid, vcpu.kept = False, None
        found = vcpu.walk(vcpu.address)
        if isinstance(found, GuestWalkFault):
            if found.errno in _GUESTS_FAULT:
                return _give_back(
                    fault, walk_status(found)[0], "the guest's own first stage does not translate VNCR_EL2"
                )
            return Retry("the guest's own first stage could not be walked")
        vcpu.kept = found
        at.guest = found.page
        at.at = found.page.gpa
        return None

    def sample(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """The sequence number, before the slot is looked up."""
        at.seq = vm.invalidations.seq
        return None

    def settle(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """No slot, or a write to a read-only one: nothing to obtain."""
        if at.slot is None or not (at.backed or at.from_file):
            return _give_back(fault, EXTERNAL, "no memory behind VNCR_EL2, or a write to a read-only slot")
        return None

    def judge(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """Any error, and what is not the host's memory, is an external abort to the guest."""
        if at.pin is None or at.pin.error is not None:
            return _give_back(fault, EXTERNAL, "the host has no page there")
        if at.pin.device:
            return _give_back(fault, EXTERNAL, "the page behind VNCR_EL2 is not memory")
        return None

    def keep(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """Keep the translation; the page is mapped on the next entry to the guest."""
        vcpu = self.vcpu
        vcpu.gva, vcpu.pfn, vcpu.host_writable, vcpu.valid = vcpu.address, at.pfn, at.map_writable, True
        return None

    def account(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        """The guest may write the page from now on, so it counts as written."""
        vcpu = self.vcpu
        assert vcpu.kept is not None
        assert at.slot is not None
        page = vcpu.kept.page
        writable = page.writable and vcpu.host_writable
        if writable:
            vm.mark_dirty(at.slot, at.gfn, at.pfn)
        allowed = writable if fault.is_write else page.readable
        if at.policy.register_page is RegisterPage.RETRANSLATE and not allowed:
            return self.forbid(fault)
        return fixed(1 << vm.page_shift, vcpu.prot)


def _leave(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
    # what guest_memfd could not give is the VMM's to sort out, and KVM_RUN does not fail
    if isinstance(outcome, Exit) and outcome.reason is Reason.MEMORY_FAULT:
        if outcome.errno in _FOR_VMM:
            return Exit(outcome.reason, outcome.detail, why=outcome.why)
        return Retry("guest_memfd gave no page: the guest tries again")
    return outcome
