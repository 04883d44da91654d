"""How Book3S HV KVM acts on a fault, and what such a host is: loaded when a fault is run, not when one is decoded."""

from __future__ import annotations

from errno import EINVAL
from typing import Final

from arch.powerpc.encode import encode
from arch.powerpc.joints import JOINTS
from arch.powerpc.policy import policy
from arch.powerpc.trace import TRACEPOINTS
from kvmfault.contract.backend import Behaviour
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import VmFacts
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import HostCaps

_USER_BITS: Final = {12: 46, 16: 52}


def host(fmt: Stage2Format) -> HostCaps:
    """A POWER9 or later host: user space of 64T with 4K pages, 4P with 64K. A slot's address has no limit of KVM's."""
    return HostCaps(
        page_shift=fmt.page_shift,
        max_gfn=Gfn((1 << 52) - 1),
        beyond_errno=EINVAL,
        user_top=Hva(1 << _USER_BITS[fmt.page_shift]),
        thp_size=2 << 20,
    )


BEHAVIOUR: Final = Behaviour(
    encode=encode,
    policies=dict.fromkeys(("6.12", "7.4"), policy),
    joints=dict.fromkeys(("6.12", "7.4"), JOINTS),
    host=host,
    vm=VmFacts(ipa_limit_bits=52, table_bits=52),
    tracepoints=TRACEPOINTS,
)
