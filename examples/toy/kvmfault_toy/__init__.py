"""A made-up architecture, for kvmfault."""

from __future__ import annotations

from typing import Final

from kvmfault.contract.backend import Backend, Behaviour
from kvmfault_toy.facts import FACTS, REACHABLE
from kvmfault_toy.format import ToyFormat
from kvmfault_toy.registers import REGISTERS
from kvmfault_toy.trace import paste


def _behaviour() -> Behaviour:
    from kvmfault_toy.behaviour import BEHAVIOUR

    return BEHAVIOUR


BACKEND: Final = Backend(
    name="toy",
    about="a made-up architecture",
    registers=REGISTERS,
    code="CAUSE",
    given={"ADDR": "ADDR_GIVEN"},
    formats={"4k": ToyFormat()},
    facts={"1.0": lambda fmt: FACTS},
    reachable=REACHABLE,
    behaviour=_behaviour,
    paste=paste,
)
