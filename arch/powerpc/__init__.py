"""The powerpc backend: hypervisor storage interrupts of Book3S HV guests, and the radix partition-scoped tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.powerpc.facts import FACTS, FETCH_WRITES, REACHABLE
from arch.powerpc.radix import FORMATS
from arch.powerpc.registers import HDSI, NO_ZERO_REGISTER, REGISTERS, inst_layout
from arch.powerpc.unusual import unusual
from kvmfault.contract.backend import Backend, Behaviour, Named
from kvmfault.contract.format import Stage2Format

# What a plain decode does not need is loaded when it is asked for.


def _behaviour() -> Behaviour:
    from arch.powerpc.behaviour import BEHAVIOUR

    return BEHAVIOUR


def _accessors(fmt: Stage2Format) -> Named:
    from arch.powerpc.accessors import ACCESSORS

    return ACCESSORS


def _paste(line: str) -> Mapping[str, int] | None:
    from arch.powerpc.paste import paste

    return paste(line)


BACKEND: Final = Backend(
    name="powerpc",
    about="POWER radix guests (Book3S HV): HDSISR, HDAR, ASDR, and the partition-scoped radix tree",
    registers=REGISTERS,
    code="HDSISR",
    defaults={"TRAP": HDSI},
    zero_register=NO_ZERO_REGISTER,
    given={"HDAR": "EA_GIVEN", "ASDR": "GPA_GIVEN", "INST": "INST_GIVEN"},
    facts=dict.fromkeys(("6.12", "7.4"), lambda fmt: FACTS),
    accessors=dict.fromkeys(("6.12", "7.4"), _accessors),
    behaviour=_behaviour,
    formats=FORMATS,
    reachable=REACHABLE,
    fetch_writes=FETCH_WRITES,
    layouts={"INST": inst_layout},
    unusual=unusual,
    paste=_paste,
)
