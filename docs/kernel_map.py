"""Where the kernel's functions live here, and the parts of kernel-map.md that say so: ``BLOCKS`` names them.

Places are not written down: a function of the kernel lives where a public docstring names it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import factorial
from pathlib import Path
from typing import Final, NamedTuple

from docs.declared import ROOT, table
from docs.kernel_calls import (
    ALREADY,
    BUILT_FROM,
    CALLERS,
    ESR_FORM,
    NEEDS_VCPU,
    ORDERS,
    READ_DIRECTLY,
    VERSION,
)
from docs.kernel_convert import Conversion, Order, Uses, duplicates, sharing, steps
from docs.kernel_functions import FUNCTIONS
from kvmfault.contract.described import bits_text
from kvmfault.contract.target import backend
from kvmfault.path.run import PATH, Locked

# -- functions -----------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A documented object: file below the repository, name inside it ("" for the module), docstring."""

    file: str
    name: str
    doc: str

    @property
    def module(self) -> str:
        """Dotted name of the module."""
        return self.file.removesuffix(".py").replace("/", ".")

    def __str__(self) -> str:
        return f"[`{self.module}{':' + self.name if self.name else ''}`](../{self.file})"


@cache
def documented() -> tuple[Place, ...]:
    """Every public object with a docstring, attributes and steps of the path too."""
    files = sorted(p for folder in ("arch", "kvmfault") for p in (ROOT / folder).rglob("*.py"))
    found = [place for path in files for place in _documented_in(path)]
    flat = [step for entry in PATH for step in (entry.steps if isinstance(entry, Locked) else (entry,))]
    found += [Place("kvmfault/path/run.py", f'PATH["{step.name}"]', step.doc) for step in flat if step.run is None]
    return tuple(found)


def _documented_in(path: Path) -> Iterator[Place]:
    file = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield Place(file, "", ast.get_docstring(tree) or "")
    yield from _members(file, "", tree.body)


def _members(file: str, prefix: str, body: Sequence[ast.stmt]) -> Iterator[Place]:
    for node, after in zip(body, (*body[1:], ast.Pass()), strict=True):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) if not name.startswith("_"):
                yield Place(file, prefix + name, ast.get_docstring(node) or "")
                if isinstance(node, ast.ClassDef):
                    yield from _members(file, f"{prefix}{name}.", node.body)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                match after:
                    case ast.Expr(value=ast.Constant(value=str(text))) if not name.startswith("_"):
                        yield Place(file, prefix + name, text)


def places(function: str) -> list[Place]:
    """Where a function of the kernel lives here: what names it, whole words only."""
    word = re.compile(rf"(?<!\w){re.escape(function)}(?!\w)")
    return [place for place in documented() if word.search(place.doc)]


def functions() -> str:
    """Every function with its places and with what shows it right."""
    parts = []
    for group, named in FUNCTIONS.items():
        rows = [(f"`{name}`", _where(name), ", ".join(_proof(p) for p in proof)) for name, proof in named.items()]
        parts.append(f"### {group}\n\n{table(('kernel', 'lives here', 'shown right by'), rows)}\n")
    return "\n".join(parts).rstrip()


def _where(name: str) -> str:
    return ", ".join(map(str, places(name)))


def _proof(path: str) -> str:
    return f"[{Path(path).stem}](../tests/{path})"


# -- accessors -----------------------------------------------------------------------------------------

RAW: Final = "kvm_vcpu_get_esr"
ESR: Final = "ESR"
OTHER: Final = "FAR/HPFAR"
DISR: Final = "DISR"
VCPU: Final = "vCPU"


def class_of(accessor: str) -> str:
    """What an accessor of 6.12 needs, by the registers that its definition reads; stated where the vCPU answers."""
    if accessor in NEEDS_VCPU:
        return VCPU
    reads = set(backend("arm64@6.12").accessors[accessor].reads)
    return ESR if reads == {"ESR_EL2"} else DISR if reads == {"DISR_EL1"} else OTHER


@cache
def columns() -> tuple[str, ...]:
    """Every accessor that is called, by class, in the order of our definitions."""
    called = {name for row in (*CALLERS, *BUILT_FROM) for name in row.uses} | {row.name for row in BUILT_FROM}
    ordered = [name for name in (*backend("arm64@6.12").accessors, *NEEDS_VCPU) if name in called]
    return tuple(name for kind in (ESR, OTHER, DISR, VCPU) for name in ordered if class_of(name) == kind)


def accessor_classes() -> str:
    """Class of each accessor, what it reads, the facts it became, its vectors, and how many functions call it."""
    vectors, rows = vector_columns(), []
    for name in columns():
        read = NEEDS_VCPU.get(name) or bits_text(backend("arm64@6.12").accessors[name].reads)
        facts = (p.name.partition(".")[2] for p in places(name) if p.name.startswith("Accessors."))
        shown = "yes" if COLUMN_OF.get(name, name) in vectors else "-"
        callers = sum(name in row.uses for row in CALLERS)
        rows.append((f"`{name}`", class_of(name), read, ", ".join(f"`{f}`" for f in facts), shown, str(callers)))
    return table(("accessor", "class", "reads", "fact", "vectors", "callers"), rows)


COLUMN_OF: Final = {"kvm_vcpu_trap_get_perm_fault_granule": "granule_4k"}
"""Accessors whose column in the vectors has another name."""


def vector_columns() -> frozenset[str]:
    """Columns of the arm64 vectors."""
    rows = json.loads((ROOT / "tests/vectors/arm64_vectors.json").read_text(encoding="utf-8"))["vectors"]
    return frozenset(rows[0]["v612"])


def matrix() -> str:
    """Caller x accessor: x is a call; the last rows are accessors that are built from others."""
    head = ("caller", "file", *(name.removeprefix("kvm_vcpu_") for name in columns()))
    kinds = ("*class*", "", *(class_of(name) for name in columns()))
    rows = [
        (f"`{row.name}`" + f" ({row.since})" * bool(row.since), row.file, *("x" * (n in row.uses) for n in columns()))
        for row in (*CALLERS, *BUILT_FROM)
    ]
    return table(head, (kinds, *rows))


def direct_reads() -> str:
    """Functions that use the saved registers without an accessor."""
    return "\n".join(f"- `{name}`: {what}" for name, what in READ_DIRECTLY.items())


# -- conversion ----------------------------------------------------------------------------------------


@cache
def pure() -> frozenset[str]:
    """Accessors that can have an ESR form: pure functions of the syndrome other than the syndrome itself."""
    return frozenset(name for name in columns() if class_of(name) == ESR) - {RAW}


@cache
def callers() -> Uses:
    """The callers with the accessors that can have an ESR form."""
    return {row.name: pure() & set(row.uses) for row in CALLERS}


@cache
def built_from() -> Uses:
    """Accessors with an ESR form that are built from others."""
    return {row.name: pure() & set(row.uses) for row in BUILT_FROM if row.name in pure()}


@cache
def conversion() -> Conversion:
    """All orders of the steps that share an accessor with another step."""
    return Conversion(sharing(callers(), built_from()), built_from(), ALREADY)


def conversion_steps() -> str:
    """The steps, and the callers that stand apart."""
    uses = steps(callers())
    rows = [(_names(step), ", ".join(f"`{a}`" for a in columns() if a in uses[step])) for step in conversion().steps]
    apart = [_names(step) for step in uses if step not in conversion().steps]
    return f"{table(('step', 'asks for'), rows)}\n\nApart, at any time and for nothing: {'; '.join(apart)}."


def _names(step: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in step)


def conversion_orders() -> str:
    """Best, worst and named orders with the duplicates after each step."""
    every = conversion()
    found = {"best": every.best(), "worst": every.worst()} | {name: every.best(first) for name, first in ORDERS.items()}
    rows = [(name, str(o.peak), str(o.total), " ".join(map(str, o.after))) for name, o in found.items()]
    bounds = (
        f"{len(every.steps)} steps, {factorial(len(every.steps)):,} orders. Before the first step: {every.at_start}. "
        f"Smallest peak of any order: {every.lowest().peak}. No order can have a sum below {every.bound()}."
    )
    lists = "\n".join(f"- *{name}*: {_told(order)}" for name, order in found.items())
    return f"{bounds}\n\n{table(('order', 'peak', 'sum', 'after each step'), rows)}\n\n{lists}"


def _told(order: Order) -> str:
    first = (
        f"`{step[0]}`{' and alike' * (len(step) > 1)} {n}" for step, n in zip(order.steps, order.after, strict=True)
    )
    return ", ".join(first)


def conversion_upstream() -> str:
    """What the rule says of the abort path alone, beside what 7.4 has."""
    done = ORDERS["the abort path first"]
    both = duplicates(done, callers(), built_from(), ALREADY)
    new = backend("arm64@7.4").accessors
    kept = [a for a in columns() if a in ESR_FORM and a in new]
    gone = [a for a in columns() if a in pure() and a not in new]
    lines = (
        f"- Converted, and nothing else: {_names(done)}.",
        f"- The rule: {len(both)} in both forms: {_names([a for a in columns() if a in both])}.",
        f"- 7.4: {len(kept)} in both forms: {_names(kept)}.",
        f"- vCPU forms that 7.4 has dropped: {_names(gone)}.",
    )
    return "\n".join(lines)


def calls_version() -> str:
    """Where the calls were read."""
    files = {row.file: None for row in CALLERS}
    return f"Linux {VERSION}, arch/arm64/kvm: {', '.join(files)}; arch/arm64/include/asm/kvm_emulate.h."


_PARTS: Final = (functions, accessor_classes, matrix, direct_reads, calls_version)
_ORDERS: Final = (conversion_steps, conversion_orders, conversion_upstream)
BLOCKS: Final[Mapping[str, Callable[[], str]]] = {block.__name__: block for block in (*_PARTS, *_ORDERS)}
