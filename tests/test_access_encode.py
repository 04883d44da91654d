"""An access carried from any backend to any other: what is not declared lost arrives, and nothing else is declared."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmfault.contract.access import Access, Cause, losses
from kvmfault.contract.target import Target, backend, backends
from kvmfault.types import Gpa, Gva
from tests.targets import any_registers, newest, reachable_fault, targets

MEMBERS: Final = tuple(f.name for f in dataclasses.fields(Access))
PAIRS: Final = list(product(backends(), backends()))


def of(name: str) -> st.SearchStrategy[Target]:
    """A target of the backend: any format, any kernel."""
    return st.sampled_from([t for t in targets() if t.backend.name == name])


def check(wanted: Access, b: Target) -> dict[str, str]:
    """Encode for *b*; whatever is not in the answer's losses must be there. Gives the losses."""
    made = b.encode(wanted)
    got = b.access(made.fault)
    lost = dict(made.lost)
    for name in MEMBERS:
        before, after = getattr(wanted, name), getattr(got, name)
        assert (name in lost) == (before != after), name
        if name in lost:
            assert " became " in lost[name]
    return lost


@pytest.mark.parametrize(("a", "b"), PAIRS)
@settings(max_examples=50)
@given(data=st.data())
def test_what_is_not_lost_arrives(a: str, b: str, data: st.DataObject) -> None:
    source, goal = data.draw(of(a)), data.draw(of(b))
    lost = check(source.access(data.draw(reachable_fault(source))), goal)
    assert [text for text in lost.values() if ": " not in text] == []  # each with its reason


@pytest.mark.parametrize(("a", "b"), [(a, b) for a, b in PAIRS if b in ("x86-ept", "x86-npt")])
@settings(max_examples=25)
@given(data=st.data())
def test_what_is_made_could_come_from_hardware(a: str, b: str, data: st.DataObject) -> None:
    source, goal = data.draw(of(a)), data.draw(of(b))
    made = goal.encode(source.access(data.draw(reachable_fault(source)))).fault
    assert goal.backend.reachable.on(goal.named(made)), {n: hex(v) for n, v in goal.named(made).items()}


@pytest.mark.parametrize("target", newest(), ids=lambda t: t.backend.name)
@settings(max_examples=40)
@given(data=st.data())
def test_registers_that_no_hardware_gives_are_only_ever_lost_openly(target: Target, data: st.DataObject) -> None:
    check(target.access(target.decode(**data.draw(any_registers(target)))), target)


def truths() -> st.SearchStrategy[bool | None]:
    return st.sampled_from((None, False, True))


PAGES: Final = st.integers(0, (1 << 52) - 1).map(lambda page: Gpa(page << 12))
ACCESSES: Final = st.builds(
    Access,
    gpa=st.none() | PAGES,
    offset=st.none() | st.integers(0, 0xFFF),
    gva=st.none() | st.integers(0, (1 << 64) - 1).map(Gva),
    cause=st.none() | st.sampled_from(Cause),
    granule=st.none() | st.integers(12, 52).map(lambda shift: 1 << shift),
    size=st.none() | st.sampled_from((1, 2, 3, 4, 8, 16)),
    register=st.none() | st.integers(0, 40),
    **{
        name: truths()
        for name in (
            *("read", "write", "exec", "user", "on_walk", "final", "cache_op", "protection_key"),
            *("shadow_stack", "private", "prefetch", "sign_extend", "wide", "ordered"),
        )
    },
)  # fmt: skip


@pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
@settings(max_examples=20)
@given(access=ACCESSES)
def test_any_access_at_all_can_be_encoded(target: Target, access: Access) -> None:
    check(access, target)


def test_every_member_can_be_lost_to_somebody_and_some_to_nobody() -> None:
    # the property above is empty for members that no pair ever carries
    full = Access(
        gpa=Gpa(0x4000_0000), offset=0x18, gva=Gva(0xFFFF_8000_0000_0018),
        read=True, write=False, exec=False, user=True,
        cause=Cause.ACCESS_FLAG, on_walk=False, final=True, granule=1 << 21, cache_op=True, protection_key=True,
        shadow_stack=True, private=True, prefetch=True, size=8, register=3, sign_extend=True, wide=True, ordered=True,
    )  # fmt: skip
    lost = {t.backend.name: set(check(full, t)) for t in newest()}
    assert lost == {
        "arm64": {"user"},
        "powerpc": {"user", "granule", "shadow_stack", "private", "ordered"}
        | {"size", "register", "sign_extend", "wide"},
        "s390": {"offset", "gva", "read", "write", "exec", "user", "cause", "on_walk", "final", "granule", "cache_op"}
        | {"protection_key", "shadow_stack", "size", "register", "sign_extend", "wide", "ordered"},
        "x86-ept": {"user", "cause", "granule", "cache_op", "protection_key"}
        | {"size", "register", "sign_extend", "wide", "ordered"},
        "x86-npt": {"gva", "user", "cause", "granule", "cache_op", "protection_key"}
        | {"size", "register", "sign_extend", "wide", "ordered"},
        "x86-shadow": {"gpa", "offset", "cause", "on_walk", "final", "granule", "cache_op"}
        | {"size", "register", "sign_extend", "wide", "ordered"},
        "riscv": {"user", "cause", "granule", "cache_op", "protection_key", "shadow_stack", "private"}
        | {"sign_extend", "ordered"},
        "loongarch": {"gva", "user", "cause", "on_walk", "final", "granule", "cache_op", "protection_key"}
        | {"shadow_stack", "private", "size", "register", "sign_extend", "wide", "ordered"},
    }


def test_losses_say_what_became_of_a_member_and_why() -> None:
    wanted = Access(gpa=Gpa(0x1000), write=True, cause=Cause.ACCESS_FLAG, user=None)
    got = Access(gpa=Gpa(0x2000), write=None, cause=Cause.MISSING, user=False)
    assert losses(wanted, got, {"gpa": "too wide", "cause": "no such thing"}) == {
        "gpa": "0x1000 became 0x2000: too wide",
        "write": "yes became unknown",
        "cause": "access flag became missing: no such thing",
        "user": "unknown became no: the registers cannot leave it open",
    }
    assert losses(wanted, wanted, {"gpa": "not asked"}) == {}


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (0x07, Cause.MISSING),
        (0x0F, Cause.PERMISSION),
        (0x0B, Cause.ACCESS_FLAG),
        (0x00, Cause.ADDRESS_SIZE),
        (0x10, Cause.EXTERNAL),
        (0x30, Cause.OTHER),
    ],
)
def test_causes_of_arm64(status: int, cause: Cause) -> None:
    assert backend("arm64").access(backend("arm64").decode(ESR_EL2=0x9200_0000 | status)).cause is cause


@pytest.mark.parametrize(
    ("code", "cause"), [(0x4, Cause.MISSING), (0x5, Cause.PERMISSION), (0xC, Cause.RESERVED), (0xD, Cause.RESERVED)]
)
def test_causes_of_npt(code: int, cause: Cause) -> None:
    assert backend("x86-npt").access(backend("x86-npt").decode(EXITINFO1=code)).cause is cause


def test_an_access_for_what_if() -> None:
    load = Access(read=True, write=False)
    assert load.with_(write=True) == Access(read=True, write=True)
    assert load.differs(load.with_(write=True, gpa=Gpa(0))) == ("gpa", "write")
    with pytest.raises(TypeError, match="wrote"):
        load.with_(wrote=True)
