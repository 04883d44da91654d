"""Step 3 of the recipe: the facts of a target, over any registers and over those that hardware produces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Final, NamedTuple

from kvmfault.algebra.expr import NEVER, Maybe, Pred, Word
from kvmfault.algebra.prove import where
from kvmfault.contract.accessors import FACTS, VALUES, Gap
from kvmfault.contract.backend import Backend
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.testing.declared import reads_undeclared
from kvmfault.testing.samples import any_rows, predicates, reachable_rows

__all__ = ["CAUSES", "LAWS", "Law", "expressions", "laws", "spelled", "text", "totality", "values"]

CAUSES: Final = (
    "is_translation",
    "is_permission",
    "is_access_flag",
    "is_reserved",
    "is_address_size",
    "is_external_abort",
)


class Law(NamedTuple):
    """Two facts that exclude each other wherever hardware can get."""

    a: str
    b: str
    because: str


LAWS: Final = (
    Law("is_write", "is_exec", "a fetch writes nothing"),  # but where Backend.fetch_writes says that it does
    Law("is_read", "is_exec", "a fetch is told as such"),
    Law("is_table_walk", "is_final", "an access is to a table or to the final address"),
    *(Law(a, b, "there is one cause") for a, b in combinations(CAUSES, 2)),
)
"""Kept by every architecture: neutral code relies on them."""
_VALID_OF: Final = {value: valid for valid, value in VALUES.values()}


def expressions(target: Target) -> Iterator[str]:
    """Facts, stand-ins and accessors read bits that the registers have. Gaps have a reason."""
    for name in FACTS:
        fact: Pred | Gap | Word = getattr(target.definition, name)
        if isinstance(fact, Gap) and (not fact.reason.strip() or "\n" in fact.reason):
            yield f"{name}: the gap has no reason in one line"
        expression = fact.assume if isinstance(fact, Gap) else fact
        yield from (f"{name} {what}" for what in reads_undeclared(target.backend, expression))
    for name, accessor in target.accessors.items():
        parts = (accessor.word, accessor.valid) if isinstance(accessor, Maybe) else (accessor,)
        yield from (f"accessor {name} {what}" for part in parts for what in reads_undeclared(target.backend, part))
        if not name.isidentifier():
            yield f"accessor {name!r} is no identifier"


def totality(target: Target) -> Iterator[str]:
    """Whatever registers hold, every fact has an answer, and that an explanation."""
    truths = predicates(target)
    for row in any_rows(target):
        fault = target.decode(**row)
        captured, shown = target.snapshot(fault), _spelled(row)
        for name in FACTS:
            answer = getattr(captured, name)
            if type(answer) is not (bool if name in truths else int):
                yield f"{name} is {answer!r} where {shown}"
        target.access(fault)
        if target.backend.unusual is not None:
            told = target.backend.unusual(target.named(fault))
            if not all(line and "\n" not in line for line in told):
                yield f"unusual gives {told!r} where {shown}"
        for register, choose in target.backend.layouts.items():
            if (chosen := choose(target.named(fault))).name != register:
                yield f"layouts: {register} is laid out as {chosen.name} where {shown}"
    for row in any_rows(target)[:10]:
        fault = target.decode(**row)
        for name in (*FACTS, *target.accessors):
            words = target.explain(fault, name)
            if not words or "\n" in words:
                yield f"{name} is explained as {words!r} where {_spelled(row)}"


def laws(target: Target) -> Iterator[str]:
    """What neutral code relies on holds for all that hardware can produce, by proof."""
    reachable = target.backend.reachable
    if where(reachable) is None:
        yield "reachable is empty: no fault is one of this backend"
        return
    fetch_writes = target.backend.fetch_writes
    if fetch_writes is not NEVER and where(fetch_writes & reachable) is None:
        yield "fetch_writes never holds where hardware can get: declare NEVER, or widen reachable"
    known = {n: f for n in FACTS if isinstance(f := getattr(target.definition, n), Pred)}
    for law in LAWS:
        if law.a in known and law.b in known:
            excepted = fetch_writes if law is LAWS[0] else NEVER
            witness = where(known[law.a] & known[law.b] & reachable & ~excepted)
            if witness is not None:
                yield f"{law.a} and {law.b} hold together where {_spelled(witness)}; but {law.because}"
    for name, fact in known.items():
        if fact is not NEVER and where(fact & reachable) is None:
            yield f"{name} never holds where hardware can get: declare NEVER or a Gap, or widen reachable"
    yield from _captured(target, known)


def _captured(target: Target, known: Mapping[str, Pred]) -> Iterator[str]:
    # a value out of a register that may be missing is known only where that was captured
    synthetic = target.backend.registers[-1]
    for valid, value in VALUES.values():
        word: Word = getattr(target.definition, value)
        for register in word.reads.keys() & target.backend.given.keys():
            mark = synthetic[target.backend.given[register]].is_set
            if valid in known and where(known[valid] & ~mark & target.backend.reachable) is not None:
                yield f"{valid} holds where {register} was not captured"


def values(target: Target) -> Iterator[str]:
    """Addresses, offsets, sizes and register numbers are in range where they are valid."""
    for name, allowed in (("gpa_page", ~0xFFF), ("gpa_offset_bits", 0xFFF)):
        word: Word = getattr(target.definition, name)
        if word.mask_out & ~allowed:
            yield f"{name} can have bits {word.mask_out & ~allowed & (1 << 64) - 1:#x}"
    sizes = {1 << shift for shift in range(12, 64)}
    for row in reachable_rows(target):
        fault = target.decode(**row)
        for name, fits in (("granule", sizes), ("mmio_size", {1, 2, 4, 8}), ("mmio_register", range(32))):
            value = getattr(fault, name)
            if value is not None and value not in fits:
                yield f"{name} is {value:#x} where {_spelled(row)}"


def text(backend: Backend) -> Iterator[str]:
    """Lines that people paste give registers that can be decoded, or nothing."""
    widths = {r.name: r.width for r in backend.registers}
    names = " ".join(f"{name}=0x{(1 << width) - 1:x}" for name, width in widths.items())
    hostile = ("", " ", "\0", "x" * 5000, "=" * 300, "0x" * 300, names, names.lower(), "kvm: " + names, "é\u2028", "-1")
    for line in hostile if backend.paste is not None else ():
        found = backend.paste(line) if backend.paste is not None else None
        for name, value in (found or {}).items():
            if name not in widths or not 0 <= value < 1 << widths[name]:
                yield f"{line[:60]!r} is read as {name}={value:#x}"


def _spelled(row: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value:#x}" for name, value in row.items()) or "no register is given"


def spelled(fault: Raw, target: Target) -> str:
    """The fault's registers in one line."""
    return _spelled(target.named(fault))
