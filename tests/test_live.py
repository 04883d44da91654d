"""Scripts on the KVM of this machine and on the model: every answer of the one is an answer of the other."""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import pytest

from arch.x86 import live as x86_live
from kvmfault.contract.live import GuestAccess, GuestCode, Touch
from kvmfault.contract.outcome import Exit, MmioAccess, Reason
from kvmfault.contract.target import backend, backends
from kvmfault.errors import LiveError
from kvmfault.live import ioctl
from kvmfault.live.compare import compare
from kvmfault.live.device import DEVICE, GUEST_SLOT, Device, DeviceKvm
from kvmfault.live.model import ModelKvm, OneToOne
from kvmfault.live.randoms import random_sequences
from kvmfault.live.script import (
    POOL,
    POOL_SIZE,
    Answer,
    DirtyRing,
    GetDirtyLog,
    HarvestRing,
    Host,
    HostAction,
    guards,
    log_bytes,
    perform,
)
from kvmfault.live.selfcheck import SelfCheck, this_machine
from kvmfault.live.sequences import STANDING, Sequence, fetch, read, region, write
from kvmfault.types import Gpa
from tests.cli import Cli

RANDOMS: Final = 60


def _check() -> SelfCheck | str:
    try:
        return SelfCheck(Device())
    except LiveError as e:
        return f"no usable KVM: {e}"


CHECK: Final = _check()
GUESTS: Final = () if isinstance(CHECK, str) else CHECK.live.guests
live = pytest.mark.skipif(isinstance(CHECK, str), reason=str(CHECK))
each_guest = pytest.mark.parametrize("guest", GUESTS or (pytest.param(None, marks=live),), ids=lambda g: g and g.name)


@live
@each_guest
@pytest.mark.parametrize("name", STANDING)
def test_standing(guest: GuestCode, name: str) -> None:
    assert isinstance(CHECK, SelfCheck)
    assert CHECK.check(guest, name, STANDING[name]).difference is None


@live
@each_guest
def test_random(guest: GuestCode) -> None:
    assert isinstance(CHECK, SelfCheck)
    for name, sequence in random_sequences(7, RANDOMS, guest.end[0]):
        assert CHECK.check(guest, name, sequence).difference is None


@live
@each_guest
@pytest.mark.long
def test_random_for_long(guest: GuestCode) -> None:
    assert isinstance(CHECK, SelfCheck)
    for name, sequence in random_sequences(8, 3000, guest.end[0]):
        assert CHECK.check(guest, name, sequence).difference is None


@pytest.fixture
def model() -> ModelKvm:
    return ModelKvm(OneToOne.on("x86-ept"))


LOGGED: Final = region(0, 0, 0x10000, 0, 1)


@pytest.mark.parametrize(
    ("sequence", "other"),
    [
        ((LOGGED, write(0x1000), GetDirtyLog(0)), Answer(pages=(2,))),
        ((read(0x80000),), Answer()),
        ((region(0, 1, 0x1000, 0),), Answer()),
        ((DirtyRing(1 << 16), LOGGED, write(0x1000), HarvestRing()), Answer()),
    ],
)
def test_a_difference_is_noticed(model: ModelKvm, sequence: Sequence, other: Answer) -> None:
    class Wrong(ModelKvm):
        """Gives *other* to the last operation."""

        left = len(sequence)

        def __getattribute__(self, name: str) -> object:
            if name in {"set_region", "access", "get_dirty_log", "harvest_ring", "dirty_ring"}:
                self.left -= 1
                if not self.left:
                    return lambda *a, **k: other
            return super().__getattribute__(name)

    found = compare(sequence, Wrong(OneToOne.on("x86-ept")), model)
    assert found is not None
    assert found.step == len(sequence)
    assert found.device == other != found.model


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_full_ring_ends_the_run_that_filled_it(interpreted: bool) -> None:
    # 256 entries, 64 kept; the emulator only comes to an entry into the guest with the next run
    kvm = ModelKvm(OneToOne.on("x86-ept"), interpreted=interpreted)
    full = Answer(exits=(Exit(Reason.DIRTY_RING_FULL),))
    perform(kvm, DirtyRing(4096))
    perform(kvm, region(0, 0, 256 * 4096, 0, 1))
    got = [perform(kvm, write(page * 4096)) for page in range(193)]
    assert got == [Answer()] * 191 + [Answer() if interpreted else full, full]


def test_every_pair_of_random_sequences_differs_and_repeats() -> None:
    first, again = list(random_sequences(1, 20, 0xEE)), list(random_sequences(1, 20, 0xEE))
    assert first == again
    assert len({sequence for _, sequence in first}) == 20
    assert {type(o) for _, sequence in random_sequences(1, 200, 0xEE) for o in sequence} == {
        type(o) for sequence in STANDING.values() for o in sequence if type(o).__name__ != "CreateMemfd"
    }


@live
@each_guest
def test_random_sequences_leave_memory_executable(guest: GuestCode) -> None:
    # what a script stores must be an instruction that ends the guest, or a later fetch runs wild
    for _, sequence in random_sequences(3, 50, guest.end[0]):
        for operation in sequence:
            if isinstance(getattr(operation, "access", None), GuestAccess):
                a = operation.access  # type: ignore[union-attr]  # the test above
                stores = a.touch in (Touch.WRITE, Touch.EXCHANGE)
                assert a.value == (int.from_bytes(guest.end * a.size, "little") if stores else 0)


# What a script says.


def test_text_of_operations_and_answers() -> None:
    assert str(write(0x1000, 2)) == "access gpa 0x1000 size 0x2 touch write value 0x2211"
    assert str(GetDirtyLog(1)) == "get dirty log slot 0x1"
    assert str(Host(HostAction.UNMAP, POOL, 4096)) == "host action unmap hva 0x100000000000 size 0x1000"
    assert str(LOGGED).startswith("set region slot 0x0 flags 0x1 gpa 0x0 size 0x10000 hva 0x100000000000")
    assert str(Answer(pages=(1, 3, 4, 5, 9))) == "ok, pages 1 3-5 9"
    assert str(Answer(22, rest=(0, 4096))) == "EINVAL, rest gpa 0x0 size 0x1000"
    exits = (Exit(Reason.MMIO, MmioAccess(Gpa(16), 2, True, b"\x01\x02")), Exit(Reason.INTERNAL_ERROR))
    assert str(Answer(exits=exits)) == "ok, mmio write 2 at 0x10 of 0102, internal_error"


@pytest.mark.parametrize(("pages", "size"), [(1, 8), (3, 8), (64, 8), (65, 16), (128, 16)])
def test_log_bytes(pages: int, size: int) -> None:
    assert log_bytes(pages) == size


def test_numbers_of_the_interface() -> None:
    # as the headers of Linux give them on every architecture but MIPS, powerpc and SPARC
    assert {name: getattr(ioctl, name) for name in ("GET_DIRTY_LOG", "SET_REGION", "SET_REGION2", "ENABLE_CAP")} == {
        "GET_DIRTY_LOG": 0x4010AE42,
        "SET_REGION": 0x4020AE46,
        "SET_REGION2": 0x40A0AE49,
        "ENABLE_CAP": 0x4068AEA3,
    }
    assert (ioctl.CLEAR_DIRTY_LOG, ioctl.SET_ATTRIBUTES) == (0xC018AEC0, 0x4020AED2)
    assert (ioctl.CREATE_MEMFD, ioctl.PRE_FAULT) == (0xC040AED4, 0xC040AED5)


# The device.


@live
@each_guest
def test_a_fetch_ends_anywhere_in_memory(guest: GuestCode) -> None:
    with Device() as device, DeviceKvm(device, guest) as kvm:
        perform(kvm, region(0, 0x1000, 0x2000, 0))
        for gpa in (0x1000, 0x1FFF, 0x2FFF):
            assert perform(kvm, fetch(gpa)) == Answer()


@live
@each_guest
def test_host_memory_outside_the_pool_is_refused(guest: GuestCode) -> None:
    with Device() as device, DeviceKvm(device, guest) as kvm:
        for hva, size in ((0, 4096), (POOL - 4096, 4096), (POOL + POOL_SIZE, 4096), (POOL, 1), (guards(4096)[0], 4096)):
            with pytest.raises(LiveError, match="not whole pages of the pool"):
                kvm.host(HostAction.UNMAP, hva, size)


@live
@each_guest
def test_one_vm_at_a_time_and_nothing_is_left_behind(guest: GuestCode) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Device() as device:
        with DeviceKvm(device, guest) as kvm:
            perform(kvm, read(0x80000))
            kvm.create_memfd(1, 4096, 0)
            with pytest.raises(LiveError, match="another VM"):
                DeviceKvm(device, guest)
        with DeviceKvm(device, guest):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@live
def test_scripts_leave_the_guests_own_slot_alone() -> None:
    for sequence in (*STANDING.values(), *(s for _, s in random_sequences(1, 100, 0xEE))):
        for operation in sequence:
            request = getattr(operation, "request", None)
            assert request is None or request.slot != GUEST_SLOT


@pytest.fixture
def not_kvm(tmp_path: Path) -> str:
    path = tmp_path / "kvm"
    path.write_text("")
    return str(path)


def test_no_device() -> None:
    with pytest.raises(LiveError, match=re.escape("/nowhere/kvm: No such file or directory")):
        Device("/nowhere/kvm")


def test_not_a_device(not_kvm: str) -> None:
    with pytest.raises(LiveError, match="is no KVM: Inappropriate ioctl"):
        Device(not_kvm)


def test_another_api_version(not_kvm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmfault.live.device.ioctl", lambda *a: 11)
    with pytest.raises(LiveError, match="API version is 11; it is 12"):
        Device(not_kvm)


@live
@each_guest
def test_what_kvm_refuses_is_said(guest: GuestCode, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")

    with Device() as device:
        for name, says in (("prepare", "a vCPU"), ("aim", f"the registers of guest {guest.name}")):
            with DeviceKvm(device, guest) as kvm, monkeypatch.context() as patch:
                patch.setattr(guest, name, refuse)
                with pytest.raises(LiveError, match=f"this KVM refuses {says}: Invalid argument"):
                    perform(kvm, read(0))


# The command.


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_selfcheck_without_kvm(cli: Cli, not_kvm: str) -> None:
    cli("selfcheck", "--device", "/nowhere/kvm").refused("/nowhere/kvm: No such file or directory")
    cli("selfcheck", "--device", not_kvm).refused("is no KVM")


@live
def test_selfcheck(cli: Cli) -> None:
    done = cli("selfcheck", "--random", "2", "--seed", "5")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith(f"against {DEVICE} of Linux {os.uname().release}")
    assert sum(line.endswith("  agree") for line in lines) == (len(STANDING) + 1) * len(GUESTS)
    assert re.fullmatch(r"\d+ sequences, \d+ steps: all agree", lines[-1])


@live
def test_selfcheck_json(cli: Cli) -> None:
    done = cli("selfcheck", "--json")
    assert done.status == 0
    assert {c["sequence"] for c in done.json["checked"]} == set(STANDING)
    assert all(c["difference"] is None for c in done.json["checked"])


@live
def test_selfcheck_shows_a_difference(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"one": (region(0, 0, 0x1000, 0), read(0), read(0x1000))}
    monkeypatch.setattr("kvmfault.live.selfcheck.STANDING", wrong)
    monkeypatch.setattr("kvmfault.cli.selfcheck.STANDING", wrong)
    monkeypatch.setattr(ModelKvm, "access", lambda *a: Answer())
    done = cli("selfcheck")
    assert done.status == 1
    assert f"one, guest {GUESTS[0].name}: step 3: access gpa 0x1000 size 0x1 touch read: KVM: ok, mmio" in done.out
    assert done.out.splitlines()[-1].endswith(f"{len(GUESTS)} differ")


def test_a_target_without_guest_code(cli: Cli) -> None:
    if isinstance(CHECK, str):
        pytest.skip(CHECK)
    cli("selfcheck", "--backend", "arm64").refused("arm64 has no guest code")
    assert backend("arm64").backend.live is None


def test_a_machine_that_no_backend_drives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmfault.live.selfcheck.backends", lambda: {"arm64": backend("arm64").backend})
    with pytest.raises(LiveError, match="no installed backend drives this machine's KVM"):
        this_machine()


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ({"kvm_intel": {"ept": "Y"}}, "x86-ept"),
        ({"kvm_intel": {"ept": "N"}}, "x86-shadow"),
        ({"kvm_amd": {"npt": "1"}}, "x86-npt"),
        ({"kvm_amd": {"npt": "0"}}, "x86-shadow"),
        ({"kvm_pvm": {}}, "x86-shadow"),
        ({"kvm": {}}, None),
    ],
    ids=str,
)
def test_which_backend_runs_here(
    modules: dict[str, dict[str, str]], found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, parameters in modules.items():
        folder = tmp_path / module / "parameters"
        folder.mkdir(parents=True)
        for name, value in parameters.items():
            (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(x86_live, "MODULES", tmp_path)
    here = [name for name, b in backends().items() if b.live is not None and b.live.runs_here()]
    assert here == ([found] if found else [])


@pytest.mark.parametrize(("value", "reserved"), [("Y", 576), ("N", 64)])
def test_ring_entries_kept_for_the_cpu(
    value: str, reserved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvm_intel" / "parameters").mkdir(parents=True)
    (tmp_path / "kvm_intel" / "parameters" / "pml").write_text(value)
    monkeypatch.setattr(x86_live, "MODULES", tmp_path)
    ept = backend("x86-ept")
    assert x86_live.EPT.host(ept.backend.host(ept.format)).ring_reserved == reserved


def test_answer_is_compared_whole() -> None:
    values = {"errno": 1, "pages": (1,), "ring": ((0, 1),), "reset": 1, "exits": (Exit(Reason.INTR),), "rest": (0, 1)}
    assert set(values) == {f.name for f in fields(Answer)}
    for name, value in values.items():
        assert replace(Answer(), **{name: value}) != Answer()  # type: ignore[arg-type]  # one of its members
