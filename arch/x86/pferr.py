"""PFERR: the error code that KVM's x86 fault path works on, from each of the four sources.

Bit 2 ("user") is three things: user mode in a #PF, always 1 in an NPF, and a *read* under EPT, where KVM puts
its ACC_READ there. Facts never take ``is_user`` from it unless the source is a #PF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.x86.registers import (
    EPT_MISCONFIG,
    ERROR_CODE,
    EXIT_QUALIFICATION,
    EXIT_REASON,
    EXITINFO1,
    KVM,
)
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.algebra.layout import join

PRESENT: Final = 1 << 0
WRITE: Final = 1 << 1
USER: Final = 1 << 2
RSVD: Final = 1 << 3
"""All that an EPT misconfiguration says: PRESENT stays 0, unlike MMIO faults of NPT and shadow paging."""
FETCH: Final = 1 << 4
GUEST_FINAL: Final = 1 << 32
GUEST_PAGE: Final = 1 << 33
PRIVATE_ACCESS: Final = 1 << 49
GPT_WRITE: Final = PRESENT | WRITE | GUEST_PAGE
"""A write to a present page while the CPU walked the guest's tables (is_write_to_guest_page_table)."""

_q = EXIT_QUALIFICATION

# EPT (__vmx_handle_ept_violation): the access bits move, any permission of the entry means present, and
# bit 8 counts only if bit 7 is set ("VMX: Fix check for valid GVA on an EPT violation").
misconfig: Final[Pred] = EXIT_REASON["REASON"].is_(EPT_MISCONFIG)
violation: Final[Pred] = ~misconfig
entry_present: Final[Pred] = _q.field_at(5, 3).one_of(range(1, 8))
_entry: Final = _q.field_at(5, 3).table(dict.fromkeys(range(1, 8), PRESENT))
_place: Final = _q.field_at(8, 7).table({0b01: GUEST_PAGE, 0b11: GUEST_FINAL})

VIOLATION: Final[Word] = join(_q["ACC_READ"] << 2, _q["ACC_WRITE"] << 1, _q["ACC_INSTR"] << 4, _entry, _place)
"""Error code of an EPT violation, without bits that KVM adds later."""
# Newer: bit 2 is user mode at last, taken from the advanced information of an access to the final address.
_advanced_user: Final = _q.field_at(9, 7).table({0b111: USER})
VIOLATION_ADVANCED: Final[Word] = join(_advanced_user, _q["ACC_WRITE"] << 1, _q["ACC_INSTR"] << 4, _entry, _place)
"""The same on kernels that read the advanced information instead of calling a read "user"."""
NPF: Final[Word] = join(EXITINFO1.field_at(47, 0), EXITINFO1.field_at(63, 50) << 50)
"""Error code of a nested page fault: EXITINFO1 without the two bits that are software's (npf_interception)."""
PF: Final[Word] = ERROR_CODE.field_at(31, 0)
"""Error code of an intercepted #PF: the upper half is dropped (kvm_handle_page_fault)."""

snp_private: Final[Pred] = KVM["SNP"].is_set & EXITINFO1["ENC"].is_set


def error_code(pferr: Word | Maybe, registers: Mapping[str, int], private: bool) -> int:
    """The code that the fault path sees: *pferr* of the registers (none: an EPT misconfiguration), and the
    software bit for what the path decided about privacy (kvm_mmu_page_fault)."""
    code = pferr.on(registers)
    return (RSVD if code is None else code) | (PRIVATE_ACCESS if private else 0)


def npf_registers(code: int, *, prefetch: bool = False) -> dict[str, int]:
    """The way back: registers of a nested page fault that the fault path sees as *code*, KVM's own bits included."""
    private = code & PRIVATE_ACCESS
    added = (KVM["PRIVATE"].mask if private else 0) | (KVM["PREFETCH"].mask if prefetch else 0)
    return {EXITINFO1.name: code ^ private, KVM.name: added}
