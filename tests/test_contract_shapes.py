"""Four shapes of one fault on every backend. That they agree is the check `shapes` of kvmfault.testing."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmfault.algebra.expr import Word
from kvmfault.contract.accessors import FACTS, TRUTHS, Gap, Snapshot
from kvmfault.contract.shapes import Handle, HandleOps, View
from kvmfault.contract.target import Target, backend
from kvmfault.testing import shapes, told
from tests.targets import any_registers, newest, targets


@pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
@settings(max_examples=25)
@given(data=st.data())
def test_gaps_are_for_people_only(target: Target, data: st.DataObject) -> None:
    raw = target.decode(**data.draw(any_registers(target)))
    for fault in shapes(target, raw).values():
        for name, value in told(fault).items():
            allowed = (bool,) if name in TRUTHS else (int,) if name == "syndrome" else (int, type(None))
            assert type(value) in allowed, name
    captured, answered = target.snapshot(raw), target.answered(raw)
    gaps = {name for name in FACTS if isinstance(getattr(target.definition, name), Gap)}
    assert {name for name in FACTS if isinstance(getattr(answered, name), Gap)} == gaps
    for name in set(FACTS) - gaps:
        assert getattr(answered, name) == getattr(captured, name)
    answers = target.answers(raw)
    sorts = {name for name in FACTS if not isinstance(getattr(target.definition, name), Word)}
    assert answers.keys() == sorts
    assert {name for name, answer in answers.items() if isinstance(answer, Gap)} == gaps
    assert all(type(answer) is bool for name, answer in answers.items() if name not in gaps)


def test_every_backend_has_gaps_with_reasons() -> None:
    for target in targets():
        for name in FACTS:
            fact = getattr(target.definition, name)
            if isinstance(fact, Gap):
                assert len(fact.reason) > 15, (target.name, name)
    assert sum(isinstance(getattr(backend("x86-npt").definition, name), Gap) for name in FACTS) == 12


def test_a_stand_in_is_used_by_code_and_hidden_from_people() -> None:
    # user mode under EPT: known only on some CPUs, assumed from bit 9 where the kernel reads it
    user = {"EXIT_QUALIFICATION": 1 << 7 | 1 << 8 | 1 << 9 | 1}
    for kernel, assumed in (("6.12", False), ("7.4", True)):
        target = backend(f"x86-ept@{kernel}")
        fault = target.decode(**user)
        assert fault.is_user is assumed
        assert target.snapshot(fault).is_user is assumed
        assert isinstance(target.answers(fault)["is_user"], Gap)
        assert isinstance(target.answered(fault).is_user, Gap)
        assert target.access(fault).user is None


# What a snapshot is good for.


@pytest.mark.parametrize("target", newest(), ids=lambda t: t.backend.name)
@settings(max_examples=20)
@given(data=st.data())
def test_snapshots_are_values(target: Target, data: st.DataObject) -> None:
    raw = target.decode(**data.draw(any_registers(target)))
    one, two = target.snapshot(raw), target.snapshot(raw)
    assert one == two
    assert hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one
    assert dataclasses.replace(one, is_write=not one.is_write) != one
    assert {one: 1}[two] == 1


def test_snapshots_and_raw_faults_do_not_change() -> None:
    raw = backend("arm64").decode(ESR_EL2=0x9200_0047)
    captured: Snapshot = backend("arm64").snapshot(raw)
    for fault in (raw, captured):
        with pytest.raises((AttributeError, TypeError)):
            fault.is_write = False  # type: ignore[misc]  # the point
        with pytest.raises((AttributeError, TypeError)):
            fault.new = 1  # type: ignore[union-attr]  # the point


def test_raw_faults_are_equal_when_their_registers_are() -> None:
    arm = backend("arm64")
    a, b, c = arm.decode(ESR_EL2=1), arm.decode(ESR_EL2=1), arm.decode(ESR_EL2=2)
    assert a == b
    assert hash(a) == hash(b)
    assert a != c
    assert arm.decode(ESR_EL2=1, FAR_EL2=0) != a  # given as 0 is not the same as not given


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_every_shape_can_be_copied(duplicate: object) -> None:
    arm = backend("arm64")
    assert callable(duplicate)
    for name, fault in shapes(arm, arm.decode(ESR_EL2=0x9200_004F, HPFAR_EL2=0x40_0120)).items():
        assert told(duplicate(fault)) == told(fault), name


class Mine:
    """The architecture that the handle of this test belongs to."""


def test_only_views_through_their_own_functions_read_a_handle() -> None:
    arm = backend("arm64")
    handle: Handle[Mine] = Handle(arm.decode(ESR_EL2=0x9200_0047).of)
    ops: HandleOps[Mine] = HandleOps(arm.ops)
    bound = ops.bind(handle)
    assert isinstance(bound, View)
    assert bound.is_write
    assert not any(hasattr(handle, name) for name in ("is_write", "syndrome", "kvm_get_fault_gpa"))


# In the path (more worlds: test_path_*.py).

WORLD_GPA: Final = 0x4000_0000


@pytest.mark.parametrize(
    ("name", "registers"),
    [
        ("arm64", {"ESR_EL2": 0x9200_0047, "HPFAR_EL2": WORLD_GPA >> 8}),
        ("arm64", {"ESR_EL2": 0x93C0_8047, "HPFAR_EL2": 0, "FAR_EL2": 0x18}),
        ("arm64", {"ESR_EL2": 0x9200_0010}),
        ("arm64", {"ESR_EL2": 0x9200_000B, "HPFAR_EL2": WORLD_GPA >> 8}),
        ("x86-ept", {"EXIT_QUALIFICATION": 0x182, "GUEST_PHYSICAL_ADDRESS": WORLD_GPA | 0x18}),
        ("x86-ept", {"EXIT_QUALIFICATION": 0x181, "GUEST_PHYSICAL_ADDRESS": 0x1018}),
        ("x86-ept", {"EXIT_REASON": 49, "GUEST_PHYSICAL_ADDRESS": 0x1018}),
        ("x86-npt", {"EXITINFO1": 0x1_0000_0006, "EXITINFO2": WORLD_GPA}),
        ("x86-npt", {"EXITINFO1": 0x2_0000_0007, "EXITINFO2": WORLD_GPA}),
        ("x86-shadow", {"ERROR_CODE": 6, "CR2": 0x7FFF_0000_0018}),
    ],
)
def test_the_path_cannot_tell_shapes_apart(name: str, registers: dict[str, int]) -> None:
    from kvmfault.machine.vm import Vm

    target = backend(name)
    world = (
        Vm.on(target)
        .add_memslot(0, gpa=WORLD_GPA, size=1 << 30, hva=0x7F00_0000_0000)
        .back(0x7F00_0000_0000, 1 << 30, "thp")
    )
    seen = {}
    for shape, fault in shapes(target, target.decode(**registers)).items():
        vm = world.fork()
        run = vm.handle(fault)
        again = vm.handle(fault)
        seen[shape] = (run.outcome, run.machinery, run.steps, again.outcome, again.steps, vm.key())
    assert all(what == seen["raw"] for what in seen.values())
