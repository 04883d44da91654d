"""All 2^32 values of a target's code register: emitted C against the Python definitions, fact by fact.

``python -m tests.exhaustive [TARGET] [SHAPE]``; the other registers are all ones, so that whatever may be captured was.
What Python says is computed once for each pattern of the bits read in the upper half, for all values of the lower
half; C is asked for every value.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvmfault.algebra.columns import pred_column, word_column
from kvmfault.algebra.expr import Pred, Word
from kvmfault.contract.accessors import FACTS
from kvmfault.contract.shapes import SHAPES, Shape
from kvmfault.contract.target import Target, backend
from kvmfault.emit.clines import variable
from kvmfault.emit.header import target_header
from kvmfault.types import U64
from tests.emitted import STRICT, expression, run_compiler

HALF: Final = 1 << 16
LOOP: Final = """
/* Where C first differs from Python, to the upper half, or ~0. A row for each pattern of upper halves. */
u64 check_{fact}(const {kind} *rows, const unsigned *row_of, const {kind} *more, u64 from, u64 to);
u64 check_{fact}(const {kind} *rows, const unsigned *row_of, const {kind} *more, u64 from, u64 to)
{{
	for (u64 high = from; high < to; high++) {{
		const {kind} *row = rows + ((u64)row_of[high] << 16);
		{kind} differs = 0;

		for (unsigned low = 0; low < 65536; low++) {{
			struct kvm_fault_regs regs = {{ {regs} }};
			struct kvm_fault fault;

			kvm_fault_init(&fault, &regs);
			differs |= ({kind})kvm_fault_{fact}(&fault) ^ (row[low] | more[high]);
		}}
		if (differs)
			return high << 16;
	}}
	return ~0ULL;
}}
"""


def asked(target: Target) -> dict[str, Pred | Word]:
    """The facts that look at the lower 32 bits of the code register."""
    found: dict[str, Pred | Word] = {}
    for fact in FACTS:
        of = expression(target, fact)
        if isinstance(of, (Pred, Word)) and of.reads.get(target.backend.code, 0) & 0xFFFF_FFFF:
            found[fact] = of
    return found


Reference: TypeAlias = tuple[NDArray[np.generic], NDArray[np.uint32], NDArray[np.generic]]


def reference(target: Target, of: Pred | Word) -> Reference:
    """Rows of 65,536 answers, which row each upper half has, and what each upper half adds to it."""
    code = target.backend.code

    def answers(values: NDArray[np.uint64]) -> NDArray[np.generic]:
        columns = {name: np.full(HALF, U64, np.uint64) for name in of.reads} | {code: values}
        return word_column(of, columns) if isinstance(of, Word) else pred_column(of, columns).view(np.uint8)

    halves = np.arange(HALF, dtype=np.uint64)
    high = halves << np.uint64(16)
    if isinstance(of, Word) and all(term.table is None for term in of.terms):  # an OR of copied bits
        return answers(halves), np.zeros(HALF, np.uint32), answers(high)
    patterns, row_of = np.unique(high & np.uint64(of.reads[code]), return_inverse=True)
    rows = np.concatenate([answers(halves | pattern) for pattern in patterns])
    return rows, row_of.astype(np.uint32), np.zeros(HALF, rows.dtype)


def first_difference(function: Callable[..., int], given: Reference, pool: ThreadPoolExecutor) -> int | None:
    """The smallest upper half, in place, for which C and Python differ somewhere; None: nowhere."""
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in given]
    step = HALF // 64

    def run(start: int) -> int:
        return function(*pointers, ctypes.c_uint64(start), ctypes.c_uint64(start + step))

    first = min(pool.map(run, range(0, HALF, step)))
    return None if first == U64 else first


def main(target: Target, shape: Shape) -> int:
    """Compare and say what differs; status 1 if anything does."""
    names = {name: variable(name) for name in target.order}
    code = target.backend.code
    values = {name: "(unsigned)high << 16 | low" if name == code else "~0ULL" for name in target.order}
    regs = ", ".join(f".{names[name]} = {value}" for name, value in values.items())
    facts = asked(target)
    started, bad = time.monotonic(), 0
    with TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        (Path(folder) / "header.h").write_text(target_header(target, shape))
        kinds = {fact: "u64" if isinstance(of, Word) else "unsigned char" for fact, of in facts.items()}
        checks = [LOOP.format(fact=fact, kind=kind, regs=regs) for fact, kind in kinds.items()]
        (Path(folder) / "check.c").write_text('#include "header.h"\n' + "".join(checks))
        library = Path(folder) / "check.so"
        options = ("-O3", "-march=native", "-shared", "-fPIC")
        run_compiler(os.environ.get("CC", "cc"), *STRICT, *options, "-o", library, Path(folder) / "check.c")
        loaded = ctypes.CDLL(str(library))
        for fact, of in facts.items():
            begun = time.monotonic()
            function = loaded[f"check_{fact}"]
            function.restype = ctypes.c_uint64
            where = first_difference(function, reference(target, of), pool)
            bad += where is not None
            answer = "equal" if where is None else f"differs in {where:#010x} to {where | 0xFFFF:#010x}"
            print(f"{fact:<22}{answer}  {time.monotonic() - begun:.1f} s", flush=True)
    took = time.monotonic() - started
    print(f"{target.name}, shape {shape.name}: {len(facts)} facts, 2^32 values of {code}, {bad} differ, {took:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("arm64", "raw")[len(sys.argv) - 1 :]]
    sys.exit(main(backend(arguments[0]), SHAPES[arguments[1]]))
