"""Registers from an access: what a fault tells comes back, and what cannot be said is said to be lost."""

from __future__ import annotations

from itertools import product
from typing import Final

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from arch.arm64 import BACKEND
from arch.arm64.facts import REACHABLE
from arch.arm64.registers import ORDER
from kvmfault.algebra.scalar import compile_pred
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.target import Target
from kvmfault.types import Gpa, Gva

TARGETS: Final = {
    (name, kernel): Target(BACKEND, name, kernel) for name in BACKEND.formats for kernel in BACKEND.kernels
}
LEVEL_MINUS_1: Final = 0x2B
targets = st.sampled_from([*TARGETS.values()])
words = st.integers(0, (1 << 64) - 1)
is_reachable = compile_pred(REACHABLE, ORDER)


@st.composite
def syndromes(draw: st.DrawFn) -> int:
    """ESR_EL2 of an abort that hardware can give."""
    status = draw(st.integers(0, 0x3E))
    esr = draw(st.sampled_from((0x20, 0x24, 0x25))) << 26 | 1 << 25 | status
    esr |= draw(st.sampled_from((0, 1 << 7, 1 << 6, 1 << 8 | 1 << 6, 1 << 7 | 1 << 6, 1 << 10)))
    if draw(st.booleans()):
        esr |= 1 << 24 | draw(st.integers(0, (1 << 10) - 1)) << 14
    esr |= draw(st.sampled_from((0, 1 << 38, 1 << 40, 1 << 37)))
    assume(is_reachable((esr, *(0,) * (len(ORDER) - 1))))
    return esr


@given(targets, syndromes(), st.none() | words, st.none() | st.integers(0, (1 << 44) - 1), st.integers(0, 3))
def test_what_a_fault_tells_comes_back(target: Target, esr: int, far: int | None, frame: int | None, kvm: int) -> None:
    assume(not (target.format.page_shift == 16 and esr & 0x3F == LEVEL_MINUS_1))  # 64K pages have no such level
    registers = {"ESR_EL2": esr, "KVM": kvm}
    if far is not None:
        registers["FAR_EL2"] = far
    if frame is not None:
        registers["HPFAR_EL2"] = frame << 4
    access = target.access(target.decode(**registers))
    encoded = target.encode(access)
    assert encoded.lost == {}
    assert target.access(encoded.fault) == access


@pytest.mark.parametrize("fmt", ["4k", "16k"])
def test_every_kind_of_fault_comes_back(fmt: str) -> None:
    target = TARGETS[fmt, "7.4"]
    tried = 0
    described = (0, *(1 << 24 | sas << 22 | rest for sas in range(4) for rest in (0, 0x3F << 15, 1 << 14)))
    flags = (0, 1 << 6, 1 << 7, 1 << 7 | 1 << 6, 1 << 8 | 1 << 6, 1 << 10)
    for ec, status, flag, syndrome in product((0x20, 0x24), range(64), flags, described):
        esr = ec << 26 | 1 << 25 | syndrome | flag | status
        if is_reachable((esr, *(0,) * (len(ORDER) - 1))):
            access = target.access(target.decode(ESR_EL2=esr, FAR_EL2=0xFFFF_8000_1234_5678, HPFAR_EL2=0x40_0120))
            assert target.encode(access).lost == {}, hex(esr)
            tried += 1
    assert tried > 900


@st.composite
def accesses(draw: st.DrawFn) -> Access:
    """Any access, also of architectures that tell more, less, or something else."""
    maybe = st.sampled_from((None, False, True))
    page = st.none() | st.integers(0, (1 << 52) - 1).map(lambda frame: Gpa(frame << 12))
    return Access(
        gpa=draw(page),
        offset=draw(st.none() | st.integers(0, 0xFFF)),
        gva=draw(st.none() | words.map(Gva)),
        read=draw(maybe),
        write=draw(maybe),
        exec=draw(maybe),
        user=draw(maybe),
        cause=draw(st.none() | st.sampled_from(Cause)),
        on_walk=draw(maybe),
        final=draw(maybe),
        granule=draw(st.none() | st.sampled_from((12, 14, 16, 21, 25, 29, 30, 39, 48)).map(lambda shift: 1 << shift)),
        cache_op=draw(maybe),
        protection_key=draw(maybe),
        shadow_stack=draw(maybe),
        private=draw(maybe),
        prefetch=draw(maybe),
        size=draw(st.sampled_from((None, 1, 2, 3, 4, 8, 16, 64))),
        register=draw(st.none() | st.integers(0, 40)),
        sign_extend=draw(maybe),
        wide=draw(maybe),
        ordered=draw(maybe),
    )


@given(targets, accesses())
def test_any_access_becomes_a_fault_and_every_loss_is_named(target: Target, access: Access) -> None:
    encoded = target.encode(access)
    got = target.access(encoded.fault)
    assert set(encoded.lost) == set(access.differs(got))
    again = target.encode(got)
    if not (target.format.page_shift == 16 and got.granule is None):
        assert again.lost == {}  # what could be said is said the same way again


@given(targets, accesses())
def test_what_is_lost_has_a_reason(target: Target, access: Access) -> None:
    for name, text in target.encode(access).lost.items():
        if name not in ("sign_extend", "wide", "ordered", "register"):  # they go with the size
            assert ": " in text, (name, text)


@pytest.mark.parametrize(
    ("access", "registers"),
    [
        (Access(gpa=Gpa(0x40012000), write=True), {"ESR_EL2": 0x92000047, "HPFAR_EL2": 0x8000_0000_0040_0120}),
        (Access(gpa=Gpa(0x40012000), exec=True, cause=Cause.PERMISSION, granule=2 << 20), {"ESR_EL2": 0x8200000E}),
        (Access(gva=Gva(0xFFFF_8000_1234_5678), offset=0xABC), {"FAR_EL2": 0xFFFF_8000_1234_5ABC}),
        (Access(gva=Gva(0x5678), on_walk=True, offset=0xABC), {"FAR_EL2": 0x5678, "ESR_EL2": 0x92000087}),
        (Access(size=4, register=3, sign_extend=True, wide=True), {"ESR_EL2": 0x93A38007}),
        (Access(size=3, register=3), {"ESR_EL2": 0x92000007}),
        (Access(size=4, register=32), {"ESR_EL2": 0x92000007}),
        (Access(gpa=Gpa(0x1000), offset=0xABC), {"FAR_EL2": 0xABC, "KVM": 0xC}),
        (Access(offset=0xABC, on_walk=True), {"FAR_EL2": 0, "KVM": 0}),
        (Access(cause=Cause.EXTERNAL), {"ESR_EL2": 0x92000010}),
        (Access(cause=Cause.EXTERNAL, on_walk=True), {"ESR_EL2": 0x92000094}),
        (Access(cause=Cause.RESERVED), {"ESR_EL2": 0x92000007}),
        (Access(private=True, prefetch=True), {"KVM": 3}),
    ],
)
def test_encode(access: Access, registers: dict[str, int]) -> None:
    target = TARGETS["4k", "7.4"]
    named = target.named(target.encode(access).fault)
    assert {name: hex(named[name]) for name in registers} == {name: hex(value) for name, value in registers.items()}


def test_a_reserved_bit_fault_is_said_to_be_lost() -> None:
    lost = TARGETS["4k", "7.4"].encode(Access(cause=Cause.RESERVED, write=True)).lost
    assert lost["cause"].startswith("reserved became missing: there is no status code for it")
