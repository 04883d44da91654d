"""How the toy's kernel and host act on a fault; loaded by whoever runs one."""

from __future__ import annotations

from typing import Final

from kvmfault.contract.backend import Behaviour
from kvmfault.contract.ports import VmFacts
from kvmfault_toy.encode import encode
from kvmfault_toy.joints import JOINTS
from kvmfault_toy.policy import POLICY, host
from kvmfault_toy.trace import TRACEPOINTS

BEHAVIOUR: Final = Behaviour(
    encode=encode,
    policies={"1.0": lambda fmt: POLICY},
    joints={"1.0": JOINTS},
    host=host,
    vm=VmFacts(),
    tracepoints=TRACEPOINTS,
)
