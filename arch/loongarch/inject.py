"""Exceptions delivered to the guest (kvm_queue_exception, _kvm_deliver_exception).

The syndrome is what KVM puts into the guest's ESTAT: 6.12 writes the code into its lowest bits, not into ECODE, and no
subcode. A guest whose exceptions have vectors of their own (ECFG.VS) does not notice.
"""

from __future__ import annotations

from arch.loongarch.registers import ADE, INE
from kvmfault.contract.outcome import Inject


def instruction_missing(why: str) -> Inject:
    """INE: what an exit without a handler becomes. BADV is left alone. (kvm_fault_ni)"""
    return Inject("ine", 0, INE, why=why)


def fetch_error(pc: int, why: str) -> Inject:
    """ADEF, with the program counter as its address."""
    return Inject("adef", pc, ADE, why=why)


def access_error(gpa: int, why: str) -> Inject:
    """ADEM. Its address is BADV of the exit, which is guest-physical."""
    return Inject("adem", gpa, ADE, why=why)
