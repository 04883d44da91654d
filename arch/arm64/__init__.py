"""The arm64 backend: guest aborts at EL2 and the second stage of translation, as KVM sees them."""

from __future__ import annotations

from errno import EFAULT
from typing import Final

from arch.arm64.accessors import accessors_74, accessors_612
from arch.arm64.encode import encode
from arch.arm64.facts import PAGE_74, PAGE_612, REACHABLE, definition
from arch.arm64.joints import JOINTS_74, JOINTS_612
from arch.arm64.paste import paste
from arch.arm64.policy import policy_74, policy_612
from arch.arm64.registers import REGISTERS, esr_layout
from arch.arm64.stage2 import FORMATS
from arch.arm64.trace import TRACEPOINTS
from arch.arm64.unusual import unusual
from kvmfault.contract.backend import Backend
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import VmFacts
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import AreaRule, HostCaps


def host(fmt: Stage2Format) -> HostCaps:
    """A Linux host with this page size: user space of 48 bits (52 with 64K pages), top-byte-ignore tags refused."""
    return HostCaps(
        page_shift=fmt.page_shift,
        max_gfn=Gfn((1 << fmt.gpa_bits - fmt.page_shift) - 1),
        beyond_errno=EFAULT,
        user_top=Hva(1 << (52 if fmt.page_shift == 16 else 48)),
        user_tag_mask=0xFF << 56,
        area_rules=(AreaRule.LOGGED_DEVICE,),
    )


BACKEND: Final = Backend(
    name="arm64",
    about="arm64 guest aborts: ESR_EL2, FAR_EL2, HPFAR_EL2, and VMSAv8-64 stage 2",
    registers=REGISTERS,
    code="ESR_EL2",
    given={"FAR_EL2": "FAR_GIVEN", "HPFAR_EL2": "HPFAR_GIVEN"},
    facts={"6.12": lambda fmt: definition(fmt, PAGE_612), "7.4": lambda fmt: definition(fmt, PAGE_74)},
    accessors={"6.12": accessors_612, "7.4": accessors_74},
    encode=encode,
    formats=FORMATS,
    policies={"6.12": policy_612, "7.4": policy_74},
    joints={"6.12": JOINTS_612, "7.4": JOINTS_74},
    host=host,
    # the format bounds the VM's table: host and VM offer what the widest one needs
    vm=VmFacts(ipa_limit_bits=52, table_bits=52),
    tracepoints=TRACEPOINTS,
    reachable=REACHABLE,
    layouts={"ESR_EL2": esr_layout},
    unusual=unusual,
    paste=paste,
)
