"""A host frame for a guest's: the path would look up, log and map another page."""

from kvmfault import Gfn, Gpa, Pfn, Vm


def look(vm: Vm, pfn: Pfn, gpa: Gpa) -> None:
    vm.find_slot(pfn)  # error: incompatible type "Pfn"; expected "Gfn"
    vm.is_private(gpa)  # error: incompatible type "Gpa"; expected "Gfn"
    vm.find_leaf(Gfn(1))  # error: incompatible type "Gfn"; expected "Gpa"
