"""TARGET names and registers: what there is, and what a mistake is told."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

import pytest

from arch.arm64 import BACKEND
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.contract import target as module
from kvmfault.contract.accessors import FACTS, Gap
from kvmfault.contract.plugins import entry_points
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
        ("", "no backend '' in target ''; there is: arm64, loongarch, powerpc"),
        ("arm", "no backend 'arm' in target 'arm' (did you mean arm64?); there is: arm64, loongarch, powerpc"),
        ("ARM64", "no backend 'ARM64' in target 'ARM64'; there is: arm64, loongarch, powerpc"),
        ("x86-epp@6.12", "(did you mean x86-ept?)"),
        ("mips", "no backend 'mips'"),
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
    with pytest.raises(UsageError, match=r"no backend 'x' in target 'x'; there is: none"):
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
    assert all(isinstance(expression, (Pred, Word, str)) for expression in names.values())


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


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Makes a package with these entry points and this source, in place of all that is installed."""
    folder = tmp_path / "foreign-1.0.dist-info"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "foreign", raising=False)

    def forget() -> None:
        importlib.invalidate_caches()
        for cached in (module._installed, module._load, module.backend):
            cached.cache_clear()

    def make(entries: str, source: str) -> None:
        (folder / "entry_points.txt").write_text(f"[kvmfault.backends]\n{entries}\n")
        (folder / "METADATA").write_text("Name: foreign\nVersion: 1.0\n")
        (tmp_path / "foreign.py").write_text(source)
        forget()

    yield make
    sys.modules.pop("foreign", None)
    monkeypatch.undo()
    forget()


REAL: Final = "from arch.arm64 import BACKEND as B\n"


def test_backends_come_from_the_entry_points(install: Callable[[str, str], None]) -> None:
    install("zeta = foreign:B\n# alpha = foreign:NOT\n alpha=foreign:N.b [extra]", f"{REAL}class N: b = B")
    assert list(backends()) == ["alpha", "zeta"]
    assert backend("zeta").backend is BACKEND
    assert backend("alpha:16k").backend is BACKEND


@pytest.mark.parametrize(
    ("value", "source", "says"),
    [
        ("gone:B", "", "backend bad: gone:B cannot be loaded: No module named 'gone'"),
        ("foreign:B", "", "backend bad: foreign:B cannot be loaded: module 'foreign' has no attribute 'B'"),
        ("foreign:B", "B = 1", "backend bad: foreign:B is a int, not a Backend"),
        ("foreign", "B = 1", "backend bad: foreign is a module, not a Backend"),
        ("foreign:B", "B = ", "backend bad: foreign:B cannot be loaded: invalid syntax (foreign.py, line 1)"),
        ("foreign:B", "raise ValueError('no')", "backend bad: foreign:B cannot be loaded: no"),
        (
            "foreign:B",
            "from kvmfault.algebra.layout import register\nregister('R', 8, '', A=(3, 0), B=2)",
            "backend bad: foreign:B cannot be loaded: R: B and A both claim bit 2",
        ),
    ],
)
def test_a_broken_backend_is_named(install: Callable[[str, str], None], value: str, source: str, says: str) -> None:
    install(f"bad = {value}", source)
    for ask in (lambda: backend("bad"), backends):
        with pytest.raises(UsageError) as refused:
            ask()
        assert str(refused.value) == says


def test_one_that_is_broken_does_not_take_the_others_with_it(install: Callable[[str, str], None]) -> None:
    install("bad = foreign:NONE\ngood = foreign:B", REAL)
    assert backend("good").backend is BACKEND
    with pytest.raises(UsageError, match=r"no backend 'x'.*there is: bad, good"):
        backend("x")


def test_without_any_backend(install: Callable[[str, str], None]) -> None:
    install("[another.group]\narm64 = foreign:B", "")
    assert backends() == {}
    with pytest.raises(UsageError, match=r"there is: none$"):
        backend("arm64")


def test_the_entry_points_of_this_package() -> None:
    mine = {e.name: e.value for e in entry_points(module.GROUP)}
    assert {"arm64", "loongarch", "riscv", "x86-ept", "x86-npt", "x86-shadow"} <= mine.keys()
    assert mine == {e.name: e.value for e in metadata.entry_points(group=module.GROUP)}  # what Python itself finds
    for name, source in backends().items():
        assert source.name == name
