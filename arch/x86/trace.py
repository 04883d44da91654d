"""Trace events of x86: kvm_exit, kvm_entry, kvm_page_fault and what tells the address of an EPT misconfiguration.

kvm_page_fault has one column ``error_code`` and three encodings: the exit qualification under EPT, EXITINFO1
under NPT, the error code of the #PF under shadow paging. Only the kvm_exit before it says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.common import COMMON
from arch.x86.exits import EXIT_REASONS, SVM, VMX
from arch.x86.pferr import PRIVATE_ACCESS
from arch.x86.registers import EPT_MISCONFIG, EPT_VIOLATION, KVM
from arch.x86.trace_mmu import MMU_TRACEPOINTS
from kvmfault.algebra.expr import Pred, Word
from kvmfault.algebra.layout import join
from kvmfault.contract.tracepoints import Printed, Role, Tracepoint, Tracepoints, Words, recorded, words

# Which kind of fault an exit is, over the fields of kvm_exit.

_PF, _SVM_PF, _SVM_NPF = 14, 0x4E, 0x400
_PF_EVENT: Final = 1 << 31 | 3 << 8 | _PF
"""VM-exit interruption information: valid, hardware exception, vector 14; bit 11 (error code present) left out."""
_VMX: Final = recorded("isa").is_(VMX)
_SVM: Final = recorded("isa").is_(SVM)
_BASIC: Final = recorded("exit_reason", 15, 0)
_IS_PF: Final = recorded("intr_info", 31, 31).is_(1) & recorded("intr_info", 10, 0).is_(_PF_EVENT & 0x7FF)

VIOLATION: Final = _VMX & _BASIC.is_(EPT_VIOLATION)
MISCONFIG: Final = _VMX & _BASIC.is_(EPT_MISCONFIG)
NPF: Final = _SVM & recorded("exit_reason").is_(_SVM_NPF)
VMX_PF: Final = _VMX & _BASIC.is_(0) & _IS_PF
SVM_PF: Final = _SVM & recorded("exit_reason").is_(_SVM_PF)

# What kvm_page_fault says, by encoding.

_CODE, _ADDRESS = recorded("error_code"), recorded("fault_address")
_PRIVATE: Final = PRIVATE_ACCESS.bit_length() - 1
EPT_REGISTERS: Final = {
    "EXIT_REASON": Word((), EPT_VIOLATION),
    "EXIT_QUALIFICATION": _CODE,  # handle_ept_violation
    "GUEST_PHYSICAL_ADDRESS": _ADDRESS,
}
NPT_REGISTERS: Final = {  # to EXITINFO1 KVM has added PRIVATE (npf_interception)
    "EXITINFO1": join(
        recorded("error_code", 63, _PRIVATE + 1) << _PRIVATE + 1, recorded("error_code", _PRIVATE - 1, 0)
    ),
    "EXITINFO2": _ADDRESS,
    "KVM": recorded("error_code", _PRIVATE, _PRIVATE) << KVM["PRIVATE"].lo,
}
SHADOW_REGISTERS: Final = {"ERROR_CODE": _CODE, "CR2": _ADDRESS}  # kvm_handle_page_fault


_EXIT_TAIL: Final = (
    "rip {guest_rip:x} info1 {info1:x} info2 {info2:x} intr_info {intr_info:x} error_code {error_code:x}"
)
_EXIT_TEXTS: Final = (
    # some reasons are two words: "PF excp", "EPT_VIOLATION FAILED_VMENTRY"
    "vcpu {vcpu_id:d} reason {exit_reason:p} " + _EXIT_TAIL,
    "vcpu {vcpu_id:d} reason {exit_reason:p} " + _EXIT_TAIL + " requests {requests:x}",
    "reason UNKNOWN ({exit_reason:d}) rip {guest_rip:x} info {info1:x} {info2:x}",  # the plugin of trace-cmd
    "reason {exit_reason:p} rip {guest_rip:x} info {info1:x} {info2:x}",
)
_EXIT_FIELDS: Final = (
    "exit_reason:d guest_rip:x isa:d info1:x info2:x intr_info:x? error_code:x? vcpu_id:d? requests:x?"
)
_NOW: Final = {"immediate_exit": 1}
_LATER: Final = {"immediate_exit": 0}
_ENTRY: Final = "vcpu {vcpu_id:d}, rip {rip:x}"
_ENTRY_EVENT: Final = _ENTRY + " intr_info {intr_info:x} error_code {error_code:x}"
_ENTRY_TEXTS: Final = (
    Printed(_ENTRY, _LATER),
    "vcpu {vcpu_id:d} rip {rip:x}",
    Printed(_ENTRY + "[immediate exit]", _NOW),
    Printed(_ENTRY_EVENT, _LATER),
    Printed(_ENTRY_EVENT + "[immediate exit]", _NOW),
)
_EXCEPTIONS: Final = Words(
    "exception",
    {
        f"#{name}": {"exception": number}
        for name, number in {
            "DE": 0, "DB": 1, "BP": 3, "OF": 4, "BR": 5, "UD": 6, "NM": 7, "DF": 8, "TS": 10, "NP": 11, "SS": 12,
            "GP": 13, "PF": 14, "MF": 16, "AC": 17, "MC": 18, "XM": 19, "VE": 20, "CP": 21, "HV": 28, "VC": 29,
            "SX": 30,
        }.items()
    },
)  # fmt: skip
_INJECTED: Final = tuple(
    Printed(text + tail, {"has_error": code, "reinjected": again})
    for text, code in (("{exception:w} ({error_code:x})", 1), ("{exception:w}", 0))
    for tail, again in ((" [reinjected]", 1), ("", 0))
)
_INSN: Final = "{csbase:x}:{rip:x}:{insn:b} ({flags:w})"
_HOSTCLOCK: Final = words("host_clock", none=0, tsc=1, pvclock=2, hvclock=3)

_X86: Final[Tracepoints] = {
    **COMMON,
    **MMU_TRACEPOINTS,
    "kvm_entry": Tracepoint(Role.ENTRY, _ENTRY_TEXTS, "vcpu_id:d rip:x immediate_exit:d? intr_info:x? error_code:x?"),
    "kvm_fast_mmio": Tracepoint(Role.SIGNAL, ("fast mmio at gpa {gpa:x}",), address=recorded("gpa") << 0),
    "kvm_pio": Tracepoint(
        None,
        tuple("pio_{rw:w} at {port:x} size {size:d} count {count:d} val {val:x}" + tail for tail in ("", " (...)")),
        "rw:d port:x size:d count:d val:x",
        {"rw": words("rw", read=0, write=1)},
    ),
    "kvm_emulate_insn": Tracepoint(
        None,
        (
            Printed(_INSN, {"failed": 0}),
            Printed(_INSN + " failed", {"failed": 1}),
            # the plugin of trace-cmd, without a disassembler; of an empty instruction it prints the one before
            Printed("{csbase:x}:{rip:x}: {:b}", {"failed": 0}),
            Printed("{csbase:x}:{rip:x}: {:b} FAIL", {"failed": 1}),
        ),
        "rip:x csbase:x len:d insn:b flags:x failed:d",
        {"flags": words("flags", real=0, prot16=1, vm16=3, prot32=5, prot64=9)},
    ),
    "kvm_inj_exception": Tracepoint(
        None, _INJECTED, "exception:d has_error:d error_code:d reinjected:d", {"exception": _EXCEPTIONS}
    ),
    "kvm_write_tsc_offset": Tracepoint(
        None,
        ("vcpu={vcpu_id:d} prev={previous_tsc_offset:d} next={next_tsc_offset:d}",),
        "vcpu_id:d previous_tsc_offset:d next_tsc_offset:d",
    ),
    "kvm_update_master_clock": Tracepoint(
        None,
        ("masterclock {use_master_clock:d} hostclock {host_clock:w} offsetmatched {offset_matched:d}",),
        "use_master_clock:d host_clock:d offset_matched:d",
        {"host_clock": _HOSTCLOCK},
    ),
    "kvm_track_tsc": Tracepoint(
        None,
        (
            "vcpu_id {vcpu_id:d} masterclock {use_master_clock:d} offsetmatched {nr_vcpus_matched_tsc:d} "
            "nr_online {online_vcpus:d} hostclock {host_clock:w}",
        ),
        "vcpu_id:d nr_vcpus_matched_tsc:d online_vcpus:d use_master_clock:d host_clock:d",
        {"host_clock": _HOSTCLOCK},
    ),
    "kvm_apicv_inhibit_changed": Tracepoint(
        None,
        tuple("{set:w} reason={reason:i}, inhibits={inhibits:x}" + tail for tail in ("", " {:p}")),
        "reason:i set:d inhibits:x",
        {"set": words("set", cleared=0, set=1)},
    ),
}


def _tracepoints(after: Pred, registers: Mapping[str, Word], *, misconfig: bool = False) -> Tracepoints:
    return {
        **_X86,
        "kvm_exit": Tracepoint(
            Role.EXIT,
            _EXIT_TEXTS,
            _EXIT_FIELDS,
            {"exit_reason": EXIT_REASONS},
            # the plugin leaves the event out; a kvm_page_fault after an exit for an exception can be no other than #PF
            missing={"intr_info": _PF_EVENT},
            registers={"EXIT_REASON": Word((), EPT_MISCONFIG)} if misconfig else None,
            when=MISCONFIG if misconfig else None,
            awaits="GUEST_PHYSICAL_ADDRESS" if misconfig else "",
            vcpu="vcpu_id",
            told_by=("exit_reason", "isa"),
        ),
        "kvm_page_fault": Tracepoint(
            Role.FAULT,
            ("vcpu {vcpu_id:d} rip {guest_rip:x} address {fault_address:x} error_code {error_code:x}",),
            registers=registers,
            when=after,
            vcpu="vcpu_id",
        ),
    }


EPT_TRACEPOINTS: Final = _tracepoints(VIOLATION, EPT_REGISTERS, misconfig=True)
NPT_TRACEPOINTS: Final = _tracepoints(NPF, NPT_REGISTERS)
SHADOW_TRACEPOINTS: Final = _tracepoints(VMX_PF | SVM_PF, SHADOW_REGISTERS)
