"""How x86 KVM acts on a fault, and what an x86 host is: loaded when a fault is run, not when one is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from errno import EINVAL
from typing import Final

from arch.x86 import encode, live, policy, saved
from arch.x86.joints import EPT_JOINTS, NPT_JOINTS, SHADOW_JOINTS
from arch.x86.probes import PROBES
from arch.x86.registers import CR2, EXITINFO2, GUEST_PHYSICAL_ADDRESS
from arch.x86.trace import EPT_TRACEPOINTS, NPT_TRACEPOINTS, SHADOW_TRACEPOINTS
from kvmfault.contract.backend import Behaviour, Encode, Joints
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.live import Live
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.saved import Saved
from kvmfault.contract.tracepoints import Tracepoints
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import HostCaps

_PHYSICAL_BITS: Final = 48
"""MAXPHYADDR of a usual server."""
USER_SLOTS: Final = 32764
"""KVM keeps three of the 32767 slots: the TSS, the APIC access page, the identity map."""


def host(fmt: Stage2Format) -> HostCaps:
    """A 64-bit host with two address spaces (the second is SMM) and 47 bits of user addresses."""
    return HostCaps(
        page_shift=12,
        max_gfn=Gfn((1 << _PHYSICAL_BITS - 12) - 1),
        beyond_errno=EINVAL,
        user_top=Hva((1 << 47) - 4096),
        nr_address_spaces=2,
        nr_user_slots=USER_SLOTS,
    )


def shadow_host(fmt: Stage2Format) -> HostCaps:
    """As ``host``; shadow paging does not walk physical addresses in hardware, so all 52 bits exist."""
    return HostCaps(
        page_shift=12,
        max_gfn=Gfn((1 << 52 - 12) - 1),
        beyond_errno=EINVAL,
        user_top=Hva((1 << 47) - 4096),
        nr_address_spaces=2,
        nr_user_slots=USER_SLOTS,
    )


_VM: Final = VmFacts(
    ipa_limit_bits=_PHYSICAL_BITS,
    table_bits=_PHYSICAL_BITS,
    max_gfn=(1 << _PHYSICAL_BITS - 12) - 1,
    eager_split=True,  # the module parameter's default; only with the TDP MMU
)


def _of(
    encode: Encode,
    joints: Mapping[str, Joints],
    tracepoints: Tracepoints,
    driven: Live,
    kept: Saved,
    address: str,
    *,
    shadow: bool = False,
) -> Behaviour:
    return Behaviour(
        encode=encode,
        policies=policy.SHADOW if shadow else policy.NESTED,
        joints=joints,
        host=shadow_host if shadow else host,
        vm=replace(_VM, eager_split=False) if shadow else _VM,
        tracepoints=tracepoints,
        probes=replace(PROBES, address=address),
        saved=kept,
        live=driven,
    )


EPT: Final = _of(encode.ept, EPT_JOINTS, EPT_TRACEPOINTS, live.EPT, saved.ept, GUEST_PHYSICAL_ADDRESS.name)
NPT: Final = _of(encode.npt, NPT_JOINTS, NPT_TRACEPOINTS, live.NPT, saved.npt, EXITINFO2.name)
SHADOW: Final = _of(encode.shadow, SHADOW_JOINTS, SHADOW_TRACEPOINTS, live.SHADOW, saved.shadow, CR2.name, shadow=True)
