"""The steps that only RISC-V has (kvm_riscv_vcpu_exit, gstage_page_fault, kvm_riscv_vcpu_mmio_load and _store).

KVM never asks whether a fault was on a walk of the guest's tables: where no memory is, it emulates the instruction that
needed the walk, at the address of the table.
"""

from __future__ import annotations

from errno import EFAULT, EIO, EOPNOTSUPP
from typing import Final

from arch.riscv.facts import fetch_code, interrupt, load_code, store, transformed
from arch.riscv.mmio import access_and_completion
from arch.riscv.syndrome import holds
from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Emulate, Error, Exit, Outcome, Reason, Retry
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress
from kvmfault.types import Gpa

_is_interrupt: Final = holds(interrupt)
_is_guest_page_fault: Final = holds(fetch_code | load_code | store)
_is_fetch: Final = holds(fetch_code)
_has_instruction: Final = holds(transformed)


def other_trap(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Interrupts resume the guest; codes that are no guest-page fault are not handled here. (kvm_riscv_vcpu_exit)"""
    if _is_interrupt(fault):
        return Retry("an interrupt of the host, no fault: the guest goes on")
    if not _is_guest_page_fault(fault):
        return Error(EFAULT, "no guest-page fault")
    return None


def fetch_outside(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A fetch is no device access; by the code, so also a walk for one. (gstage_page_fault)"""
    return Error(EOPNOTSUPP, "a fetch from where no memory is") if _is_fetch(fault) else None


def decode_htinst(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """HTINST describes a load or store, or is read from the guest's memory. (kvm_riscv_vcpu_mmio_load, _store)

    Without an instruction in HTINST, KVM reads it at SEPC; that it can, and what it finds, is for the emulator.
    """
    if not _has_instruction(fault):
        return Emulate(why="HTINST holds no instruction: KVM reads it from the guest's memory and decodes that")
    if fault.mmio_size is None:
        return Error(EOPNOTSUPP, "HTINST holds an instruction that KVM does not emulate")
    gpa = Gpa(at.gpa | (fault.gpa_offset or 0))
    if gpa & fault.mmio_size - 1:
        return Error(EIO, "a device access that is not aligned to its size")
    access, completion = access_and_completion(vm, fault, gpa, at.policy)
    return Exit(Reason.MMIO, access, completion=completion, why="no memory there: a device access")


JOINTS: Final = Joints(screen=(other_trap,), reject_unbacked=(fetch_outside,), decode_mmio=(decode_htinst,))
