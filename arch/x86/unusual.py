"""Odd register values in words. They decode all the same: hardware, emulators and old kernels do send them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from arch.x86.pferr import entry_present, misconfig, violation
from arch.x86.registers import (
    EPT_MISCONFIG,
    EPT_VIOLATION,
    ERROR_CODE,
    EXIT_QUALIFICATION,
    EXIT_REASON,
    EXITINFO1,
    KVM,
)
from kvmfault.algebra.expr import Pred

_q, _e, _c = EXIT_QUALIFICATION, EXITINFO1, ERROR_CODE
Rules = tuple[tuple[Pred, str], ...]

_ACCESS: Final = _q.field_at(2, 0)
EPT_RULES: Final[Rules] = (
    (~EXIT_REASON["REASON"].one_of((EPT_VIOLATION, EPT_MISCONFIG)), "not an EPT exit: decoded as a violation"),
    (misconfig & ~_q.field_at(63, 0).is_(0), "a misconfiguration has no qualification: the value is stale or reserved"),
    (violation & _ACCESS.is_(0), "no access is reported"),
    (violation & _ACCESS.one_of((5, 6, 7)), "a fetch that also reads or writes: no processor reports it"),
    (violation & ~_q.field_at(63, 17).is_(0), "reserved bits 63:17 are set: KVM ignores them"),
    (violation & _q["GVA_TRANSLATED"].is_set & _q["GVA_IS_VALID"].is_(0), "bit 8 without bit 7: KVM ignores it"),
    (
        violation & _q["USER_EXECUTABLE"].is_set & ~entry_present,
        "bit 6 alone means nothing: it needs mode-based execute control, and KVM does not count it as present",
    ),
    (violation & _q["NMI_UNBLOCKING"].is_set, "NMI unblocking due to IRET: KVM blocks NMIs again"),
)
NPT_RULES: Final[Rules] = (
    (_e["SYNTHETIC"].one_of((1, 2, 3)), "bits 48 and 49 are software's: KVM warns and clears them"),
    (_e["U"].is_(0), "bit 2 is clear: hardware sets it in every nested page fault"),
    (_e["W"].is_set & _e["F"].is_set, "a fetch that writes: no processor reports it"),
    (_e["FINAL"].is_set & _e["WALK"].is_set, "both a final access and a walk of the guest's tables"),
    (_e["RSVD"].is_set & _e["P"].is_(0), "a reserved bit in an entry that is not present: qemu's TCG reports MMIO so"),
    (_e["ENC"].is_set & KVM["SNP"].is_(0), "encrypted access (bit 34), private only to an SEV-SNP guest"),
    (_e["RMP"].is_set, "an RMP check failed: KVM runs its RMP handler after the fault"),
)
SHADOW_RULES: Final[Rules] = (
    (~_c["UPPER"].is_(0), "a #PF code has 32 bits: KVM warns and drops the upper half"),
    (_c["W"].is_set & _c["F"].is_set, "a fetch that writes: no processor reports it"),
    (_c["RSVD"].is_set & _c["P"].is_(0), "a reserved bit in an entry that is not present: qemu's TCG reports MMIO so"),
    (_c["PK"].is_set & _c["P"].is_(0), "a protection key violation of an entry that is not present"),
)


def said_by(rules: Rules) -> Callable[[Mapping[str, int]], tuple[str, ...]]:
    """The texts of the rules that hold for registers given by name."""
    return lambda registers: tuple(text for rule, text in rules if rule.on(registers))


REACHABLE_EPT: Final[Pred] = (misconfig & _q.field_at(63, 0).is_(0)) | (
    violation
    & EXIT_REASON["REASON"].is_(EPT_VIOLATION)
    & _ACCESS.one_of((1, 2, 3, 4))
    & _q.field_at(63, 17).is_(0)
    & (_q["GVA_IS_VALID"].is_set | _q["GVA_TRANSLATED"].is_(0))
)
"""A misconfiguration without qualification; or a violation by a read, a write, both, or a fetch."""
REACHABLE_NPT: Final[Pred] = (
    _e["SYNTHETIC"].is_(0)
    & _e["U"].is_set
    & _e["PK"].is_(0)
    & ~(_e["W"].is_set & _e["F"].is_set)
    & ~(_e["FINAL"].is_set & _e["WALK"].is_set)
    & KVM.field_at(63, 10).is_(0)
)
REACHABLE_SHADOW: Final[Pred] = (
    _c["UPPER"].is_(0) & ~(_c["W"].is_set & _c["F"].is_set) & (_c["PK"].is_(0) | _c["P"].is_set)
)
