"""Registers of a program interruption that ends SIE: its code, and the translation-exception identification.

Bits have the usual numbers, 0 for the lowest; IBM's manuals count from the other end (bit 61 is bit 2 here).
"""

from __future__ import annotations

from typing import Final

from kvmfault.algebra.layout import register

PROTECTION, ADDRESSING, SEGMENT, PAGE, TRANSLATION_SPEC = 0x04, 0x05, 0x10, 0x11, 0x12
ASCE_TYPE, REGION_1, REGION_2, REGION_3 = 0x38, 0x39, 0x3A, 0x3B
SECURE_ACCESS, NON_SECURE_ACCESS, SECURE_VIOLATION = 0x3D, 0x3E, 0x3F
GRANULES: Final = {REGION_1: 1 << 53, REGION_2: 1 << 42, REGION_3: 1 << 31, SEGMENT: 1 << 20, PAGE: 1 << 12}
"""Code -> bytes that the invalid entry would have mapped."""
DAT: Final = (PROTECTION, SEGMENT, PAGE, ASCE_TYPE, REGION_1, REGION_2, REGION_3)
"""Codes that vcpu_post_run_handle_fault gives to vcpu_dat_fault_handler."""

INT_CODE: Final = register(
    "INT_CODE",
    16,
    "z/Architecture Principles of Operation, program-interruption codes; thread.gmap_int_code",
    {
        "CODE": {
            0x00: "none",
            PROTECTION: "protection",
            ADDRESSING: "addressing",
            SEGMENT: "segment translation",
            PAGE: "page translation",
            TRANSLATION_SPEC: "translation specification",
            ASCE_TYPE: "ASCE type",
            REGION_1: "region-first translation",
            REGION_2: "region-second translation",
            REGION_3: "region-third translation",
            SECURE_ACCESS: "secure storage access",
            NON_SECURE_ACCESS: "non-secure storage access",
            SECURE_VIOLATION: "secure storage violation",
        }
    },
    TX=9,
    PER=7,
    CODE=(6, 0),
)
TEID: Final = register(
    "TEID",
    64,
    "z/Architecture Principles of Operation, translation-exception identification (union teid)",
    {
        "FSI": {0: "unknown", 1: "store", 2: "fetch"},
        "AS": {0: "primary", 1: "access register", 2: "secondary", 3: "home"},
    },
    ADDR=(63, 12),
    FSI=(11, 10),
    B56=7,
    B60=3,
    B61=2,
    AS=(1, 0),
)
KVM: Final = register(
    "KVM",
    64,
    "not hardware: what the host, the caller or the recording adds to the fault",
    {"NO_FSI": {1: "the host has no facility 75, so FSI means nothing"}},
    PREFETCH=0,
    TEID_GIVEN=1,
    NO_FSI=2,
)

REGISTERS: Final = (INT_CODE, TEID, KVM)
