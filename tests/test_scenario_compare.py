"""Differences between targets: found, declared, and the claim of what each comes from checked."""

from __future__ import annotations

from typing import Final

import pytest

from kvmfault.contract.target import backend
from kvmfault.scenario.compare import Comparison, compare
from kvmfault.scenario.expectation import Kind
from kvmfault.scenario.read import parse_scenario
from kvmfault.scenario.run import run

SLOT: Final = 'title = "t"\n[[slot]]\ngpa = "1G"\nsize = "64M"\n'
LOGGED: Final = SLOT + 'log_dirty = true\n[[event]]\ndo = "read"\ngpa = "1G"\n[[event]]\ndo = "get_log"\nslot = 0\n'
DEVICE: Final = SLOT + '[[event]]\ndo = "read"\ngpa = 4\nsize = 1\nsign_extend = true\nanswer = 0x80\n'


def judged(text: str, *targets: str) -> Comparison:
    return compare(parse_scenario("f.toml", text), targets)


def failures(text: str, *targets: str) -> list[str]:
    return [f"{f.event} {f.target.partition(':')[0]}: {f.text}" for f in judged(text, *targets).failures]


@pytest.mark.parametrize(
    ("text", "targets", "said"),
    [
        (LOGGED, ("arm64", "x86-ept"), "1 x86-ept: pages is 0, but none on arm64:4k@7.4, and no differs says why; "
         "it comes from policy read_maps_writable"),
        (DEVICE, ("arm64@7.4", "arm64@6.12"), "0 arm64: loaded is 0x80, but 0xffffffffffffff80 on arm64:4k@7.4, and no "
         "differs says why; it comes from policy mmio_sign_extension"),
        (SLOT + '[[event]]\ndo = "fetch"\ngpa = 4\n', ("x86-ept", "arm64"), "0 arm64: outcome is injected, but "
         "internal_error on x86-ept:4k@7.4, and no differs says why; it comes from policy unbacked"),
    ],
)  # fmt: skip
def test_an_undeclared_difference_is_found_with_its_cause(text: str, targets: tuple[str, ...], said: str) -> None:
    assert failures(text, *targets) == [said]


def test_only_the_first_undeclared_difference_of_a_target_is_told() -> None:
    assert (
        len(
            failures(
                LOGGED + '[[event]]\ndo = "get_log"\nslot = 0\n' + LOGGED[LOGGED.index("[[event") :], "arm64", "x86-ept"
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ('policy.read_maps_writable = "always"\nexpect.pages = [0]\n', None),
        ('policy.exec_grant = "always"\nexpect.pages = [0]\n', "1 x86-ept: declared to differ by policy exec_grant = "
         "always, but differs also with the value of arm64:4k@7.4: pages is 0, but none"),
        ('policy.read_maps_writable = "always"\npolicy.exec_grant = "always"\nexpect.pages = [0]\n', "1 x86-ept: "
         "declared to differ by policy read_maps_writable = always, exec_grant = always, but exec_grant has no part "
         "in it"),
        ('policy.read_maps_writable = "always"\nexpect.pages = []\n', "1 x86-ept: pages is 0, expected none"),
        ('joint = "repair"\nexpect.pages = [0]\n', None),
        ('host.nr_address_spaces = 2\nexpect.pages = [0]\n', "1 x86-ept: declared to differ by host nr_address_spaces "
         "= 2, but differs also with the value of arm64:4k@7.4: pages is 0, but none"),
    ],
)  # fmt: skip
def test_what_is_declared_is_checked(differs: str, said: str | None) -> None:
    text = f"{LOGGED}expect.pages = []\n[[event.differs]]\n{differs}"
    if "joint" in differs:  # both have one there, so nobody is left for `expect`, and the claim is about arm64 as well
        assert failures(text, "arm64", "x86-ept") == ["1 arm64: pages is none, expected 0"]
    else:
        assert failures(text, "arm64", "x86-ept") == ([said] if said else [])


def test_a_declared_difference_that_does_not_show() -> None:
    text = SLOT + '[[event]]\ndo = "write"\ngpa = "1G"\n[[event.differs]]\npolicy.exec_grant = "always"\n'
    assert failures(text, "arm64", "x86-ept") == [
        "0 x86-ept: declared to differ by policy exec_grant = always, but is as on arm64:4k@7.4"
    ]
    assert failures(text, "x86-ept") == []  # alone, it cannot be compared


def test_a_limit_of_the_host_is_a_cause() -> None:
    text = (
        SLOT + '[[event]]\ndo = "set_slot"\nid = 1\ngpa = 0x20_0000_0000_0000\nsize = "4K"\nhva = "1G"\n'
        'expect.errno = "EINVAL"\n'
    )
    text += '[[event.differs]]\nhost.beyond_errno = 14\nexpect.errno = "EFAULT"\n'
    done = judged(text, "x86-ept", "arm64")
    assert not done.failures
    assert [d.cause for d in done.declared] == ["host beyond_errno = 14"]


def test_every_kind_of_host_event() -> None:
    events = [
        "zero",
        "break_cow",
        "cow",
        "migrate",
        "evict",
        "split",
        "collapse",
        "poison",
        "missing",
        "protect",
        "supply",
    ]
    done = {}
    for do in events:
        before = {"break_cow": "cow", "collapse": "split", "supply": "missing", "migrate": "supply"}.get(do)
        text = (
            SLOT
            + 'memory = "thp"\n'
            + "".join(f'[[event]]\ndo = "{word}"\ngpa = "1G"\n' for word in ("write", before, do, "read") if word)
        )
        done[do] = [r.outcome for r in run(parse_scenario("f.toml", text).scenario, backend("x86-ept"))][-1]
    assert done == {
        **dict.fromkeys(events, Kind.MEMORY), "poison": Kind.SIGBUS, "missing": Kind.WAITS
    }  # fmt: skip


def test_a_device_in_the_kernel_takes_accesses() -> None:
    text = 'title = "t"\n[[device]]\ngpa = 0x1000\nsize = 8\nvalue = 0x80\n'
    text += "".join(f'[[event]]\ndo = "{do}"\ngpa = 0x1000\nsize = 1\nsign_extend = true\n' for do in ("read", "write"))
    for target in ("arm64", "x86-ept", "x86-npt"):
        read, write = run(parse_scenario("f.toml", text).scenario, backend(target))
        assert (read.outcome, write.outcome) == (Kind.BUS, Kind.BUS), target
        assert read.loaded == 0xFFFF_FFFF_FFFF_FF80
