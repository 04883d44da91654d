"""What a shape costs: time in Python, instructions of the generated C under callgrind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Final

from kvmfault.compare.equality import ASKED
from kvmfault.compare.hazards import STORE, world
from kvmfault.contract.accessors import FACTS, VALUES
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.shapes import Shape
from kvmfault.contract.target import Target
from kvmfault.emit.clines import variable
from kvmfault.emit.header import getter, prototypes, target_header
from kvmfault.errors import UsageError

__all__ = [
    "CALLS",
    "FLAGS",
    "ROUNDS",
    "Instructions",
    "Times",
    "asked_by_path",
    "instructions",
    "missing_tools",
    "times",
]

ROUNDS: Final = 7
CALLS: Final = 2_000
FLAGS: Final = ("-std=c11", "-O2", "-g0")


class _Counting:
    """A fault that notes what it is asked."""

    def __init__(self, of: MmioFault, asked: list[str]) -> None:
        self._of, self._asked = of, asked

    def __getattr__(self, name: str) -> object:
        self._asked.append(name)
        return getattr(self._of, name)


def asked_by_path(target: Target) -> tuple[str, ...]:
    """What the path asks of a store to memory that is not mapped, in order, repetitions included."""
    asked: list[str] = []
    fault = target.encode(STORE).fault
    world(target).resolve(_Counting(fault, asked))  # type: ignore[arg-type]  # it passes everything on
    return tuple(name for name in asked if name in ASKED)


@dataclass(frozen=True, slots=True)
class Times:
    """Nanoseconds in this Python, the quickest of several rounds."""

    make: float
    """A fault in the shape, of one that holds its registers."""
    access: float
    """Asking one thing, on average over everything that may be asked."""
    fault: float
    """Making it, and asking what the path asks."""


def times(target: Target, shape: Shape) -> Times:
    """Measure the shape on a store to memory that is not mapped."""
    raw = target.encode(STORE).fault
    make = shape.on(target.ops)
    made, asked = make(raw), asked_by_path(target)
    every = _nanoseconds(lambda: _ask(made, ASKED))
    return Times(
        _nanoseconds(lambda: make(raw)),
        every / len(ASKED),
        _nanoseconds(lambda: _ask(make(raw), asked)),
    )


def _ask(fault: MmioFault, names: tuple[str, ...]) -> None:
    for name in names:
        getattr(fault, name)
        if name == "kvm_get_fault_gpa":
            fault.kvm_get_fault_gpa()


def _nanoseconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        start = perf_counter_ns()
        for _ in range(CALLS // ROUNDS):
            call()
        best = min(best, (perf_counter_ns() - start) / (CALLS // ROUNDS))
    return best


# Instructions.


@dataclass(frozen=True, slots=True)
class Instructions:
    """Instructions executed on one fault, called functions included."""

    make: int
    """kvm_fault_init."""
    accesses: Mapping[str, int]
    """By fact; each as a function of its own."""
    fault: int
    """kvm_fault_init, and arch-neutral code that asks what the path asks with the accessors inlined."""
    compiler: str

    @property
    def access(self) -> float:
        """On average over all facts."""
        return sum(self.accesses.values()) / len(self.accesses)


def missing_tools() -> list[str]:
    """What is not installed of what `instructions` needs."""
    return [name for name in ("gcc", "valgrind") if shutil.which(name) is None]


def instructions(target: Target, shape: Shape) -> Instructions:
    """Compile the header, run it under callgrind. Raises UsageError naming a tool that is missing or fails."""
    if missing := missing_tools():
        raise UsageError(f"not installed: {', '.join(missing)}")
    with TemporaryDirectory(prefix="kvmfault-") as name:
        folder = Path(name)
        (folder / "header.h").write_text(target_header(target, shape))
        (folder / "prototypes.h").write_text(prototypes())
        (folder / "functions.c").write_text('#define KVM_FAULT_FN\n#include "prototypes.h"\n#include "header.h"\n')
        (folder / "neutral.c").write_text(_neutral(asked_by_path(target)))
        (folder / "main.c").write_text(_main(target))
        sources = [folder / f"{part}.c" for part in ("functions", "neutral", "main")]
        _run(["gcc", *FLAGS, "-o", folder / "measured", *sources])
        out = folder / "out"
        plain = ("--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={out}")
        _run(["valgrind", "-q", "--tool=callgrind", *plain, folder / "measured"])
        counts = _called_by_main(out.read_text())
        version = _run(["gcc", "-dumpfullversion"]).strip()
    accesses = {fact: counts[f"kvm_fault_{fact}"] for fact in FACTS}
    make = counts["kvm_fault_init"]
    return Instructions(make, accesses, make + counts["neutral"], f"gcc {version} {' '.join(FLAGS[1:2])}")


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{command[0]} failed: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    return done.stdout


def _neutral(asked: tuple[str, ...]) -> str:
    lines = []
    for name in asked:
        if name in VALUES:
            lines.append(f"\tif ({getter(name)}(fault, &value))\n\t\tsum += value;")
        else:
            lines.append(f"\tsum += kvm_fault_{name}(fault);")
    body = "\n".join(lines)
    # in a file of its own: what fills the fault is not in sight, as in the kernel
    return (
        '#include "header.h"\n\nu64 neutral(const struct kvm_fault *fault);\n\n'
        "u64 neutral(const struct kvm_fault *fault)\n{\n\tu64 sum = 0, value = 0;\n\n"
        f"{body}\n\treturn sum + value;\n}}\n"
    )


def _main(target: Target) -> str:
    names = [variable(name) for name in target.order]
    values = target.encode(STORE).fault.of
    regs = ", ".join(f".{name} = {value:#x}ULL" for name, value in zip(names, values, strict=True))
    calls = "\n".join(f"\tsum += kvm_fault_{fact}(fault);" for fact in FACTS)
    return (
        '#include <stdlib.h>\n#include "prototypes.h"\n'
        "struct kvm_fault_regs;\nvoid kvm_fault_init(struct kvm_fault *fault, const struct kvm_fault_regs *regs);\n"
        "u64 neutral(const struct kvm_fault *fault);\n\n"
        f"static struct {{ u64 {', '.join(names)}; }} regs = {{ {regs} }};\n\n"
        "int main(void)\n{\n\tstruct kvm_fault *fault = malloc(4096);\n\tu64 sum = 0;\n\n"
        f"\tkvm_fault_init(fault, (const void *)&regs);\n{calls}\n\tsum += neutral(fault);\n\treturn sum == 1;\n}}\n"
    )


def _called_by_main(text: str) -> dict[str, int]:
    # function -> instructions of its one call, from main's part of a callgrind file
    found: dict[str, int] = {}
    inside, called, count = False, "", False
    for line in text.splitlines():
        if line.startswith("fn="):
            inside = line[3:].partition("'")[0].endswith("main") and "libc" not in line
        elif line.startswith("cfn="):
            called = line[4:]
        elif line.startswith("calls="):
            count = inside
        elif count:
            found[called] = int(line.split()[1])
            count = False
    return found
