"""How arm64 KVM acts on a fault, and what an arm64 host is: loaded when a fault is run, not when one is decoded."""

from __future__ import annotations

from errno import EFAULT
from typing import Final

from arch.arm64.encode import encode
from arch.arm64.joints import JOINTS
from arch.arm64.policy import policy_74, policy_612
from arch.arm64.probes import PROBES
from arch.arm64.saved import saved
from arch.arm64.trace import TRACEPOINTS
from kvmfault.contract.backend import Behaviour
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


BEHAVIOUR: Final = Behaviour(
    encode=encode,
    policies={"6.12": policy_612, "7.4": policy_74},
    joints={"6.12": JOINTS, "7.4": JOINTS},
    host=host,
    # the format bounds the VM's table: host and VM offer what the widest one needs
    vm=VmFacts(ipa_limit_bits=52, table_bits=52),
    tracepoints=TRACEPOINTS,
    probes=PROBES,
    saved=saved,
)
