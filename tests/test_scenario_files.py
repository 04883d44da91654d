"""Scenario files that are wrong, hostile or odd: one line says where and what would be right; never a traceback."""

from __future__ import annotations

import json
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from docs.generate import HOW
from kvmfault.errors import KvmfaultError, UsageError
from kvmfault.scenario.compare import compare
from kvmfault.scenario.model import Scenario
from kvmfault.scenario.read import parse_scenario
from tests.cli import Cli
from tests.conftest import ROOT

FILES: Final = sorted((ROOT / "examples" / "scenarios").glob("*.toml"))
HEAD: Final = """title = "t"
[[slot]]
gpa = "1G"
size = "64M"
[[event]]
"""
READ: Final = HEAD + 'do = "read"\ngpa = 0x4000_0000\n'


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


WRONG: Final[dict[str, str]] = {
    # what is wrong with the form
    "": "f.toml: title is missing",
    "title = 'a'": "f.toml: the file has neither an event nor an actor: nothing happens, found {",
    "title = 3": "f.toml:1: title input should be a valid string, found 3",
    "[[[": "f.toml:1:3: not TOML: Invalid initial character for a key part",
    '{"title": }': "f.toml:1:11: not JSON: Expecting value",
    '{"title": "a", "event": []}': "f.toml: the file has neither an event nor an actor: nothing happens, found {",
    READ + "colour = 1\n": "f.toml:8: event[0].colour is no key here",
    "colour = 1\n" + READ: "f.toml:1: colour is no key here",
    HEAD + 'gpa = 1\n': "f.toml:5: event[0].do is missing: what happens",
    HEAD + 'do = "wirte"\n': "f.toml:6: event[0].do is 'wirte' (did you mean write?); there is: read,",
    HEAD + 'do = "read"\n': "f.toml:5: event[0].gpa is missing",
    HEAD + 'do = "read"\ngpa = "1X"\n': (
        "f.toml:7: event[0].gpa expected an address of 64 bits, such as 0x4000_0000, \"0x40000000\" or \"1G\", found"
    ),
    HEAD + 'do = "read"\ngpa = 1.5\n': "f.toml:7: event[0].gpa expected an address of 64 bits,",
    HEAD + 'do = "read"\ngpa = true\n': "f.toml:7: event[0].gpa expected an address of 64 bits,",
    HEAD + 'do = "read"\ngpa = 1979-05-27\n': "f.toml:7: event[0].gpa expected an address of 64 bits,",
    HEAD + 'do = "read"\ngpa = -1\n': "f.toml:7: event[0].gpa expected an address of 64 bits,",
    READ + "size = 4097\n": "f.toml:8: event[0].size input should be less than or equal to 4096, found 4097",
    READ + "count = 5000\n": "f.toml:8: event[0].count input should be less than or equal to 4096",
    READ + "vcpu = 64\n": "f.toml:8: event[0].vcpu input should be less than or equal to 63",
    READ + 'expect.outcome = "fine"\n': "f.toml:8: event[0].expect.outcome input should be 'memory', 'mmio',",
    READ + 'expect.errno = "EFOO"\n': "f.toml:8: event[0].expect.errno expected the name of an error such as",
    READ + 'expect.size = "page size"\n': 'f.toml:8: event[0].expect.size expected bytes such as "2M", ',
    READ + 'expect.prot = "rwxx"\n': "f.toml:8: event[0].expect.prot string should match pattern",
    READ + 'expect.pages = ["5-3"]\n': 'f.toml:8: event[0].expect.pages expected a page such as 7, or first and last',
    READ + "expect.pages = 5\n": 'f.toml:8: event[0].expect.pages expected a list of pages such as [0, 7, "16-31"]',
    READ + "[[event.differs]]\nexpect.faults = 1\n": (
        "f.toml:8: event[0].differs[0] expected what the difference comes from: one of policy, host, joint"
    ),
    HEAD + 'do = "migrate"\n': "f.toml:5: event[0] expected gpa or hva, one of them",
    HEAD + 'do = "evict"\ngpa = "1G"\nsize = "1G"\n': "f.toml:8: event[0].size expected 1 to 0x1000000 bytes",
    READ + "[machine]\ninitially_set = true\n": "f.toml:8: machine initially_set needs manual_protect = true",
    '{"title": "\\ud800"}': "f.toml: the file invalid JSON: unexpected end of hex escape",
    # what is wrong with the meaning
    'targets = ["arm65"]\n' + READ: "f.toml:1: targets[0]: no backend 'arm65' in target 'arm65' (did",
    'targets = ["arm64", "arm64:4k"]\n' + READ: "f.toml: arm64:4k@7.4 is named twice",
    READ + '[machine]\npolicy = { precheck = "maybe" }\n': "f.toml:8: machine: precheck=maybe: the value is yes or no",
    READ + "[machine]\npolicy = { prechek = true }\n": (
        "f.toml:8: machine: Policy has no member 'prechek' (did you mean precheck?)"
    ),
    READ + "[machine]\nfacts = { nosuch = 1 }\n": "f.toml:8: machine: VmFacts has no member 'nosuch'",
    READ + "[machine]\nhost = { readonly_slots = 3 }\n": "f.toml:8: machine: readonly_slots=3: the value is true",
    READ + "[machine]\nhost = { page_shift = 3 }\n": "f.toml:8: machine: page_shift is 3; pages are 4K, 16K or 64K",
    READ + '[machine]\ndirty_ring = "1K"\n': "f.toml:9: machine.dirty_ring: KVM_CAP_DIRTY_LOG_RING gives EINVAL (on",
    READ + "[[memfd]]\nid = 1\nsize = 5\n": "f.toml:8: memfd[0]: KVM_CREATE_GUEST_MEMFD gives ENOTTY; see",
    READ + "[[slot]]\ngpa = 5\nsize = 5\n": "f.toml:8: slot[1]: 0x5 bytes at 0x7f0000000005 are not whole units",
    READ + '[[slot]]\ngpa = "1G"\nsize = "4K"\n': "f.toml:8: slot[1]: memslot 1: EEXIST (overlap): frames",
    READ + '[[guest]]\naddress = 0\nsize = 5\n': "f.toml:8: guest: guest tables: a block of 0x5 bytes; expected",
    HEAD + 'do = "migrate"\ngpa = 0\nsize = "4K"\n': "f.toml:5: event[0]: migrate: nothing is mapped at",
    HEAD + 'do = "split"\ngpa = "1G"\n': "f.toml:5: event[0]: split: 0x7f0040000000 is not mapped by a block",
    HEAD + 'do = "set_slot"\nid = 7\n': "f.toml:5: event[0]: set_slot: slot 7 does not exist: a new one needs",
    HEAD + 'do = "punch_hole"\nmemfd = 9\noffset = 0\nsize = "4K"\n': "f.toml:5: event[0]: punch_hole:",
    HEAD + 'do = "mark"\nslot = 9\npages = [1]\n': "f.toml:5: event[0]: mark: slot 9 has no pages 1 to 2",
    HEAD + 'do = "clear_log"\nslot = 0\ncount = 64\npages = [64]\n': "f.toml:5: event[0]: clear_log: page 64",
    HEAD + 'do = "age"\ngpa = 0\n': "f.toml:5: event[0]: age: no slot covers gpa 0x0, so it has no user address",
    HEAD + 'do = "fault"\nregisters.arm64.ESR = 1\n': "f.toml:5: event[0]: fault: arm64 has no register ESR",
    READ + '[[event.differs]]\njoint = "decode"\n': "f.toml:8: event[0].differs[0]: no joint 'decode' (did you mean",
    HEAD + 'do = "read"\ngpa = 0x' + "f" * 5000: "f.toml: a number of thousands of digits; addresses have 64 bits",
    READ + "[[event.differs]]\npolicy.nosuch = 1\n": "f.toml:8: event[0].differs[0]: Policy has no member 'nosuch'",
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=[m[:60] for m in WRONG.values()])
def test_what_is_wrong_is_said_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        compare(parse_scenario("f.toml", text))
    assert str(error.value).startswith(message), str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2100


def test_the_command_line(cli: Cli, tmp_path: Path) -> None:
    good = str(ROOT / "examples" / "scenarios" / "first.toml")
    cli("run").refused("run takes a scenario file")
    cli("run", str(tmp_path / "none.toml")).refused("No such file")
    cli("run", str(tmp_path)).refused("Is a directory")
    cli("run", good, "--backend", "arm65").refused("no backend 'arm65'")
    cli("run", good, "--backend", "arm64", "--backend", "arm64").refused("is named twice")
    cli("run", good, "--set", "precheck").refused("is no setting")
    cli("run", good, "--set", "prechek=no").refused("near: precheck")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    cli("run", str(binary)).refused("TOML or JSON in UTF-8")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (2 << 20))
    cli("run", str(large)).refused("more than 1048576 bytes")
    done = cli("run", good, "--backend", "arm64@6.12", "--json")
    assert (done.status, done.json["targets"], done.json["failures"]) == (0, ["arm64:4k@6.12"], [])
    assert done.json["events"][1]["line"] == 17
    assert done.json["events"][1]["results"]["arm64:4k@6.12"]["pages"] == [[0, 0]]


def test_settings_come_after_those_of_the_file() -> None:
    source = parse_scenario("f.toml", READ + "[machine]\nfacts = { coherent_icache = true }\n")
    [[leaf]] = [[r[0].leaf] for r in compare(source, ["arm64"]).results]
    assert leaf is not None
    assert leaf.prot == "rwx"
    [[leaf]] = [[r[0].leaf] for r in compare(source, ["arm64"], ["coherent_icache=no"]).results]
    assert leaf is not None
    assert leaf.prot == "rw-"


HOSTILE: Final = {
    "accesses": "".join('[[event]]\ndo = "read"\ngpa = "1G"\ncount = 4096\n' for _ in range(60)),
    "pages": '[[event]]\ndo = "missing"\ngpa = "1G"\nsize = "16M"\n' * 60,
    "supplies": "".join(f'[[event]]\ndo = "{do}"\ngpa = "1G"\nsize = "8M"\n' for do in ["missing", "supply"] * 40),
    "logs": '[[event]]\ndo = "get_log"\nslot = 1\n' * 900,
    "prefault": '[[event]]\ndo = "prefault"\ngpa = "1G"\nsize = "16M"\n' * 60,
    "holes": '[[event]]\ndo = "punch_hole"\nmemfd = 1\noffset = 0\nsize = "16M"\n' * 100,
}  # fmt: skip


@pytest.mark.parametrize("events", HOSTILE.values(), ids=HOSTILE)
def test_work_is_bounded(events: str) -> None:
    text = (
        'title = "t"\n[machine]\nprivate_memory = "by_access"\nmanual_protect = true\n'
        'initially_set = true\n[[memfd]]\nid = 1\nsize = "64M"\n'
        '[[slot]]\ngpa = "1G"\nsize = "64M"\n'
        '[[slot]]\ngpa = "1T"\nhva = 0x1000_0000_0000\nsize = "8G"\nlog_dirty = true\n' + events
    )
    with pytest.raises(UsageError, match="more than 100000 entries and pages of work"):
        compare(parse_scenario("f.toml", text), ["x86-ept"])


def scenarios() -> list[dict[str, Any]]:
    return [tomllib.loads(path.read_text()) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_scenario_goes_through_json_unchanged(path: Path) -> None:
    scenario = parse_scenario(path.name, path.read_text()).scenario
    again = scenario.model_dump_json()
    assert Scenario.model_validate_json(again) == scenario
    short = scenario.model_dump_json(exclude_unset=True)
    assert parse_scenario("f.json", short).scenario == scenario


VALUES: Final[st.SearchStrategy[Any]] = st.sampled_from([
    None, True, False, 0, 1, -1, 7, 4096, 1 << 30, 1 << 63, 1 << 64, 1.5, float("nan"), "", "x", "2M", "0x", "page",
    [], [[]], [1], [[3, 1]], ["1-"], {}, {"a": 1}, {"do": "read"}, "arm64", "\x00", "\ud800", "9" * 5000, "thp",
])  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from(scenarios()))))
    for _ in range(draw(st.integers(1, 4))):
        at: Any = data
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], (dict, list)) and draw(st.integers(0, 4)):
                at = at[key]
                continue
            match draw(st.integers(0, 4)):
                case 0:
                    del at[key]
                case 1 if isinstance(at, list):
                    at.insert(0, at[key])
                case 2 if isinstance(at, dict):
                    at[
                        draw(st.sampled_from(["gpa", "hva", "id", "slot", "private", "policy", "joint", "size", "do"]))
                    ] = at[key]
                case _:
                    at[key] = deepcopy(draw(VALUES))  # a later step may change it
            break
    return data


@given(mutated())
@settings(max_examples=150)
def test_no_mutation_ends_in_a_traceback(data: dict[str, Any]) -> None:
    try:
        source = parse_scenario("f.json", json.dumps(data))
        done = compare(source, source.scenario.targets[:2] or ("arm64@6.12", "x86-ept"))
    except KvmfaultError as e:
        said = str(e)
    else:
        assert all(len(r) == len(source.scenario.event) for r in done.results)
        return
    assert said.startswith(("f.json", "no backend"))
    assert "\n" not in said


@given(st.text(max_size=200))
def test_no_text_ends_in_a_traceback(text: str) -> None:
    with pytest.raises(UsageError):
        parse_scenario("f.toml", text)


@given(st.sampled_from(FILES), st.integers(0, 4000), st.text("[]={}\"'#.\n\\0x_a1", max_size=4))
def test_no_damage_ends_in_a_traceback(path: Path, at: int, text: str) -> None:
    whole = path.read_text()
    at %= len(whole)
    said = "f.toml"
    try:
        compare(parse_scenario("f.toml", whole[:at] + text + whole[at + len(text) :]), ["x86-ept"])
    except UsageError as e:
        said = str(e)
    assert said.startswith("f.toml")


def test_the_schema_is_published_and_current(cli: Cli) -> None:
    printed = cli("run", "--schema")
    assert printed.status == 0
    assert printed.out == (ROOT / "docs" / "scenario.schema.json").read_text(), HOW
    schema = printed.json
    assert schema["required"] == ["title"]
    undescribed = [
        f"{name}.{key}"
        for name, table in schema["$defs"].items()
        for key, value in table.get("properties", {}).items()
        if key != "do" and not value.get("description")
    ]
    assert undescribed == []


@pytest.mark.parametrize("target", ["arm64", "x86-shadow", "riscv"])
def test_private_memory_where_no_vm_has_any(target: str, cli: Cli) -> None:
    done = cli("run", str(ROOT / "examples/scenarios/private_mismatch.toml"), "--backend", target)
    done.refused("private_mismatch.toml:7: ", "no VM of " + target, "can have private memory")
