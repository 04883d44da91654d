"""What kind each of many events is, and where: by what backends declare, computed for the distinct ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvmfault.algebra.columns import word_column
from kvmfault.algebra.expr import Pred, Word, union
from kvmfault.contract.access import Access, show
from kvmfault.contract.target import Target
from kvmfault.contract.tracepoints import Role, Sort, Tracepoint
from kvmfault.trace.frames import Column

__all__ = ["NOWHERE", "Index", "Kind", "Reader", "Rows", "Told", "U64Col", "access_words", "reader"]

U64Col: TypeAlias = NDArray[np.uint64]
Rows: TypeAlias = Mapping[str, Column]
"""Events of one name: ``pid`` and their own fields."""
Index: TypeAlias = NDArray[np.int64]

NOWHERE: Final = np.uint64((1 << 64) - 1)
"""Stands for an address that is not known."""


class Kind(NamedTuple):
    """What is counted together: an event, and what it says."""

    sort: Sort
    event: str
    detail: str

    def __str__(self) -> str:
        return f"{self.event} {self.detail}".rstrip()


class Told(NamedTuple):
    """What some events of one name say."""

    kinds: Sequence[Kind]
    which: Index
    """For each event, its place in ``kinds``."""
    address: U64Col | None
    """Guest-physical; NOWHERE where not known. None: of none."""


class Reader(Protocol):
    """Reads the events of one name."""

    def __call__(self, rows: Rows) -> Told:
        """What they say."""
        ...


def reader(target: Target, event: str, point: Tracepoint) -> Reader:
    """How *target* reads *event*, which *point* declares and which is counted."""
    if point.role is Role.FAULT and point.registers is not None:
        return _faults(target, event, point.registers)
    return _others(event, point)


def _faults(target: Target, event: str, registers: Mapping[str, Word]) -> Reader:
    definition = target.definition
    facts = [getattr(definition, name) for name in definition.__slots__]
    reads = union(*(fact.reads for fact in facts if isinstance(fact, Pred)))
    needed = union(*(word.reads for word in registers.values()))
    known: dict[tuple[int, ...], tuple[Kind, bool]] = {}

    def told(values: Mapping[str, int]) -> tuple[Kind, bool]:
        key = tuple(values.values())
        if key not in known:
            fault = target.decode(**values)
            known[key] = (
                Kind(Sort.FAULT, event, access_words(target.access(fault))),
                fault.kvm_get_fault_gpa() is not None,
            )
        return known[key]

    def read(rows: Rows) -> Told:
        fields = {name: _unsigned(rows, name) for name in needed}
        columns = {name: word_column(word, fields) for name, word in registers.items()}
        blank = np.zeros(len(rows["pid"]), np.uint64)
        columns |= {name: blank for name in definition.gpa_page.reads if name not in columns}
        distinct, which = _distinct({name: columns[name] & np.uint64(reads.get(name, 0)) for name in registers})
        found = [told(values) for values in distinct]
        page = word_column(definition.gpa_page, columns)
        has_page = np.array([has for _, has in found], np.bool_)[which]
        return Told([kind for kind, _ in found], which, np.where(has_page, page, NOWHERE))

    return read


def _others(event: str, point: Tracepoint) -> Reader:
    sort = None if point.role is None else point.role.sort
    assert sort is not None, event
    known: dict[tuple[int, ...], Kind] = {}

    def told(values: Mapping[str, int], signed: Collection[str]) -> Kind:
        key = tuple(values.values())
        if key not in known:
            fields = {k: v - (1 << 64) if k in signed and v >> 63 else v for k, v in values.items()}
            known[key] = Kind(sort, event, point.kind(fields))
        return known[key]

    plain = [Kind(sort, event, "")]

    def read(rows: Rows) -> Told:
        where = None
        if point.address is not None:
            where = word_column(point.address, {name: _unsigned(rows, name) for name in point.address.reads})
        keys = [key for key in point.told_by if key in rows]
        if not keys:
            return Told(plain, np.zeros(len(rows["pid"]), np.int64), where)
        signed = [key for key in keys if np.asarray(rows[key]).dtype.kind == "i"]
        distinct, which = _distinct({key: _unsigned(rows, key) for key in keys})
        return Told([told(values, signed) for values in distinct], which, where)

    return read


def access_words(access: Access) -> str:
    """Kind of a fault, such as ``write, permission``."""
    does = "/".join(name for name in ("read", "write", "exec") if getattr(access, name))
    parts = [does or "access", show(access.cause), "table walk" if access.on_walk else ""]
    return ", ".join(part for part in parts if part)


def _distinct(columns: Mapping[str, U64Col]) -> tuple[list[dict[str, int]], Index]:
    """The distinct rows of *columns*, and for each row which of them it is."""
    which: Index | None = None
    rows: list[dict[str, int]] = [{}]
    for name, column in columns.items():
        values, own = np.unique(column, return_inverse=True)
        if which is None:
            rows, which = [{name: int(v)} for v in values], own
            continue
        pairs, which = np.unique(which * len(values) + own, return_inverse=True)
        rows = [{**rows[pair // len(values)], name: int(values[pair % len(values)])} for pair in pairs.tolist()]
    assert which is not None, "there is a column"
    return rows, which


def _unsigned(rows: Rows, name: str) -> U64Col:
    column = rows[name]
    assert isinstance(column, np.ndarray), name
    return column.view(np.uint64)
