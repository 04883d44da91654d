"""The public interface as text: ``python -m docs.api`` writes tests/data/api.txt, ``--check`` says if it is current.

What changes there is what users may notice; docs/api.md says what may change when.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SNAPSHOT: Final = ROOT / "tests" / "data" / "api.txt"
HOW: Final = "run: python -m docs.api"
STABLE: Final[Mapping[str, str]] = {
    "kvmfault": "the names one begins with",
    "kvmfault.types": "addresses and numbers",
    "kvmfault.errors": "what is raised",
    "kvmfault.algebra": "registers, expressions over them, proofs",
    "kvmfault.contract": "the contract, and what a backend declares",
    "kvmfault.vm": "memslots, host memory, invalidation, dirty log",
    "kvmfault.path": "the steps and what runs them",
    "kvmfault.machine": "the VM",
    "kvmfault.testing": "the checks of a backend",
    "kvmfault.pytest_plugin": "the argument `conformance`",
}
"""Modules and packages that are stable, with all below them."""


def modules() -> Iterator[Path]:
    """Source of every stable module, in order."""
    for name in STABLE:
        path = ROOT / name.replace(".", "/")
        if name == "kvmfault":
            yield path / "__init__.py"
        elif path.is_dir():
            yield from sorted(p for p in path.rglob("*.py"))
        else:
            yield path.with_suffix(".py")


def snapshot() -> str:
    """Every public name of the stable modules with its signature, in the order of the source."""
    parts = ["# Written by `python -m docs.api`; docs/api.md says what may change when.\n"]
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        lines = list(_module(ast.parse(path.read_text(encoding="utf-8"))))
        if lines:
            parts.append("\n".join([name, *(f"  {line}" for line in lines)]) + "\n")
    return "\n".join(parts)


def _module(tree: ast.Module) -> Iterator[str]:
    exported: set[str] = set()
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List(elts=names)):
                exported |= {ast.literal_eval(name) for name in names}
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body) if any(_is_export(n) for n in body):
                exported |= {alias.name for n in body if isinstance(n, ast.ImportFrom) for alias in n.names}
    here = {name: text for node in tree.body for name, text in _declared(node, top=True)}
    for name, text in here.items():
        if name in exported:
            yield from text
    yield from (f"{name} (from elsewhere)" for name in sorted(exported - here.keys()))


def _is_export(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and any(alias.asname == alias.name for alias in node.names)


def _declared(node: ast.stmt, *, top: bool) -> Iterator[tuple[str, list[str]]]:
    match node:
        case ast.ClassDef(name=name, bases=bases, body=body):
            inside: dict[str, list[str]] = {}
            for part in body:
                for member, text in _declared(part, top=False):
                    inside.setdefault(member, []).extend(text)  # a name may have several: overloads
            head = f"class {name}({', '.join(map(ast.unparse, bases))})" if bases else f"class {name}"
            shown = [f"  {line}" for member, text in inside.items() if _is_public(member) for line in text]
            yield name, [*_marks(node.decorator_list), head, *shown]
        case ast.FunctionDef(name=name, args=args, returns=returns):
            marks = list(_marks(node.decorator_list))
            gives = f" -> {ast.unparse(returns)}" if returns is not None else ""
            yield name, [*marks, f"def {name}({ast.unparse(args)}){gives}"]
        case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
            given = "" if value is None else f" = {ast.unparse(value)}" if not top and _is_short(value) else " = ..."
            yield name, [f"{name}: {ast.unparse(annotation)}{given}"]
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                for leaf in ast.walk(target):
                    if isinstance(leaf, ast.Name):
                        yield leaf.id, [f"{leaf.id} = {ast.unparse(value) if _is_short(value) else '...'}"]


def _marks(decorators: list[ast.expr]) -> Iterator[str]:
    # what a decorator changes for users
    for decorator in decorators:
        text = ast.unparse(decorator)
        if text.split("(")[0] in ("property", "classmethod", "staticmethod", "dataclass", "deprecated", "overload"):
            yield f"@{text}"


def _is_public(member: str) -> bool:
    return not member.startswith("_") or (member.startswith("__") and member not in ("__slots__", "__all__"))


def _is_short(value: ast.expr) -> bool:
    return len(ast.unparse(value)) <= 60


def stable_modules() -> str:
    """The table of docs/api.md."""
    rows = [f"| `{name}` | {about} |" for name, about in STABLE.items()]
    return "\n".join(["| stable | |", "|---|---|", *rows])


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {"stable_modules": stable_modules}


def main(check: bool) -> int:
    """Write the snapshot, or with *check* say whether it is current."""
    text = snapshot()
    if check:
        return 0 if SNAPSHOT.read_text(encoding="utf-8") == text else 1
    SNAPSHOT.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{SNAPSHOT.relative_to(ROOT)}: written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
