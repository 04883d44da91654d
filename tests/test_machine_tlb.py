"""TLBs and the rules of changing a live table: which flush each change brings, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import Spurious
from kvmfault.contract.target import backend
from kvmfault.errors import ModelError
from kvmfault.machine.stage2 import Stage2
from kvmfault.machine.tlb import Cached, Tlb
from kvmfault.machine.vm import Vm
from kvmfault.types import Gpa, Hpa, Hva, Pfn
from kvmfault.vm.area import HvaRange
from tests.worlds import GPA, HVA, Watched, fault, world

M2 = 2 << 20
PAGE = (Gpa(GPA), Gpa(GPA + 4096))
TDP = ("arm64", "x86-ept", "x86-npt")


def put(table: Stage2, size: int, pfn: int, prot: int = 7, memory: Memory = Memory.NORMAL) -> None:
    table.map(Gpa(GPA), size, Pfn(pfn), prot, memory, host_writable=True, young=True, tag=0)


def table_with(target: str, size: int = 4096, *, pfn: int = 0x200) -> Stage2:
    on = backend(target)
    table = Stage2(on.format, split_blocks=target.startswith("x86"))
    put(table, size, pfn)
    assert table.take_stale() == []  # nothing was there, so nothing can be cached
    return table


CHANGES: dict[str, tuple[int, Callable[[Stage2], object], dict[str, object]]] = {
    # what is done to a leaf of this size; the flush that it needs, by the beginning of the target's name
    "unmap": (4096, lambda t: t.unmap(*PAGE), {"arm64": [PAGE], "x86": [PAGE]}),
    "write-protect": (4096, lambda t: t.write_protect(*PAGE), {"arm64": [PAGE], "x86": [PAGE]}),
    "age": (4096, lambda t: t.age(*PAGE, test_only=False), {"arm64": [], "x86": []}),
    "make young": (4096, lambda t: t.make_young(PAGE[0]), {"arm64": [], "x86": []}),
    "same again": (4096, lambda t: put(t, 4096, 0x200), {"arm64": [], "x86": []}),
    "retire": (4096, lambda t: t.clear(), {"arm64": [(0, 1 << 64)], "x86": [(0, 1 << 64)]}),
    "split": (M2, lambda t: t.split(*PAGE), {"arm64": [(GPA, GPA + M2)], "x86": []}),
    "page over block": (M2, lambda t: put(t, 4096, 0x200), {"arm64": [(GPA, GPA + M2)], "x86": []}),
    "block over pages": (4096, lambda t: put(t, M2, 0x200), {"arm64": [(GPA, GPA + M2)], "x86": [(GPA, GPA + M2)]}),
}


@pytest.mark.parametrize("target", TDP)
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_change_makes_stale(target: str, name: str) -> None:
    size, change, wanted = CHANGES[name]
    table = table_with(target, size)
    change(table)
    assert table.take_stale() == wanted[target.split("-")[0]]
    assert table.take_stale() == []


@pytest.mark.parametrize(
    ("target", "size", "new", "rule"),
    [
        ("arm64", 4096, {"hpa": 0x300000}, "break-before-make: its output address"),
        ("arm64", 4096, {"memory": Memory.DEVICE}, "break-before-make: its memory type"),
        ("arm64", M2, {"table": True}, "break-before-make: its size"),
        ("arm64", 4096, {"prot": 4}, None),
        ("x86-ept", 4096, {"hpa": 0x300000}, "a present leaf is replaced by a leaf of another frame"),
        ("x86-npt", M2, {"hpa": 0x400000}, "a present leaf is replaced by a leaf of another frame"),
        ("x86-ept", M2, {"table": True}, None),
        ("x86-ept", 4096, {"prot": 4}, None),
    ],
)
def test_a_broken_rule_is_an_error_of_the_user(
    target: str, size: int, new: dict[str, object], rule: str | None
) -> None:
    table = table_with(target, size)
    fmt, shift = table.format, size.bit_length() - 1
    if new.get("table"):
        desc = fmt.table(Hpa(1 << 40), shift)
    else:
        hpa, prot, memory = new.get("hpa", 0x200000), new.get("prot", 7), new.get("memory", Memory.NORMAL)
        assert isinstance(hpa, int)
        assert isinstance(prot, int)
        assert isinstance(memory, Memory)
        desc = fmt.leaf(shift, Hpa(hpa), prot, memory, young=True, host_writable=True, tag=0)
    before = table.key()
    if rule is None:
        table.put(Gpa(GPA), size, desc)
        assert table.take_stale() == [(GPA, GPA + size)]
        return
    with pytest.raises(ModelError, match=rule):
        table.put(Gpa(GPA), size, desc)
    assert table.key() == before
    table.unmap(Gpa(GPA), Gpa(GPA + size))  # broken, then made
    table.put(Gpa(GPA), size, desc)


def test_a_forgotten_invalidation_is_noticed_where_the_kernel_would_notice() -> None:
    # the host moves the page and tells nobody; on x86 the next fault finds a leaf of another frame
    for target in ("x86-ept@6.12", "x86-npt@6.12", "x86-shadow@6.12"):
        for kind in ("exec", "write"):
            with pytest.raises(ModelError, match="leaf of another frame"):
                moved(target).resolve(fault(target, kind))
    # newer kernels keep a leaf that allows the access, and warn (tdp_mmu_map_handle_target_level)
    for target in ("x86-ept@7.4", "x86-npt@7.4"):
        vm = moved(target)
        assert vm.resolve(fault(target, "exec")) == Spurious()
        assert vm.warnings == ("a leaf of another frame stays",)
        with pytest.raises(ModelError, match="leaf of another frame"):
            vm.resolve(fault(target, "write"))
    # the shadow MMU keeps it only if nobody waits (mmu_set_spte)
    vm = moved("x86-shadow@7.4")
    assert vm.resolve(fault(vm.target, "read", prefetch=True)) == Spurious()
    assert vm.warnings == ("a leaf of another frame stays",)
    with pytest.raises(ModelError, match="leaf of another frame"):
        vm.resolve(fault(vm.target, "exec"))


def test_a_leaf_of_the_same_frame_stays_without_a_warning() -> None:
    for target in ("x86-ept@7.4", "x86-npt@7.4"):
        for backing in ("anon", "thp"):
            vm = world(target, backing)
            vm.access(GPA + 0x3000, write=True)
            assert vm.resolve(fault(target, "exec", GPA + 0x3000)) == Spurious()
            assert not vm.warnings


def moved(target: str) -> Watched:
    """The page is mapped for reads; then the host gave it another frame."""
    vm = world(target)
    vm.access(GPA, write=True)
    vm.host.migrate(Hva(HVA))
    vm.table.write_protect(*PAGE)
    return vm


def test_a_tlb_answers_by_the_smallest_leaf_and_forgets_what_it_is_told_to() -> None:
    tlb = Tlb()
    block = Cached(Gpa(0), 21, Pfn(0x200), 7, False)
    page = Cached(Gpa(0x3000), 12, Pfn(0x999), 4, False)
    tlb.fill(block)
    tlb.fill(page)
    assert (tlb.find(Gpa(0x3FFF)), tlb.find(Gpa(0x4000)), tlb.find(Gpa(M2))) == (page, block, None)
    fork = tlb.fork()
    tlb.flush(Gpa(0x4000), Gpa(0x5000))
    assert tlb.entries() == (page,)
    tlb.flush(Gpa(0x2000), Gpa(0x3000))
    assert tlb.entries() == (page,)
    tlb.drop(Gpa(0x3000))
    assert tlb.entries() == ()
    assert fork.entries() == (block, page)
    fork.flush_all()
    assert (fork.entries(), fork.key(), fork.flushes, tlb.flushes) == ((), tlb.key(), 1, 2)


@pytest.mark.parametrize("target", TDP)
def test_after_an_invalidation_no_vcpu_reaches_the_page(target: str) -> None:
    vm = world(target)
    for vcpu in (0, 1):
        vm.access(GPA, write=True, vcpu=vcpu)
    was = vm.access(GPA, vcpu=0).pfns
    assert len(was) == 1
    assert all(v.tlb.entries() for v in vm.vcpus)
    vm.invalidate(vm.host.migrate(Hva(HVA)))
    assert not any(v.tlb.entries() for v in vm.vcpus)
    again = vm.access(GPA, vcpu=1)
    assert len(again.faults) == 1
    assert again.pfns != was


def test_a_missing_flush_can_be_seen() -> None:
    class Forgetful(Vm):
        def flush_stale(self) -> None:
            self.table.take_stale()

    vm = Forgetful.on("x86-ept").add_memslot(0, gpa=GPA, size=M2, hva=HVA).back(HVA, M2)
    was = vm.access(GPA, write=True).pfns
    vm.invalidate(vm.host.migrate(Hva(HVA)))
    assert vm.table.leaf(Gpa(GPA)) is None
    assert vm.access(GPA).pfns == was  # through the TLB, to a page that is not the guest's any more


def test_ageing_does_not_flush() -> None:
    vm = world("x86-ept")
    vm.access(GPA)
    span = HvaRange(Hva(HVA), Hva(HVA + 4096))
    assert vm.age(span)
    assert vm.access(GPA).faults == ()
    assert not vm.age(span)  # used through the TLB only
    vm.vcpu.tlb.flush_all()
    assert vm.access(GPA).faults == ()
    assert vm.age(span)
