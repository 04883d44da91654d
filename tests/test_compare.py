"""`compare policies`: the differences are the data's, each with who reads it and where the kernel has it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from typing import Final

import pytest

from kvmfault.contract.accessors import FACTS, Gap
from kvmfault.contract.described import policy_texts
from kvmfault.contract.difference import compare
from kvmfault.contract.policy import Policy
from kvmfault.contract.target import backend, backends
from kvmfault.path.run import PATH, Locked
from tests.cli import Cli
from tests.conftest import ROOT
from tests.worlds import ALL

GOLDEN: Final = ROOT / "tests" / "data" / "compare"
"""N-A-and-B.txt holds what `COLUMNS=N kvmfault compare policies A B` prints."""
UNREAD: Final = {"on_retry": "the caller"}
"""What decides outside this library."""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.mark.parametrize("name", ["100-arm64@6.12-and-arm64@7.4", "80-arm64-and-x86-ept", "140-arm64-and-x86-ept"])
def test_the_text(cli: Cli, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    width, _, words = name.partition("-")
    monkeypatch.setenv("COLUMNS", width)
    done = cli("compare", "policies", *words.split("-and-"))
    assert (done.status, done.err) == (0, "")
    assert done.out == (GOLDEN / f"{name}.txt").read_text()
    assert max(map(len, done.out.splitlines())) <= int(width)


def test_names_longer_than_the_terminal_is_wide(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("compare", "policies", "x86-ept", "x86-ept+topup=unless_permission_unlogged+precheck=no+nested=yes")
    assert done.status == 0
    assert "    x86-ept:4k@7.4+precheck=no\n" not in done.out
    assert "topup: When table pages are put in reserve\n" in done.out
    assert "policies: 2 of " in done.out
    assert "facts of a usual VM: 1 of " in done.out


def test_all_and_json(cli: Cli) -> None:
    some, every = (cli("compare", "policies", "arm64@6.12", "arm64@7.4", "--json", *more) for more in ([], ["--all"]))
    assert some.json["targets"] == ["arm64:4k@6.12", "arm64:4k@7.4"]
    assert [row["name"] for row in every.json["policies"]] == list(Policy.__annotations__)
    for group, rows in every.json.items():
        if group != "targets":
            assert [row for row in rows if row["differs"]] == some.json[group]
    text = cli("compare", "policies", "arm64@6.12", "arm64@7.4", "--all").out
    assert all(f"\n  {member}: " in text for member in Policy.__annotations__)
    sign = next(row for row in some.json["policies"] if row["name"] == "mmio_sign_extension")
    assert sign["values"] == ["lost", "kept"]
    assert sign["read_by"] == ["access_and_completion"]
    assert sign["kernel"] == ['kvm_handle_mmio_return, "KVM: arm64: Fix sign-extension of MMIO loads"']


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["arm64"], "compare takes two targets or more"),
        ([], "Missing argument"),
        (["arm64", "nope"], "no backend 'nope'"),
        (["arm64", "arm64@5.0"], "arm64 models no kernel '5.0'"),
        (["arm64", "arm64+topup=x"], "topup=x: the value is one of"),
    ],
)
def test_bad_targets(cli: Cli, words: list[str], says: str) -> None:
    cli("compare", "policies", *words).refused(says)


@pytest.mark.parametrize(("a", "b"), list(combinations((*ALL, "riscv", "loongarch"), 2)))
def test_the_differences_are_those_of_the_data(a: str, b: str) -> None:
    one, two = backend(a), backend(b)
    groups = compare([one, two])
    assert {row.name for row in groups["policies"] if row.differs} == set(one.policy.differs(two.policy))
    gaps = {n for n in FACTS if len({isinstance(getattr(t.definition, n), Gap) for t in (one, two)}) == 2}
    assert {row.name for row in groups["gaps"] if row.differs} == gaps
    assert {row.name for row in groups["vm"] if row.differs} == {
        f.name for f in fields(one.facts) if getattr(one.facts, f.name) != getattr(two.facts, f.name)
    }
    caps = [t.backend.host(t.format) for t in (one, two)]
    assert {row.name for row in groups["host"] if row.differs} == {
        f.name for f in fields(caps[0]) if getattr(caps[0], f.name) != getattr(caps[1], f.name)
    }
    for row in groups["joints"]:
        assert row.differs is (getattr(one.joints, row.name) != getattr(two.joints, row.name))


def deciding(member: str) -> set[str]:
    """Architectures that had to choose a value, or chose one that is not the default."""
    default = next(f.default for f in fields(Policy) if f.name == member)
    found = set()
    for name, one in backends().items():
        fmt = next(iter(one.formats.values()))
        values = [getattr(made(fmt), member) for made in one.policies.values()]
        if any(value != default for value in values):
            found.add(name.partition("-")[0])
    return found


@pytest.mark.parametrize("member", list(Policy.__annotations__))
def test_every_policy_says_what_it_means_who_reads_it_and_where_it_comes_from(member: str) -> None:
    text = policy_texts()[member]
    assert text.meaning
    assert text.readers
    owners = {source.owner for source in text.kernel}
    assert "" in owners or owners >= {"arm64", "x86"} | deciding(member), owners
    assert all(source.text for source in text.kernel)


def reads() -> dict[str, set[str]]:
    """Member of Policy -> steps, and functions outside the path, whose code reads it."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    steps = {s.name: s for e in PATH for s in (e.steps if isinstance(e, Locked) else (e,))}
    inside: dict[str, set[str]] = {}
    for path in sorted((ROOT / "kvmfault" / "path").glob("*.py")):
        inside |= {name: read for name, read in _functions(ast.parse(path.read_text()))}  # noqa: C416  later ones win
    for name, step in steps.items():
        for member in inside.get(getattr(step.run, "__name__", ""), ()):
            found[member].add(name)
    for node in ast.walk(ast.parse((ROOT / "kvmfault" / "path" / "run.py").read_text())):
        match node:
            case ast.Call(func=ast.Name(id="Step"), args=[ast.Constant(value=str(name)), *rest]):
                for member in {m for arg in rest if isinstance(arg, ast.Lambda) for m in _members(arg)}:
                    found[member].add(name)
    for path in [*(ROOT / "arch").glob("*/*.py"), *(ROOT / "kvmfault" / "machine").glob("*.py")]:
        for name, read in _functions(ast.parse(path.read_text())):
            for member in read:
                found[member].add(name)
    return found


def _members(tree: ast.AST) -> set[str]:
    # at.policy.X, target.policy.X, policy.X, and p.X in the filters of PATH
    of = {"policy", "p"}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in Policy.__annotations__
        and (getattr(node.value, "id", None) in of or getattr(node.value, "attr", None) in of)
    }


def _functions(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    # with what functions, private methods and private classes of the same module read for them
    defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}

    def read(node: ast.AST, seen: frozenset[str]) -> set[str]:
        found = _members(node)
        for call in ast.walk(node):
            name = getattr(getattr(call, "func", None), "id", "")
            if name in defined and name not in seen:
                found |= read(defined[name], seen | {name})
        return found

    for name, node in defined.items():
        if isinstance(node, ast.FunctionDef) and not name.startswith("_"):
            yield name, read(node, frozenset())
    for cls in (n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")):
        methods = {n.name: n for n in cls.body if isinstance(n, ast.FunctionDef)}
        for name, method in methods.items():
            if name == "__init__" or not name.startswith("_"):
                asked = {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute) and n.attr.startswith("_")}
                private = (methods[helper] for helper in sorted(asked & methods.keys()))
                found = _members(method).union(*map(_members, private))
                yield cls.name if name == "__init__" else f"{cls.name}.{name}", found


@pytest.mark.parametrize("member", list(Policy.__annotations__))
def test_the_named_readers_read_it_and_no_other_does(member: str) -> None:
    named = set(policy_texts()[member].readers)
    assert named - {UNREAD.get(member)} == reads()[member]
