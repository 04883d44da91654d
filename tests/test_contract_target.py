"""TARGET names and registers: what there is, and what a mistake is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pytest

from arch.arm64 import BACKEND
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.contract import target as module
from kvmfault.contract.accessors import FACTS, Gap
from kvmfault.contract.target import Target, backend, backends, resolve
from kvmfault.errors import DecodeError, KvmfaultError, UsageError
from tests.targets import targets


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("arm64", "arm64:4k@7.4"),
        ("arm64:16k", "arm64:16k@7.4"),
        ("arm64@6.12", "arm64:4k@6.12"),
        ("arm64:64k@6.12", "arm64:64k@6.12"),
        ("arm64:", "arm64:4k@7.4"),
        ("arm64@", "arm64:4k@7.4"),
        ("x86-ept", "x86-ept:4k@7.4"),
        ("x86-npt:4k@6.12", "x86-npt:4k@6.12"),
        ("x86-shadow", "x86-shadow:4k@7.4"),
    ],
)
def test_a_target_has_defaults(spelled: str, name: str) -> None:
    target = backend(spelled)
    assert target.name == name
    assert repr(target) == f"<Target {name}>"
    assert backend(spelled) is target
    assert backend(name).name == name


@pytest.mark.parametrize(
    ("spelled", "says"),
    [
        ("", "no backend '' in target ''; there is: arm64, x86-ept, x86-npt, x86-shadow"),
        ("arm", "no backend 'arm' in target 'arm' (did you mean arm64?); there is: arm64, x86-ept, x86-npt"),
        ("ARM64", "no backend 'ARM64' in target 'ARM64'; there is: arm64, x86-ept, x86-npt, x86-shadow"),
        ("x86-epp@6.12", "(did you mean x86-ept?)"),
        ("riscv", "no backend 'riscv'"),
        (" arm64", "no backend ' arm64'"),
        ("arm64:5k", "arm64 has no format '5k' in target 'arm64:5k'; it has: 4k, 16k, 64k, 4k-lpa2, 16k-lpa2"),
        ("arm64:4k:16k", "arm64 has no format '4k:16k'"),
        ("arm64@6.1", "arm64 models no kernel '6.1' in target 'arm64@6.1'; it models: 6.12, 7.4"),
        ("arm64@6.12@7.4", "arm64 models no kernel '6.12@7.4'"),
        ("arm64@6.12:4k", "arm64 models no kernel '6.12:4k'"),
        ("@7.4", "no backend ''"),
    ],
)  # fmt: skip
def test_an_unknown_target_is_told_what_there_is(spelled: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        backend(spelled)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_resolve_takes_any_backends() -> None:
    with pytest.raises(UsageError, match="no backend 'x' in target 'x'; there is: none"):
        resolve({}, "x", "", "", "x")
    mine = resolve({"mine": backends()["arm64"]}, "mine", "", "", "mine")
    assert isinstance(mine, Target)


# Registers.


@pytest.mark.parametrize(
    ("target", "registers", "says", "value"),
    [
        ("arm64", {"esr_el2": 1}, "did you mean ESR_EL2? it has ESR_EL2, FAR_EL2, HPFAR_EL2, DISR_EL1, KVM", 1),
        ("arm64", {"CR2": 1}, "arm64 has no register CR2: it has ESR_EL2", 1),
        ("arm64", {"ESR_EL2": 1 << 64}, "ESR_EL2=0x10000000000000000 does not fit 64 bits", 1 << 64),
        ("arm64", {"ESR_EL2": -1}, "ESR_EL2=-0x1 does not fit 64 bits", -1),
        ("arm64", {"ESR_EL2": 1 << 5000}, "ESR_EL2=a number does not fit 64 bits", 1 << 5000),
        ("x86-ept", {"EXIT_REASON": 1 << 32}, "EXIT_REASON=0x100000000 does not fit 32 bits", 1 << 32),
        ("x86-ept", {"GPA": 1}, "x86-ept has no register GPA", 1),
    ],
)
def test_bad_registers(target: str, registers: dict[str, int], says: str, value: int) -> None:
    with pytest.raises(DecodeError) as refused:
        backend(target).decode(**registers)
    assert says in str(refused.value)
    assert (refused.value.register, refused.value.value) == (next(iter(registers)), value)
    assert isinstance(refused.value, KvmfaultError)


def test_what_was_given_is_noted_in_the_synthetic_register() -> None:
    arm = backend("arm64")
    assert arm.named(arm.decode(ESR_EL2=1))["KVM"] == 0
    assert arm.named(arm.decode(ESR_EL2=1, FAR_EL2=0))["KVM"] == 1 << 2
    assert arm.named(arm.decode(HPFAR_EL2=0, KVM=1)) == {
        "ESR_EL2": 0, "FAR_EL2": 0, "HPFAR_EL2": 0, "DISR_EL1": 0, "KVM": 1 << 3 | 1,
    }  # fmt: skip
    assert arm.decode(ESR_EL2=0x9200_0007).kvm_get_fault_gpa() is None
    assert arm.decode(ESR_EL2=0x9200_0007, HPFAR_EL2=0).kvm_get_fault_gpa() == 0


def test_a_register_that_was_not_given_has_its_default() -> None:
    ept = backend("x86-ept")
    assert ept.named(ept.decode(EXIT_QUALIFICATION=1))["EXIT_REASON"] == 48
    assert ept.named(ept.decode(EXIT_REASON=49))["EXIT_REASON"] == 49


# Names.


@pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)
def test_every_name_can_be_explained(target: Target) -> None:
    fault = target.decode()
    for name in (*FACTS, *target.accessors):
        text = target.explain(fault, name)
        assert text
        assert "\n" not in text
        expression = target.expression(name)
        assert isinstance(expression, (Pred, Word, Maybe, Gap))
        if isinstance(expression, Gap):
            assert text == f"not known: {expression.reason}"
    names = target.names()
    assert set(FACTS) | target.accessors.keys() <= names.keys()
    for register in target.backend.registers:
        for f in register:
            assert names[f"{register.name}.{f.name}"] is f
    assert all(isinstance(expression, (Pred, Word)) for expression in names.values())


def test_a_fact_goes_before_a_field_of_the_same_name() -> None:
    # "isv" is an accessor of arm64 beside the field ISV; a fact would hide both
    names = backend("arm64").names()
    assert names["is_write"] is backend("arm64").definition.is_write
    assert names["ISV"] is names["ESR_EL2.ISV"]


def test_an_unknown_fact() -> None:
    arm = backend("arm64")
    with pytest.raises(UsageError, match=r"^arm64:4k@7.4 has no fact is_wrote; near: is_write"):
        arm.explain(arm.decode(), "is_wrote")
    with pytest.raises(UsageError, match=r"^arm64:4k@7.4 has no fact zzzzzz$"):
        arm.expression("zzzzzz")


# Installed backends.


@dataclass(frozen=True, eq=False)
class _Entry:
    """An entry point that gives something else than it should."""

    name: str
    value: str
    gives: object

    def load(self) -> object:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Entry]]:
    """What entry_points() finds, for one test."""
    entries: list[_Entry] = []
    asked: list[str] = []

    def found(*, group: str) -> list[_Entry]:
        asked.append(group)
        return entries

    def forget() -> None:
        for cached in (module._installed, module._load, module.backend):
            cached.cache_clear()

    monkeypatch.setattr(module, "entry_points", found)
    forget()
    yield entries
    assert set(asked) == {"kvmfault.backends"}
    forget()


def test_backends_come_from_the_entry_points(installed: list[_Entry]) -> None:
    installed += [_Entry("zeta", "x:Z", BACKEND), _Entry("alpha", "x:A", BACKEND)]
    assert list(backends()) == ["alpha", "zeta"]
    assert backend("zeta").backend is BACKEND


@pytest.mark.parametrize(
    ("gives", "says"),
    [
        (ImportError("No module named 'gone'"), "backend bad: x:B cannot be loaded: No module named 'gone'"),
        (AttributeError("no B"), "backend bad: x:B cannot be loaded: no B"),
        (object(), "backend bad: x:B is a object, not a Backend"),
        (SyntaxError("invalid syntax"), "backend bad: x:B cannot be loaded: invalid syntax"),
        (ValueError("layout"), "backend bad: x:B cannot be loaded: layout"),
    ],
)
def test_a_broken_backend_is_named(installed: list[_Entry], gives: object, says: str) -> None:
    installed.append(_Entry("bad", "x:B", gives))
    for ask in (lambda: backend("bad"), backends):
        with pytest.raises(UsageError) as refused:
            ask()
        assert str(refused.value) == says
    installed.append(_Entry("good", "x:G", BACKEND))
    module._installed.cache_clear()
    assert backend("good").backend is BACKEND  # one that is broken does not take the others with it


def test_without_any_backend(installed: list[_Entry]) -> None:
    assert backends() == {}
    with pytest.raises(UsageError, match=r"there is: none$"):
        backend("arm64")


def test_the_entry_points_of_this_package() -> None:
    mine: dict[str, EntryPoint] = {e.name: e for e in entry_points(group=module.GROUP)}
    assert {"arm64", "x86-ept", "x86-npt", "x86-shadow"} <= mine.keys()
    for name, source in backends().items():
        assert source.name == name
