"""The facts of a hypervisor storage interrupt, as expressions over the registers.

Several bits of HDSISR may be set together; the facts name one cause, a malformed tree first, and a missing reference or
change bit only where it is all that is missing. The instruction is
described where a table over single fields can: plain D and DS forms. KVM decodes more of them
(``arch.powerpc.instruction``), and the joint that makes a device access of one asks there.
"""

from __future__ import annotations

from typing import Final

from arch.powerpc.instruction import CACHE_OPS
from arch.powerpc.registers import ASDR, CANARY, HDAR, HDSI, HDSISR, HISI, INST, INST_X, KVM, SRR1_BITS, TRAP
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred
from kvmfault.algebra.layout import ZERO, join
from kvmfault.contract.accessors import Accessors, Definition, Gap

_s = HDSISR
store: Final = _s["ISSTORE"].is_set
fetch: Final = TRAP["VECTOR"].is_(HISI)
walk: Final = _s["PRTABLE"].is_set
ea_given: Final = KVM["EA_GIVEN"].is_set
gpa_given: Final = KVM["GPA_GIVEN"].is_set
inst_given: Final = KVM["INST_GIVEN"].is_set
unsupported: Final = _s["UNSUPP_MMU"].is_set
missing: Final = _s["NOHPTE"].is_set & ~unsupported
forbidden: Final = _s["PROTFAULT"].is_set & ~unsupported
canary: Final = TRAP["VECTOR"].is_(HDSI) & _s.field_at(31, 0).is_(CANARY)

_OPCODE: Final = INST["OPCD"]
_SIZES: Final = {32: 4, 34: 1, 36: 4, 38: 1, 40: 2, 42: 2, 44: 2, 58: 8, 62: 8}
_DS: Final = (58, 62)
described: Final = inst_given & (
    _OPCODE.one_of(tuple(op for op in _SIZES if op not in _DS)) | (_OPCODE.one_of(_DS) & INST["XO"].is_(0))
)

FACTS: Final[Definition] = Accessors(
    syndrome=join(HDSISR.field_at(31, 0), INST.field_at(31, 0) << 32),
    gpa_valid=gpa_given,
    gpa_page=ASDR["GRA"] << 12,
    # for an access to the guest's own tables HDAR is the address that was being translated
    gpa_offset_valid=gpa_given & ea_given & ~walk,
    gpa_offset_bits=HDAR.field_at(11, 0),
    gva_valid=ea_given,
    gva_bits=HDAR["EA"],
    is_read=~store & (~fetch | walk),
    is_write=store,
    is_exec=fetch & ~walk,
    is_user=Gap("the guest's problem state is in HSRR1, which KVM saves as its MSR, not among the fault's registers"),
    is_translation=missing,
    is_permission=forbidden,
    is_access_flag=_s["SET_RC"].is_set & ~unsupported & ~_s["NOHPTE"].is_set & ~_s["PROTFAULT"].is_set,
    is_reserved=unsupported,
    is_address_size=Gap("an address beyond the tree is reported as one that no entry maps"),
    is_external_abort=Gap("no such interrupt: failing memory is a machine check"),
    granule_valid=Gap("the level at which the walk ended is not reported"),
    granule_bytes=ZERO,
    is_table_walk=walk,
    is_final=~walk,
    is_protection_key=_s["KEYFAULT"].is_set,
    is_shadow_stack=NEVER,
    is_cache_op=inst_given & _OPCODE.is_(31) & INST_X["XO"].one_of(CACHE_OPS),
    is_private=Gap("what a secure guest shares is known to the ultravisor; the interrupt does not tell"),
    is_prefetch=KVM["PREFETCH"].is_set,
    mmio_valid=described,
    mmio_bytes=_OPCODE.table(_SIZES),
    mmio_register_number=INST["RT"],
    mmio_sign_extend=_OPCODE.is_(42),
    mmio_wide=ALWAYS,
    mmio_ordered=NEVER,
)


def _reachable() -> Pred:
    named = sum(f.mask for f in HDSISR)
    silent = [n for n in range(32) if not named >> n & 1]
    not_of_fetch = [n for n in range(32) if not (SRR1_BITS | HDSISR["ISSTORE"].mask) >> n & 1]
    data = TRAP["VECTOR"].is_(HDSI)
    instruction = fetch & _zero(not_of_fetch) & INST.field_at(31, 0).is_(0)
    one_cause = ~(_s["NOHPTE"].is_set & _s["PROTFAULT"].is_set)
    return (data | instruction) & _zero(silent) & one_cause & KVM.field_at(63, 4).is_(0)


def _zero(bits: list[int]) -> Pred:
    pred = ALWAYS
    while bits:
        low = high = bits.pop(0)
        while bits and bits[0] == high + 1:
            high = bits.pop(0)
        pred &= HDSISR.field_at(high, low).is_(0)
    return pred


REACHABLE: Final = _reachable()
"""What hardware gives: one of the two interrupts, reserved bits 0, for a fetch only the bits that HSRR1 has, and not
both a missing entry and a forbidden access."""
FETCH_WRITES: Final = fetch & store
"""HSRR1 says that an entry could not be updated for a fetch, and KVM makes ISSTORE of it (kvmppc_handle_exit_hv,
HSRR1_HISI_WRITE): the page is mapped for writing. No other architecture has such an access."""
