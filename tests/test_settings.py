"""KEY=VALUE: every member of Policy and VmFacts has a spelling that is read back, and what runs follows it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from enum import Enum
from errno import EFAULT, EINVAL
from typing import Final

import pytest

from kvmfault.contract.access import Access, Cause
from kvmfault.contract.outcome import Fixed, Inject
from kvmfault.contract.policy import Policy
from kvmfault.contract.ports import PinError, VmFacts
from kvmfault.contract.settings import HINTS, overrides, parse_setting, replaced, spell
from kvmfault.contract.target import backend
from kvmfault.contract.values import MemfdSource, Reaction, SignExtension, TagRefusal, Topup
from kvmfault.errors import KvmfaultError, UsageError
from kvmfault.machine.vm import Vm
from kvmfault.path.run import bind
from kvmfault.types import Gpa
from tests.cli import Cli
from tests.conftest import ROOT
from tests.targets import targets
from tests.worlds import ALL, GPA, HVA, SIZE

RECORDING: Final = str(ROOT / "tests" / "data" / "traces" / "guest_fault.trace.txt")
MEMBERS: Final = [*HINTS[Policy], *HINTS[VmFacts]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.mark.parametrize(
    ("text", "member", "value"),
    [
        ("mmio_sign_extension=kept", "mmio_sign_extension", SignExtension.KEPT),
        ("mmio-sign-extension=LOST", "mmio_sign_extension", SignExtension.LOST),
        (" Topup = Unless-Permission ", "topup", Topup.UNLESS_PERMISSION),
        ("memfd_source=none", "memfd_source", MemfdSource.NONE),
        ("precheck=yes", "precheck", True),
        ("precheck=TRUE", "precheck", True),
        ("nested=no", "nested", False),
        ("nested=false", "nested", False),
        ("ipa_limit_bits=40", "ipa_limit_bits", 40),
        ("ipa_limit_bits=0x28", "ipa_limit_bits", 40),
        ("table_bits=64", "table_bits", 64),
        ("guest_bits=32", "guest_bits", 32),
        ("walk_level=-1", "walk_level", -1),
        ("max_gfn=1g", "max_gfn", 1 << 30),
        ("unexplained_permission=EFAULT", "unexplained_permission", EFAULT),
        ("unexplained_permission=22", "unexplained_permission", EINVAL),
        ("unexplained_permission=none", "unexplained_permission", None),
        ("fit_sizes=1G,2M,2m", "fit_sizes", (2 << 20, 1 << 30)),
        ("fit_sizes=none", "fit_sizes", ()),
        ("area_sizes=4k, 64k:4k", "area_sizes", {4096: 4096, 65536: 4096}),
        ("area_sizes=none", "area_sizes", None),
        (
            "frame_reaction=hwpoison:fault,RO-FAULT:emulate",
            "frame_reaction",
            {PinError.HWPOISON: Reaction.FAULT, PinError.RO_FAULT: Reaction.EMULATE},
        ),
    ],
)
def test_a_setting_is_read(text: str, member: str, value: object) -> None:
    assert parse_setting(text) == (member, value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no setting: write KEY=VALUE"),
        ("precheck", "'precheck' is no setting: write KEY=VALUE"),
        ("mmio_sign=kept", "no policy or VM fact 'mmio_sign'; near: mmio_caching, mmio_sign_extension"),
        ("zzz=1", "there is: unbacked, invalid_slot,"),
        ("x" * 5000 + "=1", "no policy or VM fact 'xxx"),
        ("topup=sometimes", "one of: always, unless_permission, unless_permission_unlogged"),
        ("topup=", "one of: always"),
        ("precheck=2", "precheck=2: the value is yes or no"),
        ("ipa_limit_bits=-1", "a number, decimal or 0x..., from 16 to 64"),
        ("ipa_limit_bits=0x10000000000000000", "from 16 to 64"),
        (
            "ipa_limit_bits=0xffffffffffffffff",
            "ipa_limit_bits=0xffffffffffffffff: the value is a number, decimal or 0x",
        ),
        ("ipa_limit_bits=15", "from 16 to 64"),
        ("table_bits=65", "from 16 to 64"),
        ("max_gfn=0x10000000000000", "from 0 to 0xfffffffffffff"),
        ("guest_bits=7", "guest_bits=7: the value is one of: 32, 64"),
        ("walk_level=4", "a number, decimal or 0x..., from -2 to 3, or none"),
        ("ipa_limit_bits=1_0", "a number"),
        ("ipa_limit_bits=٤٠", "a number"),
        ("ipa_limit_bits=" + "9" * 5000, "a number"),
        ("fit_sizes=3", "a size such as 2M: a power of two, 4K or more"),
        ("fit_sizes=2K", "4K or more"),
        ("fit_sizes=2M,", "a size such as 2M"),
        ("area_sizes=4k:x", "a list of NAME:VALUE with commas; NAME alone means NAME:NAME"),
        ("frame_reaction=hwpoison", "NAME is one of: fault, hwpoison,"),
        ("frame_reaction=none", "VALUE is one of: fault, sigbus,"),
        ("unexplained_permission=99999", "an error's name or number, such as EFAULT, or none"),
    ],
)
def test_a_wrong_setting_says_what_is_right(text: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_setting(text)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 1600


def test_no_member_is_in_both_records() -> None:
    assert len(set(MEMBERS)) == len(MEMBERS)


def test_every_value_of_every_target_has_a_spelling() -> None:
    for target in targets():
        for record in (target.policy, target.facts):
            for f in fields(record):
                value = getattr(record, f.name)
                assert parse_setting(f"{f.name}={spell(type(record), f.name, value)}") == (f.name, value)


def others(member: str) -> list[str]:
    """Settings of the member that are not all what a target has."""
    hint = {**HINTS[Policy], **HINTS[VmFacts]}[member]
    if hint is bool:
        return ["yes", "no"]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [choice.name for choice in hint]
    texts = [
        "0",
        "1",
        "12",
        "32",
        "64",
        "-1",
        "0xffffffffffffffff",
        "EINTR",
        "none",
        "4K,1M:8K,2M",
        "8K,1M",
        "hwpoison:emulate,fault:intr",
    ]
    return [text for text in texts if _is_setting(f"{member}={text}")]


def _is_setting(text: str) -> bool:
    try:
        parse_setting(text)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("member", MEMBERS)
def test_a_changed_target_is_named_by_its_changes_and_runs(member: str) -> None:
    changed = 0
    for spelled in ALL:
        plain = backend(spelled)
        for text in others(member):
            target = plain.with_settings([f"{member}={text}"])
            again = backend(target.name)
            assert (again.policy, again.facts, again.name) == (target.policy, target.facts, target.name)
            told = {*overrides(plain.policy, target.policy), *overrides(plain.facts, target.facts)}
            assert target.name == "+".join((plain.name, *told))
            assert len(told) <= 1
            changed += len(told)
            vm = Vm.on(target).add_memslot(0, gpa=GPA, size=SIZE, hva=HVA, log_dirty=True).back(HVA, SIZE, "hugetlb-2m")
            assert (vm.target.policy, vm.facts) == (target.policy, target.facts)
            for cause in (Cause.MISSING, Cause.PERMISSION):
                for gpa in (GPA + 0x1234, 0x18):
                    access = Access(gpa=Gpa(gpa), gva=None, write=True, cause=cause)
                    with suppress(KvmfaultError):  # a line for people, no traceback
                        vm.resolve(target.encode(access).fault)
    assert changed >= len(ALL) - 2


def test_of_one_key_the_last_counts_and_a_mapping_grows() -> None:
    arm = backend("arm64@6.12")
    assert arm.with_settings(["topup=always", "topup=unless_permission"]).name == arm.name
    both = arm.with_settings(["frame_reaction=hwpoison:fault", "frame_reaction=ro_fault:emulate"])
    assert both.name == "arm64:4k@6.12+frame_reaction=hwpoison:fault,ro_fault:emulate"
    assert both.policy.frame_reaction[PinError.FAULT] is Reaction.FAULT


def test_the_original_stays_as_it_is() -> None:
    arm = backend("arm64@6.12")
    before = arm.policy, arm.facts, bind(arm).named
    other = arm.with_policy(mmio_sign_extension=SignExtension.KEPT, write_tracking=True).with_facts(nested=True)
    assert other.name == "arm64:4k@6.12+write_tracking=yes+mmio_sign_extension=kept+nested=yes"
    assert (arm.policy, arm.facts, bind(arm).named) == before
    added = {step.name for step, _ in bind(other).named} - {step.name for step, _ in bind(arm).named}
    assert added == {"track_write", "protect_tracked"}
    assert Vm.on(other).key() != Vm.on(arm).key()
    assert other.with_facts(nested=False).with_policy(
        write_tracking=False, mmio_sign_extension=SignExtension.LOST
    ).name == (arm.name)
    assert backend("arm64@6.12") is arm


def test_joints_follow_the_policy_also_after_those_of_the_original_were_asked_for() -> None:
    arm = backend("arm64@6.12")
    assert arm.joints.refuse_page == ()
    after = arm.with_policy(tag_refusal=TagRefusal.BEFORE_LOCK)
    assert [joint.__name__ for joint in after.joints.refuse_page] == ["refuse_tags"]
    assert after.with_policy(tag_refusal=TagRefusal.UNDER_LOCK).joints == arm.joints


@pytest.mark.parametrize(
    "values", [{"nope": 1}, {"topup": "always"}, {"precheck": 1}, {"fit_sizes": (1 << 30, 1 << 21)}, {"nested": True}]
)
def test_values_of_another_type_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        backend("arm64").with_policy(**values)
    with pytest.raises(UsageError):
        replaced(backend("arm64").facts, {"ipa_limit_bits": True, **values})


def test_a_policy_decides_when_a_fault_runs() -> None:
    outcomes = []
    for target in (backend("arm64"), backend("arm64+read_maps_writable=never"), backend("arm64+ipa_limit_bits=30")):
        vm = Vm.on(target).add_memslot(0, gpa=GPA, size=SIZE, hva=HVA).back(HVA, SIZE)
        read = Access(gpa=Gpa(GPA), gva=None, read=True, write=False, cause=Cause.MISSING)
        outcomes.append(vm.resolve(target.encode(read).fault))
    assert isinstance(outcomes[0], Fixed)
    assert str(outcomes[0].prot) == "rw-"
    assert isinstance(outcomes[1], Fixed)
    assert str(outcomes[1].prot) == "r--"
    assert isinstance(outcomes[2], Inject)


def test_set_on_the_command_line(cli: Cli) -> None:
    plain, changed = cli("path", "arm64"), cli("path", "arm64", "--set", "write-tracking=yes", "--set", "nested=yes")
    assert "(track_write)" in plain.out
    assert changed.out.startswith("arm64:4k@7.4+write_tracking=yes+nested=yes: ")
    assert "(track_write)" not in changed.out
    assert cli("path", "arm64+nested=yes+write_tracking=yes").out == changed.out
    cli("path", "arm64", "--set", "topup=x").refused("topup=x: the value is one of: always")
    cli("path", "arm64", "--set", "nope=1").refused("no policy or VM fact 'nope'")
    cli("path", "arm64+").refused("'' is no setting")
    cli("replay", RECORDING, "--set", "precheck").refused("write KEY=VALUE")


@pytest.mark.parametrize("told", [[], ["--backend", "arm64"]])
def test_set_counts_for_every_target_of_a_replay(cli: Cli, told: list[str]) -> None:
    done = cli("replay", RECORDING, *told, "--backend", "x86-ept", "--set", "exec_grant=always", "--json")
    assert done.status in (0, 1)
    names = [result["target"] for result in done.json["results"]]
    assert [name.partition("+")[2] for name in names] == ["exec_grant=always", ""]
    assert names[0].startswith("arm64:")
