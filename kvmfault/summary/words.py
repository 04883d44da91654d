"""Figures as text, one way for all outputs."""

from __future__ import annotations

from typing import Final

from kvmfault.contract.format import size_text
from kvmfault.summary.figures import Cell

__all__ = ["NOTHING", "text"]

_TIMES: Final = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"))
NOTHING: Final = "-"


def text(value: Cell, unit: str, *, ticks: bool = False) -> str:
    """*value* for people; ``-`` for what is not known. Times are ns, or with *ticks* bare numbers."""
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    match unit:
        case "share":
            return f"{100 * value:.1f} %"
        case "time":
            return f"{value:,.0f}" if ticks else _time(value)
        case "address":
            return f"{int(value):#x}"
        case "bytes":
            return size_text(int(value))
        case "change":
            return f"{value:+,.0f}" if isinstance(value, int) else f"{value:+,.3g}"
        case "ratio":
            return f"x{value:.2f}" if value < 100 else f"x{value:,.0f}"
        case "rate":
            return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
        case _:
            return f"{value:,}"


def _time(value: float) -> str:
    for size, name in _TIMES:
        if abs(value) >= size:
            return f"{_three(value / size)} {name}"
    return f"{value:.0f} ns"


def _three(value: float) -> str:
    whole = len(str(int(abs(value))))
    return f"{value:,.{max(3 - whole, 0)}f}"
