"""The s390 backend: program interruptions of a guest that SIE runs, and the DAT tables that KVM makes (gmap)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from arch.s390.dat import FORMATS
from arch.s390.facts import FACTS, REACHABLE
from arch.s390.registers import REGISTERS
from arch.s390.unusual import unusual
from kvmfault.contract.backend import Backend, Behaviour, Named
from kvmfault.contract.format import Stage2Format

# What a plain decode does not need is loaded when it is asked for.

KERNELS: Final = ("6.12", "6.18", "7.4")


def _behaviour() -> Behaviour:
    from arch.s390.behaviour import BEHAVIOUR

    return BEHAVIOUR


def _accessors(fmt: Stage2Format) -> Named:
    from arch.s390.accessors import ACCESSORS

    return ACCESSORS


def _paste(line: str) -> Mapping[str, int] | None:
    from arch.s390.paste import paste

    return paste(line)


BACKEND: Final = Backend(
    name="s390",
    about="s390 guests under SIE: program interruption code and TEID, and the DAT tables of gmap",
    registers=REGISTERS,
    code="INT_CODE",
    given={"TEID": "TEID_GIVEN"},
    facts=dict.fromkeys(KERNELS, lambda fmt: FACTS),
    accessors=dict.fromkeys(KERNELS, _accessors),
    behaviour=_behaviour,
    formats=FORMATS,
    reachable=REACHABLE,
    unusual=unusual,
    paste=_paste,
)
