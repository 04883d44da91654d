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
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import PinError
from kvmfault.contract.target import Target
from kvmfault.contract.values import Reaction
from tests.conftest import ROOT, VECTORS
from tests.kernel import arm64_decide, x86_decode, x86_hugepage, x86_path

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


@pytest.mark.parametrize(
    ("line", "want"),
    [
        # whatever but INVALID ends the fault where the kernel tries without the lock
        ("err=0x3 fast=1", {"rc": 1, "ret_pf": "RETRY", "emulated": 0, "trace": ["fast"]}),
        ("err=0x3 fast=2", {"rc": 1, "ret_pf": "EMULATE", "emul_type": "0x40", "trace": ["fast", "emulate"]}),
        ("err=0x3 fast=3", {"rc": 1, "ret_pf": "WRITE_PROTECTED", "emul_type": "0x48", "trace": ["fast", "emulate"]}),
        ("err=0x4 map=2", {"rc": 1, "ret_pf": "EMULATE", "emulated": 1, "emul_type": "0x40", "warn": 0}),
        # the slow path may not answer INVALID: KVM_BUG_ON
        ("err=0x4 map=4", {"rc": -5, "ret_pf": "INVALID", "emulated": 0, "warn": 1}),
        ("err=0x100000000 prefetch=1 map=4", {"rc": -5, "ret_pf": "INVALID", "warn": 1}),
        # the address is asked for with write semantics, which a read-only slot does not have
        ("err=0x4 slot=4 pfn=2 apf=1 apfset=1", {"ret_pf": "FIXED"}),
    ],
)
def test_what_the_rows_do_not_show(line: str, want: dict[str, object]) -> None:
    answer = dict(one(x86_path, line))
    assert {key: answer[key] for key in want} == want


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("gfn=0xfffffffffffff pfn=0xfffffffffffff host=3", (3, 3, 0xFFFFFFFFC0000)),
        ("gfn=0x12345678912 pfn=0x38912 host=3 private=1", (3, 3, 0)),
        ("host=2", (2, 2, 0)),
        ("", (1, 1, 0)),
        ("host=5 max=4", (3, 3, 0)),  # tables of levels 4 and 5, but no blocks
        ("host=3 pfn=0x7ff0000000000002", (1, 1, 0x7FF0000000000002)),  # KVM_PFN_ERR_RO_FAULT
        ("host=3 pfn=0x8000000000000000", (1, 1, 1 << 63)),  # KVM_PFN_NOSLOT
        ("host=3 pfn=0x8000000000000000 private=1", (1, 1, 1 << 63)),
    ],
)
def test_sizes_that_the_rows_do_not_show(line: str, want: tuple[int, int, int]) -> None:
    answer = x86_hugepage.run(x86_hugepage.parse(line))
    assert (answer["req"], answer["goal"], answer["pfn"]) == want
    assert answer["bug"] == 0


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
        (x86_path, "err=-1", "err=-1: expected 0 to 0xffffffffffffffff"),
        (x86_path, "err=0x4 pfn=-1", "pfn=-1: expected 0 to 9"),
        (x86_path, "err=0x4 pfn=10", "pfn=10: expected 0 to 9"),
        (x86_path, "err=0x4 slot=6", "slot=6: expected 0 to 5"),
        (x86_path, "err=0x4 map=0", "map=0: expected 1 to 6"),
        (x86_path, "err=0x4 fast=7", "fast=7: expected 1 to 6"),
        (x86_path, "err=0x4 walk=4", "walk=4: expected 0 to 3"),
        (x86_path, "err=0x4 topup=12", "topup=12: expected -4095 to 0"),
        (x86_path, "err=0x4 slot", "'slot': expected key=value with a key of err, prefetch"),
        (x86_path, "err=four", "err=four: expected a number (hexadecimal with 0x)"),
        (x86_hugepage, "max=9", "max=9: expected 1 to 5"),
        (x86_hugepage, "host=0", "host=0: expected 1 to 5"),
        (x86_hugepage, "hw=4", "hw=4: expected 1 to 3"),
        (x86_hugepage, "gfn=0x10000000000000", "gfn=0x10000000000000: expected 0 to 0xfffffffffffff"),
        (arm64_decide, "92000007 0 400120 slot=3", "slot=3: expected 0 to 2"),
        (arm64_decide, "92000007 0 400120 pfnkind=4", "pfnkind=4: expected 0 to 3"),
        (arm64_decide, "92000007 0 400120 npages=-1", "npages=-1: expected 0 to fffffffffffff"),
        (arm64_decide, "92000007 0 400120 vmashift=40", "vmashift=40: expected 0 to 3f"),
        (arm64_decide, "92000007 0 400120 mapret=b", "mapret=b: expected -fff to 0"),
        (arm64_decide, "92000007 0 400120 slto=1", "'slto=1': expected key=value with a key of ipa_limit, ia_bits"),
        (arm64_decide, "92000007 0 400120 slot=1=1", "slot=1=1: expected a hexadecimal number"),
        (arm64_decide, "92000007 0", "'92000007 0': expected 'esr far hpfar [key=value ...]', hexadecimal"),
        (arm64_decide, "92000007 0 1" + 16 * "0", "hpfar=10000000000000000: expected 0 to ffffffffffffffff"),
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
