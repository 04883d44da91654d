"""Fault registers of x86: what a VM exit leaves in the VMCS or VMCB, and what an intercepted #PF brings.

Fields that KVM has a name for carry that name; the error code of an NPF and of a #PF share one layout, and
EXITINFO1 adds the upper half that only nested paging has.
"""

from __future__ import annotations

from typing import Final

from kvmfault.algebra.layout import register

EPT_VIOLATION: Final = 48
EPT_MISCONFIG: Final = 49

EXIT_REASON: Final = register(
    "EXIT_REASON",
    32,
    "Intel SDM, format of the exit-reason field; VMX basic exit reasons",
    {"REASON": {0: "exception or NMI", EPT_VIOLATION: "EPT violation", EPT_MISCONFIG: "EPT misconfiguration"}},
    REASON=(15, 0),
    SHADOW_STACK_BUSY=25,
    BUS_LOCK=26,
    ENCLAVE=27,
    PENDING_MTF=28,
    VMX_ROOT=29,
    ENTRY_FAILURE=31,
)

EXIT_QUALIFICATION: Final = register(
    "EXIT_QUALIFICATION",
    64,
    "Intel SDM, exit qualification for EPT violations",
    {
        "GVA_TRANSLATED": {0: "guest paging structure", 1: "translation of the linear address"},
        "ADV_WRITABLE": {0: "read-only linear address", 1: "read/write linear address"},
    },
    ACC_READ=0,
    ACC_WRITE=1,
    ACC_INSTR=2,
    READABLE=3,
    WRITABLE=4,
    EXECUTABLE=5,
    USER_EXECUTABLE=6,
    GVA_IS_VALID=7,
    GVA_TRANSLATED=8,
    ADV_USER=9,
    ADV_WRITABLE=10,
    ADV_NX=11,
    NMI_UNBLOCKING=12,
    ACC_SHADOW_STACK=13,
    SSS_ENTRY=14,
    PAGING_VERIFICATION=15,
    ASYNCHRONOUS=16,
)

GUEST_PHYSICAL_ADDRESS: Final = register(
    "GUEST_PHYSICAL_ADDRESS", 64, "Intel SDM, guest-physical address field (0x2400)", PAGE=(63, 12), OFFSET=(11, 0)
)
GUEST_LINEAR_ADDRESS: Final = register(
    "GUEST_LINEAR_ADDRESS", 64, "Intel SDM, guest-linear address field (0x640a)", LINEAR=(63, 0)
)

# The page-fault error code, bits that #PF and NPF share. P W U RSVD F: the letters of kvm_mmu_trace.
_CODE: Final = {"P": 0, "W": 1, "U": 2, "RSVD": 3, "F": 4, "PK": 5, "SS": 6, "SGX": 15, "RMP": 31}
_MEANINGS: Final = {
    "P": {0: "no entry", 1: "entry present"},
    "W": {0: "read or fetch", 1: "write"},
    "F": {0: "data access", 1: "instruction fetch"},
}

EXITINFO1: Final = register(
    "EXITINFO1",
    64,
    "AMD APM volume 2, EXITINFO1 of a nested page fault; PFERR_* of KVM",
    _MEANINGS,
    **_CODE,
    FINAL=32,
    WALK=33,
    ENC=34,
    SIZEM=35,
    VMPL=36,
    SSS=37,
    SYNTHETIC=(49, 48),
)
EXITINFO2: Final = register(
    "EXITINFO2", 64, "AMD APM volume 2, EXITINFO2 of a nested page fault", PAGE=(63, 12), OFFSET=(11, 0)
)

ERROR_CODE: Final = register(
    "ERROR_CODE",
    64,
    "Intel SDM and AMD APM, page-fault error code (KVM passes it on as 64 bits)",
    _MEANINGS | {"U": {0: "supervisor", 1: "user mode"}},
    **_CODE,
    UPPER=(63, 32),
)
CR2: Final = register("CR2", 64, "Intel SDM and AMD APM, CR2", LINEAR=(63, 0))

KVM: Final = register(
    "KVM",
    64,
    "not hardware: what the VM or the caller adds (PFERR bits 48 and 49, fault->prefetch)",
    PRIVATE=0,
    PREFETCH=1,
    SNP=2,
    GPA_GIVEN=8,
    GVA_GIVEN=9,
)
"""PRIVATE: the access is to private memory (PFERR_PRIVATE_ACCESS). PREFETCH: nobody waits for the page.
SNP: the guest is encrypted (SEV-SNP), so ENC means private. The last two: the address was captured."""
