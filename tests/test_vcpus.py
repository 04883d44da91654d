"""Registers of vCPUs out of a kernel's memory: pure extraction, and the walk over objects that behave as drgn's do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from struct import pack
from typing import Any, Final, TypeAlias

import pytest

from kvmfault.contract.target import backend
from kvmfault.errors import UsageError
from kvmfault.live import vcpus
from kvmfault.live.vcpus import Drgn, SavedFault, VcpuObject, open_kernel, saved_faults
from tests.cli import Cli

Vcpu: TypeAlias = tuple[dict[str, object], dict[str, object]]
"""Members of its struct kvm_vcpu, and structures around it by name."""


class Unreadable(Exception):
    """What drgn calls FaultError."""


class Fake:
    """An object of drgn: nested dicts are structures, and pointers to them; an exception is memory that is gone."""

    def __init__(self, value: object, outer: Mapping[str, object] | None = None) -> None:
        self.value = value
        self.outer = outer or {}

    def member_(self, name: str) -> Fake:
        if isinstance(self.value, Exception):
            raise self.value
        if not isinstance(self.value, dict):
            raise TypeError("'member_' is only for structures")
        if name not in self.value:
            raise LookupError(f"no member {name!r}")
        return Fake(self.value[name])

    def value_(self) -> object:
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    def address_of_(self) -> Fake:
        return self


def container_of(pointer: Any, name: str, member: str) -> Fake:  # noqa: ANN401  a Fake
    assert member == "vcpu"
    if name not in pointer.outer:
        raise LookupError(f"could not find {name!r}")
    return Fake(pointer.outer[name])


def kernel(vms: Iterable[Mapping[str, Any]] | Exception) -> Drgn:
    """A kernel with these VMs: pid, and vCPUs as (members, structures around)."""

    def vm_list() -> Fake:
        if isinstance(vms, Exception):
            raise vms
        return Fake({})

    def every(type_name: str, head: object, member: str) -> Iterable[Fake]:
        assert (type_name, member) == ("struct kvm", "vm_list")
        assert not isinstance(vms, Exception)
        return [Fake({"userspace_pid": vm["pid"], "vcpu_array": vm["vcpus"]}) for vm in vms]

    def entries(array: Any) -> Iterable[tuple[int, Any]]:  # noqa: ANN401  a Fake
        return [(i, Fake(members, outer)) for i, (members, outer) in enumerate(array.value)]

    return Drgn(
        vm_list=vm_list,
        list_for_each_entry=every,
        xa_for_each=entries,
        cast=lambda name, entry: entry,
        container_of=container_of,
        unreadable=Unreadable,
    )


def arm64(esr: int, **more: object) -> Vcpu:
    fault = {"esr_el2": esr, "far_el2": 0xFFFF_8000_0801_0008, "hpfar_el2": 0x90100, "disr_el1": 0, **more}
    return {"vcpu_id": 1, "arch": {"fault": fault}}, {}


def vmx(reason: int, *, vt: bool = False, **more: object) -> Vcpu:
    kept: dict[str, object] = {"exit_reason": {"full": reason}, "exit_qualification": 0x182, **more}
    return {"vcpu_id": 0}, {"struct vcpu_vmx": {"vt": kept, "vcpu": {}} if vt else kept}


def svm(code: int, info1: object = 0x1_0000_0006, info2: object = 0x18_0000) -> Vcpu:
    control = {"exit_code": code, "exit_info_1": info1, "exit_info_2": info2}
    return {"vcpu_id": 0}, {"struct vcpu_svm": {"vmcb": {"control": control}}}


ABORT: Final = {"ESR_EL2": 0x93C0_8007, "FAR_EL2": 0xFFFF_8000_0801_0008, "HPFAR_EL2": 0x90100, "DISR_EL1": 0}


@pytest.mark.parametrize(
    ("target", "vcpu", "registers"),
    [
        ("arm64", arm64(0x93C0_8007), ABORT),
        ("arm64", arm64(0x8200_0007), {**ABORT, "ESR_EL2": 0x8200_0007}),
        ("arm64", arm64(0x5A00_0000), None),  # a hypercall
        ("arm64", arm64(0), None),  # never left the guest
        ("arm64", arm64(0x9600_0007), None),  # of the hypervisor itself
        ("arm64", ({"vcpu_id": 1, "arch": {}}, {}), None),
        ("arm64", arm64(0x93C0_8007, far_el2=Unreadable()), {n: v for n, v in ABORT.items() if n != "FAR_EL2"}),
        ("arm64", arm64(0x93C0_8007, esr_el2=Unreadable()), None),
        ("x86-ept", vmx(48), {"EXIT_REASON": 48, "EXIT_QUALIFICATION": 0x182}),
        ("x86-ept", vmx(48, vt=True), {"EXIT_REASON": 48, "EXIT_QUALIFICATION": 0x182}),
        ("x86-ept", vmx(49), {"EXIT_REASON": 49}),
        ("x86-ept", vmx(48 | 1 << 27), {"EXIT_REASON": 48 | 1 << 27, "EXIT_QUALIFICATION": 0x182}),
        ("x86-ept", vmx(12), None),
        ("x86-ept", vmx(48, exit_qualification=Unreadable()), None),
        ("x86-ept", svm(0x400), None),
        ("x86-npt", svm(0x400), {"EXITINFO1": 0x1_0000_0006, "EXITINFO2": 0x18_0000}),
        ("x86-npt", svm(0x4E), None),
        ("x86-npt", svm(0x400, Unreadable()), None),
        ("x86-npt", vmx(48), None),
        ("x86-shadow", svm(0x4E, 6, 0x7FFF_1234_5678), {"ERROR_CODE": 6, "CR2": 0x7FFF_1234_5678}),
        ("x86-shadow", svm(0x400), None),
        ("x86-shadow", vmx(0), None),
    ],
)
def test_registers(target: str, vcpu: Vcpu, registers: object) -> None:
    (found,) = saved_faults(kernel([{"pid": 77, "vcpus": [vcpu]}]), backend(target))
    assert found.pid == 77
    assert found.registers == registers
    if found.registers is not None:
        backend(target).decode(**found.registers)


def test_every_vcpu_of_every_vm() -> None:
    vms = [
        {"pid": 1, "vcpus": [arm64(0x93C0_8007), arm64(0)]},
        {"pid": 2, "vcpus": []},
        {"pid": 3, "vcpus": [arm64(0)]},
    ]
    found = list(saved_faults(kernel(vms), backend("arm64")))
    assert [(f.pid, f.registers is not None) for f in found] == [(1, True), (1, False), (3, False)]


@pytest.mark.parametrize(
    ("vms", "says"),
    [
        (KeyError("vm_list"), "no KVM in this kernel, or no debug information of the kvm module"),
        ([{"pid": Unreadable("bad"), "vcpus": []}], "the list of VMs cannot be read: bad"),
    ],
)
def test_a_kernel_without_vms_to_read(vms: Exception | list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        list(saved_faults(kernel(vms), backend("arm64")))


def test_numbers() -> None:
    of = VcpuObject(kernel([]), Fake({"a": {"b": -1}, "text": b"x"}))
    assert of.number("a.b") == (1 << 64) - 1
    for path in ("a", "text", "gone", "a.gone", "a.b.c"):
        assert of.number(path) is None, path
    assert of.number("a.b", "vcpu_vmx") is None


# The command.


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_the_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str | None] = []

    def fake(core: str | None) -> Drgn:
        opened.append(core)
        return kernel([{"pid": 77, "vcpus": [arm64(0x93C0_8007), arm64(0)]}, {"pid": 78, "vcpus": [arm64(0)]}])

    monkeypatch.setattr("kvmfault.cli.live.open_kernel", fake)
    done = cli("live", "faults", "arm64", "--core", "vmcore")
    assert done.status == 0
    assert "read at gpa 0x9010008: no entry maps the page, 8 bytes, register 0" in done.out
    assert "ESR_EL2=0x93c08007" in done.out
    assert done.out.count("no fault of this kind") == 2
    only = cli("live", "faults", "arm64", "--pid", "78", "--json")
    assert json.loads(only.out) == [{"pid": 78, "vcpu": 1, "registers": None, "fault": None}]
    assert opened == ["vmcore", None]
    assert cli("live", "faults", "arm64", "--pid", "9").out == "no VM\n"


def test_without_drgn(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "drgn", None)
    cli("live", "faults", "arm64").refused("reading a kernel needs drgn: install kvmfault[drgn]")


def test_a_backend_that_does_not_say_where_is_refused_before_any_memory_is_opened(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmfault.cli.live.open_kernel", None)
    cli("live", "faults", "riscv").refused("riscv does not say where a kernel keeps its fault registers")


def test_a_dump_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("drgn")
    (tmp_path / "vmcore").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="vmcore: "):
        open_kernel(str(tmp_path / "vmcore"))
    assert vcpus.SavedFault is SavedFault


def test_objects_of_drgn() -> None:
    # a program made up of two pieces of memory: pointers are followed, what is not there is None
    drgn = pytest.importorskip("drgn")
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    word = program.int_type("u64", 8, False)
    member, struct = drgn.TypeMember, program.struct_type
    names = ("exit_code", "exit_info_1", "exit_info_2")
    control = struct("vmcb_control_area", 24, tuple(member(word, n, 64 * i) for i, n in enumerate(names)))
    vmcb = struct("vmcb", 24, (member(control, "control", 0),))
    vcpu = struct("kvm_vcpu", 8, (member(word, "vcpu_id", 0),))
    outer = struct("vcpu_svm", 16, (member(vcpu, "vcpu", 0), member(program.pointer_type(vmcb), "vmcb", 64)))
    types = {t.tag: t for t in (control, vmcb, vcpu, outer)}
    program.register_type_finder("made up", lambda prog, kinds, name, file: types.get(name), enable_index=0)
    for start, words in ((0x1000, (7, 0x2000)), (0x2000, (0x400, 0x1_0000_0006, 0x18_0000))):
        data = pack(f"<{len(words)}Q", *words)
        program.add_memory_segment(start, len(data), lambda a, count, at, physical, data=data: data[at : at + count])

    def at(address: int) -> VcpuObject:
        pointer = drgn.Object(program, program.pointer_type(vcpu), value=address)
        return VcpuObject(replace(kernel([]), container_of=drgn.container_of, unreadable=drgn.FaultError), pointer)

    assert at(0x1000).number("vcpu_id") == 7
    assert at(0x1000).number("gone") is None
    assert at(0x1000).number("vcpu_id.more") is None
    assert at(0x9000).number("vcpu_id") is None
    found = {name: backend(name).backend.saved for name in ("arm64", "x86-ept", "x86-npt", "x86-shadow")}
    assert {name: saved(at(0x1000)) if saved is not None else None for name, saved in found.items()} == {
        "arm64": None,
        "x86-ept": None,
        "x86-npt": {"EXITINFO1": 0x1_0000_0006, "EXITINFO2": 0x18_0000},
        "x86-shadow": None,
    }
