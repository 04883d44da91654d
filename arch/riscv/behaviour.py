"""How RISC-V KVM acts on a fault, and what a RISC-V host is: loaded when a fault is run, not when one is decoded."""

from __future__ import annotations

from errno import EFAULT
from typing import Final

from arch.riscv.encode import encode
from arch.riscv.joints import JOINTS
from arch.riscv.policy import policy_612
from arch.riscv.trace import TRACEPOINTS
from kvmfault.contract.backend import Behaviour
from kvmfault.contract.format import Stage2Format
from kvmfault.contract.ports import VmFacts
from kvmfault.types import Gfn, Hva
from kvmfault.vm.caps import AreaRule, HostCaps


def host(fmt: Stage2Format) -> HostCaps:
    """A Linux host with Sv48 for user space. A slot may not reach the end of the G-stage address space."""
    return HostCaps(
        page_shift=12,
        max_gfn=Gfn((1 << fmt.gpa_bits - 12) - 1),
        beyond_errno=EFAULT,
        end_refused=True,
        user_top=Hva(1 << 47),
        area_rules=(AreaRule.READONLY_AREA, AreaRule.LOGGED_DEVICE),
    )


BEHAVIOUR: Final = Behaviour(
    encode=encode,
    policies={"6.12": policy_612},
    joints={"6.12": JOINTS},
    host=host,
    # profiles ask for harts that fault on a clear A (Svade); those that set it themselves are an option
    vm=VmFacts(ipa_limit_bits=59, table_bits=59, hardware_access_dirty=False),
    tracepoints=TRACEPOINTS,
)
