"""The RISC-V backend: guest-page faults of the hypervisor extension, and G-stage tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.riscv.facts import FACTS, REACHABLE
from arch.riscv.gstage import FORMATS
from arch.riscv.registers import REGISTERS, ZERO
from arch.riscv.unusual import unusual
from kvmfault.contract.backend import Backend, Behaviour, Named
from kvmfault.contract.format import Stage2Format

# What a plain decode does not need is loaded when it is asked for: it doubles the time to start.


def _behaviour() -> Behaviour:
    from arch.riscv.behaviour import BEHAVIOUR

    return BEHAVIOUR


def _accessors(fmt: Stage2Format) -> Named:
    from arch.riscv.accessors import ACCESSORS

    return ACCESSORS


def _paste(line: str) -> Mapping[str, int] | None:
    from arch.riscv.paste import paste

    return paste(line)


BACKEND: Final = Backend(
    name="riscv",
    about="RISC-V guest-page faults: SCAUSE, STVAL, HTVAL, HTINST, and G-stage tables",
    registers=REGISTERS,
    code="SCAUSE",
    given={"STVAL": "STVAL_GIVEN", "HTVAL": "HTVAL_GIVEN"},
    zero_register=ZERO,
    facts={"6.12": lambda fmt: FACTS},
    accessors={"6.12": _accessors},
    behaviour=_behaviour,
    formats=FORMATS,
    reachable=REACHABLE,
    unusual=unusual,
    paste=_paste,
)
