"""kvmfault/ knows no architecture: no name of one, no import of a backend, no decision on which one it is.

import-linter (`make lint`) holds the order of the layers; this holds what it cannot see.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.conftest import ROOT

# fmt: off
ARCHITECTURES: Final = frozenset((
    "arm64", "aarch64", "esr", "hpfar",
    "x86", "x64", "amd64", "intel", "amd", "vmx", "svm", "ept", "npt",
    "riscv", "loongarch", "s390", "s390x", "powerpc", "ppc", "mips",
))
# fmt: on
"""Refused as a whole word of a name or a string: `ept_format`, `EptFormat` and "ept:4k", but not `accept`."""

TRACEPOINTS: Final = re.compile(r"\bkvm_(?:guest_fault|page_fault|tdp\w*|nested_vmexit\w*)\b")
"""Events that one architecture has and the other has not: their names belong to the backends."""

LONGEST_MODULE: Final = 400
"""Lines. A module that needs more is two ideas."""


def words(text: str) -> set[str]:
    """The words of an identifier or a string, lower case: split at case changes and at all but letters and digits.

    >>> sorted(words("EptFormat.esr_el2"))
    ['el2', 'ept', 'esr', 'format']
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return {word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word}


def texts(node: ast.AST) -> Iterator[str]:
    """Every identifier or string that ``node`` itself (not its children) holds."""
    for _, value in ast.iter_fields(node):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                yield item
            elif isinstance(item, bytes):
                yield item.decode("latin-1")


def on_arch(node: ast.expr) -> bool:
    """Whether ``node`` reads something that is called an architecture."""
    return any(
        words(n.id if isinstance(n, ast.Name) else n.attr) & {"arch", "architecture"}
        for n in ast.walk(node)
        if isinstance(n, (ast.Name, ast.Attribute))
    )


def imported(node: ast.AST) -> list[str]:
    """The modules that ``node`` imports by absolute name, written as a statement or as a call."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            return [module]
    return []


def faults(source: str) -> list[str]:
    """What is wrong with ``source`` as a module of kvmfault/, each as "line: what"."""
    tree = ast.parse(source)
    # A string that stands alone is a docstring (also of an attribute): it may name kernel functions.
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if id(node) in docs:
            continue
        line = getattr(node, "lineno", 0)
        for text in texts(node):
            bad = sorted(words(text) & ARCHITECTURES) + TRACEPOINTS.findall(text)
            found += [(line, f"names {name}") for name in bad]
        found += [(line, "imports arch") for module in imported(node) if module.split(".")[0] == "arch"]
        match node:
            case ast.Compare(left=left, comparators=rest) if any(map(on_arch, [left, *rest])):
                found.append((line, "decides on arch"))
            case ast.Match(subject=subject) if on_arch(subject):
                found.append((line, "decides on arch"))
    return [f"{line}: {what}" for line, what in sorted(found)]


def modules(folder: str) -> list[Path]:
    """The Python files of ``folder``, never none."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder}/ has no modules"
    return found


@pytest.mark.parametrize("path", modules("kvmfault"), ids=lambda p: str(p.relative_to(ROOT)))
def test_core_is_neutral(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize("path", modules("kvmfault") + modules("arch"), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_MODULE


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("ept = 1", ["1: names ept"]),
        ("class EptFormat: ...", ["1: names ept"]),
        ("x = ESR_EL2", ["1: names esr"]),
        ("x.is_svm", ["1: names svm"]),
        ("def f(vmx_basic): ...", ["1: names vmx"]),
        ("f(npt=1)", ["1: names npt"]),
        ("from a import b as aarch64", ["1: names aarch64"]),
        ("import a.riscv", ["1: names riscv"]),
        ("def f():\n    global intel", ["2: names intel"]),
        ("match x:\n    case amd: ...", ["2: names amd"]),
        ("x = 'arm64:4k'", ["1: names arm64"]),
        ("x = f'{y}-x86'", ["1: names x86"]),
        ("x = b'HPFAR'", ["1: names hpfar"]),
        ("x = {'s390': 1}", ["1: names s390"]),
        ("EVENT = 'kvm_page_fault'", ["1: names kvm_page_fault"]),
        ("EVENT = 'kvm:kvm_guest_fault'", ["1: names kvm_guest_fault"]),
        ("EVENT = 'kvm_tdp_mmu_spte_changed'", ["1: names kvm_tdp_mmu_spte_changed"]),
        ("import arch", ["1: imports arch"]),
        ("from arch.toy import BACKEND", ["1: imports arch"]),
        ("importlib.import_module('arch.toy')", ["1: imports arch"]),
        ("if arch == y: ...", ["1: decides on arch"]),
        ("y = 1 if fault.arch_name in z else 2", ["1: decides on arch"]),
        ("match vm.arch:\n    case 1: ...", ["1: decides on arch"]),
    ],
)
def test_refuses(source: str, expected: list[str]) -> None:
    assert faults(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "try: accept()\nexcept KeyError: kept = descriptor",
        '"""kvm_handle_guest_abort (arm64), the x86 page fault handler."""',
        'class A:\n    """EPT."""\n    x: int\n    """The ESR."""',
        "# arm64\nx = 1",
        "from kvmfault.contract import PageFault",
        "from .arch_neutral import x",
        "reads = 'kvm_handle_page_fault'",
        "if archive == 1: ...",
        "arch = backend.arch",
    ],
)
def test_allows(source: str) -> None:
    assert faults(source) == []
