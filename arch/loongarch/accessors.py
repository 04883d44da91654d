"""What LoongArch KVM computes from an exit, under its own names (exit.c, kvm_vcpu_arch)."""

from __future__ import annotations

from typing import Final

from arch.loongarch.facts import handled_read, handled_write
from arch.loongarch.registers import BADI, BADV, ESTAT, PC
from kvmfault.contract.backend import Named

ACCESSORS: Final[Named] = {
    "ecode": ESTAT["ECODE"],
    "badv": BADV.field_at(63, 0),
    "badi": BADI.field_at(31, 0),
    "pc": PC["PC"],
    "op8": BADI.field_at(31, 24),
    "reg2i12_opcode": BADI.field_at(31, 22),
    "reg2i14_opcode": BADI.field_at(31, 24),
    "reg3_opcode": BADI["OPCODE"],
    "rd": BADI["RD"],
    "kvm_handle_read_fault": handled_read,
    "kvm_handle_write_fault": handled_write,
}
