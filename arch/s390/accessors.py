"""The kernel's own names for what it asks of the registers (kvm-s390.c, asm/fault.h)."""

from __future__ import annotations

from typing import Final

from arch.s390.facts import CODE, FSI, kernel_write, primary
from arch.s390.registers import DAT, INT_CODE, TEID
from kvmfault.contract.backend import Named

ACCESSORS: Final[Named] = {
    "gmap_int_code": INT_CODE.field_at(15, 0),
    "gmap_teid": TEID.field_at(63, 0),
    "teid_addr": TEID["ADDR"],
    "teid_fsi": FSI,
    "teid_as": TEID["AS"],
    "gaddr": TEID["ADDR"] << 12,
    "PGM_INT_CODE": CODE,
    "kvm_s390_cur_gmap_fault_is_write": kernel_write,
    "kvm_s390_assert_primary_as": primary,
    "is_dat_fault": CODE.one_of(DAT),
}
