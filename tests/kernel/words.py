"""Lines of the vectors' formats: ``key=value`` words, where each key has the values that mean something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

ANY: Final = range(-(1 << 63), 1 << 64)
"""A truth value too: as in C, all but 0 is true."""
WORD: Final = range(1 << 64)
FRAME: Final = range(1 << 52)
ERRNO: Final = range(-4095, 1)
"""0, or minus an errno."""
_BITS: Final = 64


def keys(words: Iterable[str], allowed: Mapping[str, range], base: int) -> dict[str, int]:
    """The pairs; numbers as ``int`` reads them in *base*. Raises ValueError naming word, key and what is allowed."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in allowed:
            raise ValueError(f"{word[:_BITS]!r}: expected key=value with a key of {', '.join(allowed)}")
        found[name] = number(name, value, allowed[name], base)
    return found


def number(name: str, text: str, allowed: range, base: int) -> int:
    """One number. Raises ValueError naming it and what is allowed."""
    try:
        value = int(text, base)
    except ValueError:
        kind = "hexadecimal number" if base == 16 else "number (hexadecimal with 0x)"
        raise ValueError(f"{name}={text[:_BITS]}: expected a {kind}") from None
    if value not in allowed:
        first, last = (_shown(end, base) for end in (allowed[0], allowed[-1]))
        raise ValueError(f"{name}={text[:_BITS]}: expected {first} to {last}")
    return value


def _shown(value: int, base: int) -> str:
    return f"{value:x}" if base == 16 else f"{value:#x}" if abs(value) > 9999 else str(value)
