"""What the modules of kvmfault/ export: `__all__` names what each defines. `python -m tests.exports` writes them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.conftest import ROOT

PACKAGE: Final = ROOT / "kvmfault"
NO_API: Final = frozenset({"__init__", "__main__"})
"""Modules whose `__all__`, if any, is written by hand."""


def modules() -> list[Path]:
    """Every module that has to have an `__all__`."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path.stem not in NO_API)


def defined(tree: ast.Module) -> list[str]:
    """Public names that the module defines: classes, functions, constants and aliases, but no type variables."""
    names: list[str] = []
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.append(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
            case ast.Assign(targets=targets, value=value) if not _is_type_variable(value):
                names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return sorted({name for name in names if not name.startswith("_")})


def _is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("TypeVar", "ParamSpec")


def exported(tree: ast.Module) -> list[str] | None:
    """The literal `__all__` of a module; None: it has none."""
    found: list[str] | None = None
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="__all__")], value=value)
                | ast.AugAssign(target=ast.Name(id="__all__"), value=value)
            ):
                found = (found or []) + list(ast.literal_eval(value))
    return found


def with_exports(source: str) -> str:
    """*source* with an `__all__` that names all that it defines, and what it names already and imports."""
    tree = ast.parse(source)
    old = exported(tree)
    imported = {
        a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    wanted = sorted({*defined(tree), *(imported & set(old or []))})
    if (old is not None and set(old) == set(wanted)) or not wanted:
        return source
    lines = source.splitlines(keepends=True)
    text = f"__all__ = {wanted!r}\n"
    places = [n for n in tree.body if isinstance(n, ast.Assign | ast.AugAssign) and "__all__" in ast.unparse(n)]
    if places:
        for node in reversed(places):
            del lines[node.lineno - 1 : node.end_lineno]
        at = places[0].lineno - 1
    else:
        at = max((n.end_lineno or 0 for n in tree.body if _is_import(n)), default=0)
        text = f"\n{text}"
    return "".join([*lines[:at], text, *lines[at:]])


def _is_import(node: ast.stmt) -> bool:
    typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Import | ast.ImportFrom) or typing_only


def main() -> None:
    """Write every `__all__`, as ruff would."""
    for path in modules():
        path.write_text(with_exports(path.read_text()))
    for words in (("check", "--fix", "--select", "RUF022"), ("format",)):
        subprocess.run([sys.executable, "-m", "ruff", words[0], "-q", *words[1:], str(PACKAGE)], check=True)


if __name__ == "__main__":
    main()
