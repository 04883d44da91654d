"""Words of the arm64 backend: layouts, oddities, pasted lines, and the text of its tracepoints."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arch.arm64 import BACKEND
from arch.arm64.codes import CLASSES, STATUS
from arch.arm64.encode import hpfar
from arch.arm64.paste import paste
from arch.arm64.registers import DISR_EL1, ESR_EL2, ESR_OTHER, HPFAR_EL2, ORDER, compose, esr_layout
from arch.arm64.trace import TRACEPOINTS
from arch.arm64.unusual import RULES, unusual
from kvmfault.contract.tracepoints import Role
from kvmfault.trace.assemble import Assembler, assemble
from kvmfault.trace.claims import Claim
from kvmfault.trace.events import FaultEvent, MmioEvent, UserspaceExitEvent
from kvmfault.trace.pattern import Fields, Pattern
from tests.conftest import recordings

# Registers.


def test_reserved_bits() -> None:
    assert ESR_EL2.reserved == 0xFFFF_F000_0000_0000
    assert HPFAR_EL2.reserved == 0x7FFF_0000_0000_000F
    assert DISR_EL1.reserved == 0xFFFF_FFFF_7EFF_E1C0


@pytest.mark.parametrize(
    ("esr", "fields"),
    [
        (0x92000047, {"WnR": 1, "FSC": 7}),
        (0x82000087, {"S1PTW": 1, "FSC": 7}),
        (0x623000E0, {"Op0": 3, "Rt": 7, "Direction": 0}),
        (0x5A00BEEF, {"imm16": 0xBEEF}),
        (0x07E00001, {"CV": 1, "COND": 0xE, "TI": 1}),
        (0x0FE12345, {"CV": 1, "COND": 0xE, "ISS": 0x12345}),
        (0xBE000C11, {"AET": 3, "DFSC": 0x11}),
        (0x00000000, {"ISS": 0}),
    ],
)
def test_layout_by_class(esr: int, fields: dict[str, int]) -> None:
    registers = {"ESR_EL2": esr}
    layout = esr_layout(registers)
    assert layout.name == "ESR_EL2"
    assert {name: layout[name].on(registers) for name in fields} == fields
    assert layout["EC"].on(registers) == esr >> 26


def test_every_class_and_status_has_words() -> None:
    assert len(set(CLASSES.values())) == len(CLASSES)
    assert len(STATUS) == 64 - 16  # the rest is reserved
    assert STATUS[0x29] == "address size, level -1"
    assert STATUS[0x25] == "granule protection on a table walk, level 1"  # once taken for the former
    assert STATUS[0x2B] == "translation, level -1"


def test_compose_refuses_what_does_not_fit() -> None:
    assert compose(ESR_EL2, EC=0x24, IL=1, FSC=7) == 0x92000007
    with pytest.raises(ValueError, match=r"^ESR_EL2.FSC: 0x40 does not fit 6 bits$"):
        compose(ESR_EL2, FSC=0x40)


# What is odd.


@pytest.mark.parametrize(
    ("registers", "word"),
    [
        ({"ESR_EL2": 0x86000007}, "EC 0x21 is an abort of the hypervisor itself"),
        ({"ESR_EL2": 0x96002047}, "an access through VNCR_EL2"),
        ({"ESR_EL2": 0x9200003F}, "the status code is reserved"),
        ({"ESR_EL2": 0x9200002A}, "level -2"),
        ({"ESR_EL2": 0x82000021}, "defined for data aborts only"),
        ({"ESR_EL2": 0x92000407}, "FnV (bit 10)"),
        ({"ESR_EL2": 0x92B18007}, "ISV = 0, so bits 23:14 mean nothing"),
        ({"ESR_EL2": 0x93C08087}, "ISV = 1 on a table walk"),
        ({"ESR_EL2": 0x92000107}, "normally reported with WnR = 1"),
        ({"ESR_EL2": 0x92000007, "HPFAR_EL2": 1 << 50, "KVM": 8}, "6.12 lets them into the address"),
        ({"ESR_EL2": 0x80000092000007}, "ESR_EL2: reserved bits 0x80000000000000 are set"),
        ({"ESR_EL2": 0x82000047}, "ESR_EL2: reserved bits 0x40 are set"),
        ({"ESR_EL2": 0x92000007, "HPFAR_EL2": 0xF}, "HPFAR_EL2: reserved bits 0xf are set"),
        ({"ESR_EL2": 0x623000E0}, "EC 0x18 (MSR, MRS or system instruction) is no abort"),
    ],
)
def test_unusual(registers: dict[str, int], word: str) -> None:
    notes = unusual(dict.fromkeys(ORDER, 0) | registers)
    assert any(word in note for note in notes), notes


@pytest.mark.parametrize("esr", [0x92000007, 0x9200004F, 0x82000087, 0x93C08047, 0x92000147, 0x92000410, 0x92000035])
def test_nothing_unusual(esr: int) -> None:
    assert unusual(dict.fromkeys(ORDER, 0) | {"ESR_EL2": esr, "HPFAR_EL2": 0x8000_0000_0040_0120, "KVM": 0xC}) == ()


def test_every_rule_is_reached() -> None:
    assert len({text for _, text in RULES}) == len(RULES) == 10


@given(st.fixed_dictionaries({name: st.integers(0, (1 << 64) - 1) for name in ORDER}))
def test_any_register_values_have_notes(registers: dict[str, int]) -> None:
    assert all(unusual(registers))


# Pasted lines.


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        (
            "[   12.345678] kvm [234]: Unsupported FSC: EC=0x24 xFSC=0x21 ESR_EL2=0x92000061",
            {"ESR_EL2": 0x92000061},
        ),
        (
            " page_fault_test-217     [001] .....    14.415129: kvm_guest_fault: ipa 0xfffffe4000, hsr 0x82000085, "
            "hxfar 0x4008e4, pc 0x000000004008e4",
            {"ESR_EL2": 0x82000085, "FAR_EL2": 0x4008E4, "HPFAR_EL2": 0x8000_0000_FFFF_FE40},
        ),
        (
            "kvm_guest_fault:      vcpu_pc=0x400c34 hsr=0x92000047 hxfar=0x090000 ipa=0x9000000",
            {"ESR_EL2": 0x92000047, "FAR_EL2": 0x90000, "HPFAR_EL2": 0x8000_0000_0009_0000},
        ),
        (
            "kvm_mmio_nisv: ipa 0x0000ffffffe000, esr 0x00000092000047, far 0x000000c0000000, pc 0x00000000400c34",
            {"ESR_EL2": 0x92000047, "FAR_EL2": 0xC0000000, "HPFAR_EL2": 0x8000_0000_FFFF_FFE0},
        ),
        ("  ESR = 0x0000000096000004", {"ESR_EL2": 0x96000004}),
        ("ESR_EL2=92000007 FAR_EL2=ffff800012345678", {"ESR_EL2": 0x92000007, "FAR_EL2": 0xFFFF_8000_1234_5678}),
        (
            "guest_abort: (kvm_handle_guest_abort+0x0/0xe68) vcpu=0xfff00000c58dd2b0 esr=0x82000005 far=0x80000000 "
            "hpfar=0x800000",
            {"ESR_EL2": 0x82000005, "FAR_EL2": 0x80000000, "HPFAR_EL2": 0x800000},
        ),
        ("esr_el2: 0X9200004F", {"ESR_EL2": 0x9200004F}),
        ("...with ESR 0x24/0x92000046", {"ESR_EL2": 0x92000046}),
        ("HPFAR_EL2=0x400120 ESR_EL2=0x92000007 IPA=0x1000", {"ESR_EL2": 0x92000007, "HPFAR_EL2": 0x400120}),
    ],
)
def test_paste(line: str, registers: dict[str, int]) -> None:
    assert paste(line) == registers
    assert paste(line.upper()) == registers


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nothing here",
        "FAR_EL2=0x1000",
        "esr = maybe",
        "address 0x1000",
        "esr=0x12345678901234567",
        "desr=0x1",
        "esr=12",
    ],
)
def test_paste_finds_no_fault(line: str) -> None:
    assert paste(line) is None


@given(st.text(max_size=200))
def test_paste_never_raises(line: str) -> None:
    found = paste(line)
    assert found is None or "ESR_EL2" in found


# Tracepoints.

BODIES: Final = {
    "kvm_guest_fault": (
        "ipa 0x180000, hsr 0x82000084, hxfar 0x4064d0, pc 0x000000004064d0",
        "vcpu_pc=0x000000004064d0 hsr=0x82000084 hxfar=0x4064d0 ipa=0x180000",
    ),
    "kvm_exit": (
        "TRAP: HSR_EC: 0x0020 (IABT_LOW), PC: 0x00000000004064d0",
        "ret=2 esr_ec=0x0020 vcpu_pc=0x00000000004064d0",
    ),
    "kvm_entry": ("PC: 0x00000000004064d0", "vcpu_pc=0x00000000004064d0"),
    "kvm_mmio": ("mmio read len 4 gpa 0xfee000f0 val 0xff", "type=1 len=4 gpa=0xfee000f0 val=0xff"),
    "kvm_unmap_hva_range": (
        "mmu notifier unmap range: 0x007fa5563bf000 -- 0x007fa5563c0000",
        "start=0x007fa5563bf000 end=0x007fa5563c0000",
    ),
    "kvm_age_hva": (
        "mmu notifier age hva: 0x000000004cf000 -- 0x000000004d0000",
        "start=0x000000004cf000 end=0x000000004d0000",
    ),
    "kvm_test_age_hva": ("mmu notifier test age hva: 0x000000004cf000", "hva=0x000000004cf000"),
    "kvm_set_spte_hva": ("mmu notifier set pte hva: 0x000000004cf000", "hva=0x000000004cf000"),
    "kvm_userspace_exit": ("reason KVM_EXIT_MMIO (6)", "reason=6 errno=0"),
    "kvm_access_fault": ("IPA: 40001000", "ipa=0x40001000"),
    "kvm_mmio_nisv": (
        "ipa 0x10001000, esr 0x92000046, far 0x10001008, pc 0x400000",
        "vcpu_pc=0x400000 esr=0x92000046 far=0x10001008 ipa=0x10001000",
    ),
}


def test_every_tracepoint_reads_in_both_forms() -> None:
    assert {name for name, point in TRACEPOINTS.items() if point.role is not None} <= BODIES.keys()
    for name, bodies in BODIES.items():
        point = TRACEPOINTS[name]
        pattern = Pattern.of([point])
        printed, assigned = (pattern.read(body) for body in bodies)
        assert isinstance(printed, Fields)
        assert isinstance(assigned, Fields)
        unsaid = {"errno"} if name == "kvm_userspace_exit" else set()
        assert {n: v for n, v in assigned.numbers.items() if n not in unsaid} == printed.numbers


@pytest.mark.parametrize(("body", "errno"), [("reason restart (4)", -4), ("reason error (38)", -38)])
def test_user_exit_with_an_errno(body: str, errno: int) -> None:
    point = TRACEPOINTS["kvm_userspace_exit"]
    read = Pattern.of([point]).read(body)
    assert isinstance(read, Fields)
    assert read.numbers == {"errno": errno}


@pytest.mark.parametrize("body", ["reason KVM_EXIT_INTERNAL_ERROR (17)", "reason=17 errno=0", "reason 0x11 (17)"])
def test_every_form_names_the_reason_of_a_return(body: str) -> None:
    line = f"    vcpu-7     [000] d....     1.000001: kvm_userspace_exit: {body}\n".encode()
    (event,) = assemble(BytesIO(line), Assembler([BACKEND]))
    assert event == UserspaceExitEvent(1, 1_000_001_000, "7", "KVM_EXIT_INTERNAL_ERROR", 0)


def test_an_access_that_the_syndrome_does_not_describe_is_one_of_a_device() -> None:
    body = "ipa 0x10001000, esr 0x92000046, far 0x10001008, pc 0x400000"
    line = f"    vcpu-7     [000] d....     1.000001: kvm_mmio_nisv: {body}\n".encode()
    (event,) = assemble(BytesIO(line), Assembler([BACKEND]))
    assert isinstance(event, MmioEvent)
    assert (event.gpa, event.size) == (0x10001000, 0)


def test_kinds_of_exits_in_words() -> None:
    exits = TRACEPOINTS["kvm_exit"]
    assert exits.kind({"ret": 2, "esr_ec": 0x24}) == "TRAP, data abort from a lower EL"
    assert exits.kind({"ret": 0, "esr_ec": 0}) == "IRQ"
    assert TRACEPOINTS["kvm_userspace_exit"].kind({"reason": 6, "errno": -4}) == "error EINTR"


def test_guest_fault_gives_the_registers() -> None:
    fields = {"hsr": 0x82000084, "hxfar": 0x4064D0, "ipa": 0x180000}
    registers = {"ESR_EL2": 0x82000084, "FAR_EL2": 0x4064D0, "HPFAR_EL2": hpfar(0x180000)}
    guest_fault = Claim("arm64", TRACEPOINTS["kvm_guest_fault"], TRACEPOINTS).registers
    assert guest_fault(fields) == registers
    assert guest_fault({**fields, "ipa": "?"}) is None
    assert guest_fault({**fields, "ipa": (1 << 64) - 4096}) == {**registers, "HPFAR_EL2": hpfar((1 << 56) - 4096)}
    assert TRACEPOINTS["kvm_guest_fault"].role is Role.FAULT


@pytest.mark.parametrize("folder", recordings("arm64/[abcr]*/meta.json"))
def test_every_recorded_fault_decodes_as_its_recording_counts(folder: Path) -> None:
    meta = json.loads(folder.read_text())
    if "esr" not in meta:
        pytest.skip("no counts by ESR")
    want = {int(esr, 16): count for esr, count in meta["esr"].items()}
    for form in ("trace.txt.gz", "report.txt.gz", "report-raw.txt.gz"):
        path = folder.parent / form
        if not path.exists():
            continue
        assembler = Assembler([BACKEND])
        got: dict[int, int] = {}
        for event in assemble(str(path), assembler, strict=True):
            if isinstance(event, FaultEvent):
                esr = event.registers["ESR_EL2"]
                got[esr] = got.get(esr, 0) + 1
        assert got == want


def test_other_layout_names_all_bits() -> None:
    assert ESR_OTHER.reserved == 0xFF << 56
