"""Aborts delivered to the guest: syndrome, address, and who gets them (inject_fault.c).

Addresses are those that the guest finds in FAR_EL1, syndromes those in ESR_EL1 (of a 32-bit guest: in DFSR or IFSR).
``what`` of the outcome names the kind; a suffix says what is not the usual: ``_el2`` to the guest's hypervisor,
``_serror`` at the SError vector.
"""

from __future__ import annotations

from typing import Final

from arch.arm64.codes import DABT_CUR, DABT_LOW, EXCLUSIVE_ATOMIC, EXTERNAL, EXTERNAL_WALK, IABT_CUR, IABT_LOW
from arch.arm64.registers import ESR_EL2, ESR_SERROR, compose
from arch.arm64.syndrome import value
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.outcome import Inject, Outcome, Retry
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Ports, VmFacts
from kvmfault.contract.values import InjectedLength, InjectedTarget, InjectedWalk

_trapped_length: Final = value(ESR_EL2["IL"])
_WALK_STATUS: Final = {level: code for code, level in EXTERNAL_WALK.items()}
_LPAE, _SHORT_EXTERNAL = 1 << 9, 0x08
"""Of DFSR and IFSR: the long format, and the status of an external abort in the short one."""
_ADDRESS_SIZE = 0x00
_SERROR: Final = compose(ESR_SERROR, EC=0x2F, IL=1, IDS=1)


def serror(why: str) -> Inject:
    """An SError without a described syndrome. (kvm_inject_serror)"""
    return Inject("vabt", 0, _SERROR, why=why)


def unhandled(fault: MmioFault, policy: Policy) -> Inject:
    """An exception class without a handler is an undefined instruction to the guest. (kvm_handle_unknown_ec)"""
    syndrome = compose(ESR_EL2, EC=0, IL=_length(fault, policy))
    return Inject("undef", 0, syndrome, why="this kernel handles no such abort")


def external(vm: Ports, fault: MmioFault, policy: Policy, address: int | None, why: str, *, fetch: bool) -> Outcome:
    """A synchronous external abort, or none where the walk that failed no longer does. (kvm_inject_sea)"""
    facts = vm.facts
    if policy.injected_target is InjectedTarget.CONFIGURED and facts.nested and facts.aborts_to_hypervisor:
        syndrome = compose(ESR_EL2, EC=IABT_LOW if fetch else DABT_LOW, IL=1, FSC=EXTERNAL)
        return Inject(_name(fetch, facts, policy, "_el2"), address or 0, syndrome, why=why)
    return _to_kernel(vm, fault, policy, address, why, fetch=fetch)


def atomic(vm: Ports, fault: MmioFault, policy: Policy, why: str) -> Outcome:
    """A data abort with the status of an unsupported exclusive or atomic access. (kvm_inject_dabt_excl_atomic)"""
    if vm.facts.nested:
        syndrome = compose(ESR_EL2, EC=DABT_LOW, IL=1, FSC=EXCLUSIVE_ATOMIC)
        return Inject("dabt_el2", fault.gva or 0, syndrome, why=why)
    return _to_kernel(vm, fault, policy, fault.gva, why, fetch=False, status=EXCLUSIVE_ATOMIC)


def size_fault(vm: Ports, fault: MmioFault, policy: Policy, address: int, why: str, *, fetch: bool) -> Outcome:
    """An external abort whose status is then overwritten with that of an address-size fault at level 0.

    Kernel: kvm_inject_size_fault.
    """
    return _to_kernel(vm, fault, policy, address, why, fetch=fetch, status=_ADDRESS_SIZE, what="size_fault")


def _to_kernel(
    vm: Ports,
    fault: MmioFault,
    policy: Policy,
    address: int | None,
    why: str,
    *,
    fetch: bool,
    status: int | None = None,
    what: str = "",
) -> Outcome:
    facts = vm.facts
    if facts.guest_bits == 32:
        syndrome = _short_form(facts, status, fetch=fetch)
        return Inject(what or _name(fetch, facts, policy), (address or 0) & 0xFFFF_FFFF, syndrome, why=why)
    plain = EXTERNAL
    if fault.is_table_walk and policy.injected_walk is InjectedWalk.LEVEL:
        if facts.walk_level is None:
            return Retry("walking the guest's first stage again does not find the access: nothing is injected")
        plain = _WALK_STATUS[facts.walk_level]
    low, current = (IABT_LOW, IABT_CUR) if fetch else (DABT_LOW, DABT_CUR)
    syndrome = compose(
        ESR_EL2,
        EC=low if facts.user_level else current,
        IL=_length(fault, policy),
        FSC=plain if status is None else status,
    )
    return Inject(what or _name(fetch, facts, policy), address or 0, syndrome, why=why)


def _short_form(facts: VmFacts, status: int | None, *, fetch: bool) -> int:
    if not facts.long_descriptors:
        # the short format has no address-size fault; the other status is put over the whole field
        return EXCLUSIVE_ATOMIC if status == EXCLUSIVE_ATOMIC else _SHORT_EXTERNAL
    # for a fetch the kernel changes the status in DFSR, while the fault is in IFSR
    return _LPAE | (EXTERNAL if status is None or fetch else status)


def _name(fetch: bool, facts: VmFacts, policy: Policy, suffix: str = "") -> str:
    at_serror = policy.injected_target is InjectedTarget.CONFIGURED and facts.aborts_as_serror
    return ("pabt" if fetch else "dabt") + suffix + ("_serror" if at_serror else "")


def _length(fault: MmioFault, policy: Policy) -> int:
    return 1 if policy.injected_length is InjectedLength.FULL else _trapped_length(fault)
