"""Tracepoints of s390 KVM (arch/s390/kvm/trace.h, trace-s390.h).

No event carries code and TEID of a fault: kvm_s390_sie_exit has the intercept code, which is 0 for one. Every text of a
vCPU begins with its number and the guest's PSW.
"""

from __future__ import annotations

from typing import Final

from arch.common import COMMON
from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints

_VCPU: Final = "{id:d}[{pswmask:x}-{pswaddr:x}]: "
_FIELDS: Final = "id:d pswmask:x pswaddr:x"

TRACEPOINTS: Final[Tracepoints] = {
    **COMMON,
    "kvm_s390_sie_exit": Tracepoint(
        Role.EXIT,
        (_VCPU + "exit sie icptcode {icptcode:d} ({:w})",),
        f"{_FIELDS} icptcode:d",
        told_by=("icptcode",),
    ),
    "kvm_s390_sie_enter": Tracepoint(Role.ENTRY, (_VCPU + "entering sie flags {cpuflags:x}",), f"{_FIELDS} cpuflags:x"),
    "kvm_s390_sie_fault": Tracepoint(None, (_VCPU + "fault in sie instruction",), _FIELDS),
    "kvm_s390_major_guest_pfault": Tracepoint(None, (_VCPU + "major fault, maybe applicable for pfault",), _FIELDS),
    "kvm_s390_pfault_init": Tracepoint(
        None, (_VCPU + "init pfault token {pfault_token:d}",), f"{_FIELDS} pfault_token:d"
    ),
    "kvm_s390_pfault_done": Tracepoint(
        None, (_VCPU + "done pfault token {pfault_token:d}",), f"{_FIELDS} pfault_token:d"
    ),
}
