"""The LoongArch backend: exits for guest-physical addresses, and the tables that the TLB refill walks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.loongarch.facts import FACTS, REACHABLE
from arch.loongarch.gpt import FORMATS
from arch.loongarch.registers import REGISTERS, ZERO
from arch.loongarch.unusual import unusual
from kvmfault.contract.backend import Backend, Behaviour, Named
from kvmfault.contract.format import Stage2Format

# What a plain decode does not need is loaded when it is asked for: it doubles the time to start.


def _behaviour() -> Behaviour:
    from arch.loongarch.behaviour import BEHAVIOUR

    return BEHAVIOUR


def _accessors(fmt: Stage2Format) -> Named:
    from arch.loongarch.accessors import ACCESSORS

    return ACCESSORS


def _paste(line: str) -> Mapping[str, int] | None:
    from arch.loongarch.paste import paste

    return paste(line)


BACKEND: Final = Backend(
    name="loongarch",
    about="LoongArch page exceptions of guests: ESTAT, BADV, BADI, and the tables of the TLB refill",
    registers=REGISTERS,
    code="ESTAT",
    given={"BADV": "BADV_GIVEN", "PC": "PC_GIVEN"},
    zero_register=ZERO,
    facts={"6.12": lambda fmt: FACTS},
    accessors={"6.12": _accessors},
    behaviour=_behaviour,
    formats=FORMATS,
    reachable=REACHABLE,
    unusual=unusual,
    paste=_paste,
)
