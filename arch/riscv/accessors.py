"""What RISC-V KVM computes from a trap, under its own names where it has some (vcpu_exit.c, vcpu_insn.c)."""

from __future__ import annotations

from typing import Final

from arch.riscv.facts import SIZES, described, fault_addr, fetch_code, load_code, store, transformed
from arch.riscv.registers import HTINST, HTVAL, SCAUSE, STVAL
from kvmfault.contract.backend import Named

ACCESSORS: Final[Named] = {
    "fault_addr": fault_addr,
    "gfn": fault_addr >> 12,
    "scause": SCAUSE.field_at(63, 0),
    "stval": STVAL["VA"],
    "htval": HTVAL.field_at(63, 0),
    "htinst": HTINST.field_at(63, 0),
    "is_instruction_guest_page_fault": fetch_code,
    "is_load_guest_page_fault": load_code,
    "is_store_guest_page_fault": store,
    "htinst_is_transformed": transformed,
    "mmio_len": HTINST["FUNCT3"].table(SIZES).when(described),
}
