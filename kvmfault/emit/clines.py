"""Pieces of C in the kernel's style: names, comments, bit masks, folded lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Final

from kvmfault.algebra.layout import Field, Register

__all__ = [
    "COMMENT_WIDTH",
    "WIDTH",
    "Masks",
    "bare",
    "bits",
    "comment",
    "define",
    "folded",
    "kernel_doc",
    "kernel_struct",
    "mask",
    "paragraphs",
    "plain",
    "variable",
]

WIDTH: Final = 100
"""Columns of code, a tab being 8."""
COMMENT_WIDTH: Final = 80
_KEYWORDS: Final = """auto break case char const continue default do double else enum extern float for goto if int
inline long register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
bool true false asm typeof"""
_WHOLE: Final = re.compile(
    r'"[^"]*"|\[\w+\] = \w+|\(\w+ & (?:\w+|GENMASK_ULL\(\d+, \d+\)|BIT_ULL\(\d+\))\)(?: [!=]= \w+)?'
)
"""What stays on one line: a string, an entry of a table, a test of some bits."""


def variable(name: str) -> str:
    """A register's name as that of a variable."""
    lower = name.lower()
    return f"{lower}_" if lower in _KEYWORDS.split() else lower


def bits(mask: int) -> str:
    """``BIT_ULL(6)``, ``GENMASK_ULL(31, 26)``, or a number where the ones are not in one run."""
    low = (mask & -mask).bit_length() - 1
    high = mask.bit_length() - 1
    if low == high:
        return f"BIT_ULL({low})"
    return f"GENMASK_ULL({high}, {low})" if mask >> low == (1 << high - low + 1) - 1 else f"{mask:#x}ULL"


def mask(field: Field) -> str:
    """The macro of a field; its prefix keeps it apart from the kernel's own (asm/sysreg.h: HPFAR_EL2_NS)."""
    return f"KVM_FAULT_{field.register}_{field.name}"


class Masks:
    """Names for the bits of *registers*: a whole field by its own, other bits by number."""

    def __init__(self, registers: Sequence[Register]) -> None:
        self._names = {(f.register, f.mask): mask(f) for r in registers for f in r}

    def __call__(self, register: str, mask: int) -> str:
        """How C spells *mask*."""
        return self._names.get((register, mask)) or bits(mask)


def plain(text: str) -> str:
    """Text that ends no comment and begins none."""
    return text.replace("``", "").replace("*/", "* /").replace("/*", "/ *")


def paragraphs(texts: Sequence[str]) -> Iterator[str]:
    """Lines of a comment, an empty one between two texts."""
    for number, text in enumerate(texts):
        yield from [" *"] * (number > 0)
        yield from (f" * {line}" for line in wrap(plain(text), COMMENT_WIDTH - 3, break_on_hyphens=False))


def comment(*texts: str) -> str:
    """A comment; short ones on one line."""
    line = f"/* {plain(texts[0])} */" if len(texts) == 1 else ""
    return line if line and len(line) <= COMMENT_WIDTH else "\n".join(["/*", *paragraphs(texts), " */"])


def kernel_doc(name: str, doc: str, *more: str, parameters: Sequence[tuple[str, str]] = (), returns: str = "") -> str:
    """A kernel-doc comment: the first sentence of *doc* as the summary."""
    brief, _, rest = doc.partition(". ")
    head = wrap(f"{name}() - {plain(brief).rstrip('.')}", COMMENT_WIDTH - 3, subsequent_indent="  ")
    lines = ["/**", *(f" * {line}" for line in head), *(f" * @{of}: {what}" for of, what in parameters)]
    for text in (rest, *more, f"Return: {returns}" if returns else ""):
        if text:
            lines += [" *", *paragraphs([text])]
    return "\n".join([*lines, " */"])


def kernel_struct(name: str, about: str, members: Sequence[tuple[str, str]]) -> str:
    """A kernel-doc comment for a struct."""
    lines = [f" * struct {name} - {about}"]
    for member, source in members:
        text = wrap(f"@{member}: {plain(source)}", COMMENT_WIDTH - 3, subsequent_indent="  ", break_on_hyphens=False)
        lines += [f" * {line}" for line in text]
    return "\n".join(["/**", *lines, " */"])


def folded(statement: str, tabs: int = 1) -> str:
    """A statement on as many lines as it needs, each ending with an operator or a comma."""
    room = WIDTH - 8 * tabs
    if len(statement) <= room:
        return "\t" * tabs + statement
    held = _WHOLE.sub(lambda text: text[0].replace(" ", "\0"), statement)
    for operator in ("|", "&", "+", "<<", ">>", "="):
        held = held.replace(f" {operator} ", f"\0{operator} ")
    first, *others = wrap(held, room - 8, break_long_words=False, break_on_hyphens=False)
    indent = "\n" + "\t" * (tabs + 1)
    return "\t" * tabs + indent.join([first, *others]).replace("\0", " ")


def bare(expression: str) -> str:
    """Without the parentheses round all of it."""
    depth = 0
    for place, char in enumerate(expression):
        depth += (char == "(") - (char == ")")
        if not depth:
            return expression[1:-1] if place and place == len(expression) - 1 else expression
    return expression


def define(name: str, value: str) -> str:
    """``#define``, its value in column 48 where that is free."""
    head = f"#define {name}"
    return f"{head}{chr(9) * max(1, -(-(48 - len(head)) // 8))}{value}"
