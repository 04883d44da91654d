"""Facts as loops in C, built with the machine's own compiler: what columns are measured beside, and checked against."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmfault.algebra.c import c_function
from kvmfault.algebra.columns import Columns
from kvmfault.algebra.expr import Pred, Word

FLAGS = ("-O3", "-std=c11", "-Wall", "-Wextra", "-shared", "-fPIC")


def compiler() -> str | None:
    """Path of the C compiler ($CC, or cc), or None."""
    return shutil.which(os.environ.get("CC", "cc"))


def source(facts: Mapping[str, Pred | Word]) -> str:
    """One C file: for each fact a function of that name, and ``loop_NAME`` over columns of the registers it reads."""
    parts = ["#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n"]
    for name, of in facts.items():
        variables = {register: register.lower() for register in of.reads}
        columns = "".join(f"const uint64_t *restrict {v}, " for v in variables.values())
        arguments = ", ".join(f"{v}[i]" for v in variables.values())
        kind = "uint64_t" if isinstance(of, Word) else "bool"
        parts.append(
            f"{c_function(name, of, variables)}\n"
            f"void loop_{name}({columns}{kind} *restrict out, size_t n)\n"
            f"{{\n\tfor (size_t i = 0; i < n; i++)\n\t\tout[i] = {name}({arguments});\n}}\n"
        )
    return "\n".join(parts)


class CLoops:
    """The loops of *facts*, compiled in *folder*. Raises CalledProcessError if the compiler refuses the text."""

    def __init__(self, facts: Mapping[str, Pred | Word], folder: Path, cc: str = "cc") -> None:
        text, library = folder / "facts.c", folder / "facts.so"
        text.write_text(source(facts))
        subprocess.run([cc, *FLAGS, "-o", str(library), str(text)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._facts = facts

    def run(self, name: str, columns: Columns, out: NDArray[Any]) -> None:
        """Fill *out* with the fact's value, row by row."""
        reads = [np.ascontiguousarray(columns[register], np.uint64) for register in self._facts[name].reads]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*reads, out)]
        self._library[f"loop_{name}"](*pointers, ctypes.c_size_t(len(out)))

    def column(self, name: str, columns: Columns, rows: int) -> NDArray[np.uint64] | NDArray[np.bool_]:
        """The fact's value, row by row, in a new array."""
        out: NDArray[np.uint64] | NDArray[np.bool_]
        out = np.empty(rows, np.uint64) if isinstance(self._facts[name], Word) else np.empty(rows, np.bool_)
        self.run(name, columns, out)
        return out
