"""What the real fault handlers of 6.12 decided, and where 7.4 decides otherwise."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arch.arm64 import BACKEND
from arch.arm64.facts import external, translation
from arch.arm64.mmio import access_and_completion
from kvmfault.algebra.prove import relate
from kvmfault.contract.format import Prot
from kvmfault.contract.outcome import Completion, Error, Exit, Fixed, Inject, Outcome, Retry
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import Leaf, VmFacts
from kvmfault.contract.target import Target
from kvmfault.contract.values import SignExtension
from kvmfault.path.run import bind
from kvmfault.types import Gpa, Pfn
from tests.conftest import VECTORS
from tests.kernel import arm64_decide
from tests.kernel.arm64_decide import decide
from tests.kernel.scripted import ScriptedPorts

CASES: Final[list[dict[str, Any]]] = json.loads((VECTORS / "arm64_decisions.json").read_text())["cases"]
FAR: Final = 0xFFFF_8000_1234_5678
HPFAR: Final = 0x8000_0000_0040_0120


def script(case: dict[str, Any]) -> dict[str, int]:
    return {key: int(value, 16) for key, value in (word.split("=") for word in case["env"].split())}


def test_the_cases_are_there() -> None:
    assert len(CASES) == 131
    assert len({case["name"] for case in CASES}) == 131
    assert not any(case["out"]["bug"] for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["name"]))
def test_decides_as_the_kernel(case: dict[str, Any]) -> None:
    want = {key: value for key, value in case["out"].items() if key != "bug"}
    want["events"] = [event for event in want["events"] if event != "kvm_err"]  # a line in the log decides nothing
    assert decide(int(case["esr"], 16), int(case["far"], 16), int(case["hpfar"], 16), script(case)) == want


@pytest.mark.parametrize(
    ("line", "ret", "last"),
    [
        # user_mem_abort turns EAGAIN, also from the look at the host's table, into another try
        ("92000007 0 400120 mapsz=-b", 1, "faultin gfn=40012 write=0"),
        ("92000007 0 400120 mapsz=-e", -14, "faultin gfn=40012 write=0"),
        # the memory type is asked for with the permissions
        ("9200004f 0 400120 pfnkind=1 anyuc=1", 1, "mark_dirty gfn=40012"),
        # struct kvm_s2_trans: u32 esr
        ("409200004f 0 400120 nested=1 out=41234000 tw=0", 1, "inject_s2_fault esr=9200004f far=0 hpfar=400120"),
        # kvm_vcpu_get_fault_ipa shifts the highest bits of HPFAR_EL2 out
        ("92000010 0 8000000000400120", 1, "inject_vabt"),
    ],
)
def test_what_the_cases_do_not_show(line: str, ret: int, last: str) -> None:
    (answer,) = arm64_decide.answers([line])
    events = answer["events"]
    assert isinstance(events, list)
    assert (answer["ret"], events[-1]) == (ret, last)
    assert "relax addr=40012000 prot=16" in events or "pfnkind" not in line
    assert "apei addr=40012000" in events or "inject_vabt" not in events


@pytest.mark.parametrize(
    ("line", "ret", "event"),
    [
        # what the walk of the guest's tables gave is what the exit handler gives
        ("92000007 0 400120 nested=1 walk=2 walkfsc=6", 2, "inject_s2_fault esr=92000006 far=0 hpfar=400120"),
        ("92000007 0 400120 nested=1 walk=1 walkfsc=6", 1, "inject_s2_fault esr=92000006 far=0 hpfar=400120"),
        # sizes below a page, of an area with an unknown shift or of the guest's own block, are used as they are
        ("92000007 0 400120 vmashift=b mapsz=200000", 1, "map addr=40012000 size=800 phys=140012000 prot=6"),
        ("92000007 0 400120 nested=1 out=41234000 tsz=800", 1, "map addr=40012000 size=800 phys=141234000 prot=18{}6"),
        ("9200004f 0 400120 nested=1 out=41234000 tsz=0", 1, "map addr=40012000 size=0 phys=141234000 prot=18{}6"),
        # only ia_bits bounds the table
        ("92000007 0 10000000000 ia_bits=34 ipa_limit=34 nisv=1", 0, "exit_nisv esr_iss=7 ipa=1000000000000"),
        ("92000007 0 10000000000 ia_bits=30 ipa_limit=34", 1, "inject_dabt addr=1000000000000"),
        ("92000007 0 100000000000 ia_bits=34 ipa_limit=34", 1, "inject_size_fault iabt=0 addr=10000000000000"),
    ],
)
def test_what_no_host_of_today_has(line: str, ret: int, event: str) -> None:
    (answer,) = arm64_decide.answers([line])
    events = answer["events"]
    assert isinstance(events, list)
    assert answer["ret"] == ret
    assert event.format(12 * "0") in events


DIFFERENT_IN_74: Final = {
    # the exclusive goes on to the page, and then back to the guest
    "unsupported FSC excl atomic 0x35",
    # what neither writes nor fetches is only warned about
    "permission load: -EFAULT",
    # loads keep their sign
    "mmio load sas=0 sse=1 sf=0 data=f..f80",
    "mmio load sas=0 sse=1 sf=1 data=f..f80",
    "mmio load sas=1 sse=1 sf=0 data=f..f80",
    "mmio load sas=1 sse=1 sf=1 data=f..f80",
    "mmio load sas=2 sse=1 sf=1 data=f..f80",
    # the whole block is written, where 6.12 notes the page
    "nested 1G guest + THP",
    "permission store L2 (2M granule) on small vma: relax 2M",
    "thp 2M",
    # what the nested guest's table makes non-executable stays so
    "nested fetch guest XN (translation fault)",
}


def test_74_decides_alike_but_for_these() -> None:
    def both(case: dict[str, Any]) -> tuple[object, object]:
        registers = (int(case[name], 16) for name in ("esr", "far", "hpfar"))
        esr, far, hpfar = registers
        older, newer = (decide(esr, far, hpfar, script(case), kernel) for kernel in ("6.12", "7.4"))
        return older, newer

    assert {case["name"] for case in CASES if len({*map(repr, both(case))}) > 1} == DIFFERENT_IN_74


def new(esr: int, hpfar: int = HPFAR, kernel: str = "7.4", **env: int) -> tuple[object, list[str]]:
    answer = decide(esr, FAR, hpfar, env, kernel)
    events = answer["events"]
    assert isinstance(events, list)
    return answer["ret"], events


def test_74_reserves_page_table_pages_whenever_the_slot_is_logged() -> None:
    for kernel, first in (("6.12", "faultin gfn=40012 write=0"), ("7.4", "topup")):
        assert new(0x8200000F, kernel=kernel, logging=1)[1][0] == first


def test_74_tries_again_when_a_nested_table_changed_during_the_walk() -> None:
    walked = f"inject_s2_fault esr=92000000 far={FAR:x} hpfar={HPFAR:x}"
    assert new(0x92000007, kernel="6.12", nested=1, walk=-11) == (-11, ["walk_s2 ipa=40012000", walked])
    assert new(0x92000007, nested=1, walk=-11) == (1, ["walk_s2 ipa=40012000"])
    assert new(0x92000007, nested=1, walk=-14)[0] == -14


def test_no_fault_is_both_an_external_abort_and_a_missing_translation() -> None:
    # 6.12 has the range checks, which are for missing translations, before the external aborts, and 7.4 after them
    assert relate(translation, external).disjoint


def test_74_gives_an_exclusive_back_with_its_status() -> None:
    assert new(0x92000035)[1] == ["topup", "faultin gfn=40012 write=0", f"inject_dabt addr={FAR:x}"]
    assert new(0x92000035, slot=0, nisv=1) == (0, ["exit_nisv esr_iss=35 ipa=40012678"])
    assert new(0x92000035, slot=0) == (-38, [])


def test_74_has_no_address_after_an_external_abort_on_a_walk() -> None:
    ret, events = new(0x92000096, hpfar=0)
    assert (ret, events[-1]) == (1, "inject_vabt")


def outcome(esr: int, vm: ScriptedPorts | None = None, **registers: int) -> Outcome:
    target = Target(BACKEND, "4k", "6.12")
    surroundings = vm or ScriptedPorts(target.format, VmFacts(table_bits=40))
    return bind(target).resolve(surroundings, target.decode(ESR_EL2=esr, **registers))


@pytest.mark.parametrize(
    ("esr", "registers", "injected"),
    [
        (0x82000007, {"FAR_EL2": 0x1234, "HPFAR_EL2": 0x90000}, Inject("pabt", 0x1234, 0x86000010)),
        (0x92000087, {"FAR_EL2": 0x1234, "HPFAR_EL2": 0x90000}, Inject("dabt", 0x1234, 0x96000010)),
        (0x90000087, {"FAR_EL2": 0x1234, "HPFAR_EL2": 0x90000}, Inject("dabt", 0x1234, 0x94000010)),
        (0x92000087, {"HPFAR_EL2": 0x90000}, Inject("dabt", 0, 0x96000010)),
        (0x92000007, {"HPFAR_EL2": 1 << 32}, Inject("dabt", 1 << 40, 0x96000010)),
        (0x92000007, {"HPFAR_EL2": 1 << 32, "FAR_EL2": 0x5678}, Inject("dabt", 1 << 40 | 0x678, 0x96000010)),
        (0x82000007, {"HPFAR_EL2": 1 << 40, "FAR_EL2": 0x5678}, Inject("size_fault", 1 << 48 | 0x678, 0x86000000)),
        (0x92000016, {}, Inject("vabt", 0, 0xBF000000)),
    ],
)
def test_injected(esr: int, registers: dict[str, int], injected: Inject) -> None:
    assert outcome(esr, None, **registers) == injected


def test_without_hpfar_there_is_no_address() -> None:
    assert outcome(0x92000007) == Error(14)
    nested = ScriptedPorts(BACKEND.formats["4k"], VmFacts(nested=True))
    assert outcome(0x92000007, vm=nested) == Error(14)


@pytest.mark.parametrize("esr", [0x92000007, 0x9200004F])
def test_without_guest_tables_a_nested_fault_goes_on_as_it_is(esr: int) -> None:
    vm = arm64_decide.Surroundings({**arm64_decide.DEFAULTS, "nested": 1, "walk": 0})
    vm.walk_guest = lambda gpa: None  # type: ignore[method-assign]  # the adapter's always walks
    assert isinstance(outcome(esr, vm=vm, HPFAR_EL2=HPFAR), Fixed)


def test_an_access_flag_of_an_entry_that_is_gone() -> None:
    vm = arm64_decide.Surroundings(dict(arm64_decide.DEFAULTS))
    assert isinstance(outcome(0x9200000B, vm=vm, HPFAR_EL2=HPFAR), Retry)
    vm.find_leaf = lambda gpa: Leaf(6, 0x1000, Pfn(0))  # type: ignore[method-assign]
    assert outcome(0x9200000B, vm=vm, HPFAR_EL2=HPFAR) == Fixed(0x1000, Prot.R | Prot.W)


@pytest.mark.parametrize("name", ["4k", "16k", "64k", "4k-lpa2"])
def test_the_format_bounds_the_table(name: str) -> None:
    target = Target(BACKEND, name, "6.12")
    vm = ScriptedPorts(target.format, BACKEND.vm)
    top = 1 << target.format.gpa_bits
    inside, outside = (
        bind(target).handle(vm, target.decode(ESR_EL2=0x92000007, FAR_EL2=0, HPFAR_EL2=gpa >> 8)).outcome
        for gpa in (top - 0x1000, top)
    )
    assert type(inside).__name__ == "Error"  # no slot, and no instruction described
    assert type(outside).__name__ == "Inject"


# Device accesses.


def architectural(value: int, size: int, signed: bool, wide: bool) -> int:
    """What the load leaves in the register, by the instruction set."""
    value = int.from_bytes(value.to_bytes(size, "little"), "little", signed=signed)
    return value % (1 << (64 if wide else 32))


def completion(esr: int, rule: SignExtension, big_endian: bool) -> Completion:
    target = Target(BACKEND, "4k", "7.4")
    policy: Policy = replace(target.policy, mmio_sign_extension=rule)
    vm = ScriptedPorts(target.format, VmFacts(big_endian=big_endian))
    return access_and_completion(vm, target.decode(ESR_EL2=esr), Gpa(0x1000), policy)[1]


@given(
    st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 2, 3)), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 31),
)  # fmt: skip
def test_a_load_that_keeps_its_sign(value: int, sas: int, signed: bool, wide: bool, big: bool, register: int) -> None:
    esr = 0x92000007 | 1 << 24 | sas << 22 | signed << 21 | register << 16 | wide << 15
    done = completion(esr, SignExtension.KEPT, big)
    size = 1 << sas
    on_bus = (value % (1 << 8 * size)).to_bytes(size, "little")
    read = int.from_bytes(on_bus, "big" if big else "little")
    want = None if register == 31 else architectural(read, size, signed and size < 8, wide)
    assert done.finish(value) == want


@given(st.integers(0, 2**64 - 1), st.sampled_from((0, 1, 2)), st.booleans(), st.booleans())
def test_a_load_that_loses_its_sign_is_as_wide_as_the_access(value: int, sas: int, wide: bool, big: bool) -> None:
    esr = 0x92000007 | 1 << 24 | sas << 22 | wide << 15
    signed, unsigned = (completion(esr | sign << 21, SignExtension.LOST, big).finish(value) for sign in (1, 0))
    assert signed is not None
    assert signed == unsigned
    assert signed >> (8 << sas) == 0


def test_a_completion_does_not_need_the_fault() -> None:
    target = Target(BACKEND, "4k", "6.12")
    vm = ScriptedPorts(target.format, VmFacts())
    left = bind(target).resolve(vm, target.decode(ESR_EL2=0x93840007, FAR_EL2=0x678, HPFAR_EL2=0x90000))
    assert isinstance(left, Exit)
    assert left.completion is not None
    vm.facts = VmFacts(big_endian=True)
    assert left.completion.finish(0x1234) == 0x1234


def test_an_access_may_cross_a_page() -> None:
    answer = decide(0x93C40047, 0xFFC, 0x90000, {"val": 0x1122334455667788})
    events = answer["events"]
    assert isinstance(events, list)
    assert events[-1] == "exit_mmio addr=9000ffc len=8 write=1 data=1122334455667788"


# The adapter.


@pytest.mark.parametrize(
    ("case", "joint"),
    [
        ("translation, IPA beyond ipa_limit: size fault injected", "screen"),
        ("access flag load", "repair"),
        ("fetch outside memslots", "reject_unbacked"),
        ("load no ISV, NISV cap", "decode_mmio"),
        ("device fetch: ENOEXEC -> pabt", "refuse_fetch"),
        ("mte ok", "prepare_page"),
        ("nested load", "translate"),
    ],
)
def test_adapter_holds_no_decision(case: str, joint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = next(c for c in CASES if c["name"] == case)
    target = Target(BACKEND, "4k", "6.12")
    target.joints = replace(target.joints, **{joint: ()})
    monkeypatch.setitem(arm64_decide._TARGETS, "6.12", target)
    got = decide(int(found["esr"], 16), int(found["far"], 16), int(found["hpfar"], 16), script(found))
    assert got["events"] != found["out"]["events"]


def run(monkeypatch: pytest.MonkeyPatch, text: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return arm64_decide.main()


def test_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "0x92000007 0x0 0x400120 slot=2 mapw=0\n") == 0
    assert json.loads(capsys.readouterr().out)["ret"] == 1


@pytest.mark.parametrize("text", ["1 2\n", "1 2 3 slot\n", "1 2 3 slot=x\n", "1 2 3 colour=1\n"])
def test_main_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert run(monkeypatch, text) == 2
    said = capsys.readouterr().err
    assert said.startswith("line 1: ")
    assert said.count("\n") == 1
