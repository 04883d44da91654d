"""A read-only view used to change the VM: joints and rules that only look are given no way to install a mapping."""

from kvmfault import Gpa
from kvmfault.contract.format import Memory
from kvmfault.contract.ports import VmView
from kvmfault.types import Gfn, Pfn


def look(vm: VmView) -> None:
    vm.map(Gpa(0), 4096, Pfn(1), 7, Memory.NORMAL)  # error: "VmView" has no attribute "map"
    vm.mark_dirty(Gfn(0))  # error: "VmView" has no attribute "mark_dirty"
    vm.page_shift = 14  # error: Property "page_shift" defined in "VmView" is read-only
