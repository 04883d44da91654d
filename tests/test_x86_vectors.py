"""What functions of the real 6.12.117 answered: error codes, the fault path, mapping sizes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, Final

import pytest

from arch.x86 import NPT, SHADOW
from kvmfault.algebra.expr import NEVER
from kvmfault.contract.policy import Policy, Reaction
from kvmfault.contract.ports import PinError
from kvmfault.contract.target import Target
from tests.conftest import ROOT, VECTORS
from tests.kernel import x86_decode, x86_hugepage, x86_path

DATA: Final[dict[str, list[dict[str, Any]]]] = json.loads((VECTORS / "x86_vectors.json").read_text())
SIZE_LINE: Final = "exec=0 nxwa=0 dis2m=0 dis1g=0 private=0 slotflags=0 gfn=1 pfn=1"
INPUTS: Final = ("name", "kind", "code", "addr", "flags")


def decode_line(row: dict[str, Any]) -> str:
    return f"{row['kind']} {row['code']} {row['addr']} {','.join(row['flags'])}"


def key_line(row: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in row["in"].items())


def one(module: ModuleType, line: str) -> list[tuple[str, object]]:
    """The fields of the one answer, in order."""
    (answer,) = module.answers([line])
    return list(json.loads(answer).items())


def test_the_vectors_are_there() -> None:
    assert [len(DATA[name]) for name in ("decode", "path", "hugepage")] == [99, 91, 576]


@pytest.mark.parametrize("row", DATA["decode"], ids=lambda row: str(row["name"]))
def test_decode(row: dict[str, Any]) -> None:
    expected = [(name, value) for name, value in row.items() if name not in INPUTS]
    assert one(x86_decode, decode_line(row)) == expected
    assert one(x86_decode, decode_line(row).replace(",", " ")) == expected


@pytest.mark.parametrize("row", DATA["path"], ids=key_line)
def test_path(row: dict[str, Any]) -> None:
    assert one(x86_path, key_line(row)) == [(name, value) for name, value in row.items() if name != "in"]


def test_a_page_on_its_way_is_waited_for_even_in_a_read_only_slot() -> None:
    (answer,) = x86_path.answers(["err=0x4 slot=4 pfn=2 apf=1 apfdup=1"])
    said = json.loads(answer)
    assert (said["ret_pf"], said["trace"][-2:]) == ("RETRY", ["gup_nowait", "req"])


def test_a_frame_out_of_step_with_its_gfn_is_a_bug() -> None:
    line = "exec=0 nxwa=0 max=3 host=3 dis2m=0 dis1g=0 private=0 slotflags=0 gfn=0x40012 pfn=0x800{}"
    answers = [json.loads(a) for a in x86_hugepage.answers([line.format("13"), line.format("12")])]
    assert [(a["goal"], a["pfn"], a["bug"]) for a in answers] == [(3, 0x80000, 1000), (3, 0x80000, 0)]


def test_mapping_sizes() -> None:
    lines = [key_line(row) for row in DATA["hugepage"]]
    got = [json.loads(answer) for answer in x86_hugepage.answers(lines)]
    assert got == [row["out"] for row in DATA["hugepage"]]


# The adapters.


def test_runs_by_hand() -> None:
    rows = DATA["decode"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel.x86_decode"],
        input="\n".join(decode_line(row) for row in rows),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert [json.loads(line)["rc"] for line in done.stdout.splitlines()] == [row["rc"] for row in rows]


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        (x86_decode, "epd 0x1", "kind 'epd': expected one of ept, misconfig, npf, npf-snp, pf"),
        (x86_decode, "ept", "code '': expected a hexadecimal number of up to 64 bits"),
        (x86_decode, "ept 0x1g", "code '0x1g': expected a hexadecimal number of up to 64 bits"),
        (x86_decode, "ept 1 0x2 swp,no", "flag 'no': expected ad, nxwa, priv, swp (or an address as 0x...)"),
        (x86_decode, "ept 1 12345", "flag '12345': expected ad, nxwa, priv, swp (or an address as 0x...)"),
        (x86_path, "slot=1", "no err=CODE"),
        (x86_path, "err=0x4 slto=1", "'slto=1': expected key=value with a key of err, prefetch"),
        (x86_path, "err=-1", "EXITINFO1=-0x2000000000001 does not fit 64 bits"),
        (x86_hugepage, "exec=0", "no nxwa="),
        (
            x86_hugepage,
            "exec=0 nxwa=0 max=9 host=1 dis2m=0 dis1g=0 private=0 slotflags=0 gfn=1 pfn=1",
            "max=9: a level",
        ),
    ],
)
def test_bad_lines(
    module: ModuleType,
    line: str,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{line}\n"))
    assert module.main() == 2
    assert f"line 2: {complaint}" in capsys.readouterr().err


def test_an_address_may_be_left_out() -> None:
    assert dict(one(x86_decode, "ept 0x181"))["gfn"] == "0x12345"


# The adapters decide nothing: with a rule taken from the library, their answers change.


def test_decoding_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {kind: one(x86_decode, f"{kind} 0x500000003") for kind in ("npf", "npf-snp", "pf")}
    target = Target(NPT, "4k", "6.12")
    target.definition = replace(target.definition, is_write=NEVER, is_private=NEVER)
    monkeypatch.setitem(x86_decode._TARGETS, "x86-npt", target)
    assert dict(one(x86_decode, "npf 0x500000003"))["write"] is False
    assert dict(one(x86_decode, "npf-snp 0x500000003"))["is_private"] is False
    assert before["pf"] == one(x86_decode, "pf 0x500000003")


def test_refusals_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "npf-snp 0x50000000d"
    assert dict(one(x86_decode, line))["captured"] is False
    target = Target(NPT, "4k", "6.12")
    target.joints = replace(target.joints, screen=())
    monkeypatch.setitem(x86_decode._TARGETS, "x86-npt", target)
    assert dict(one(x86_decode, line))["captured"] is True


def test_the_path_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(NPT, "4k", "6.12")
    reactions = {**target.policy.frame_reaction, PinError.HWPOISON: Reaction.FAULT}
    target.policy = replace(target.policy, frame_reaction=reactions)
    monkeypatch.setattr(x86_path, "_TARGET", target)
    assert dict(one(x86_path, "err=0x4 pfn=4")) | {"rc": -14, "sigbus": 0} == dict(one(x86_path, "err=0x4 pfn=4"))


@pytest.mark.parametrize("policy", [{"fit_sizes": ()}, {"fit_sizes": (1 << 21,)}])
def test_sizes_are_the_librarys(policy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(SHADOW, "4k", "6.12")
    target.policy = _changed(target.policy, policy)
    monkeypatch.setattr(x86_hugepage, "_TARGET", target)
    lines = [key_line(row) for row in DATA["hugepage"]]
    got = [json.loads(answer) for answer in x86_hugepage.answers(lines)]
    assert got != [row["out"] for row in DATA["hugepage"]]


def _changed(policy: Policy, members: dict[str, Any]) -> Policy:
    return replace(policy, **members)
