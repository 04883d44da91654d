"""Steps under mmu_lock, and what follows it. The lock is held for read: another vCPU may run the same steps."""

from __future__ import annotations

from errno import EAGAIN, EFAULT

from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import R, W, X
from kvmfault.contract.outcome import Emulate, Error, Fixed, Outcome, Retry, Spurious, WriteProtected, fixed
from kvmfault.contract.ports import MapResult, Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.values import DirtyMark, ExecGrant, PresentLeaf, RetryTest, Unchanged
from kvmfault.path.resolve import fits
from kvmfault.types import Gfn, Gpa, Pfn

__all__ = ["account", "fit_size", "install", "keep_present", "mapped", "protect_tracked", "stale"]

_GFN = RetryTest.GFN
_WITH_ENTRY, _OF_BLOCK = DirtyMark.WITH_ENTRY, DirtyMark.BLOCK_AFTER_UNLOCK
_ON_HARVEST = DirtyMark.ON_HARVEST
_FIXED = MapResult.FIXED
_ALL_EXEC = ExecGrant.ALWAYS


def stale(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The table was retired, or what was sampled is no longer true. An MMIO entry depends on no sequence.

    Kernel: mmu_invalidate_retry in user_mem_abort; is_page_fault_stale.
    """
    if vm.table_retired():
        return Retry("the table that this vCPU uses was retired")
    if at.slot is None:
        return None
    invalidations = vm.invalidations
    gone = invalidations.retry_gfn(at.seq, at.gfn) if at.policy.retry_test is _GFN else invalidations.retry(at.seq)
    return Retry("the page was invalidated after it was looked up") if gone else None


def fit_size(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """The size that is mapped: the area's, the one that faulted, or as much as the host itself maps.

    Kernel: transparent_hugepage_adjust and the granule rule of user_mem_abort; kvm_mmu_hugepage_adjust.
    """
    slot = at.slot
    if slot is None:
        return None
    page = 1 << vm.page_shift
    policy = at.policy
    at.wanted = at.size
    if at.page_only or at.size != page or not policy.fit_sizes:
        return None
    if policy.relax_in_place:
        if at.device:
            return None
        if fault.is_permission and (fault.granule or 0) > page:
            at.wanted = at.size = fault.granule or page
            return None
    allowed = page
    anywhere = not policy.check_geometry
    free = not policy.write_tracking  # where no frame is shadowed or tracked, nothing else forbids a block
    for size in policy.fit_sizes:  # smallest first
        geometry = anywhere or fits(vm, slot, at.hva, size)
        if size <= at.max_size and geometry and (free or vm.block_allowed(slot, at.gfn, size)):
            allowed = size
    if allowed == page:
        return None
    # private memory is not in the host's page table
    host = allowed if at.private else vm.mapping_size(at.hva)
    if host == -EAGAIN:
        return Retry("the host's page table changes")
    if host < 0:
        return Error(-host, "the host's page table could not be read")
    if host > page:
        _take_block(vm, fault, at, min(allowed, max((s for s in policy.fit_sizes if s <= host), default=page)), page)
    return None


def _take_block(vm: Ports, fault: MmioFault, at: Progress, size: int, page: int) -> None:
    at.wanted = size
    if size > page and not (fault.is_exec and vm.facts.small_exec and at.policy.exec_grant is _ALL_EXEC):
        at.size = size
        at.at = Gpa(at.at & -size)
        at.pfn = Pfn(at.pfn & -(size >> vm.page_shift))


def keep_present(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A leaf of the same size is there: it may stay as it is, also where this fault found no slot.

    Kernel: tdp_mmu_map_handle_target_level, mmu_set_spte.
    """
    leaf = vm.find_leaf(at.at)
    if leaf is None or leaf.size != (at.size or 1 << vm.page_shift):  # without a slot no size was looked for
        return None
    wanted = X if fault.is_exec else W if fault.is_write else R
    if fault.is_prefetch:
        why = "the page is mapped already, and nobody waits for it"
    elif leaf.prot & wanted and at.policy.present_leaf is PresentLeaf.KEEP_IF_ALLOWED:
        why = "the entry already allows the access"
    else:
        return None
    if at.slot is None or leaf.pfn != at.pfn:
        vm.warn("a leaf of another frame stays")
    return Spurious(why)


def protect_tracked(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """A frame whose writes are tracked is mapped without write permission.

    Kernel: mmu_try_to_unsync_pages in make_spte.
    """
    if at.prot & W and at.slot is not None and vm.is_tracked(at.gfn):
        at.prot &= ~W
        at.protected = True
    return None


def install(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Relax, map, or leave an entry that remembers MMIO; each entry by compare-and-swap.

    Kernel: kvm_pgtable_stage2_relax_perms, kvm_pgtable_stage2_map; kvm_tdp_mmu_map.
    """
    slot = at.slot
    if slot is None:
        at.answer = mapped(at, vm.map_mmio(at.at, at.gpa, at.prot))
        return at.answer
    policy = at.policy
    if vm.facts.small_exec and policy.exec_grant is _ALL_EXEC:
        if at.size > 1 << vm.page_shift:
            at.prot &= ~X
        if fault.is_exec:
            vm.grow_for_fetch(at.at)
    prot = at.prot
    with_entry = policy.dirty_mark is _WITH_ENTRY
    if with_entry and at.logged and prot & W:
        vm.mark_dirty(slot, at.gfn, at.pfn)
    if policy.relax_in_place and fault.is_permission and (at.size == fault.granule or at.from_file):
        result = vm.relax(at.at, prot, at.memory)
    else:
        result = vm.map(
            at.at,
            at.size,
            at.pfn,
            prot,
            at.memory,
            host_writable=at.map_writable,
            young=not fault.is_prefetch,
            tag=at.tag,
        )
    if at.protected and fault.is_write and result in (_FIXED, MapResult.UNCHANGED):
        result = MapResult.WRITE_PROTECTED
    at.answer = fixed(at.size, prot) if result is _FIXED else mapped(at, result)
    return at.answer if with_entry or policy.dirty_mark is _ON_HARVEST else None


def mapped(at: Progress, result: MapResult | int) -> Outcome:
    """What it means that mapping ended so; a number is an errno."""
    match result:
        case MapResult.FIXED:
            return fixed(at.size, at.prot)
        case MapResult.UNCHANGED:
            if at.policy.unchanged is Unchanged.SPURIOUS:
                return Spurious("the entry already allows the access")
            return Retry("the entry is already there")
        case MapResult.LOST:
            return Retry("another vCPU changed the entry first")
        case MapResult.ABSENT:
            return Retry("the entry is gone")
        case MapResult.MMIO:
            return Emulate(why="no slot: the entry remembers MMIO, the access is emulated")
        case MapResult.WRITE_PROTECTED:
            return WriteProtected("the frame must stay write-protected")
        case _:
            return Error(result or EFAULT, "the table could not be changed")


def account(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    """Mark the page dirty outside the lock; a read that mapped writable memory counts. Then answer.

    Kernel: end of user_mem_abort, kvm_s2_fault_map; mark_page_dirty_in_slot.
    """
    if type(at.answer) is Fixed and at.prot & W and at.slot is not None:
        first = at.gfn & -(at.size >> vm.page_shift) if at.policy.dirty_mark is _OF_BLOCK else at.gfn
        vm.mark_dirty(at.slot, Gfn(first), at.pfn)
    return at.answer
