"""Emitted headers, compiled: every function of one as a loop over columns of registers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvmfault.algebra.columns import Columns
from kvmfault.algebra.domain import cases, with_representatives
from kvmfault.algebra.expr import Maybe, Pred, Word, union
from kvmfault.algebra.prove import combinations
from kvmfault.contract.accessors import FACTS, VALUES, Gap, stand_in
from kvmfault.contract.shapes import Shape
from kvmfault.contract.target import Target
from kvmfault.emit.clines import variable
from kvmfault.emit.header import target_header
from kvmfault.types import U64

STRICT: Final = ("-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror")
EVERY_BITS: Final = 18
"""Up to so many bits read, every combination is compared."""


def compilers() -> dict[str, str | None]:
    """The compilers that headers are for, and where this machine has them."""
    return {name: shutil.which(name) for name in ("gcc", "clang")}


def run_compiler(cc: str, *arguments: str | Path) -> None:
    """Compile; a warning is an error, and its text that of the AssertionError."""
    done = subprocess.run([cc, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def function(fact: str) -> str:
    """Name of a fact's function in C; an optional value has a getter."""
    if fact in VALUES:
        return fact if fact.startswith("kvm_get_fault_") else f"kvm_get_fault_{fact}"
    return f"kvm_fault_{fact}"


def expression(target: Target, fact: str) -> Pred | Word | Maybe:
    """What Python says: the definition, a gap as what it assumes, an optional value as a Maybe."""
    if fact in VALUES:
        valid, value = (expression(target, part) for part in VALUES[fact])
        assert isinstance(valid, Pred)
        assert isinstance(value, Word)
        return value.when(valid)
    of: Pred | Gap | Word = getattr(target.definition, fact)
    return of if isinstance(of, Word) else stand_in(of)


def loops(target: Target) -> str:
    """A C file's text: ``loop_FACT(registers..., out, n)`` for each fact, the same for optional values."""
    names = [variable(name) for name in target.order]
    columns = "".join(f"const u64 *{name}, " for name in names)
    regs = ", ".join(f".{name} = {name}[i]" for name in names)
    parts = ['#include "header.h"\n']
    for fact in (*FACTS, *VALUES):
        get = "out[i] = 0;\n\t\tok[i] = {0}(&fault, &out[i]);" if fact in VALUES else "out[i] = {0}(&fault);"
        more = "bool *ok, " if fact in VALUES else ""
        parts.append(
            f"void loop_{fact}({columns}u64 *out, {more}size_t n);\n"
            f"void loop_{fact}({columns}u64 *out, {more}size_t n)\n{{\n"
            "\tfor (size_t i = 0; i < n; i++) {\n"
            f"\t\tstruct kvm_fault_regs regs = {{ {regs} }};\n\t\tstruct kvm_fault fault;\n\n"
            f"\t\tkvm_fault_init(&fault, &regs);\n\t\t{get.format(function(fact))}\n\t}}\n}}\n"
        )
    return "\n".join(parts)


class Compiled:
    """The header of *target* in *shape*, compiled in *folder* without a warning."""

    def __init__(self, target: Target, shape: Shape, cc: str, folder: Path, *options: str) -> None:
        (folder / "header.h").write_text(target_header(target, shape))
        (folder / "loops.c").write_text(loops(target))
        library = folder / "loops.so"
        run_compiler(cc, *STRICT, "-O0", *options, "-shared", "-fPIC", "-o", library, folder / "loops.c")
        self._library = ctypes.CDLL(str(library))
        self._order = target.order

    def column(self, fact: str, columns: Columns) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Value, and for an optional one validity, row by row."""
        rows = len(next(iter(columns.values())))
        zeros = np.zeros(rows, np.uint64)
        reads = [np.ascontiguousarray(columns.get(name, zeros)) for name in self._order]
        out, ok = np.empty(rows, np.uint64), np.ones(rows, np.bool_)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*reads, out, *([ok] if fact in VALUES else []))]
        self._library[f"loop_{fact}"](*pointers, ctypes.c_size_t(rows))
        return out, ok


def _complete(columns: Columns, order: Sequence[str]) -> Columns:
    zeros = np.zeros(len(next(iter(columns.values()))), np.uint64)
    return {name: columns.get(name, zeros) for name in order}


def _decisive(of: Pred | Word | Maybe) -> dict[str, int]:
    # what comparisons and tables read; all else a word copies, bit by bit
    word, valid = (of.word, of.valid) if isinstance(of, Maybe) else (of, of)
    tables = [{t.register: t.mask} for t in word.terms if t.table is not None] if isinstance(word, Word) else []
    return union(*tables, valid.reads if isinstance(valid, Pred) else {})


def inputs(of: Pred | Word | Maybe, order: Sequence[str], seed: int = 1) -> Iterator[Columns]:
    """Every combination of the bits that decide, all other bits 0 and then random; of what is copied, each bit alone.

    Where the combinations are too many: one value of each kind that the expression tells apart, and random ones.
    """
    rng = np.random.default_rng(seed)
    reads = _decisive(of)
    if sum(mask.bit_count() for mask in reads.values()) <= EVERY_BITS:
        for columns in combinations(reads):
            rows = len(next(iter(columns.values())))
            yield _complete(columns, order)
            noise = {r: rng.integers(0, U64, rows, np.uint64, endpoint=True) for r in order}
            unread = {r: noise[r] & np.uint64(U64 & ~reads.get(r, 0)) for r in order}
            yield {r: unread[r] | columns[r] if r in columns else unread[r] for r in order}
        if isinstance(of, Pred):
            return
    elif not isinstance(of, Word):
        kinds = cases(with_representatives({}, of.valid if isinstance(of, Maybe) else of))
        yield from (_complete(columns, order) for columns in kinds)
    one_hot = np.array([0, *(1 << bit for bit in range(64)), U64], np.uint64)
    noise = {r: rng.integers(0, U64, 20_000, np.uint64, endpoint=True) for r in order}
    for hot in of.reads:
        quiet = {r: one_hot if r == hot else np.zeros_like(one_hot) for r in order}
        yield {r: np.concatenate([quiet[r], noise[r], quiet[r] | noise[r][: len(one_hot)]]) for r in order}
