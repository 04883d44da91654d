"""Mistakes that people make with a fault, a small program for each shape, and what ``mypy --strict`` says of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import kvmfault
from kvmfault.contract.shapes import SHAPES
from kvmfault.errors import UsageError

__all__ = ["CAUGHT", "IMPOSSIBLE", "MISSED", "MISTAKES", "Mistake", "Verdict", "verdicts"]

_TYPES: Final = {
    "fields": "Snapshot",
    "raw": "Raw",
    "opaque": "View[Handle[Mine]]",
    "hybrid": "Hybrid",
}
_HEAD: Final = """from dataclasses import replace

from kvmfault import Handle, HandleOps, Hybrid, PageFault, Raw, Snapshot, Target
from kvmfault.contract.accessors import Accessors
from kvmfault.algebra.scalar import Regs
from kvmfault.contract.shapes import Ops, View
from kvmfault.types import Gfn


class Mine:
    ...


class Other:
    ...


def frame(gfn: Gfn) -> Gfn:
    return gfn


"""


@dataclass(frozen=True, slots=True)
class Mistake:
    """One way to be wrong."""

    name: str
    about: str
    """What goes wrong at run time."""
    programs: Mapping[str, str]
    """Body of a function ``wrong(fault, ...)`` by shape; a shape that is missing gives no way to make the mistake."""


def _wrong(parameters: str, *lines: str) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"def wrong({parameters}) -> object:\n{body}"


def _all(*lines: str) -> dict[str, str]:
    return {shape: _wrong(f"fault: {kind}", *lines) for shape, kind in _TYPES.items()}


MISTAKES: Final = (
    Mistake("a misspelt fact", "AttributeError, once a fault comes this way", _all("return fault.is_wirte")),
    Mistake(
        "an address used that may be none",
        "TypeError, where hardware reports none",
        _all("return fault.kvm_get_fault_gpa() + 0x10"),
    ),
    Mistake(
        "bytes where frames are wanted",
        "another page",
        _all("gpa = fault.kvm_get_fault_gpa()", "return None if gpa is None else frame(gpa)"),
    ),
    Mistake("a function not called", "always true", _all("return 1 if fault.kvm_get_fault_gpa else 0")),
    Mistake("a fact overwritten", "AttributeError", _all("fault.is_write = True", "return fault")),
    Mistake(
        "MMIO asked of any fault",
        "AttributeError, on an architecture that cannot say",
        dict.fromkeys(_TYPES, _wrong("fault: PageFault", "return fault.mmio_size")),
    ),
    Mistake(
        "registers read by neutral code",
        "right on one architecture",
        {s: _wrong(f"fault: {_TYPES[s]}", "return fault.of[0] & 0x40") for s in ("raw", "opaque", "hybrid")},
    ),
    Mistake(
        "registers given to another architecture's functions",
        "wrong answers",
        {
            "raw": _wrong("fault: Raw, other: Target", "return View(other.ops, fault.of)"),
            "opaque": _wrong("fault: Handle[Mine], other: HandleOps[Other]", "return other.bind(fault)"),
            "hybrid": _wrong("fault: Hybrid, other: Target", "return Hybrid(other.ops, fault.of)"),
        },
    ),
    Mistake(
        "registers that still change",
        "answers of the next fault",
        {
            "raw": _wrong("ops: Ops[list[int]], vcpu: list[int]", "fault: PageFault = View(ops, vcpu)", "return fault"),
            "opaque": _wrong("ops: HandleOps[Mine], vcpu: list[int]", "return ops.bind(Handle(vcpu))"),
            "hybrid": _wrong("ops: Ops[Regs], vcpu: list[int]", "return Hybrid(ops, vcpu)"),
        },
    ),
    Mistake(
        "a fact or register forgotten when a fault is made",
        "TypeError or IndexError",
        {
            "fields": _wrong("", "return Accessors(syndrome=0, is_write=True)"),
            "raw": _wrong("ops: Ops[Regs]", "none: Regs = ()", "return View(ops, none)"),
            "opaque": _wrong("ops: HandleOps[Mine]", "return ops.bind(Handle(()))"),
            "hybrid": _wrong("ops: Ops[Regs]", "return Hybrid(ops, ())"),
        },
    ),
    Mistake(
        "a fault that contradicts itself",
        "a store that is a fetch",
        {"fields": _wrong("fault: Snapshot", "return replace(fault, is_write=True, is_exec=True)")},
    ),
)
"""The fixed list."""

CAUGHT: Final = "caught"
MISSED: Final = "not caught"
IMPOSSIBLE: Final = "cannot be made"


@dataclass(frozen=True, slots=True)
class Verdict:
    """CAUGHT, MISSED or IMPOSSIBLE; and what mypy says where it catches it."""

    word: str
    says: str = ""


def verdicts() -> dict[str, dict[str, Verdict]]:
    """Mistake -> shape -> verdict, from one run of mypy. Raises UsageError where it is not installed, or fails."""
    if find_spec("mypy") is None:
        raise UsageError("mypy is not installed")
    names = {f"m{number}_{shape}.py": (m.name, shape) for number, m in enumerate(MISTAKES) for shape in m.programs}
    with TemporaryDirectory(prefix="kvmfault-") as folder:
        for number, mistake in enumerate(MISTAKES):
            for shape, body in mistake.programs.items():
                (Path(folder) / f"m{number}_{shape}.py").write_text(_HEAD + body)
        said = dict(_errors(Path(folder), list(names)))
    found = {m.name: dict.fromkeys(SHAPES, Verdict(IMPOSSIBLE)) for m in MISTAKES}
    for file, (mistake_name, shape) in names.items():
        found[mistake_name][shape] = Verdict(CAUGHT, said[file]) if file in said else Verdict(MISSED)
    return found


def _errors(folder: Path, files: list[str]) -> Iterator[tuple[str, str]]:
    package = Path(kvmfault.__file__).parents[1]
    paths = [] if package.name in ("site-packages", "dist-packages") else [str(package)]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(paths)}
    options = ("--strict", "--config-file=", "--no-error-summary", "--enable-error-code=truthy-bool")
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={folder / 'cache'}", *files]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode > 1 or done.stderr:
        raise UsageError(f"mypy failed: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    for line in done.stdout.splitlines():
        if found := re.match(r"([^:]+):(\d+): error: (.*)", line):
            if found[1] not in files or int(found[2]) <= _HEAD.count("\n"):
                raise UsageError(f"mypy failed: {line}")
            yield found[1], found[3]
