"""The x86 backends: EPT, NPT and shadow paging, as KVM sees their faults."""

from __future__ import annotations

from errno import EINVAL
from typing import Final

from arch.x86 import accessors, encode, facts, paste
from arch.x86.joints import EPT_JOINTS, NPT_JOINTS, SHADOW_JOINTS
from arch.x86.policy import policy
from arch.x86.registers import (
    CR2,
    EPT_VIOLATION,
    ERROR_CODE,
    EXIT_QUALIFICATION,
    EXIT_REASON,
    EXITINFO1,
    EXITINFO2,
    GUEST_LINEAR_ADDRESS,
    GUEST_PHYSICAL_ADDRESS,
    KVM,
)
from arch.x86.spte import EPT_4K, NPT_4K, SHADOW_4K
from arch.x86.trace import EPT_TRACEPOINTS, NPT_TRACEPOINTS, SHADOW_TRACEPOINTS
from arch.x86.unusual import (
    EPT_RULES,
    NPT_RULES,
    REACHABLE_EPT,
    REACHABLE_NPT,
    REACHABLE_SHADOW,
    SHADOW_RULES,
    said_by,
)
from kvmfault.contract.backend import Backend
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import VmFacts
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


_VM: Final = VmFacts(ipa_limit_bits=_PHYSICAL_BITS, table_bits=_PHYSICAL_BITS, max_gfn=(1 << _PHYSICAL_BITS - 12) - 1)

EPT: Final = Backend(
    name="x86-ept",
    about="Intel nested paging: EPT violations and misconfigurations",
    registers=(EXIT_REASON, EXIT_QUALIFICATION, GUEST_PHYSICAL_ADDRESS, GUEST_LINEAR_ADDRESS, KVM),
    code="EXIT_QUALIFICATION",
    defaults={"EXIT_REASON": EPT_VIOLATION},
    given={"GUEST_PHYSICAL_ADDRESS": "GPA_GIVEN", "GUEST_LINEAR_ADDRESS": "GVA_GIVEN"},
    facts={
        "6.12": lambda fmt: facts.ept(reads_advanced_info=False),
        "7.4": lambda fmt: facts.ept(reads_advanced_info=True),
    },
    accessors={
        "6.12": lambda fmt: accessors.ept(reads_advanced_info=False),
        "7.4": lambda fmt: accessors.ept(reads_advanced_info=True),
    },
    encode=encode.ept,
    formats={"4k": EPT_4K},
    policies={"6.12": policy, "7.4": policy},
    joints={"6.12": EPT_JOINTS, "7.4": EPT_JOINTS},
    host=host,
    vm=_VM,
    tracepoints=EPT_TRACEPOINTS,
    reachable=REACHABLE_EPT,
    unusual=said_by(EPT_RULES),
    paste=paste.ept,
)

NPT: Final = Backend(
    name="x86-npt",
    about="AMD nested paging: nested page faults (NPF), SEV-SNP included",
    registers=(EXITINFO1, EXITINFO2, KVM),
    code="EXITINFO1",
    given={"EXITINFO2": "GPA_GIVEN"},
    facts={"6.12": lambda fmt: facts.npt(), "7.4": lambda fmt: facts.npt()},
    accessors={"6.12": lambda fmt: accessors.npt(), "7.4": lambda fmt: accessors.npt()},
    encode=encode.npt,
    formats={"4k": NPT_4K},
    policies={"6.12": policy, "7.4": policy},
    joints={"6.12": NPT_JOINTS, "7.4": NPT_JOINTS},
    host=host,
    vm=_VM,
    tracepoints=NPT_TRACEPOINTS,
    reachable=REACHABLE_NPT,
    unusual=said_by(NPT_RULES),
    paste=paste.npt,
)

SHADOW: Final = Backend(
    name="x86-shadow",
    about="shadow paging, Intel or AMD: intercepted #PF with virtual addresses",
    registers=(ERROR_CODE, CR2, KVM),
    code="ERROR_CODE",
    given={"CR2": "GVA_GIVEN"},
    facts={"6.12": lambda fmt: facts.shadow(), "7.4": lambda fmt: facts.shadow()},
    accessors={"6.12": lambda fmt: accessors.shadow(), "7.4": lambda fmt: accessors.shadow()},
    encode=encode.shadow,
    formats={"4k": SHADOW_4K},
    policies={"6.12": policy, "7.4": policy},
    joints={"6.12": SHADOW_JOINTS, "7.4": SHADOW_JOINTS},
    host=shadow_host,
    vm=_VM,
    tracepoints=SHADOW_TRACEPOINTS,
    reachable=REACHABLE_SHADOW,
    unusual=said_by(SHADOW_RULES),
    paste=paste.shadow,
)
