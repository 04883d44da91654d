"""The steps that only LoongArch has (kvm_handle_rdwr_fault, kvm_map_page_fast, kvm_map_page)."""

from __future__ import annotations

from typing import Final

from arch.loongarch import inject
from arch.loongarch.facts import handled_read, handled_write
from arch.loongarch.instructions import decode
from arch.loongarch.mmio import access_and_completion
from arch.loongarch.syndrome import holds, instruction
from kvmfault.contract.backend import Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import PROTS, R
from kvmfault.contract.outcome import Emulate, Error, Exit, Fixed, Outcome, Reason, Spurious
from kvmfault.contract.ports import MapResult, Ports, Repair
from kvmfault.contract.progress import Progress
from kvmfault.types import Gpa, Pfn

_has_handler: Final = holds(handled_read | handled_write)


def _address(fault: MmioFault) -> Gpa | None:
    page = fault.kvm_get_fault_gpa()
    return None if page is None else Gpa(page | (fault.gpa_offset or 0))


def unhandled(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Page exceptions for want of permission have no handler. (kvm_fault_ni)"""
    return None if _has_handler(fault) else inject.instruction_missing("this kernel has no handler for the exception")


def beyond(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """An address beyond the guest's physical address space. (kvm_handle_rdwr_fault)"""
    gpa = _address(fault)
    if gpa is None or not gpa >> vm.format.gpa_bits:
        return None
    return inject.access_error(gpa, "the address is beyond the guest's physical address space")


def map_fast(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Make the entry young or dirty again; before anyone looks at memslots. (kvm_map_page_fast)"""
    match vm.repair_fast(at.at, write=fault.is_write, execute=fault.is_exec):
        case Repair.FIXED:
            leaf = vm.find_leaf(at.at)
            prot, size = (leaf.prot, leaf.size) if leaf is not None else (R, 1 << vm.page_shift)
            return Fixed(size, PROTS[prot], "made young or dirty again")
        case Repair.SPURIOUS:
            return Spurious("the entry already allows the access")
        case Repair.NOT_HERE | MapResult():
            return None


def keep_table(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A block does not take the place of a table of pages, even of an empty one: it stays until the slot goes.

    Kernel: the second look at the table in kvm_map_page; kvm_unmap_gfn_range frees no tables.
    """
    page = 1 << vm.page_shift
    if at.size > page and vm.fetched_small(at.at, at.size):
        between = at.size - page
        at.at = Gpa(at.at | at.gpa & between)
        at.pfn = Pfn(at.pfn | (at.gpa & between) >> vm.page_shift)
        at.size = page
    if at.size == page:
        vm.grow_for_fetch(at.at)
    return None


def treat_as_mmio(vm: Ports, fault: MmioFault, at: Progress, outcome: Outcome) -> Outcome:
    """Whatever went wrong, the access is taken for one to a device: a missing slot, failed memory, even the lack of
    memory for tables. (kvm_handle_rdwr_fault)

    A fetch is told by its address: PC, which is virtual, against BADV, which is physical. Where the two differ, BADI is
    decoded as if it were a load; where PC was not captured, nobody can say which of the two it is.
    """
    gpa = _address(fault)
    if not isinstance(outcome, Error) or gpa is None:
        return outcome
    write = fault.is_write
    if fault.is_exec:
        if fault.gva is None:
            return Emulate(why="a fetch from where no memory is: that KVM sees it is one needs PC, not captured")
        if int(fault.gva) == gpa:
            return inject.fetch_error(gpa, "a fetch from where no memory is")
    decoded = decode(instruction(fault), write=write)
    if decoded is None:
        return inject.access_error(gpa, "no memory there, and KVM does not emulate the instruction")
    access, completion = access_and_completion(vm, decoded, gpa, at.policy, write=write)
    return Exit(Reason.MMIO, access, completion=completion, why=f"taken for a device access: {outcome.why}")


JOINTS: Final = Joints(
    screen=(unhandled, beyond), repair=(map_fast,), prepare_page=(keep_table,), conclude=(treat_as_mmio,)
)
