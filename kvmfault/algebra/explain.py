"""Why an expression has its value on one fault, in words that name fields, bits and values."""

from __future__ import annotations

from collections.abc import Mapping

from kvmfault.algebra.expr import AllOf, Among, AnyOf, Not, Pred
from kvmfault.algebra.layout import Field

__all__ = ["describe", "explain", "spell"]


def explain(pred: Pred, registers: Mapping[str, int]) -> str:
    """The fields that decide *pred* on these registers, e.g. ``S1PTW (bit 7) = 0, WnR (bit 6) = 1``.

    Only what decides: of a conjunction that fails, the first part that fails; of a disjunction that
    holds, the first that holds.
    """
    return ", ".join(dict.fromkeys(describe(f, registers) for f in _deciding(pred, registers))) or "always"


def describe(f: Field, registers: Mapping[str, int]) -> str:
    """``EC (bits 31:26) = 0x24 data abort from a lower EL``."""
    value = f.on(registers)
    shown = str(value) if f.width == 1 else f"{value:#x}"
    meaning = f.meanings.get(value)
    return f"{f.name} ({f.place}) = {shown}" + (f" {meaning}" if meaning and f.width > 1 else "")


def _deciding(pred: Pred, registers: Mapping[str, int]) -> list[Field]:
    match pred:
        case Among(field):
            return [field]
        case Not(of):
            return _deciding(of, registers)
        case AllOf(parts) | AnyOf(parts):
            decisive = isinstance(pred, AnyOf)  # one True settles an or, one False settles an and
            for part in parts:
                if part.on(registers) is decisive:
                    return _deciding(part, registers)
            return [field for part in parts for field in _deciding(part, registers)]
        case _:
            raise TypeError(f"{type(pred).__name__} is not a node of the algebra")


def spell(pred: Pred) -> str:
    """The expression as text: ``~S1PTW & (EC in {0x24, 0x25})``; `parse` reads it back, given fields by these names."""

    def leaf(p: Among) -> str:
        values = sorted(p.values)
        if p.field.width == 1 and len(values) == 1:
            return p.field.name if values == [1] else f"~{p.field.name}"
        if len(values) == 1:
            return f"{p.field.name} == {values[0]:#x}"
        return f"{p.field.name} in {{{', '.join(map(hex, values))}}}"

    def nest(op: str, parts: list[str]) -> str:
        return op.join(f"({p})" if any(c in p for c in " ") else p for p in parts)

    return pred.fold(
        leaf,
        lambda parts: nest(" & ", list(parts)) if parts else "ALWAYS",
        lambda parts: nest(" | ", list(parts)) if parts else "NEVER",
        lambda part: f"~({part})",
    )
