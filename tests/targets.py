"""Every target of the installed backends, and registers for them: any at all, and those that hardware produces."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Final

from hypothesis import strategies as st

from arch.arm64.codes import STATUS
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target, backend, backends

BIT: Final = (0, 1)
DECISIVE: Final[dict[str, dict[str, dict[str, tuple[int, ...]]]]] = {
    "arm64": {
        "ESR_EL2": {
            "EC": (0x20, 0x21, 0x24, 0x25),
            "FSC": tuple(STATUS),
            **dict.fromkeys(("ISV", "CM", "WnR", "FnV", "S1PTW"), BIT),
        }
    },
    "powerpc": {
        "TRAP": {"VECTOR": (0xE00, 0xE20)},
        "HDSISR": dict.fromkeys(
            (
                "NOHPTE",
                "NOEXEC_OR_G",
                "PROTFAULT",
                "BADACCESS",
                "ISSTORE",
                "KEYFAULT",
                "UNSUPP_MMU",
                "SET_RC",
                "PRTABLE",
            ),
            BIT,
        ),
    },
    "s390": {
        "INT_CODE": {"CODE": tuple(range(0x40)), "PER": BIT},
        "TEID": {"FSI": (0, 1, 2, 3), **dict.fromkeys(("B56", "B60", "B61"), BIT)},
    },
    "x86-ept": {
        "EXIT_REASON": {"REASON": (48, 49)},
        "EXIT_QUALIFICATION": dict.fromkeys(
            (
                *("ACC_READ", "ACC_WRITE", "ACC_INSTR", "READABLE", "WRITABLE", "EXECUTABLE"),
                *("GVA_IS_VALID", "GVA_TRANSLATED", "ADV_USER", "ACC_SHADOW_STACK"),
            ),
            BIT,
        ),
    },
    "x86-npt": {"EXITINFO1": dict.fromkeys(("P", "W", "U", "RSVD", "F", "PK", "SS", "FINAL", "WALK"), BIT)},
    "x86-shadow": {"ERROR_CODE": dict.fromkeys(("P", "W", "U", "RSVD", "F", "PK", "SS"), BIT)},
    "riscv": {
        "SCAUSE": {"CODE": (20, 21, 23), "INTERRUPT": (0,)},
        "HTINST": {"OPCODE": (0, 1, 8, 9, 11), "FUNCT3": tuple(range(8)), "WIDTH": BIT, "TRANSFORMED": BIT},
    },
    "loongarch": {"ESTAT": {"ECODE": tuple(range(1, 7)), "ESUBCODE": (0,)}},
}
"""Fields that decide whether hardware produces a value, with their candidates. The others are free where
REACHABLE leaves them so."""


@cache
def targets() -> tuple[Target, ...]:
    """One for each backend, format and kernel."""
    return tuple(
        backend(f"{name}:{fmt}@{kernel}") for name, b in backends().items() for fmt in b.formats for kernel in b.kernels
    )


def newest() -> tuple[Target, ...]:
    """The default target of each backend."""
    return tuple(backend(name) for name in backends())


# Strategies are made once: making one costs more than drawing from it.


@cache
def _value(width: int) -> st.SearchStrategy[int]:
    few = st.sets(st.integers(0, width - 1), max_size=3).map(lambda s: sum(1 << b for b in s))
    return few | st.integers(0, (1 << width) - 1)


@cache
def _given(name: str) -> st.SearchStrategy[set[str]]:
    return st.sets(st.sampled_from(tuple(backends()[name].given)))


def any_registers(target: Target) -> st.SearchStrategy[dict[str, int]]:
    """Some of the target's registers with any value that fits."""
    return st.fixed_dictionaries({}, optional={r.name: _value(r.width) for r in target.backend.registers})


@cache
def _shapes_of(name: str) -> tuple[dict[str, int], ...]:
    # all combinations of the decisive fields that the backend calls reachable
    layouts = {r.name: r for r in backends()[name].registers}
    fields = [(layouts[r][f], values) for r, named in DECISIVE[name].items() for f, values in named.items()]
    rows = []
    for chosen in product(*(values for _, values in fields)):
        row = dict.fromkeys(layouts, 0)
        for (f, _), value in zip(fields, chosen, strict=True):
            row[f.register] |= value << f.lo
        if backends()[name].reachable.on(row):
            rows.append(row)
    return tuple(rows)


@cache
def _shape(name: str) -> st.SearchStrategy[dict[str, int]]:
    return st.sampled_from(_shapes_of(name))


@cache
def _free_bits(name: str) -> dict[str, int]:
    source = backends()[name]
    marks = {source.registers[-1][mark] for mark in source.given.values()}
    decisive = DECISIVE[name]
    return {
        r.name: sum(f.mask for f in r if f.name not in decisive.get(r.name, {}) and f not in marks)
        for r in source.registers
    }


@st.composite
def reachable_registers(draw: st.DrawFn, target: Target) -> dict[str, int]:
    """Registers as hardware produces them: reserved bits 0, addresses captured or not."""
    source = target.backend
    row = dict(draw(_shape(source.name)))
    for register in source.registers:
        free = _free_bits(source.name)[register.name]
        tried = row | {register.name: row[register.name] | draw(_value(register.width)) & free}
        row = tried if source.reachable.on(tried) else row
    left_out = source.given.keys() - draw(_given(source.name))
    return {name: value for name, value in row.items() if name not in left_out}


def reachable_fault(target: Target) -> st.SearchStrategy[Raw]:
    """A fault that hardware produces."""
    return reachable_registers(target).map(lambda registers: target.decode(**registers))
