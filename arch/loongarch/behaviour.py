"""How LoongArch KVM acts on a fault, and what such a host is: loaded when a fault is run, not when one is decoded."""

from __future__ import annotations

from errno import ENOMEM
from typing import Final

from arch.loongarch.encode import encode
from arch.loongarch.joints import JOINTS
from arch.loongarch.policy import policy_612
from arch.loongarch.trace import TRACEPOINTS
from kvmfault.contract.backend import Behaviour
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import VmFacts
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import HostCaps


def host(fmt: Stage2Format) -> HostCaps:
    """A Linux host whose CPU gives user space, and so guests, 47 bits of address."""
    return HostCaps(
        page_shift=fmt.page_shift,
        max_gfn=Gfn((1 << fmt.gpa_bits - fmt.page_shift) - 1),
        beyond_errno=ENOMEM,
        user_top=Hva(1 << 47),
    )


BEHAVIOUR: Final = Behaviour(
    encode=encode,
    policies={"6.12": policy_612},
    joints={"6.12": JOINTS},
    host=host,
    vm=VmFacts(ipa_limit_bits=47, table_bits=47, hardware_access_dirty=False),
    tracepoints=TRACEPOINTS,
)
