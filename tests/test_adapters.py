"""The adapters in tests/kernel hold no decisions: they script, run and print.

A decision is a branch, a comparison or a selection of bits whose operand comes from the fault: from a register or an
error code, from a fact or an accessor of the fault, or from a value computed of these. What the path answered is not
the fault, and to print a value is no decision. So every difference between two answers comes from the path, and with
a step or a joint of it missing, some answer changes.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from kvmfault.contract.target import backend
from kvmfault.path.run import PATH, BoundPath, Locked
from tests.conftest import ROOT, VECTORS
from tests.crippled import crippled
from tests.kernel import arm64_decide, x86_hugepage, x86_path

ADAPTERS: Final = sorted((ROOT / "tests" / "kernel").glob("*.py"))

# No decisions.

FAULT: Final = frozenset({"esr", "far", "hpfar", "err", "error_code", "code", "syndrome", "fault", "registers"})
"""Names (of variables, attributes, keys) that hold the fault or a part of it, wherever they stand."""
ANSWERED: Final = frozenset({"resolve", "run", "handle", "_before_handler", "function", "isinstance"})
"""Calls that give what the path or a step of it (``function``) answered, or a type, which no fault changes."""
ASKED: Final = frozenset({"accessor", "accessors"})
"""What reads the fault for who asks."""
_BITS: Final = (ast.BitAnd, ast.BitOr, ast.BitXor, ast.LShift, ast.RShift, ast.Mod, ast.FloorDiv)

EXCUSED: Final = {
    (
        "arm64_decide",
        "told.register != 31",
    ): "the vectors name no register 31; nothing else depends on it",
    ("arm64_decide", "number == 31"): "the port that reads a register: 31 reads as zero",
    ("arm64_accessors", "valid(registers)"): "prints an accessor that may have no value",
    ("arm64_accessors", "holds(registers)"): "prints several accessors as one number",
}
"""(adapter, expression) -> why it is no decision about the fault."""


class Decisions(ast.NodeVisitor):
    """Collects the decisions of a module. Values are followed through assignments and into its own functions."""

    def __init__(self, tree: ast.Module) -> None:
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.known: set[tuple[str, str]] = set()
        """(function, name) that hold what comes from the fault; function "": an attribute or a module's name."""
        self.inside: list[str] = [""]
        self.found: set[str] = set()
        size = -1
        while size != len(self.known) + len(self.found):
            size = len(self.known) + len(self.found)
            self.visit(tree)

    def holds(self, name: str) -> bool:
        return name in FAULT or any((function, name) in self.known for function in self.inside)

    def of_fault(self, node: ast.AST) -> bool:
        """Whether the expression's value comes from the fault."""
        match node:
            case ast.Name(id=name):
                return self.holds(name)
            case ast.Attribute(value=value, attr=name):
                return name in FAULT | ASKED or ("", name) in self.known or self.of_fault(value)
            case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
                return key in FAULT or self.of_fault(value)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in ANSWERED:
                return False
        return any(self.of_fault(child) for child in ast.iter_child_nodes(node))

    def learn(self, target: ast.AST) -> None:
        for node in ast.walk(target):
            match node:
                case ast.Name(id=name, ctx=ast.Store()):
                    self.known.add((self.inside[-1], name))
                case ast.Attribute(attr=name, ctx=ast.Store()):
                    self.known.add(("", name))

    def visit(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=value) if self.of_fault(value):
                for target in targets:
                    self.learn(target)
            case (
                ast.comprehension(target=target, iter=value)
                | ast.For(target=target, iter=value)
                | ast.AnnAssign(target=target, value=ast.expr() as value)
                | ast.NamedExpr(target=target, value=value)
            ) if self.of_fault(value):
                self.learn(target)
            case ast.Call(func=ast.Name(id=name)):
                self.pass_on(node, name)
            case ast.Call(func=ast.Attribute(attr=name)) if name not in ANSWERED:
                self.pass_on(node, name)
        for decision in self.decisions(node):
            if self.of_fault(decision):
                self.found.add(ast.unparse(decision))
        if isinstance(node, ast.FunctionDef):
            self.inside.append(node.name)
            self.generic_visit(node)
            self.inside.pop()
        else:
            self.generic_visit(node)

    def pass_on(self, call: ast.Call, name: str) -> None:
        # an argument that comes from the fault makes the parameter one that does
        called = self.functions.get(name)
        if name in self.classes:
            body = self.classes[name].body
            called = next((f for f in body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
        if called is None:
            return
        names = [a.arg for a in called.args.args if a.arg != "self"]
        given = [*zip(names, call.args, strict=False), *((k.arg, k.value) for k in call.keywords if k.arg)]
        self.known |= {(called.name, parameter) for parameter, value in given if self.of_fault(value)}

    @staticmethod
    def decisions(node: ast.AST) -> list[ast.expr]:
        """The expressions on which the node itself decides."""
        match node:
            case ast.Compare(ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
                return []  # whether there is a value is not what it is
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not() | ast.Invert()):
                return [node]
            case ast.BinOp(op=ast.BitOr(), right=ast.Dict()) | ast.AugAssign(op=ast.BitOr(), value=ast.Dict()):
                return []  # two dicts
            case ast.BinOp(op=op) if isinstance(op, _BITS):
                return [node]
            case ast.AugAssign(op=op, target=target, value=value) if isinstance(op, _BITS):
                return [target, value]
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) | ast.Assert(test=test):
                return [] if isinstance(test, ast.Compare) else [test]
            case ast.comprehension(ifs=tests):
                return tests
            case ast.Match(subject=subject):
                return [subject]
        return []


def decisions(source: str) -> set[str]:
    """Every decision about the fault in a module's text."""
    return Decisions(ast.parse(source)).found


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda path: path.stem)
def test_no_decision(adapter: Path) -> None:
    excused = {expression for module, expression in EXCUSED if module == adapter.stem}
    assert decisions(adapter.read_text()) == excused


@pytest.mark.parametrize(
    "source",
    [
        "if esr & 0x3f == 7: pass",
        "x = hpfar >> 4",
        "def f(fault): return 1 if fault.is_write else 0",
        "def f(fault): return fault.syndrome and 1",
        "def f(fault):\n match fault.granule:\n  case 1: pass",
        "written = fault.is_write\nassert written",
        "a = b = esr\nc = int(b)\nprint([x for x in y if c])",
        "def g(n): return n == 7\ndef f(esr): return g(esr)",
        "def g(a, n=0): return not n\ndef f(esr): return g(1, n=esr)",
        "class T:\n def __init__(self, n):\n  self.n = n\n def f(self): return self.n > 1\nT(hpfar)",
        "rd = target.accessors['rd'].on(named)\nif rd: pass",
        "def run(keys): return keys['err'] & 2",
        "while (now := fault.is_exec): pass",
        "x = 0\nx |= error_code",
        "for bit in bits(esr):\n if bit: pass",
    ],
)
def test_a_decision_is_seen(source: str) -> None:
    assert decisions(source)


@pytest.mark.parametrize(
    "source",
    [
        "print(esr, f'{hpfar:x}')",
        "def f(fault): return {'write': fault.is_write}",
        "outcome = path.resolve(vm, fault)\nif outcome.errno: pass",
        "value = accessor('x')\nprint(None if value is None else hex(value))",
        "def f(keys): return 1 if keys['slot'] == 2 else 0",
    ],
)
def test_printing_is_no_decision(source: str) -> None:
    assert not decisions(source)


# Nothing is idle.

Answer = Callable[[BoundPath | None], object]
"""The answer to one line of the vectors, on a path."""


def _arm64(case: dict[str, Any], kernel: str) -> Answer:
    esr, far, hpfar, script = arm64_decide.parse(f"{case['esr']} {case['far']} {case['hpfar']} {case['env']}")
    return lambda path: arm64_decide.decide(esr, far, hpfar, script, kernel, path)


def _x86_path(row: dict[str, Any]) -> Answer:
    script = x86_path.parse(" ".join(f"{key}={value}" for key, value in row["in"].items()))
    return lambda path: x86_path.run(script, path)


def _x86_hugepage(row: dict[str, Any]) -> Answer:
    return lambda path: x86_hugepage.run(row["in"], path)


@cache
def lines() -> dict[str, list[Answer]]:
    """Target of an adapter -> every line of its vectors."""
    arm64 = json.loads((VECTORS / "arm64_decisions.json").read_text())["cases"]
    x86 = json.loads((VECTORS / "x86_vectors.json").read_text())
    return {
        "arm64@6.12": [_arm64(case, "6.12") for case in arm64],
        "arm64@7.4": [_arm64(case, "7.4") for case in arm64],
        "x86-npt@6.12": [_x86_path(row) for row in x86["path"]],
        "x86-shadow@6.12": [_x86_hugepage(row) for row in x86["hugepage"]],
    }


def answered(answer: Answer, path: BoundPath) -> object:
    """The answer, or that there is none: a path with a part missing may do what no kernel does."""
    try:
        return answer(path)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        return type(error)


UNSEEN: Final = {
    "screen: lose_address": "no line has an address that does not translate again",
    "translate: walk_nested_npt": "no nested guest of a line has tables of its hypervisor's",
    "prepare_page: nested_entry": "no nested guest of a line has tables of its hypervisor's",
    "prepare_page: shadow_entry": "the guest's rights show in entries; an answer on sizes names none",
    "prepare_page: stay_small": "no line has a table that a fetch made small before",
}
"""Part -> why no line of an adapter notices it. Each of them decides something in tests/test_path_steps.py."""


ELSEWHERE: Final = {
    "userfault": "proposed: a step only of targets with the policy (tests/test_policy_values.py)",
    "keep_present": "x86 after 6.12, whose adapters answer for 6.12 (tests/test_policy_values.py)",
}
"""Step -> why no target of an adapter has it."""


def test_every_step_and_joint_shows_in_some_answer() -> None:
    parts: set[str] = set()
    noticed: set[str] = set()
    for name, answers in lines().items():
        normal = [answer(None) for answer in answers]
        for part, path in crippled(backend(name)):
            parts.add(part)
            if any(answered(a, path) != n for a, n in zip(answers, normal, strict=True)):
                noticed.add(part)
    assert parts - noticed == UNSEEN.keys()
    steps = {step.name for entry in PATH for step in (entry.steps if isinstance(entry, Locked) else (entry,))}
    assert steps - {part.partition(":")[0] for part in parts} == ELSEWHERE.keys()
