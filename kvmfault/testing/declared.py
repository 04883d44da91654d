"""Steps 1, 5 and 7 of the recipe: what a backend declares fits together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Final

from kvmfault.algebra.expr import Pred, Word
from kvmfault.algebra.layout import Register
from kvmfault.contract.backend import Backend, Joints
from kvmfault.contract.format import block_sizes
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import VmFacts
from kvmfault.contract.probes import SAID
from kvmfault.contract.settings import HINTS, accepts
from kvmfault.contract.target import Target
from kvmfault.contract.tracepoints import Role, Tracepoint
from kvmfault.contract.values import Unbacked
from kvmfault.trace.pattern import Pattern

__all__ = ["layout", "policies", "reads_undeclared", "tracepoints"]

_PART: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""What a part of a TARGET may be called."""


def layout(backend: Backend) -> Iterator[str]:
    """Names, registers and what is keyed by them go together."""
    for what, names in (("backend", [backend.name]), ("format", backend.formats), ("kernel", backend.kernels)):
        yield from (f"{what} {n!r}: lower-case letters, digits, . _ -" for n in names if not _PART.fullmatch(n))
    if not backend.about.strip() or "\n" in backend.about:
        yield "about is one line"
    registers = {r.name: r for r in backend.registers}
    if len(registers) != len(backend.registers):
        yield "two registers have one name"
    if len(registers) < 2:
        yield "registers: at least one of the hardware, and the synthetic one, which is last"
        return
    synthetic = backend.registers[-1]
    if backend.code not in registers or backend.code == synthetic.name:
        yield f"code={backend.code!r} is none of {', '.join(list(registers)[:-1])}"
    for name, value in backend.defaults.items():
        if name not in registers or not 0 <= value < 1 << registers[name].width:
            yield f"defaults: {name}={value:#x} is no register, or does not fit"
    yield from _given(backend, registers, synthetic)
    yield from (f"layouts: {name} is no register" for name in backend.layouts.keys() - registers.keys())
    yield from (f"reachable {text}" for text in reads_undeclared(backend, backend.reachable))
    yield from _by_kernel(backend)


def _given(backend: Backend, registers: dict[str, Register], synthetic: Register) -> Iterator[str]:
    marks = list(backend.given.values())
    for name, mark in backend.given.items():
        if name not in registers or name == synthetic.name:
            yield f"given: {name} is no register of the hardware"
        if mark not in synthetic.fields or synthetic[mark].width != 1:
            yield f"given: {mark} is no single bit of {synthetic.name}"
        elif marks.count(mark) > 1:
            yield f"given: {mark} stands for two registers"


def _by_kernel(backend: Backend) -> Iterator[str]:
    kernels = set(backend.kernels)
    if set(backend.accessors) - kernels or (backend.accessors and kernels - set(backend.accessors)):
        yield f"accessors are of {', '.join(backend.accessors)}, facts of {', '.join(kernels)}"
    yield from (f"format {n!r} calls itself {f.name!r}" for n, f in backend.formats.items() if f.name != n)


def reads_undeclared(backend: Backend, expression: Pred | Word) -> Iterator[str]:
    """Bits that the expression reads and no register has."""
    widths = {r.name: r.width for r in backend.registers}
    for name, mask in expression.reads.items():
        if name not in widths:
            yield f"reads {name}, which is no register of the backend"
        elif mask >> widths[name]:
            yield f"reads bits {mask:#x} of {name}, which has {widths[name]}"


def policies(target: Target) -> Iterator[str]:
    """Every decision has a value of its type, for every kernel, of sizes that the format has."""
    backend, fmt = target.backend, target.format
    behaviour = backend.behaviour()
    for what, by_kernel in (("policies", behaviour.policies), ("joints", behaviour.joints)):
        if set(by_kernel) != set(backend.kernels):
            yield f"{what} are of {', '.join(by_kernel) or 'no kernel'}, facts of {', '.join(backend.kernels)}"
            return
    policy, joints = target.policy, behaviour.joints[target.kernel]
    parts: tuple[tuple[str, object, type], ...] = (
        ("a policy", policy, Policy),
        ("joints", joints, Joints),
        ("vm", behaviour.vm, VmFacts),
    )
    wrong = [
        f"{what}: a {type(part).__name__} is no {kind.__name__}" for what, part, kind in parts if type(part) is not kind
    ]
    if wrong:
        yield from wrong
        return
    for record in (policy, behaviour.vm):
        for name, hint in HINTS[type(record)].items():
            value = getattr(record, name)
            if not accepts(hint, value) and not (value == {} or value == ()):
                yield f"{type(record).__name__}.{name}={value!r} is no value of it"
    sizes = set(block_sizes(fmt))
    named = set(policy.fit_sizes) | set((policy.area_sizes or {}).values())
    if named - sizes:
        yield f"fit_sizes or area_sizes name {', '.join(map(hex, named - sizes))}: no leaf has that size"
    if policy.unbacked is Unbacked.REMEMBER and not fmt.mmio_generation_bits():
        yield "unbacked=REMEMBER needs entries that remember MMIO, and the format has none"
    host = behaviour.host(fmt)
    if host.page_shift != fmt.page_shift:
        yield f"host: pages of {1 << host.page_shift:#x}, the format's are of {1 << fmt.page_shift:#x}"
    for f in fields(joints):
        if not all(callable(joint) for joint in getattr(joints, f.name)):
            yield f"joints.{f.name} holds something that cannot be called"


def tracepoints(backend: Backend) -> Iterator[str]:
    """Events tell registers that exist, out of fields that they have."""
    behaviour = backend.behaviour()
    for name, point in behaviour.tracepoints.items():
        yield from (f"{name}: {text}" for text in _tracepoint(backend, point))


def _tracepoint(backend: Backend, point: Tracepoint) -> Iterator[str]:
    pattern = Pattern.of((point,))  # LayoutError for what cannot be compiled
    told = {name for words in point.words.values() for fields in words.values.values() for name in fields}
    implied = {name for t in point.templates if not isinstance(t, str) for name in t.implied}
    names = pattern.fields.keys() | point.missing.keys() | told | implied
    registers = {r.name: r for r in backend.registers}
    for register, word in (point.registers or {}).items():
        if register not in registers:
            yield f"tells {register}, which is no register of the backend"
        else:
            if word.mask_out >> registers[register].width:
                yield f"tells {register} more bits than its {registers[register].width}"
            unknown = word.reads.keys() - names
            if unknown:
                yield f"takes {register} from {', '.join(unknown)}: the event has {', '.join(sorted(names))}"
    where = set() if point.address is None else set(point.address.reads)
    if lacking := {*point.told_by, *where} - names:
        yield f"is told apart or placed by {', '.join(sorted(lacking))}: the event has {', '.join(sorted(names))}"
    if point.tells is not None and point.role not in SAID:
        yield "tells a check something, and its role does not say what"
    if point.registers is not None and point.role not in (Role.FAULT, Role.EXIT):
        yield "has registers, but its role is neither FAULT nor EXIT"
    if point.awaits and point.awaits not in registers:
        yield f"awaits {point.awaits}, which is no register of the backend"
