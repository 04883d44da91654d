"""``kvmfault emit``."""

from __future__ import annotations

from collections.abc import Sequence

from kvmfault.cli.render import to_json
from kvmfault.contract.shapes import SHAPES, Shape
from kvmfault.contract.target import backend, backends
from kvmfault.errors import UsageError

__all__ = ["c", "json", "shape_named"]


def c(target: str | None, shape: str | None) -> int:
    """Print the header of a target in a shape, or without a target the prototypes."""
    from kvmfault.emit.header import prototypes, target_header

    if target is None:
        if shape is not None:
            raise UsageError("--shape is of a target's header, and no --backend is named")
        print(prototypes(), end="")
    else:
        print(target_header(backend(target), shape_named(next(iter(SHAPES)) if shape is None else shape)), end="")
    return 0


def shape_named(word: str) -> Shape:
    """A shape by its name, or by that of its class.

    The one that keeps the registers may also be called after a register that some backend reports its faults in: the
    first word of that register's name. Raises UsageError listing the names.
    """
    for shape in SHAPES.values():
        if word in (shape.name, shape.kind):
            return shape
    codes = {source.code.lower() for source in backends().values()}
    if word in codes | {code.partition("_")[0] for code in codes}:
        return next(s for s in SHAPES.values() if s.keeps_registers and not s.stored and not s.through_table)
    raise UsageError(f"no shape {word!r}: {', '.join(SHAPES)}")


def json(targets: Sequence[str]) -> int:
    """Print the definitions of targets, of every backend if none is named."""
    from kvmfault.emit.definitions import definitions

    print(to_json(definitions([backend(t) for t in targets or backends()])))
    return 0
