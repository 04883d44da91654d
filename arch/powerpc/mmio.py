"""Device accesses: the bytes of a store, and how the bytes of a load become a register (powerpc.c of KVM).

A completion keeps all it needs: by the next KVM_RUN the fault registers may hold another fault. Update forms also
change RA, which KVM does before user space is asked (kvmppc_emulate_loadstore); a completion names one register.
"""

from __future__ import annotations

from functools import partial

from arch.powerpc.instruction import LoadStore
from arch.powerpc.registers import NO_ZERO_REGISTER
from kvmfault.contract.outcome import Completion, MmioAccess
from kvmfault.contract.ports import Ports
from kvmfault.types import U64, Gpa


def access_and_completion(vm: Ports, found: LoadStore, gpa: Gpa) -> tuple[MmioAccess, Completion]:
    """The device access at *gpa*, byte exact. (kvmppc_handle_store, kvmppc_handle_load)"""
    swapped = vm.facts.big_endian != found.reverse
    number = found.register
    data = b""
    if found.store:
        value = vm.register(number) & (1 << 8 * found.size) - 1
        data = value.to_bytes(found.size, "big" if swapped else "little")
    access = MmioAccess(gpa, found.size, found.store, data)
    return access, Completion(
        access, number, found.sign_extend, True, partial(_loaded, swapped=swapped), NO_ZERO_REGISTER
    )


def _loaded(done: Completion, value: int, *, swapped: bool) -> int:
    # kvmppc_complete_mmio_load: byte order, then sign
    size = done.access.size
    if swapped:
        value = int.from_bytes(value.to_bytes(size, "little"), "big")
    bits = 8 * size
    return value | U64 << bits & U64 if done.sign_extend and value >> bits - 1 & 1 else value
