"""The x86 backends: EPT, NPT and shadow paging, as KVM sees their faults."""

from __future__ import annotations

from typing import Final

from arch.x86 import accessors, facts, paste
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
from arch.x86.unusual import (
    EPT_RULES,
    NPT_RULES,
    REACHABLE_EPT,
    REACHABLE_NPT,
    REACHABLE_SHADOW,
    SHADOW_RULES,
    said_by,
)
from kvmfault.contract.backend import Backend, Behaviour


def _ept() -> Behaviour:
    from arch.x86.behaviour import EPT as found

    return found


def _npt() -> Behaviour:
    from arch.x86.behaviour import NPT as found

    return found


def _shadow() -> Behaviour:
    from arch.x86.behaviour import SHADOW as found

    return found


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
    behaviour=_ept,
    formats={"4k": EPT_4K},
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
    behaviour=_npt,
    formats={"4k": NPT_4K},
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
    behaviour=_shadow,
    formats={"4k": SHADOW_4K},
    reachable=REACHABLE_SHADOW,
    unusual=said_by(SHADOW_RULES),
    paste=paste.shadow,
)
