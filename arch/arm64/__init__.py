"""The arm64 backend: guest aborts at EL2 and the second stage of translation, as KVM sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from arch.arm64.facts import PAGE_74, PAGE_612, REACHABLE, definition
from arch.arm64.registers import REGISTERS, esr_layout
from arch.arm64.stage2 import FORMATS
from arch.arm64.unusual import unusual
from kvmfault.contract.backend import Backend, Behaviour, Named
from kvmfault.contract.format import Stage2Format

# What a plain decode does not need is loaded when it is asked for: it doubles the time to start.


def _behaviour() -> Behaviour:
    from arch.arm64.behaviour import BEHAVIOUR

    return BEHAVIOUR


def _accessors(kernel: str) -> Callable[[Stage2Format], Named]:
    def named(fmt: Stage2Format) -> Named:
        from arch.arm64 import accessors

        return accessors.accessors_612(fmt) if kernel == "6.12" else accessors.accessors_74(fmt)

    return named


def _paste(line: str) -> Mapping[str, int] | None:
    from arch.arm64.paste import paste

    return paste(line)


BACKEND: Final = Backend(
    name="arm64",
    about="arm64 guest aborts: ESR_EL2, FAR_EL2, HPFAR_EL2, and VMSAv8-64 stage 2",
    registers=REGISTERS,
    code="ESR_EL2",
    given={"FAR_EL2": "FAR_GIVEN", "HPFAR_EL2": "HPFAR_GIVEN"},
    facts={"6.12": lambda fmt: definition(fmt, PAGE_612), "7.4": lambda fmt: definition(fmt, PAGE_74)},
    accessors={kernel: _accessors(kernel) for kernel in ("6.12", "7.4")},
    behaviour=_behaviour,
    formats=FORMATS,
    reachable=REACHABLE,
    layouts={"ESR_EL2": esr_layout},
    unusual=unusual,
    paste=_paste,
)
