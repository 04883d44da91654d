"""`kvmfault decode`: a code, NAME=VALUE, a pasted line, standard input, a table entry, and what is none of these."""

from __future__ import annotations

import json
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmfault.contract.accessors import TRUTHS, VALUES
from kvmfault.contract.target import backend
from kvmfault.decode import MAX_INPUT
from tests.cli import Cli


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


SHOWN: Final = {name for name in (*TRUTHS, *VALUES) if not name.startswith("mmio_")} | {"mmio_size"}
"""What is said of every fault; more where the syndrome describes the instruction."""
STORE: Final = ("ESR_EL2=0x92000047", "FAR_EL2=0xffff000000001018", "HPFAR_EL2=0x400000")


def test_a_code(cli: Cli) -> None:
    done = cli("decode", "arm64", "0x9200004f")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "arm64:4k@7.4  write: the entry forbids the access"
    assert lines[1] == "ESR_EL2 = 0x9200004f"
    assert "  EC   31:26  0x24  data abort from a lower EL" in lines
    assert "  FSC    5:0   0xf  permission, level 3" in lines
    said = {line.split()[0]: line for line in lines[lines.index("facts") + 1 :]}
    assert "yes" in said["is_write"]
    assert "WnR (bit 6) = 1" in said["is_write"]
    assert "unknown" in said["is_user"]
    assert said.keys() >= SHOWN


@pytest.mark.parametrize(
    ("words", "headline"),
    [
        (["arm64", *STORE], "write at gpa 0x40000018: no entry maps the page"),
        (["arm64@6.12", *STORE], "write at gpa 0x40000018: no entry maps the page"),
        (["arm64", " ".join(STORE)], "write at gpa 0x40000018: no entry maps the page"),
        (["arm64", ",".join(STORE)], "write at gpa 0x40000018: no entry maps the page"),
        (["arm64", "0x92000047", *STORE[1:]], "write at gpa 0x40000018: no entry maps the page"),
        (["arm64", "0d2449473607"], "write: no entry maps the page"),
        (["arm64", "0b111"], "read: no entry maps the page"),
        (["arm64", "0"], "read: the address is too wide"),
        (["arm64", "7"], "read: no entry maps the page"),
        (["arm64", "ESR_EL2=0x92000010"], "read: the memory system failed"),
        (["arm64", "FAR_EL2=0x1000"], "ESR_EL2 is not given: nothing says what was tried"),
        (["arm64", "0x5e000000"], "read: the address is too wide (EC 0x17 (SMC) is no abort"),
        (["x86-ept", "GUEST_PHYSICAL_ADDRESS=0x1000"], "EXIT_QUALIFICATION is not given"),
        (["x86-ept", "0x182"], "write: no entry maps the page"),
        (["x86-ept", "EXIT_REASON=0d49", "GUEST_PHYSICAL_ADDRESS=0xfee00018"], "access at gpa 0xfee00018: the en"),
        (["x86-npt", "EXITINFO1=0x100000006", "EXITINFO2=0x180000"], "write at gpa 0x180000: no entry maps the page"),
        (["x86-shadow", "ERROR_CODE=0x7", "CR2=0x7fff12345678"], "write at gva 0x7fff12345678: the entry forbids"),
    ],
)  # fmt: skip
def test_brief(cli: Cli, words: list[str], headline: str) -> None:
    done = cli("decode", *words, "--brief")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(headline)
    assert done.out.count("\n") == 1
    assert cli("decode", "-b", *words).out == done.out


@pytest.mark.parametrize(
    ("target", "line", "headline"),
    [
        ("arm64", "kvm [1234]: Unsupported FSC: EC=0x24 xFSC=0x21 ESR_EL2=0x92000061", "write: data abort"),
        ("arm64", "qemu-system-aar-7 [001] 12.5: kvm_guest_fault: ipa 0x40000000, hsr 0x92000047, hxfar 0x18, pc 0x1",
         "write at gpa 0x40000018: no entry maps the page"),
        ("x86-ept", "KVM internal error. Suberror: 3, extra data 80000b0e 31 182 bfefc", "access at gpa 0xbfefc"),
        ("x86-npt", "exit_info1:     0000000100000006 exit_info2:     0000000000180000", "write at gpa 0x180000"),
        ("x86-ept", "KVM_EXIT_MEMORY_FAULT flags=0x8 gpa=0x1000 size=0x1000", "private access at gpa 0x1000"),
    ],
)  # fmt: skip
def test_a_pasted_line(cli: Cli, target: str, line: str, headline: str) -> None:
    for words in ([line], line.split()):
        done = cli("decode", target, "-b", "--", *words)
        assert done.status == 0
        assert done.out.startswith(headline), done


def test_accessors_and_notes_are_shown(cli: Cli) -> None:
    done = cli("decode", "arm64", "0x92000447", "-a")
    assert "kernel's accessors\n" in done.out
    assert "kvm_vcpu_dabt_iswrite" in done.out
    assert "notes\n  FnV (bit 10) has a meaning only with status 0x10\n" in done.out
    assert "kernel's accessors" not in cli("decode", "arm64", "0x92000447").out


@pytest.mark.parametrize("target", ["arm64", "x86-ept", "x86-npt", "x86-shadow"])
def test_json(cli: Cli, target: str) -> None:
    done = cli("decode", target, "0x3", "--json")
    data = done.json
    assert data.keys() == {"target", "headline", "access", "registers", "facts", "accessors", "notes"}
    on = backend(target)
    assert data["target"] == on.name
    assert data["facts"].keys() >= SHOWN
    fault = on.decode(**{on.backend.code: 3})
    for name in SHOWN.intersection(TRUTHS):
        fact = data["facts"][name]
        assert fact["known"] == (type(on.answers(fault)[name]) is bool)
        assert fact["answer"] == (getattr(fault, name) if fact["known"] else None)
        assert fact["why"]
    assert data["registers"].keys() == {on.backend.code}


# Standard input.


def test_lines_from_standard_input(cli: Cli) -> None:
    text = "# a comment\n\n0x92000047\nESR_EL2=0x92000007 HPFAR_EL2=0x400000\n  0x82000007  \n"
    done = cli("decode", "arm64", "-", "-b", stdin=text)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "write: no entry maps the page",
        "read at gpa 0x40000000: no entry maps the page",
        "fetch: no entry maps the page",
    ]
    full = cli("decode", "arm64", "-", stdin=text)
    assert full.out.count("arm64:4k@7.4  ") == 3


def test_a_bad_line_is_reported_and_the_rest_goes_on(cli: Cli) -> None:
    done = cli("decode", "arm64", "-", "-b", stdin=b"0x92000047\nnonsense\n\xff\xfe\n0x92000007\n1234\n")
    assert done.status == 2
    assert done.out.splitlines() == ["write: no entry maps the page", "read: no entry maps the page"]
    errors = done.err.splitlines()
    assert [e.split(": ")[1] for e in errors] == ["<stdin>:2", "<stdin>:3", "<stdin>:5"]
    assert errors[0] == "kvmfault: <stdin>:2: 'nonsense' is not a number: write 0x..., 0d... (decimal) or 0b..."
    assert errors[2].endswith("'1234' is ambiguous: write 0x1234 or 0d1234")


def test_json_of_standard_input_is_one_object_per_line(cli: Cli) -> None:
    done = cli("decode", "x86-ept", "-", "--json", stdin="0x182\n0x181\n")
    assert [json.loads(line)["access"]["write"] for line in done.out.splitlines()] == [True, False]


def test_nothing_on_standard_input(cli: Cli) -> None:
    cli("decode", "arm64", "-").refused("nothing to decode on standard input")
    cli("decode", "arm64", "-", stdin="\n# only a comment\n").refused("nothing to decode on standard input")


# Table entries.


@pytest.mark.parametrize(
    ("target", "words", "lines"),
    [
        ("arm64", ["0x400000400007ff"], ["as an entry of L3 (4k)", "  kind      leaf", "  hpa       0x40000000"]),
        ("arm64", ["0x400000400007ff", "--level", "L3"], ["  prot      rw-", "  memory    normal"]),
        ("arm64:16k", ["0", "--level", "32m"], ["as an entry of L2 (32m)", "  kind  empty"]),
        ("x86-ept", ["0x86000001c0000bf7", "--level", "2m"], ["PG_LEVEL_2M (2m)", "  hpa            0x1c0000000"]),
        ("x86-ept", ["0x86000001c0000bf7", "--level", "PG_LEVEL_2M"], ["  prot           rwx"]),
        ("x86-npt", ["0x8000000fee000063", "--level", "4k"], ["note"]),
    ],
)
def test_entries(cli: Cli, target: str, words: list[str], lines: list[str]) -> None:
    done = cli("decode", target, "--entry", *words)
    assert (done.status, done.err) == (0, "")
    assert all(line in done.out for line in lines), done.out
    data = cli("decode", target, "--entry", *words, "--json").json
    assert all({"level", "kind", "value"} <= entry.keys() for entry in data)


# Refused.


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["arm64"], ["nothing to decode: give a value of ESR_EL2, NAME=VALUE, or a pasted line"]),
        (["arm64", ""], ["nothing to decode"]),
        (["arm64", "  ", ","], ["nothing to decode"]),
        (["arm64", "zz"], ["'zz' is not a number: write 0x..., 0d... (decimal) or 0b..."]),
        (["arm64", "92000047"], ["'92000047' is ambiguous: write 0x92000047 or 0d92000047"]),
        (["arm64", "9200004f"], ["'9200004f' is ambiguous: write 0x9200004f"]),
        (["arm64", "10"], ["'10' is ambiguous: write 0x10 or 0d10"]),
        (["arm64", "0x"], ["'0x' is not a number"]),
        (["arm64", "0d1f"], ["'0d1f' is not a number"]),
        (["arm64", "-1"], ["No such option: -1"]),
        (["arm64", "0x7", "--jsn"], ["No such option: --jsn"]),
        (["arm64", "--", "-1"], ["-0x1 does not fit 64 bits"]),
        (["arm64", "0x1" + "0" * 16], ["ESR_EL2=0x10000000000000000 does not fit 64 bits"]),
        (["arm64", "0x" + "f" * 5000], ["ESR_EL2=a number does not fit 64 bits"]),
        (["arm64", "9" * 5000], ["is ambiguous"]),
        (["arm64", "x" * MAX_INPUT + "x"], [f"at most {MAX_INPUT}"]),
        (["arm64", "0x1", "0x2"], ["ESR_EL2 is given twice"]),
        (["arm64", "ESR_EL2=0x1", "0x2"], ["ESR_EL2 is given twice"]),
        (["arm64", "ESR_EL2="], ["'' is not a number"]),
        (["arm64", "esr_el2=0x1z"], ["is not a number"]),
        (["arm64", "FAR=0x1"], ["arm64 has no register FAR", "FAR_EL2"]),
        (["x86-ept", "EXIT_REASON=0x100000000"], ["EXIT_REASON=0x100000000 does not fit 32 bits"]),
        (["arm", "0x1"], ["no backend 'arm' in target 'arm' (did you mean arm64?)"]),
        (["arm64:3k", "0x1"], ["arm64 has no format '3k'"]),
        (["arm64@5.0", "0x1"], ["arm64 models no kernel '5.0'"]),
        ([], ["Missing argument 'TARGET'"]),
        (["arm64", "--entry"], ["Option '--entry' requires an argument"]),
        (["arm64", "--entry", "0x1", "0x2"], ["--entry takes one descriptor and nothing else"]),
        (["arm64", "--entry", "xyz"], ["'xyz' is not a number"]),
        (["arm64", "--entry", "0x1" + "0" * 16], ["0x10000000000000000 does not fit the 64 bits of an entry"]),
        (["arm64", "--entry", "0x1", "--level", "3m"], ["no level '3m'; it has: L0 (512g), L1 (1g), L2 (2m), L3 (4k)"]),
        (["arm64", "0x1", "--level", "2m"], ["--level says where the descriptor of --entry stands; there is none"]),
        (["arm64", "ESR_EL2=0x92000047", "HPFRA_EL2=0x40"], ["no register HPFRA_EL2: did you mean HPFAR_EL2?"]),
        (["arm64", "0d" + "9" * 5000], ["is not a number"]),
        (["arm64", "-", "0x1"], ["no register of arm64 in this line"]),
        (["arm64", "__import__('os')"], ["is not a number"]),
        (["arm64", "\x00"], ["is not a number"]),
        (["arm64", "\udcff"], ["is not a number"]),
        (["arm64", "two\nlines"], ["no register of arm64 in this line", "HPFAR_EL2"]),
        (["arm64", "٣"], ["is not a number"]),
    ],
)  # fmt: skip
def test_refused(cli: Cli, words: list[str], says: list[str]) -> None:
    cli("decode", *words).refused(*says)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150)
@given(
    st.sampled_from(["arm64", "x86-ept", "x86-npt", "x86-shadow"]),
    st.lists(
        st.text(max_size=12)
        | st.text(alphabet="0123456789abcdefxdb=,._ESRL2 ", max_size=20)
        | st.sampled_from(["ESR_EL2=", "0x92000047", "hsr", "kvm_page_fault:", "gpa", "extra", "data", "Suberror: 3"]),
        max_size=5,
    ),
)
def test_any_words_are_decoded_or_refused(cli: Cli, target: str, words: list[str]) -> None:
    done = cli("decode", target, "-b", "--", *words)
    if done.status:
        done.refused()
    elif words != ["-"]:
        assert done.out.count("\n") == 1


def test_help(cli: Cli) -> None:
    for words in (["--help"], ["-h"], ["decode", "--help"], ["decode", "-h"]):
        done = cli(*words)
        assert done.status == 0
        assert done.out.startswith("Usage: ")
        assert not done.err
