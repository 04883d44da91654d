"""Memslots against what kernels answered: the session of x86_vectors.json and every memslot_ioctl_cases file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from errno import EINVAL, errorcode
from functools import cache
from typing import Any, Final

import pytest

from kvmfault.types import Gfn, Gpa, Hva
from kvmfault.vm import memslot_rules, memslots
from kvmfault.vm.caps import HostCaps
from kvmfault.vm.memslot_request import NO_FILE, MemslotRequest, Via
from kvmfault.vm.memslots import Memslots
from tests.conftest import VECTORS
from tests.kernel import x86_memslots

SESSION: Final = json.loads((VECTORS / "x86_vectors.json").read_text())["memslot"]


@cache
def session_answers() -> list[str]:
    return list(x86_memslots.answers(row["op"] for row in SESSION))


def test_session_is_all_here() -> None:
    assert len(SESSION) == len(session_answers()) == 50


@pytest.mark.parametrize("row", range(50), ids=lambda i: SESSION[i]["op"])
def test_session(row: int) -> None:
    assert session_answers()[row] == SESSION[row]["out"]


# The ioctl cases.

TWO_SPACES: Final = HostCaps(
    page_shift=12,
    max_gfn=Gfn((1 << 40 - 12) - 1),  # MAXPHYADDR 40, the default of the emulated CPU that ran the cases
    beyond_errno=EINVAL,
    user_top=Hva((1 << 47) - 4096),
    nr_address_spaces=2,
    nr_user_slots=32764,
)
"""6.12 with nested paging."""
SHADOW_LIMIT: Final = Gfn((1 << 52 - 12) - 1)
CAPS: Final = {
    ("6.1.0", "Y"): replace(TWO_SPACES, region2=False),
    ("6.12.117", "Y"): TWO_SPACES,
    ("6.12.117", "N"): replace(TWO_SPACES, max_gfn=SHADOW_LIMIT),
    ("6.18.44", "kvm_pvm"): replace(TWO_SPACES, max_gfn=SHADOW_LIMIT, nr_address_spaces=1, guest_memfd=True),
}
"""By kernel and mode (Y, N: nested paging on or off), as the heads of the files give them."""

UNASKED: Final = "gmem-create:ENOTTY"
"""Result of a row whose guest_memfd could not be made: the kernel has none, and the slot ioctl was never called."""
UNASKED_CASES: Final = {
    "guest_memfd hole: hva misaligned": 1,
    "set2-guest_memfd-ok": 1,
    "set2-guest_memfd-offset-2m": 1,
    "set2-guest_memfd-offset-misaligned": 1,
    "set2-guest_memfd-offset+size>file": 1,
    "set2-guest_memfd-offset-wraps": 1,
    "set2-guest_memfd+log-dirty": 1,
    "set2-guest_memfd+readonly": 1,
    "set2-guest_memfd-resize": 2,
    "set2-guest_memfd-modify-same": 2,
    "set2-guest_memfd-flags-change": 1,
    "set2-guest_memfd-delete": 1,
    "set2-guest_memfd-delete-with-flag": 2,
    "set2-guest_memfd-delete-by-ioctl1": 1,
    "set2-guest_memfd-two-slots-same-offset": 2,
    "set2-guest_memfd-move-gpa": 2,
}
"""Rows of that result per case, in each file but 6.18's: they record the harness, not an answer about a slot."""

FILES: Final = {
    "memslot_ioctl_cases.json": (97, {}),
    "memslot_ioctl_cases-6.1.192-svm-npt.json": (97, UNASKED_CASES),
    "memslot_ioctl_cases-6.12.117-svm-npt.json": (99, UNASKED_CASES),
    "memslot_ioctl_cases-6.12.117-svm-shadow.json": (97, UNASKED_CASES),
}
POOL: Final = 0x7F00_0000_0000
MEMFD, OTHER_FILE = 3, 4


def head_caps(data: dict[str, Any]) -> HostCaps:
    """What the kernel of a file offers. The head's own numbers must agree with the table."""
    caps = CAPS[data["kernel"].split("-")[0].split("+")[0], data["mode"]]
    assert caps.nr_user_slots == data["nr_memslots"]
    assert caps.nr_address_spaces == (data["multi_address_space"] or 1)
    return caps


def all_cases() -> Iterator[Any]:
    for name in FILES:
        data = json.loads((VECTORS / name).read_text())
        for case in data["cases"]:
            yield pytest.param(head_caps(data), case, id=f"{name.removesuffix('.json')}: {case['name']}")


def request(op: dict[str, Any]) -> MemslotRequest:
    hva = POOL + int(op["hva"][5:], 16) if op["hva"].startswith("pool+") else int(op["hva"], 16)
    memfd = MEMFD if "gmem" in op else OTHER_FILE if "badfd" in op else NO_FILE
    return MemslotRequest(
        slot=op["slot"],
        flags=op["flags"],
        gpa=Gpa(int(op["gpa"], 16)),
        size=int(op["size"], 16),
        hva=Hva(hva),
        memfd=memfd,
        memfd_offset=op.get("gmem_off", 0),
        via={"set": Via.REGION1, "set2": Via.REGION2}[op["op"]],
    )


@pytest.mark.parametrize(("caps", "case"), list(all_cases()))
def test_ioctl_case(caps: HostCaps, case: dict[str, Any]) -> None:
    slots = Memslots(caps)
    slots.open_file(OTHER_FILE, None)
    for op in case["ops"]:
        if op["result"] == UNASKED:
            assert case["name"] in UNASKED_CASES
            continue  # no request was made, so no slot is there for the operations that follow
        if "gmem" in op and MEMFD not in slots.files:
            assert slots.create_guest_memfd(MEMFD, op["gmem"]) == 0
        done = slots.set_region(request(op))
        assert (done.errno, errorcode.get(done.errno, "ok")) == (op["errno"], op["result"]), done


@pytest.mark.parametrize("name", FILES)
def test_only_the_listed_rows_were_not_asked(name: str) -> None:
    cases = json.loads((VECTORS / name).read_text())["cases"]
    unasked = {case["name"]: sum(op["result"] == UNASKED for op in case["ops"]) for case in cases}
    expected_cases, expected_unasked = FILES[name]
    assert len(cases) == expected_cases
    assert {name: n for name, n in unasked.items() if n} == expected_unasked


# The adapter.

OTHER_VM: Final = "N 1 1 1 ffffffffffff"
NOTICED: Final = {
    "user-id": ["S 7ffc 0 0 1000 0"],
    "flags": ["S 0 8 0 1000 0"],
    "size-aligned": ["S 0 0 0 1800 0"],
    "gpa-aligned": ["S 0 0 800 1000 0"],
    "hva-legal": ["S 0 0 0 1000 800"],
    "memfd-offset": ["S 0 4 0 1000 0 3 800"],
    "slot-number": ["S 10000 0 0 1000 0"],
    "gpa-wraps": ["S 0 0 fffffffffffff000 2000 0"],
    "slot-size": ["S 0 0 0 80000000000 0"],
    "delete-absent": ["S 0 0 0 0 0"],
    "memfd-immutable": ["S 0 4 0 1000 0 3 0", "S 0 4 0 1000 0 3 0"],
    "fixed-properties": ["S 0 0 0 1000 0", "S 0 0 0 1000 1000", "S 0 0 0 2000 0", "S 0 2 0 1000 0"],
    "overlap": ["S 0 0 0 2000 0", "S 1 0 1000 1000 0"],
    "memfd-open": ["S 0 4 0 1000 0 9 0"],
    "memfd-range": ["S 0 4 0 1000 0 3 100000000000"],
    "memfd-bound": ["S 0 4 0 2000 0 3 0", "S 1 4 2000 2000 0 3 1000"],
    "gfn-limit": ["S 0 0 1000000000000000 1000 0"],
}
UNREACHABLE: Final = {
    "ioctl-exists": "the vectors' kernel has both ioctls",
    "ioctl-flags": "the vectors use the newer ioctl",
    "userfault-bitmap": "proposed: the vectors' kernel has no such flag",
    "page-count": "pages are counted right",
    "total-pages": "needs 2^64 pages",
    "memfd-kind": "every open file of the vectors is the VM's guest_memfd",
    "move-refused": "nobody tracks pages from outside",
    "memory-slot": "allocations succeed",
    "memory-invalid": "allocations succeed",
    "memory-bitmap": "allocations succeed",
    "memory-metadata": "allocations succeed",
}
TABLES: Final = ("REQUEST_RULES", "CHANGE_RULES", "PREPARE_RULES")


def outputs(lines: list[str]) -> list[str]:
    try:
        return list(x86_memslots.answers([OTHER_VM, *lines]))
    except IndexError as error:  # what the removed rule kept away from the tables
        return [repr(error)]


@pytest.mark.parametrize("rule", NOTICED)
def test_adapter_notices_a_removed_rule(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outputs(NOTICED[rule])
    for table in TABLES:
        rules = getattr(memslot_rules, table)
        monkeypatch.setattr(memslots, table, tuple(r for r in rules if r.name != rule))
    assert outputs(NOTICED[rule]) != before


def test_every_rule_is_tried_or_out_of_reach() -> None:
    names = [rule.name for table in TABLES for rule in getattr(memslot_rules, table)]
    assert sorted(names) == sorted([*NOTICED, *UNREACHABLE])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("S 0 0 0 1000 0\n", "line 1: S before the first N"),
        ("N 0 1 2 fff\nS 0 0\n", "line 2: 'S 0 0' is neither"),
        ("N 0 1 2 fff\n\nS 0 0 0 xyz 0\n", "line 3: invalid literal"),
        ("N 0 1 3 fff\n", "line 1: nr_address_spaces is 3"),
        ("N 0 1 2 fff\nS 0 0 0 0 10000000000000000\n", "line 2: hva is 0x10000000000000000"),
        ("N 0 1 2 fff\nS 100000000 0 0 0 0\n", "line 2: slot is 0x100000000"),
        ("hello\n", "line 1: 'hello' is neither"),
    ],
)
def test_adapter_names_the_bad_line(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert x86_memslots.main() == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_adapter_answers_standard_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(row["op"] + "\n" for row in SESSION)))
    assert x86_memslots.main() == 0
    assert capsys.readouterr().out.splitlines() == [row["out"] for row in SESSION]
