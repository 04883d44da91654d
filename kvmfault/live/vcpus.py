"""The vCPUs in the memory of a kernel, running or dumped, and the registers of their last faults. Needs drgn.

What reads memory is drgn; everything else works on whatever behaves like its objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from kvmfault.contract.saved import VcpuMemory
from kvmfault.contract.target import Target
from kvmfault.errors import UsageError
from kvmfault.types import U64

__all__ = ["Drgn", "KernelObject", "SavedFault", "VcpuObject", "extraction", "open_kernel", "saved_faults"]


class KernelObject(Protocol):
    """What drgn gives for something in the kernel's memory."""

    def member_(self, name: str) -> KernelObject:
        """A member of a structure, or of one that is pointed to. LookupError: there is none; TypeError: no struct."""
        ...

    def value_(self) -> object:
        """The value as Python has it. Raises what the program raises for memory that cannot be read."""
        ...

    def address_of_(self) -> KernelObject:
        """A pointer to it."""
        ...


@dataclass(frozen=True, slots=True)
class Drgn:
    """A kernel opened by drgn: what is needed of it."""

    vm_list: Callable[[], KernelObject]
    """The head of KVM's list of VMs. KeyError: KVM is not there, or nobody knows its symbols."""
    list_for_each_entry: Callable[[str, KernelObject, str], Iterable[KernelObject]]
    xa_for_each: Callable[[KernelObject], Iterable[tuple[int, KernelObject]]]
    cast: Callable[[str, KernelObject], KernelObject]
    container_of: Callable[[KernelObject, str, str], KernelObject]
    unreadable: type[Exception]
    """What is raised for memory that cannot be read."""


class VcpuObject:
    """A ``struct kvm_vcpu`` as VcpuMemory."""

    def __init__(self, kernel: Drgn, pointer: KernelObject) -> None:
        self._kernel = kernel
        self._pointer = pointer

    def number(self, path: str, within: str = "") -> int | None:
        """See VcpuMemory."""
        at = self._pointer
        try:
            if within:
                at = self._kernel.container_of(at, f"struct {within}", "vcpu")
            for name in path.split("."):
                at = at.member_(name)
            value = at.value_()
        except (LookupError, TypeError, self._kernel.unreadable):
            return None
        return value & U64 if isinstance(value, int) else None


@dataclass(frozen=True, slots=True)
class SavedFault:
    """A vCPU, and the registers of its last exit if that was a fault of the target's kind."""

    pid: int
    """The process that made the VM."""
    vcpu: int
    registers: Mapping[str, int] | None


def extraction(target: Target) -> Callable[[VcpuMemory], Mapping[str, int] | None]:
    """How the target finds its registers in a vCPU. Raises UsageError where it does not say."""
    saved = target.backend.saved
    if saved is None:
        name = target.backend.name
        raise UsageError(f"{name} does not say where a kernel keeps its fault registers (Behaviour.saved)")
    return saved


def saved_faults(kernel: Drgn, target: Target) -> Iterator[SavedFault]:
    """Every vCPU of every VM. While a vCPU runs, its registers may be of two exits: nothing is stopped.

    Raises UsageError where the target does not say how its registers are found, or the kernel's memory has no KVM.
    """
    saved = extraction(target)
    try:
        head = kernel.vm_list()
    except KeyError as e:
        raise UsageError("no KVM in this kernel, or no debug information of the kvm module") from e
    try:
        for vm in kernel.list_for_each_entry("struct kvm", head.address_of_(), "vm_list"):
            pid = vm.member_("userspace_pid").value_()
            for _, entry in kernel.xa_for_each(vm.member_("vcpu_array").address_of_()):
                vcpu = VcpuObject(kernel, kernel.cast("struct kvm_vcpu *", entry))
                number = vcpu.number("vcpu_id")
                yield SavedFault(pid if isinstance(pid, int) else 0, number or 0, _fitting(target, saved(vcpu)))
    except (LookupError, kernel.unreadable) as e:
        raise UsageError(f"the list of VMs cannot be read: {e}") from e


def _fitting(target: Target, registers: Mapping[str, int] | None) -> Mapping[str, int] | None:
    # a member may be wider than the register
    if registers is None:
        return None
    widths = {r.name: r.width for r in target.backend.registers}
    return {name: value & ((1 << widths[name]) - 1) for name, value in registers.items()}


def open_kernel(core: str | None) -> Drgn:
    """The running kernel, or the one whose dump *core* is.

    Raises UsageError: drgn is not installed, or the memory cannot be opened (root and /proc/kcore; a vmcore).
    """
    try:
        drgn: Any = import_module("drgn")
        lists: Any = import_module("drgn.helpers.linux.list")
        arrays: Any = import_module("drgn.helpers.linux.xarray")
    except ImportError as e:
        raise UsageError(f"reading a kernel needs drgn: install kvmfault[drgn] ({e})") from e
    program = drgn.Program()
    try:
        if core is None:
            program.set_kernel()
        else:
            program.set_core_dump(core)
    except (OSError, ValueError, drgn.FaultError) as e:
        raise UsageError(f"{core or '/proc/kcore'}: {e}") from e
    with suppress(drgn.MissingDebugInfoError):  # of some modules; what is needed is told where it is asked for
        program.load_default_debug_info()
    return Drgn(
        vm_list=lambda: program["vm_list"],
        list_for_each_entry=lists.list_for_each_entry,
        xa_for_each=arrays.xa_for_each,
        cast=drgn.cast,
        container_of=drgn.container_of,
        unreadable=drgn.FaultError,
    )
