"""How s390 KVM acts on a fault, and what such a host is: loaded when a fault is run, not when one is decoded."""

from __future__ import annotations

from errno import EINVAL
from typing import Final

from arch.s390.encode import encode
from arch.s390.joints import JOINTS
from arch.s390.policy import policy_74, policy_612
from arch.s390.trace import TRACEPOINTS
from kvmfault.contract.backend import Behaviour
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import VmFacts
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import HostCaps


def host(fmt: Stage2Format) -> HostCaps:
    """Slots end at the VM's memory limit (kvm->arch.mem_limit, here what the table holds), and none is read-only."""
    return HostCaps(
        page_shift=fmt.page_shift,
        max_gfn=Gfn((1 << fmt.gpa_bits - fmt.page_shift) - 1),
        beyond_errno=EINVAL,
        user_top=Hva((1 << 64) - (1 << fmt.page_shift)),
        readonly_slots=False,
        thp_size=1 << 20,
    )


BEHAVIOUR: Final = Behaviour(
    encode=encode,
    policies={"6.12": policy_612, "6.18": policy_74, "7.4": policy_74},
    joints=JOINTS,
    host=host,
    vm=VmFacts(hardware_access_dirty=False, ipa_limit_bits=52, table_bits=52),
    tracepoints=TRACEPOINTS,
)
