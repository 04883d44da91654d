"""`kvmfault prove`: one expression, two, values; what is expected and what is not; what is no expression."""

from __future__ import annotations

import pytest

from kvmfault.contract.target import backend
from tests.cli import Cli


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["arm64", "is_write & is_exec"], "never ("),
        (["arm64", "is_write | ~is_write"], "always ("),
        (["arm64", "is_write"], "sometimes ("),
        (["arm64", "ALWAYS"], "always (0 bits read, 1 cases)"),
        (["arm64", "is_write", "is_exec"], "disjoint ("),
        (["arm64", "is_write", "kvm_is_write_fault"], "equal, implies, implied ("),
        (["arm64", "is_permission", "FSC in {0xc, 0xd, 0xe, 0xf}"], "equal, implies, implied ("),
        (["arm64", "FSC == 0xc", "is_permission"], "implies ("),
        (["arm64", "is_permission", "FSC == 0xc"], "implied ("),
        (["arm64", "is_write", "is_permission"], "none of the relations holds ("),
        (["x86-ept", "is_read & is_exec", "--reachable"], "never ("),
        (["x86-ept", "is_read & is_exec"], "sometimes ("),
        (["arm64", "is_write", "WnR", "--within", "~S1PTW & (EC == 0x24)"], "equal, implies, implied ("),
        (["arm64", "gva_bits", "FAR_EL2.VA"], "equal"),
        (["arm64", "gva_bits", "syndrome"], "differ, e.g. FAR_EL2=0x0 ESR_EL2=0x1"),
        (["arm64@6.12", "gpa_page", "kvm_vcpu_get_fault_ipa"], "equal"),
    ],
)
def test_verdicts(cli: Cli, words: list[str], first: str) -> None:
    done = cli("prove", *words)
    assert (done.status, done.err) == (0, "")
    target, _, verdict = done.out.splitlines()[0].partition(": ")
    assert target == backend(words[0]).name
    assert verdict.startswith(first)


def test_counts_come_with_the_smallest_example(cli: Cli) -> None:
    lines = cli("prove", "arm64", "WnR", "FSC == 3").out.splitlines()
    assert lines == [
        "arm64:4k@7.4: none of the relations holds (7 bits read, 128 cases)",
        "          1  both, e.g. ESR_EL2=0x43",
        "         63  only the first, e.g. ESR_EL2=0x40",
        "          1  only the second, e.g. ESR_EL2=0x3",
        "         63  neither, e.g. ESR_EL2=0x0",
    ]
    lines = cli("prove", "arm64", "FSC == 3").out.splitlines()
    assert lines[1:] == ["          1  FSC == 3, e.g. ESR_EL2=0x3", "         63  not FSC == 3, e.g. ESR_EL2=0x0"]


@pytest.mark.parametrize(
    ("words", "expect", "status"),
    [
        (["is_write & is_exec"], "never", 0),
        (["is_write & is_exec"], "always", 1),
        (["is_write | ~is_write"], "always", 0),
        (["is_write"], "never", 1),
        (["is_write", "is_exec"], "disjoint", 0),
        (["is_write", "is_exec"], "equal", 1),
        (["FSC == 0xc", "is_permission"], "implies", 0),
        (["FSC == 0xc", "is_permission"], "implied", 1),
        (["is_permission", "FSC == 0xc"], "implied", 0),
        (["gva_bits", "FAR_EL2.VA"], "equal", 0),
        (["gva_bits", "syndrome"], "equal", 1),
    ],
)
def test_expectations_set_the_status(cli: Cli, words: list[str], expect: str, status: int) -> None:
    done = cli("prove", "arm64", *words, "--expect", expect)
    assert (done.status, done.err) == (status, "")
    as_json = cli("prove", "arm64", *words, "--expect", expect, "--json")
    assert as_json.status == status
    assert as_json.json.get("ok", as_json.json["equal"] if len(words) == 2 else None) is (status == 0)


def test_json(cli: Cli) -> None:
    data = cli("prove", "arm64", "WnR", "FSC == 3", "--json").json
    assert data == {
        "target": "arm64:4k@7.4", "a": "WnR", "b": "FSC == 3", "cases": 128, "kinds": False, "bits": 7,
        "equal": False, "implies": False, "implied": False, "disjoint": False,
        "counts": {"both": 1, "only_a": 63, "only_b": 1, "neither": 63},
        "witnesses": {
            "both": {"ESR_EL2": 0x43}, "only_a": {"ESR_EL2": 0x40}, "only_b": {"ESR_EL2": 3}, "neither": {"ESR_EL2": 0},
        },
        "ok": True,
    }  # fmt: skip
    alone = cli("prove", "arm64", "is_write & is_exec", "--json").json
    assert (alone["never"], alone["always"], alone["b"]) == (True, False, None)
    values = cli("prove", "arm64", "gva_bits", "syndrome", "--json").json
    assert (values["equal"], values["witness"]) == (False, {"FAR_EL2": 0, "ESR_EL2": 1})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], ["Missing argument 'TARGET'"]),
        (["arm64"], ["Missing argument 'EXPR'"]),
        (["arm64", "is_write", "is_exec", "is_read"], ["unexpected extra argument"]),
        (["nope", "is_write"], ["no backend 'nope'"]),
        (["arm64", ""], ["column 1: not an expression"]),
        (["arm64", "is_write &"], ["column 11: not an expression"]),
        (["arm64", "is_wrte"], ["column 1: no fact or field is_wrte; near: is_write"]),
        (["arm64", "is_write", "is_exc"], ["no fact or field is_exc; near: is_exec"]),
        (["arm64", "is_write", "--within", "is_exc"], ["no fact or field is_exc"]),
        (["arm64", "S1PTW & EC == 0x24"], ["put parentheses around the comparison"]),
        (["arm64", "FSC == 0x40"], ["0x40 does not fit 6 bits"]),
        (["arm64", "FSC"], ["a value can only be compared with a value"]),
        (["arm64", "FSC", "FSC == 7"], ["a value can only be compared with a value"]),
        (["arm64", "FSC & WnR"], ["FSC has 6 bits: is_set needs one"]),
        (["arm64", "gpa_page & WnR"], ["gpa_page is a value, not a truth: compare it"]),
        (["arm64", "is_write", "--within", "FSC"], ["--within 'FSC' is a value, not a truth"]),
        (["arm64", "gva_bits", "syndrome", "--within", "WnR"], ["narrow truths; values are compared everywhere"]),
        (["arm64", "gva_bits", "syndrome", "--reachable"], ["narrow truths; values are compared everywhere"]),
        (["arm64", "is_write", "--expect", "equal"], ["--expect 'equal' does not apply here: always, never"]),
        (["arm64", "is_write", "is_exec", "--expect", "always"], ["does not apply here: equal, implies, implied"]),
        (["arm64", "is_write", "--expect", "sometimes"], ["does not apply here"]),
        (["arm64", "gva_bits", "syndrome", "--expect", "implies"], ["does not apply to values: equal"]),
        (["arm64", "is_user"], ["column 1: is_user is not known: the exception level"]),
        (["arm64", "is_write", "--within", "NEVER"], ["nothing to compare"]),
        (["arm64", "is_write", "is_exc"], ["the second EXPR: column 1"]),
        (["arm64", "gpa_page", "is_write"], ["a value can only be compared with a value"]),
        (["arm64", "__import__('os').system('true')"], ["is not in the language"]),
        (["arm64", "(" * 3000 + "WnR" + ")" * 3000], ["not an expression"]),
        (["arm64", "~" * 9000 + "WnR"], ["nested too deeply"]),
        (["arm64", "W" * 20000], ["expression of 20000 characters: at most 10000"]),
        (["arm64", "is_write\nis_exec"], ["not an expression"]),
        (["arm64", "\udcff"], []),
        (["arm64", "is_write", "--expcet", "never"], ["No such option: --expcet"]),
        (["arm64", "is_write", "--expect"], ["Option '--expect' requires an argument"]),
    ],
)  # fmt: skip
def test_refused(cli: Cli, words: list[str], says: list[str]) -> None:
    cli("prove", *words).refused(*says)
