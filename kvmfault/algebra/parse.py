"""Expressions as people type them: ``is_write & ~is_exec``, ``FSC in {0x0c, 0x0d}``, ``EC == 0x24``."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeAlias

from kvmfault.algebra.expr import ALWAYS, NEVER, Pred, Word
from kvmfault.algebra.layout import Field
from kvmfault.errors import LayoutError, UsageError

__all__ = ["MAX_DEPTH", "MAX_LENGTH", "Names", "as_pred", "parse"]

Names: TypeAlias = Mapping[str, Pred | Word | str]
"""What an expression may name; a string says why there is no answer behind a name."""
MAX_LENGTH = 10_000
MAX_DEPTH = 60
"""Operators inside operators; ``a & b & c`` counts as one."""


def parse(text: str, names: Names) -> Pred | Word:
    """Read an expression over *names* (facts and fields). Raises UsageError naming the column and what would fit."""
    if len(text) > MAX_LENGTH:
        raise UsageError(f"expression of {len(text)} characters: at most {MAX_LENGTH}")
    shown = repr(text if len(text) <= 80 else f"{text[:77]}...")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        built = _build(tree, names)
        if isinstance(built, Pred) and _depth(built) > MAX_DEPTH:
            raise RecursionError
        return built
    except SyntaxError as e:
        column = e.offset or len(text.strip()) + 1  # 0: the text ended too early
        raise UsageError(f"{shown}: column {column}: not an expression ({e.msg})") from None
    except (RecursionError, MemoryError, ValueError):
        raise UsageError(f"{shown}: nested too deeply, or not text") from None
    except LayoutError as e:
        raise UsageError(f"{shown}: {e}") from None


def _depth(pred: Pred) -> int:
    return pred.fold(
        lambda _: 0, lambda parts: max(parts, default=0) + 1, lambda parts: max(parts, default=0) + 1, lambda n: n + 1
    )


def _build(node: ast.expr, names: Names) -> Pred | Word:
    match node:
        case ast.Compare(ast.BinOp() | ast.UnaryOp()) | ast.Compare(_, _, [ast.BinOp()]):
            what = f"{ast.unparse(node)!r}: & | ~ bind tighter than == and in: put parentheses around the comparison"
            raise UsageError(f"column {node.col_offset + 1}: {what}")
        case ast.BinOp(left, ast.BitAnd(), right):
            return _pred(left, names) & _pred(right, names)
        case ast.BinOp(left, ast.BitOr(), right):
            return _pred(left, names) | _pred(right, names)
        case ast.UnaryOp(ast.Invert(), of):
            return ~_pred(of, names)
        case ast.Compare(left, [ast.Eq()], [value]):
            return _field(left, names).is_(_int(value))
        case ast.Compare(left, [ast.NotEq()], [value]):
            return ~_field(left, names).is_(_int(value))
        case ast.Compare(left, [ast.In()], [ast.Set(values) | ast.Tuple(values) | ast.List(values)]):
            return _field(left, names).one_of(tuple(_int(v) for v in values))
        case ast.Name() | ast.Attribute():
            return _named(node, names)
        case _:
            what = f"{ast.unparse(node)!r} is not in the language (names, & | ~ == != in)"
            raise UsageError(f"column {node.col_offset + 1}: {what}")


def _pred(node: ast.expr, names: Names) -> Pred:
    built = _build(node, names)
    if isinstance(built, Field):
        return built.is_set
    if isinstance(built, Word):
        raise UsageError(f"column {node.col_offset + 1}: {ast.unparse(node)} is a value, not a truth: compare it")
    return built


def as_pred(built: Pred | Word) -> Pred | Word:
    """A one-bit field standing alone is the truth that it is set."""
    return built.is_set if isinstance(built, Field) and built.width == 1 else built


def _field(node: ast.expr, names: Names) -> Field:
    built = _build(node, names)
    if not isinstance(built, Field):
        raise UsageError(f"column {node.col_offset + 1}: {ast.unparse(node)} is not a field: only fields are compared")
    return built


def _named(node: ast.expr, names: Names) -> Pred | Word:
    name = ast.unparse(node)
    constants: dict[str, Pred] = {"ALWAYS": ALWAYS, "NEVER": NEVER}
    found = names.get(name, constants.get(name))
    if isinstance(found, str):
        raise UsageError(f"column {node.col_offset + 1}: {name} is not known: {found}")
    if found is None:
        near = get_close_matches(name, [*names, *constants], 3) or [n for n in names if n.startswith("is_")][:6]
        such = f"; near: {', '.join(near)}" if near else ""
        raise UsageError(f"column {node.col_offset + 1}: no fact or field {name}{such}")
    return found


def _int(node: ast.expr) -> int:
    match node:
        case ast.Constant(value) if type(value) is int:
            return value
    raise UsageError(f"column {node.col_offset + 1}: {ast.unparse(node)!r} is not a number")
