"""Steps 3 and 4 of the recipe: the shapes of a fault tell the same, and an access comes back from registers."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from itertools import product

import numpy as np

from kvmfault.algebra.columns import pred_column, word_column
from kvmfault.algebra.expr import Pred, Word
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.accessors import FACTS, TRUTHS, VALUES, Gap, stand_in
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.shapes import SHAPES, Raw
from kvmfault.contract.target import Target
from kvmfault.testing.facts import spelled
from kvmfault.testing.samples import any_rows, reachable_rows
from kvmfault.types import Gpa, Gva

__all__ = ["accesses", "encoding", "shape_agreement", "shapes", "told"]


@cache
def _makers(target: Target) -> Mapping[str, Callable[[Raw], MmioFault]]:
    return {name: shape.on(target.ops) for name, shape in SHAPES.items()}


def shapes(target: Target, raw: Raw) -> dict[str, MmioFault]:
    """The fault in its four shapes, as what neutral code takes."""
    return {name: make(raw) for name, make in _makers(target).items()}


def told(fault: MmioFault) -> dict[str, object]:
    """All that a fault tells."""
    plain: dict[str, object] = {name: getattr(fault, name) for name in ("syndrome", *TRUTHS, *VALUES)}
    return plain | {"kvm_get_fault_gpa": fault.kvm_get_fault_gpa()}


def shape_agreement(target: Target) -> Iterator[str]:
    """The four shapes of a fault and columns tell the same. People are told gaps as gaps."""
    rows = (*reachable_rows(target), *any_rows(target))
    faults = [target.decode(**row) for row in rows]
    registers = zip(*(fault.of for fault in faults), strict=True)
    columns = {name: np.array(values, np.uint64) for name, values in zip(target.order, registers, strict=True)}
    for fault in faults:
        answers = {name: told(shape) for name, shape in shapes(target, fault).items()}
        for name, answer in answers.items():
            if answer != answers["raw"]:
                wrong = next(k for k in answer if answer[k] != answers["raw"][k])
                was, now = answers["raw"][wrong], answer[wrong]
                yield f"{wrong} is {now} in shape {name}, {was} raw: {spelled(fault, target)}"
    for name in FACTS:
        fact: Pred | Gap | Word = getattr(target.definition, name)
        column = word_column(fact, columns) if isinstance(fact, Word) else pred_column(stand_in(fact), columns)
        one_by_one = [getattr(target.snapshot(fault), name) for fault in faults]
        if column.tolist() != one_by_one:
            yield f"{name} as a column is not what it is one by one"
        if isinstance(fact, Gap) and getattr(target.answered(faults[0]), name) is not fact:
            yield f"{name} is a gap, and people are told an answer"
    captured = target.snapshot(faults[0])
    if pickle.loads(pickle.dumps(captured)) != captured:
        yield "a snapshot does not survive pickle"


def accesses() -> Iterator[Access]:
    """Accesses that somebody may ask for, also impossible ones."""
    blank = Access()
    yield blank
    yield replace(
        blank, gpa=Gpa((1 << 64) - 4096), offset=4095, gva=Gva((1 << 64) - 1), granule=1 << 52, size=16, register=40
    )
    tries = ((True, None, None), (None, True, None), (None, None, True), (True, True, None), (None, True, True))
    for cause, (read, write, execute) in product((None, *Cause), tries):
        yield replace(blank, cause=cause, gpa=Gpa(0x4000_0000), offset=0x18, read=read, write=write, exec=execute)
        yield replace(
            blank, cause=cause, gpa=Gpa(0x1000), gva=Gva(0x7FFF_0000_0123), read=read, write=write, exec=execute,
            on_walk=True, final=False, user=True, granule=1 << 21, private=True, prefetch=True,
        )  # fmt: skip
        yield replace(
            blank, cause=cause, gpa=Gpa(0xFEE0_0000), offset=0xF0, read=read, write=write, exec=execute,
            size=4, register=3, sign_extend=True, wide=False, ordered=True, cache_op=False, final=True,
        )  # fmt: skip


def encoding(target: Target) -> Iterator[str]:
    """An access comes back from the registers made of it, or what is lost is told.

    Of its own faults a backend loses nothing unless ``encode`` gives the reason.
    """
    for row in reachable_rows(target):
        fault = target.decode(**row)
        wanted = target.access(fault)
        yield from _lost_openly(target, wanted)
        registers, reasons = target.backend.encode(wanted, target.format)
        made = target.decode(**registers)
        got = target.access(made)
        if not target.backend.reachable.on(target.named(made)):
            yield f"of a fault of its own encode makes what no hardware gives: {spelled(made, target)}"
        for name in set(wanted.differs(got)) - reasons.keys():
            was, now = getattr(wanted, name), getattr(got, name)
            lost = f"{name} of a fault of its own is lost, {was} became {now}"
            yield f"{lost}, without a reason: {spelled(fault, target)}"
    for wanted in accesses():
        yield from _lost_openly(target, wanted)
        once = target.access(target.encode(wanted).fault)
        again = target.encode(once)
        if target.access(again.fault) != once:
            yield f"encoding twice is not encoding once: {_members(once, target.access(again.fault))}"


def _lost_openly(target: Target, wanted: Access) -> Iterator[str]:
    made = target.encode(wanted)
    got = target.access(made.fault)
    if set(made.lost) != set(wanted.differs(got)):
        yield f"lost is {', '.join(made.lost)}; what differs is {_members(wanted, got)}"


def _members(a: Access, b: Access) -> str:
    return ", ".join(f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)) or "nothing"
