"""encode after access: nothing is lost to the same backend, and only what is declared to another."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from arch.x86 import EPT, NPT, SHADOW, pferr
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.types import Gpa, Gva

TARGETS: Final = {b.name: Target(b, "4k", kernel) for b in (EPT, NPT, SHADOW) for kernel in b.kernels[-1:]}
MISCONFIG_HIDES: Final = {"read", "write", "exec", "gva", "on_walk", "final", "shadow_stack"}
LOST: Final = {
    ("x86-ept", "x86-npt"): {"read", "gva"},
    ("x86-ept", "x86-shadow"): {"read", "gpa", "offset", "on_walk", "final", "user", "protection_key"},
    ("x86-npt", "x86-ept"): set[str](),
    ("x86-npt", "x86-shadow"): {"gpa", "offset", "on_walk", "final", "user", "protection_key"},
    ("x86-shadow", "x86-ept"): {"on_walk", "final", "user", "protection_key"},
    ("x86-shadow", "x86-npt"): {"gva", "on_walk", "final", "user", "protection_key"},
}
"""Members that may change, for faults that are no misconfiguration."""

addresses = st.integers(0, (1 << 52) - 1)
kvm_bits = st.integers(0, 7)


@st.composite
def faults(draw: st.DrawFn, name: str) -> Raw:
    """Faults that hardware produces, with and without their addresses."""
    target = TARGETS[name]
    registers = {"KVM": draw(kvm_bits)}
    match name:
        case "x86-ept":
            violation = draw(st.integers(0, (1 << 17) - 1))
            misconfig = draw(st.booleans())
            registers |= {"EXIT_REASON": 49 if misconfig else 48, "EXIT_QUALIFICATION": 0 if misconfig else violation}
            given_: tuple[str, ...] = ("GUEST_PHYSICAL_ADDRESS", "GUEST_LINEAR_ADDRESS")
        case "x86-npt":
            registers["EXITINFO1"] = draw(st.integers(0, 0x7F)) & ~0x20 | 4 | draw(st.integers(0, 31)) << 32
            given_ = ("EXITINFO2",)
        case _:
            registers["ERROR_CODE"] = draw(st.integers(0, 0x7F))
            given_ = ("CR2",)
    registers |= {register: draw(addresses) for register in given_ if draw(st.booleans())}
    fault = target.decode(**registers)
    assume(target.backend.reachable.on(target.named(fault)))
    return fault


def changed(source: str, to: str, fault: Raw) -> set[str]:
    """Members of the access that the other backend tells differently; all of them are declared lost."""
    access = TARGETS[source].access(fault)
    moved = TARGETS[to].encode(access)
    again = TARGETS[to].access(moved.fault)
    assert moved.lost.keys() == set(access.differs(again))
    assert TARGETS[to].backend.reachable.on(TARGETS[to].named(moved.fault)) or access.cause is Cause.OTHER
    return set(moved.lost)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_identity_on_the_same_backend(name: str, data: st.DataObject) -> None:
    assert changed(name, name, data.draw(faults(name))) == set()


@pytest.mark.parametrize(("source", "to"), LOST, ids=lambda name: str(name))
@given(data=st.data())
def test_only_what_is_declared_is_lost(source: str, to: str, data: st.DataObject) -> None:
    fault = data.draw(faults(source))
    hidden = MISCONFIG_HIDES if fault.is_reserved and to == "x86-ept" else set()
    assert changed(source, to, fault) <= LOST[source, to] | hidden


@pytest.mark.parametrize(("source", "to"), LOST, ids=lambda name: str(name))
def test_each_declared_loss_happens(source: str, to: str) -> None:
    # the table above claims no more than is needed
    seen: set[str] = set()
    target = TARGETS[source]
    every = {
        "x86-ept": [{"EXIT_QUALIFICATION": q, "GUEST_PHYSICAL_ADDRESS": 0x1234, "GUEST_LINEAR_ADDRESS": 0x5678}
                    for q in (0x181, 0x183, 0x81)],
        "x86-npt": [{"EXITINFO1": 0x100000006, "EXITINFO2": 0x1234}],
        "x86-shadow": [{"ERROR_CODE": 0x27, "CR2": 0x1234}],
    }  # fmt: skip
    for registers in every[source]:
        seen |= changed(source, to, target.decode(**registers))
    assert seen == LOST[source, to]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cause", Cause)
def test_causes_that_x86_has_not_are_explained(name: str, cause: Cause) -> None:
    access = Access(gpa=Gpa(0x1000), gva=Gva(0x2000), read=True, write=False, exec=False, cause=cause)
    moved = TARGETS[name].encode(access)
    if cause in (Cause.MISSING, Cause.PERMISSION, Cause.RESERVED):
        assert "cause" not in moved.lost
        assert TARGETS[name].access(moved.fault).cause is cause
    else:
        assert "became missing: " in moved.lost["cause"]


def test_a_write_on_arm64_becomes_the_violation_of_a_write() -> None:
    write = Access(gpa=Gpa(0x40_1000), offset=0x678, read=False, write=True, exec=False, cause=Cause.MISSING)
    moved = TARGETS["x86-ept"].encode(write.with_(on_walk=False, final=True))
    assert TARGETS["x86-ept"].named(moved.fault) == {
        "EXIT_REASON": 48,
        "EXIT_QUALIFICATION": 0x182,
        "GUEST_PHYSICAL_ADDRESS": 0x401678,
        "GUEST_LINEAR_ADDRESS": 0,
        "KVM": 1 << 8,
    }


@pytest.mark.parametrize(
    ("access", "qualification"),
    [
        (Access(write=True, cause=Cause.PERMISSION), 0x2A),  # a read-only, executable entry
        (Access(read=True, cause=Cause.PERMISSION), 0x21),  # execute only: KVM makes none that is write-only
        (Access(exec=True, cause=Cause.PERMISSION), 0x1C),
        (Access(read=True, write=True, cause=Cause.PERMISSION), 0x23),
        (Access(read=True, write=True, exec=True, cause=Cause.PERMISSION), 0xB),  # no processor's fetch writes
        (Access(read=True, on_walk=True, cause=Cause.MISSING), 0x81),
        (Access(exec=True, final=True, cause=Cause.MISSING), 0x184),
        (Access(read=True, gva=Gva(0x1000), cause=Cause.MISSING), 0x181),
    ],
)
def test_qualifications(access: Access, qualification: int) -> None:
    moved = TARGETS["x86-ept"].encode(access)
    assert moved.fault.syndrome == qualification


def test_a_walk_is_not_the_final_access() -> None:
    both = Access(read=True, on_walk=True, final=True, cause=Cause.MISSING)
    assert TARGETS["x86-npt"].encode(both).fault.syndrome == 0x200000004
    assert TARGETS["x86-ept"].encode(both).fault.syndrome == 0x81


@pytest.mark.parametrize("private", [False, True])
def test_the_access_of_a_pre_fault(private: bool) -> None:
    # KVM_PRE_FAULT_MEMORY hands in GUEST_FINAL, with PRIVATE by the attribute; what hardware would add to it (a user
    # access, of NPT) decides nothing
    asked = Access(
        gpa=Gpa(0x1000), read=False, write=False, exec=False, cause=Cause.MISSING, on_walk=False, final=True,
        prefetch=True, private=private,
    )  # fmt: skip
    for name, word, added in (("x86-ept", pferr.VIOLATION_ADVANCED, 0), ("x86-npt", pferr.NPF, pferr.USER)):
        target = TARGETS[name]
        fault = target.encode(asked).fault
        code = pferr.error_code(word, target.named(fault), fault.is_private)
        assert code == pferr.GUEST_FINAL | added | (pferr.PRIVATE_ACCESS if private else 0)
        assert fault.is_prefetch
        assert not fault.is_permission
