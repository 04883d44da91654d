"""Tracepoints of LoongArch KVM (arch/loongarch/kvm/trace.h). None has the address of a fault: an exit has its code."""

from __future__ import annotations

from typing import Final

from arch.common import COMMON
from kvmfault.contract.tracepoints import Role, Tracepoint, Tracepoints, words

_REASONS: Final = words("reason", IDLE=64, CACHE=65)
_PC: Final = ("PC: {pc:x}",)
_OPS: Final = words("op", save=0, restore=1, enable=2, disable=3, discard=4)
_STATES: Final = words("state", FPU=1, LSX=2, LASX=3)


def _exit(role: Role | None) -> Tracepoint:
    return Tracepoint(
        role, ("[{reason:w}]PC: {pc:x}",), "pc:x reason:d", {"reason": _REASONS}, told_by=("reason",) if role else ()
    )


TRACEPOINTS: Final[Tracepoints] = {
    **COMMON,
    "kvm_exit": _exit(Role.EXIT),
    "kvm_exit_idle": _exit(None),
    "kvm_exit_cache": _exit(None),
    "kvm_exit_gspr": Tracepoint(None, ("Inst word: {inst_word:x}",)),
    "kvm_enter": Tracepoint(Role.ENTRY, _PC),
    "kvm_reenter": Tracepoint(Role.ENTRY, _PC),
    "kvm_out": Tracepoint(None, _PC),
    "kvm_aux": Tracepoint(None, ("{op:w} {state:w} PC: {pc:x}",), "pc:x op:d state:d", {"op": _OPS, "state": _STATES}),
    "kvm_vpid_change": Tracepoint(None, ("VPID: {vpid:x}",)),
}
