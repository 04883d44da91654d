"""The x86 backends as a whole: on a VM, and what they say of odd values."""

from __future__ import annotations

from errno import EINVAL
from typing import Final

import pytest

from arch.x86 import EPT, NPT, SHADOW
from kvmfault.contract.format import Kind, Prot
from kvmfault.contract.outcome import Emulate, Fixed, Spurious
from kvmfault.contract.target import Target
from kvmfault.machine.vm import Vm
from kvmfault.types import Gpa

TARGETS: Final = {b.name: Target(b, "4k", "6.12") for b in (EPT, NPT, SHADOW)}
EPT_612, NPT_612, SHADOW_612 = TARGETS.values()
HVA: Final = 0x7F00_0000_0000

# On a VM: the entries are those that kernels install.


@pytest.mark.parametrize("target", [EPT_612, NPT_612], ids=lambda t: t.backend.name)
def test_on_a_vm(target: Target) -> None:
    vm = Vm.on(target).add_memslot(0, gpa=0x4000_0000, size=1 << 30, hva=HVA).back(HVA, 1 << 30, "thp")
    code, address = (
        ("EXIT_QUALIFICATION", "GUEST_PHYSICAL_ADDRESS") if target is EPT_612 else ("EXITINFO1", "EXITINFO2")
    )
    write, mmio = (0x182, 0x181) if target is EPT_612 else (0x1_0000_0006, 0x1_0000_0004)
    done = vm.handle(target.decode(**{code: write, address: 0x4012_3456}))
    assert done.outcome == Fixed(1 << 21, Prot.R | Prot.W | Prot.X)
    leaf = vm.table.leaf(Gpa(0x4012_3456))
    assert leaf is not None
    assert leaf.desc & ~((1 << 52) - (1 << 12)) == (0x8600000000000BF7 if target is EPT_612 else 0xEE7)
    again = [vm.handle(target.decode(**{code: write, address: 0x4012_3456})).outcome for _ in range(2)]
    assert list(map(type, again)) == [Fixed, Spurious]  # the second one takes the dirty bit away
    assert isinstance(vm.handle(target.decode(**{code: mmio, address: 0x1000})).outcome, Emulate)
    found = vm.table.walk(Gpa(0x1000))
    assert vm.format.entry(found.desc, found.shift).kind is Kind.MMIO
    known = {"EXIT_REASON": 49} if target is EPT_612 else {code: 0xD}
    assert isinstance(vm.handle(target.decode(**known, **{address: 0x1000})).outcome, Emulate)


def test_a_page_of_a_block_splits_it() -> None:
    vm = Vm.on(NPT_612).add_memslot(0, gpa=0x4000_0000, size=1 << 30, hva=HVA).back(HVA, 1 << 30, "thp")
    write = NPT_612.decode(EXITINFO1=0x1_0000_0006, EXITINFO2=0x4000_0000)
    assert vm.handle(write).outcome == Fixed(1 << 21, Prot.R | Prot.W | Prot.X)
    vm.add_memslot(0, gpa=0x4000_0000, size=1 << 30, hva=HVA, log_dirty=True)
    vm.table.write_protect(Gpa(0x4000_0000), Gpa(0x4020_0000))
    again = NPT_612.decode(EXITINFO1=0x1_0000_0007, EXITINFO2=0x4000_0000)
    assert vm.handle(again).outcome == Fixed(1 << 12, Prot.R | Prot.W | Prot.X)
    pieces = list(vm.table.in_range(Gpa(0x4000_0000), Gpa(0x4020_0000)))
    assert [vm.format.prot(piece.desc) for piece in pieces] == [7] + [5] * 511
    assert {piece.shift for piece in pieces} == {12}


@pytest.mark.parametrize(
    ("target", "registers", "text"),
    [
        (EPT_612, {"EXIT_QUALIFICATION": 0x180}, "no access is reported"),
        (EPT_612, {"EXIT_QUALIFICATION": 0x186}, "a fetch that also reads or writes"),
        (EPT_612, {"EXIT_QUALIFICATION": 0x101}, "bit 8 without bit 7"),
        (EPT_612, {"EXIT_REASON": 49, "EXIT_QUALIFICATION": 0x182}, "a misconfiguration has no qualification"),
        (EPT_612, {"EXIT_REASON": 10}, "not an EPT exit"),
        (NPT_612, {"EXITINFO1": 3 << 48 | 4}, "bits 48 and 49 are software's"),
        (NPT_612, {"EXITINFO1": 0x10000000E}, "qemu's TCG"),
        (SHADOW_612, {"ERROR_CODE": 1 << 32}, "drops the upper half"),
    ],
)
def test_unusual(target: Target, registers: dict[str, int], text: str) -> None:
    assert target.backend.unusual is not None
    said = target.backend.unusual(target.named(target.decode(**registers)))
    assert any(text in line for line in said), said


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_nothing_is_unusual_about_an_ordinary_fault(target: Target) -> None:
    ordinary = {"x86-ept": 0x182, "x86-npt": 0x100000006, "x86-shadow": 7}[target.backend.name]
    assert target.backend.unusual is not None
    assert target.backend.unusual(target.named(target.decode(**{target.backend.code: ordinary}))) == ()


def test_hosts() -> None:
    # memslot_ioctl_cases of 6.12: two address spaces, three slots kept; shadow paging is not bound by MAXPHYADDR
    for target, bits in ((EPT_612, 48), (NPT_612, 48), (SHADOW_612, 52)):
        caps = target.backend.host(target.format)
        assert (caps.nr_address_spaces, caps.nr_user_slots, caps.beyond_errno) == (2, 32764, EINVAL)
        assert caps.max_gfn == (1 << bits - 12) - 1
