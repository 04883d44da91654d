"""Tracepoints and pasted lines: every text form of every recording, and the three encodings told apart."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from arch.x86 import EPT, NPT, SHADOW
from arch.x86.exits import EXIT_REASONS
from arch.x86.registers import KVM
from kvmfault.contract.backend import Backend
from kvmfault.contract.target import Target
from kvmfault.contract.tracepoints import LOCATING, Fields, Role
from kvmfault.trace.claims import Claim
from kvmfault.trace.pattern import Fields as Parsed
from kvmfault.trace.pattern import Pattern
from kvmfault.trace.text import read_text
from tests.conftest import recording, recordings

BACKENDS: Final = (EPT, NPT, SHADOW)
EVENTS: Final = tuple(EPT.tracepoints)


@cache
def pattern(event: str) -> Pattern:
    return Pattern.of([EPT.tracepoints[event]])


def read(event: str, body: str) -> Fields:
    parsed = pattern(event).read(body)
    assert isinstance(parsed, Parsed), (event, body, str(parsed))
    return {**parsed.numbers, **parsed.words}


@cache
def claims_of(event: str) -> tuple[Claim, ...]:
    points = [(b, b.tracepoints[event]) for b in BACKENDS]
    return tuple(Claim(b.name, point, b.tracepoints) for b, point in points if point.registers is not None)


def claims(event: str, fields: Fields, last_exit: Fields) -> list[tuple[str, dict[str, int]]]:
    """Which backends say that the event is a fault of theirs."""
    found = []
    for claim in claims_of(event):
        registers = claim.registers(fields) if claim.after(last_exit) else None
        if registers is not None:
            found.append((claim.backend, dict(registers)))
    return found


# Single lines.

FAULT: Final = "vcpu 0 rip 0x400000 address 0x0000000000180000 error_code 0x182"
RAW_FAULT: Final = "vcpu_id=0 guest_rip=0x400000 fault_address=0x0000000000180000 error_code=0x182"
TAIL: Final = "rip 0x1 info1 0x182 info2 0x0 intr_info 0x00000000 error_code 0x00000000"


@pytest.mark.parametrize("fault", [FAULT, RAW_FAULT], ids=["text", "raw"])
@pytest.mark.parametrize(
    ("exit_", "backend"),
    [
        (f"vcpu 0 reason EPT_VIOLATION {TAIL}", "x86-ept"),
        (f"vcpu 0 reason EPT_VIOLATION ENCLAVE_MODE {TAIL}", "x86-ept"),
        (f"vcpu 0 reason EPT_VIOLATION {TAIL} requests 0x0000000000000000", "x86-ept"),
        ("reason EPT_VIOLATION rip 0x1 info 182 0", "x86-ept"),
        ("exit_reason=48 guest_rip=0x1 isa=1 info1=0x182 info2=0x0 intr_info=0x0 error_code=0x0 vcpu_id=0", "x86-ept"),
        (f"vcpu 0 reason npf {TAIL}", "x86-npt"),
        ("reason EXIT_NPF rip 0x1 info 182 0", "x86-npt"),
        (
            "exit_reason=1024 guest_rip=0x1 isa=2 info1=0x182 info2=0x0 intr_info=0x0 error_code=0x0 vcpu_id=0",
            "x86-npt",
        ),
        ("exit_reason=1024 guest_rip=0x1 isa=2 info1=0x182 info2=0x0 vcpu_id=0 requests=0x0", "x86-npt"),
        (f"vcpu 0 reason PF excp {TAIL}", "x86-shadow"),
        (f"vcpu 0 reason PF excp {TAIL} requests 0x0", "x86-shadow"),
        ("reason EXIT_EXCP_PF rip 0x1 info 182 0", "x86-shadow"),
        ("exit_reason=78 guest_rip=0x1 isa=2 info1=0x182 info2=0x0 vcpu_id=0", "x86-shadow"),
        ("vcpu 0 reason EXCEPTION_NMI rip 0x1 info1 0x0 info2 0x0 intr_info 0x80000b0e error_code 0x4", "x86-shadow"),
        ("reason EXCEPTION_NMI rip 0x1 info 182 0", "x86-shadow"),
        ("exit_reason=0 guest_rip=0x1 isa=1 info1=0x1 info2=0x0 intr_info=0x80000b0e error_code=0x4", "x86-shadow"),
    ],
)
def test_the_exit_tells_the_encoding(fault: str, exit_: str, backend: str) -> None:
    wanted: Mapping[str, dict[str, int]] = {
        "x86-ept": {"EXIT_REASON": 48, "EXIT_QUALIFICATION": 0x182, "GUEST_PHYSICAL_ADDRESS": 0x180000},
        "x86-npt": {"EXITINFO1": 0x182, "EXITINFO2": 0x180000, "KVM": 0},
        "x86-shadow": {"ERROR_CODE": 0x182, "CR2": 0x180000},
    }
    fields = read("kvm_page_fault", fault)
    assert claims("kvm_page_fault", fields, read("kvm_exit", exit_)) == [(backend, wanted[backend])]


@pytest.mark.parametrize(
    "exit_",
    [
        f"vcpu 0 reason HLT {TAIL}",
        f"vcpu 0 reason GP excp {TAIL}",
        "vcpu 0 reason EXCEPTION_NMI rip 0x1 info1 0x0 info2 0x0 intr_info 0x80000301 error_code 0x0",
        "exit_reason=48 guest_rip=0x1 isa=2 info1=0x0 info2=0x0",  # a debug register, on AMD
        "exit_reason=78 guest_rip=0x1 isa=1 info1=0x0 info2=0x0",
        "exit_reason=0 guest_rip=0x1 isa=1 info1=0x0 info2=0x0 intr_info=0x80000202 error_code=0x0",
        "exit_reason=0 guest_rip=0x1 isa=1 info1=0x0 info2=0x0 intr_info=0x8000060e error_code=0x0",  # INT 14
        f"vcpu 0 reason EPT_MISCONFIG {TAIL}",
    ],
)
def test_other_exits_tell_nothing_of_a_fault(exit_: str) -> None:
    assert claims("kvm_page_fault", read("kvm_page_fault", FAULT), read("kvm_exit", exit_)) == []


def test_without_an_exit_the_target_says() -> None:
    point = EPT.tracepoints["kvm_page_fault"]
    assert point.needs_exit
    fields = read("kvm_page_fault", FAULT)
    told = {c.backend for c in claims_of("kvm_page_fault") if c.registers(fields) is not None}
    assert told == {"x86-ept", "x86-npt", "x86-shadow"}
    assert claims("kvm_page_fault", fields, {}) == []


@pytest.mark.parametrize(
    ("exit_", "found"),
    [
        (f"vcpu 0 reason EPT_MISCONFIG {TAIL}", [("x86-ept", {"EXIT_REASON": 49})]),
        ("exit_reason=49 guest_rip=0x1 isa=1 info1=0x0 info2=0x0", [("x86-ept", {"EXIT_REASON": 49})]),
        ("exit_reason=49 guest_rip=0x1 isa=2 info1=0x0 info2=0x0", []),
        (f"vcpu 0 reason EPT_VIOLATION {TAIL}", []),
        (f"vcpu 0 reason npf {TAIL}", []),
    ],
)
def test_a_misconfiguration_is_a_fault_of_its_own(exit_: str, found: list[tuple[str, dict[str, int]]]) -> None:
    fields = read("kvm_exit", exit_)
    assert claims("kvm_exit", fields, fields) == found
    assert EPT.tracepoints["kvm_exit"].awaits == "GUEST_PHYSICAL_ADDRESS"


def test_private_in_a_recorded_npf_is_what_kvm_added() -> None:
    fields = {"fault_address": 0x5000, "error_code": 0x2_0005_0000_0006}
    registers = Claim("", NPT.tracepoints["kvm_page_fault"], NPT.tracepoints).registers(fields)
    assert registers == {"EXITINFO1": 0x5_0000_0006, "EXITINFO2": 0x5000, "KVM": KVM["PRIVATE"].mask}


@pytest.mark.parametrize(
    ("event", "body", "fields"),
    [
        ("vcpu_match_mmio", "gva 0xc01000 gpa 0x3001000 Write GPA", {"gpa": 0x3001000}),
        ("vcpu_match_mmio", "gva=0xc01000 gpa=0x3001000 write=1 gpa_match=1", {"gpa": 0x3001000}),
        ("kvm_mmu_spte_requested", "gfn 600 pfn 8000000000000000 level 1", {"gfn": 0x600}),
        ("kvm_fast_mmio", "fast mmio at gpa 0xfe001000", {"gpa": 0xFE001000}),
        ("kvm_entry", "vcpu 1, rip 0x400000", {"vcpu_id": 1}),
        ("kvm_entry", "vcpu 1, rip 0x400000[immediate exit]", {"vcpu_id": 1}),
        ("kvm_entry", "vcpu 1, rip 0x40 intr_info 0x800000ec error_code 0x00000000", {"vcpu_id": 1}),
        ("kvm_entry", "vcpu 0 rip 0x400000", {"vcpu_id": 0}),
        ("kvm_entry", "vcpu_id=1 rip=0x400000 immediate_exit=0 intr_info=0x0 error_code=0x0", {"vcpu_id": 1}),
    ],
)
def test_other_events(event: str, body: str, fields: dict[str, int]) -> None:
    assert fields.items() <= read(event, body).items()


def test_roles() -> None:
    roles = {name: point.role for name, point in NPT.tracepoints.items()}
    assert roles["kvm_page_fault"] is Role.FAULT
    told = {name for name, role in roles.items() if role in LOCATING}
    assert told == {"kvm_mmio", "vcpu_match_mmio", "kvm_fast_mmio", "kvm_mmu_spte_requested"}


# Whole recordings.


@dataclass(frozen=True)
class Met:
    """One fault of a recording."""

    backend: str
    registers: tuple[tuple[str, int], ...]


def faults(path: Path) -> Iterator[Met]:
    """Faults in order; each is claimed by exactly one backend."""
    last: dict[int, Fields] = {}
    waiting: dict[int, dict[str, int]] = {}
    for event in read_text(path, wanted=EVENTS):
        fields = read(event.name, event.body)
        role = EPT.tracepoints[event.name].role
        if role in (Role.FAULT, Role.EXIT):
            claimed = claims(event.name, fields, last.get(event.pid, {}) if role is Role.FAULT else fields)
            if role is Role.EXIT:
                last[event.pid] = fields
                if claimed:
                    waiting[event.pid] = claimed[0][1]
            else:
                ((name, registers),) = claimed
                yield Met(name, tuple(registers.items()))
        elif role in LOCATING and event.pid in waiting:
            gpa = fields["gpa"] if "gpa" in fields else int(fields["gfn"]) << 12
            assert isinstance(gpa, int)
            yield Met("x86-ept", (*waiting.pop(event.pid).items(), ("GUEST_PHYSICAL_ADDRESS", gpa)))
        elif role is Role.ENTRY:
            assert event.pid not in waiting, f"line {event.line}: no event told the address of the misconfiguration"


def _backend_of(folder: str) -> Backend:
    if folder.startswith(("e1", "e3")):
        return EPT
    return SHADOW if folder.startswith(("c", "e2", "shadow")) else NPT


@pytest.mark.parametrize("path", recordings("x86/*/report-R.txt.gz", largest=False))
def test_every_form_of_a_recording_gives_the_same_faults(path: Path) -> None:
    forms = [path, path.with_name("report.txt.gz"), path.with_name("trace.txt.gz")]
    read_as = [list(faults(form)) for form in forms if form.exists()]
    assert len(read_as) >= 2
    assert read_as[0]
    assert {met.backend for met in read_as[0]} == {_backend_of(path.parent.name).name}
    assert all(other == read_as[0] for other in read_as[1:])
    index = {entry["workload"]: entry for entry in json.loads(recording("x86/INDEX.json").read_text())}
    counted = index[path.parent.name]["kvm_page_fault_error_codes"] if path.parent.name in index else None
    if counted is not None:
        code = {"x86-ept": "EXIT_QUALIFICATION", "x86-npt": "EXITINFO1", "x86-shadow": "ERROR_CODE"}
        found = Counter(hex(r[code[m.backend]]) for m in read_as[0] if code[m.backend] in (r := dict(m.registers)))
        assert found == counted
        misconfigs = sum(dict(met.registers).get("EXIT_REASON") == 49 for met in read_as[0])
        assert misconfigs == index[path.parent.name]["kvm_exit_reasons"].get("EPT_MISCONFIG", 0)


@pytest.mark.parametrize("path", recordings("x86aux/*/trace.txt*"))
def test_recordings_with_ground_truth(path: Path) -> None:
    counts = Counter(met.backend for met in faults(path))
    # the second guest of a nested one faults under the first guest's own tables as well
    assert counts[_backend_of(path.parent.name).name] > 0.9 * counts.total() > 0


def test_recorded_faults_decode() -> None:
    met = list(faults(recording("x86/e1-longmode2-cpl3/trace.txt.gz")))
    target = Target(EPT, "4k", "6.12")
    kinds = Counter[str]()
    for one in met:
        fault = target.decode(**dict(one.registers))
        assert fault.kvm_get_fault_gpa() is not None
        kinds["reserved" if fault.is_reserved else "write" if fault.is_write else "other"] += 1
    assert kinds == {"write": 295, "other": 100, "reserved": 26}


# What people paste.


@pytest.mark.parametrize(
    ("backend", "line", "registers"),
    [
        (EPT, f" qemu-1 [000] d..1. 1.0: kvm_page_fault: {FAULT}", {"EXIT_REASON": 48, "EXIT_QUALIFICATION": 0x182,
                                                                    "GUEST_PHYSICAL_ADDRESS": 0x180000}),
        (EPT, f"kvm_page_fault: {RAW_FAULT}", {"EXIT_REASON": 48, "EXIT_QUALIFICATION": 0x182,
                                               "GUEST_PHYSICAL_ADDRESS": 0x180000}),
        (NPT, f"kvm:kvm_page_fault: {FAULT}", {"EXITINFO1": 0x182, "EXITINFO2": 0x180000, "KVM": 0}),
        (SHADOW, f"kvm_page_fault: {FAULT}", {"ERROR_CODE": 0x182, "CR2": 0x180000}),
        (EPT, f"kvm_exit: vcpu 0 reason EPT_VIOLATION {TAIL}", {"EXIT_REASON": 48, "EXIT_QUALIFICATION": 0x182}),
        (EPT, f"kvm_exit: vcpu 0 reason EPT_MISCONFIG {TAIL}", {"EXIT_REASON": 49}),
        (EPT, f"kvm_exit: vcpu 0 reason npf {TAIL}", None),
        (NPT, "kvm_exit: reason EXIT_NPF rip 0x407250 info 200000006 180000",
         {"EXITINFO1": 0x200000006, "EXITINFO2": 0x180000}),
        (NPT, f"kvm_exit: vcpu 0 reason EPT_VIOLATION {TAIL}", None),
        (SHADOW, "kvm_exit: reason EXIT_EXCP_PF rip 0x400000 info 14 400000", {"ERROR_CODE": 0x14, "CR2": 0x400000}),
        (SHADOW, "kvm_exit: vcpu 0 reason EXCEPTION_NMI rip 0x1 info1 0x400000 info2 0x0 intr_info 0x80000b0e "
         "error_code 0x14", {"ERROR_CODE": 0x14, "CR2": 0x400000}),
        (SHADOW, "kvm_exit: reason EXCEPTION_NMI rip 0x400000 info 400000 0", None),  # the code was not printed
        (EPT, "KVM internal error. Suberror: 3 extra data[0]: 0x0000000080000b0e extra data[1]: 0x31 "
         "extra data[2]: 0x182 extra data[3]: 0xbfefc",
         {"EXIT_REASON": 0x31, "EXIT_QUALIFICATION": 0x182, "GUEST_PHYSICAL_ADDRESS": 0xBFEFC}),
        (EPT, "Suberror: 3, extra data 80000b0e 30 182", {"EXIT_REASON": 0x30, "EXIT_QUALIFICATION": 0x182}),
        (EPT, "Suberror: 3, extra data 80000b0e 1 182", None),
        (EPT, "Suberror: 3, extra data 80000b0e 8000031 0", {"EXIT_REASON": 0x8000031, "EXIT_QUALIFICATION": 0}),
        (EPT, "Suberror: 1, extra data 80000b0e 31 182 bfefc", None),
        (EPT, "EXIT_QUALIFICATION=0x182", {"EXIT_QUALIFICATION": 0x182}),
        (EPT, "Exit qualification: 0000000000000181, GPA = 0x1000 GVA=0x2000",
         {"EXIT_QUALIFICATION": 0x181, "GUEST_PHYSICAL_ADDRESS": 0x1000, "GUEST_LINEAR_ADDRESS": 0x2000}),
        (EPT, "   reason=00000030 qualification=0000000000000182", {"EXIT_REASON": 0x30, "EXIT_QUALIFICATION": 0x182}),
        (NPT, "exit_info1:          0000000100000006 exit_info2:          0000000000180000",
         {"EXITINFO1": 0x100000006, "EXITINFO2": 0x180000}),
        (SHADOW, "error code: 0x7 CR2: 00007fff12345678", {"ERROR_CODE": 7, "CR2": 0x7FFF12345678}),
        (EPT, "KVM_EXIT_MEMORY_FAULT flags=0x8 gpa=0x1234000 size=0x1000",
         {"GUEST_PHYSICAL_ADDRESS": 0x1234000, "KVM": 1}),
        (NPT, "MemoryFault { flags: 0, gpa: 4096, size: 4096 }", {"EXITINFO2": 4096, "KVM": 0}),
        (SHADOW, "KVM_EXIT_MEMORY_FAULT flags=0x8 gpa=0x1234000 size=0x1000", None),
        (EPT, "nothing to see here", None),
        (EPT, "", None),
        (EPT, "kvm_page_fault: torn off", None),
        (NPT, "EXIT_QUALIFICATION=0x182", None),
    ],
)  # fmt: skip
def test_paste(backend: Backend, line: str, registers: dict[str, int] | None) -> None:
    assert backend.paste is not None
    assert backend.paste(line) == registers
    if registers is not None:
        Target(backend, "4k", "7.4").decode(**registers)


@pytest.mark.parametrize("path", recordings("x86/*-longmode2-cpl3/report.txt.gz"))
def test_every_recorded_line_can_be_pasted(path: Path) -> None:
    backend = _backend_of(path.parent.name)
    assert backend.paste is not None
    with gzip.open(path, "rt") as lines:
        pasted = [backend.paste(line) for line in lines if "kvm_page_fault:" in line]
    assert pasted == [dict(met.registers) for met in faults(path) if dict(met.registers).get("EXIT_REASON") != 49]


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("EPT_VIOLATION", {"exit_reason": 48, "isa": 1}),
        ("INVALID_STATE FAILED_VMENTRY", {"exit_reason": 0x80000021, "isa": 1}),
        ("npf", {"exit_reason": 0x400, "isa": 2}),
        ("PF excp", {"exit_reason": 0x4E, "isa": 2}),
        ("write_dr7", {"exit_reason": 0x37, "isa": 2}),
        ("idle-halt", {"exit_reason": 0xA6, "isa": 2}),
        ("invalid_guest_state", {"exit_reason": 0xFFFFFFFF, "isa": 2}),
    ],
)
def test_exit_reasons_have_names(word: str, fields: dict[str, int]) -> None:
    assert EXIT_REASONS.told(word) == fields
    assert EXIT_REASONS.name(fields) == word


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("EXIT_NPF", {"exit_reason": 0x400, "isa": 2}),  # trace-cmd's own
        ("EXIT_EXCP_PF", {"exit_reason": 0x4E, "isa": 2}),
        ("EXIT_IOIO", {"exit_reason": 0x7B, "isa": 2}),
        ("EXIT_ERR", {"exit_reason": 0xFFFFFFFF, "isa": 2}),
        ("PENDING_INTERRUPT", {"exit_reason": 7, "isa": 1}),
        ("0x1234", {"exit_reason": 0x1234}),  # of a kernel newer than the table
        ("EPT_VIOLATION 0x40000000", {"exit_reason": 0x40000030, "isa": 1}),
        ("UNHEARD_OF", {}),
    ],
)
def test_other_words_for_exit_reasons(word: str, fields: dict[str, int]) -> None:
    assert EXIT_REASONS.told(word) == fields


def test_an_unknown_exit_reason_is_shown_as_a_number() -> None:
    assert EXIT_REASONS.name({"exit_reason": 0x4E}) == "78"
    assert EXIT_REASONS.name({"exit_reason": 0xC0000000, "isa": 2}) == "0xc0000000"
    assert EXIT_REASONS.name({}) == "?"


@pytest.mark.parametrize("path", recordings("x86/formats-*/kvm/kvm_exit.format"))
def test_every_reason_that_a_kernel_prints_has_its_name(path: Path) -> None:
    tables = path.read_text().split("print fmt", 1)[1].split("__print_symbolic(")[1:]
    for isa, table in enumerate(tables, 1):
        rows = re.findall(r'{ ([x0-9a-f+ -]+), "([^"]+)" }', table.split("__print_flags")[0])
        assert len(rows) > 50
        for value, word in rows:
            number = sum(int(part, 0) for part in value.split("+")) & 0xFFFFFFFF
            assert EXIT_REASONS.told(word) == {"exit_reason": number, "isa": isa}
            assert EXIT_REASONS.name({"exit_reason": number, "isa": isa}) == word
