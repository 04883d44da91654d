"""Memslots: lists and recordings of changes, inference from events, and both compared on real recordings."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.errors import KvmfaultError, TraceError, UsageError
from kvmfault.trace.events import EntryEvent, Event, ExitEvent, FaultEvent, MmioEvent, SlotEvent, UserspaceExitEvent
from kvmfault.trace.pattern import Pattern
from kvmfault.trace.slotfile import read_slots
from kvmfault.trace.slots import SlotSource, compare_slots, infer_slots, place
from kvmfault.trace.text import read_fields
from kvmfault.types import Gpa, Hva
from tests.conftest import recording

DATA = Path(__file__).parent / "data" / "traces"
PAGE = 4096
RAM, ROM = 0, 2


# -- a list of slots ---------------------------------------------------------------------------------

TOML = """
[[slot]]
id = 0
gpa = 0x4000_0000
size = "0x1000000"
hva = "0x7f0000000000"
log_dirty = true

[[slot]]
id = 3
as_id = 1
gpa = "1073741824"
size = 16384
readonly = true
"""
JSON = json.dumps(
    {
        "slot": [
            {"id": 0, "gpa": 1 << 30, "size": 1 << 24, "hva": 0x7F00_0000_0000, "flags": 1},
            {"id": 3, "as_id": 1, "gpa": "0x40000000", "size": "0x4000", "flags": "0x2"},
        ]
    }
)


@pytest.mark.parametrize("content", [TOML, JSON, "\n " + JSON])
def test_a_list_in_both_forms(content: str, tmp_path: Path) -> None:
    path = tmp_path / "slots"
    path.write_text(content)
    source = read_slots(path)
    first, second = source.changes
    assert first == SlotEvent(0, 0, "", 0, 1, Gpa(1 << 30), 1 << 24, Hva(0x7F00_0000_0000), 0)
    assert (second.slot, second.flags, second.gpa, second.size, second.ret) == (1 << 16 | 3, ROM, 1 << 30, 0x4000, 0)
    assert (second.hva - second.gpa) % (1 << 30) == 0
    assert (source.origin, source.timed, source.vms) == (str(path), False, ("",))


AS = 'as a number or a string such as "0x1000", found'
SIZE = f"slot[1].size expected bytes, more than 0 and of 64 bits, {AS}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": slot is missing"),
        ("slot = []", ":1: slot list should have at least 1 item after validation, not 0, found []"),
        ("slot = 3", ":1: slot input should be a valid list, found 3"),
        (TOML + "[vm]\n", ":15: vm is no key here"),
        (TOML.replace("id = 3", ""), ":9: slot[1].id is missing"),
        (TOML.replace("size = 16384", "size = 0"), f":13: {SIZE} 0"),
        (TOML.replace("16384", '"4 MiB"'), f":13: {SIZE} '4 MiB'"),
        (TOML.replace("16384", "true"), f":13: {SIZE} True"),
        (TOML.replace("16384", "1.5"), f":13: {SIZE} 1.5"),
        (TOML.replace("16384", '"0x1' + "0" * 16 + '"'), f":13: {SIZE} '0x10000000000000000'"),
        (TOML.replace("16384", '"' + "9" * 9999 + '"'), f":13: {SIZE} '{'9' * 59}"),
        (TOML.replace("= 0x4000_0000", "= -4096"), f":4: slot[0].gpa expected an address of 64 bits, {AS} -4096"),
        (TOML.replace("id = 3", "id = 32767"), f":10: slot[1].id expected an id below 32767, {AS} 32767"),
        (TOML.replace("readonly = true", "readonly = 1"),
         ":14: slot[1].readonly input should be a valid boolean, found 1"),
        (TOML.replace("readonly", "read_only"), ":14: slot[1].read_only is no key here"),
        (TOML.replace("id = 3\nas_id = 1", "id = 0"), ":10: slot[1].id is 0, as in slot[0]"),
        (TOML.replace("id = 3", "id ="), ":10:5: not TOML: Invalid value"),
        ("hello\n", ":1:6: not TOML: Expected '=' after a key in a key/value pair"),
        ("[[slot]]\nid", ": not TOML: Expected '=' after a key in a key/value pair (at end of document)"),
        ("{'slot': 1}", ":1:2: not JSON: Expecting property name enclosed in double quotes"),
        ('{"a":' + "[" * 100_000, ": nested too deeply for a list of slots"),
        ("\udcff", ": neither a list of slots (TOML, JSON) nor a recording in text form"),
        ("# " + "x" * (5 << 20), ": more than 4194304 bytes are no list of slots"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_said_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UsageError) as error:
        read_slots(path)
    assert str(error.value) == f"{path}{message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", ": the file expected keys with values, found [1]"),
        ('"x"', ": the file expected keys with values, found 'x'"),
        ('{"slot": [1]}', ": slot[0] expected keys with values, found 1"),
        ("// slots\n{}", ":1:1: not JSON: Expecting value"),
    ],
)
def test_a_file_that_is_called_json_is_read_as_json(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.JSON"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        read_slots(path)
    assert str(error.value) == f"{path}{message}"


def test_the_same_id_in_two_address_spaces() -> None:
    source = read_slots(io.BytesIO(TOML.replace("id = 3", "id = 0").encode()))
    assert [c.slot for c in source.changes] == [0, 1 << 16]


def test_files_that_are_neither(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none: No such file or directory$"):
        read_slots(tmp_path / "none")
    with pytest.raises(TraceError, match=r"^<stream>:1: a binary trace\.dat"):
        read_slots(io.BytesIO(b"\x17\x08\x44tracing7\0"))
    with pytest.raises(TraceError, match=r"guest_fault.trace.txt:1: the recording holds no memslot event"):
        read_slots(DATA / "guest_fault.trace.txt")


@given(st.binary(max_size=200) | st.text(st.sampled_from('[]slot =\n"0x{}:,#id'), max_size=80).map(str.encode))
def test_any_bytes_give_slots_or_one_line(content: bytes) -> None:
    error = ""
    try:
        read_slots(io.BytesIO(content))
    except KvmfaultError as e:
        error = str(e)
    assert error
    assert "\n" not in error


# -- recorded changes --------------------------------------------------------------------------------


def test_one_vm() -> None:
    source = read_slots(DATA / "one_vm.aux.txt")
    assert source.vms == ("0xffffc90000735000",)
    assert source.timed
    assert source.notes == ("8 changes of memslots, VMs: 1",)
    assert [(c.slot, c.flags, c.gpa, c.size, c.ret) for c in source.changes] == [
        (0, 1, 0, 0x400000, 0),
        (1, 2, 0x600000, 0x4000, 0),
        (2, 0, 0x1000000, 0x400000, 0),
        (1, 2, 0x600000, 0, 0),
        (1, 0, 0x600000, 0x4000, 0),
        (1, 0, 0x700000, 0x4000, 0),
        (2, 1, 0x1000000, 0x400000, 0),
        (2, 0, 0x1000000, 0x400000, 0),
    ]
    first = source.changes[0]
    assert (first.line, first.time, first.end, first.hva) == (13, 84112910000, 84113313000, 0x7FB53F400000)


def test_vms_are_told_apart_with_and_without_the_pointer() -> None:
    content = (DATA / "vms.aux.txt").read_bytes()
    named = read_slots(io.BytesIO(content))
    assert [len([c for c in named.changes if c.vm == vm]) for vm in named.vms] == [4, 4, 7, 3]
    bare = read_slots(io.BytesIO(re.sub(rb" kvm=\w+", b"", content)))
    assert bare.vms == ("vm1", "vm2", "vm3", "vm4")
    assert [bare.vms.index(c.vm) for c in bare.changes] == [named.vms.index(c.vm) for c in named.changes]


def change(
    task: int, slot: int, gpa: int, size: int, hva: int, *, kvm: str = "", flags: int = 0, ret: str = "0"
) -> list[str]:
    """The lines of one change; ret "" leaves out the return."""
    head = f"{'qemu':>16}-{task:<7d} [000] ..... "
    vm = f"kvm={kvm} " if kvm else ""
    body = f"memslot: (f+0x4/0x4f0) {vm}slot={slot} flags={flags:#x} gpa={gpa:#x} size={size:#x} hva={hva:#x}"
    return [f"{head}1.000000: {body}", *([f"{head}1.000001: memslot_ret: (g+0x1/0x2 <- f) ret={ret}"] if ret else [])]


M = 1 << 20
A = change(1, 0, 0, M, 0x10000)


@pytest.mark.parametrize(
    ("changes", "vms"),
    [
        ([A, change(1, 1, M, M, 0x90000)], "aa"),
        ([A, change(1, 1, M // 2, M, 0x90000)], "ab"),  # overlap
        ([A, change(1, 1 << 16, M // 2, M, 0x90000)], "aa"),  # another address space
        ([A, change(1, 0, 4 * M, M, 0x10000)], "aa"),  # a move
        ([A, change(1, 0, 0, M, 0x20000)], "ab"),  # other user memory
        ([A, change(1, 0, 0, 2 * M, 0x10000)], "ab"),  # another size
        ([A, change(1, 0, 0, M, 0x10000, flags=1)], "aa"),
        ([A, change(1, 0, 0, M, 0x10000, flags=2)], "ab"),  # read-only cannot change
        ([A, change(1, 5, 0, 0, 0)], "ab"),  # nothing to delete
        ([A, change(1, 0, 0, 0, 0), change(1, 0, 0, 2 * M, 0x20000)], "aaa"),
        ([A, change(1, 0, 0, M, 0x20000, ret="-22")], "aa"),  # refused, so nothing is wrong with it
        ([A, change(1, 1, 0, M, 0x20000, ret="-17"), change(1, 1, M, M, 0x30000)], "aaa"),
        ([A, change(1, 0, 0, M, 0x20000, ret="")], "ab"),  # not known: taken as accepted
        ([A, change(2, 1, M, M, 0x90000)], "aa"),  # two tasks of one VM
        ([A, change(2, 0, 0, M, 0x20000), change(1, 1, M, M, 0), change(2, 1, M, M, 1 << 30)], "abab"),  # interleaved
        ([A, change(1, 0, 0, M, 0x20000), change(1, 0, 0, 0, 0), change(1, 0, 0, M, 7)], "abbb"),
    ],
)
def test_the_rule_without_a_pointer(changes: list[list[str]], vms: str) -> None:
    source = read_slots(io.BytesIO("\n".join(itertools.chain(*changes)).encode()))
    assert [c.vm for c in source.changes] == [f"vm{'abc'.index(v) + 1}" for v in vms]


def test_a_pointer_can_be_used_again() -> None:
    lines = [*change(1, 0, 0, M, 1 << 20, kvm="0xf00"), *change(1, 0, 0, M, 1 << 20, kvm="0xba0"),
             *change(1, 0, 0, M, 1 << 30, kvm="0xf00"), *change(1, 1, M, M, 1 << 30, kvm="0xf00")]  # fmt: skip
    source = read_slots(io.BytesIO("\n".join(lines).encode()))
    assert [c.vm for c in source.changes] == ["0xf00", "0xba0", "0xf00#2", "0xf00#2"]


def test_refused_unknown_and_nested_returns() -> None:
    first, second, third = change(1, 0, 0, M, 0, ret="-17"), change(2, 1, M, M, 0), change(1, 2, 9 * M, M, 0, ret="")
    lines = [first[0], second[0], second[1], "CPU:0 [LOST 3 EVENTS]", first[1], *third]
    source = read_slots(io.BytesIO("\n".join(lines).encode()))
    assert [c.ret for c in source.changes] == [-17, 0, None]
    assert source.notes == (
        "3 changes of memslots, VMs: 1", "1 of them refused", "1 without a return value, taken as accepted",
        "3 events lost: slots may be wrong",
    )  # fmt: skip


def test_a_change_that_does_not_read_is_an_error() -> None:
    line = A[0].replace("size=0x100000", "size=?")
    with pytest.raises(
        TraceError, match=rf"^<stream>:1:{line.index('?') + 1}: memslot: expected size as a hexadecimal"
    ):
        read_slots(io.BytesIO(line.encode()))


# -- inference ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoded:
    gpa: Gpa | None
    is_write: bool

    def kvm_get_fault_gpa(self) -> Gpa | None:
        return self.gpa


def decode(fault: FaultEvent) -> Decoded:
    gpa = fault.registers.get("gpa")
    return Decoded(None if gpa is None else Gpa(gpa), bool(fault.registers.get("write")))


def fault(page: int, *, write: bool = False, vcpu: str = "0") -> FaultEvent:
    return FaultEvent(1, 0, vcpu, "any", {"gpa": page * PAGE, "write": write})


def mmio(page: int, *, write: bool = False, vcpu: str = "0") -> MmioEvent:
    return MmioEvent(1, 0, vcpu, Gpa(page * PAGE + 8), 4, write, 0, True)


def entry(vcpu: str = "0") -> EntryEvent:
    return EntryEvent(1, 0, vcpu)


def touched(*pages: int) -> list[Event]:
    return [fault(page) for page in pages]


def emulated(*pages: int) -> list[Event]:
    return [event for page in pages for event in (fault(page), mmio(page), entry())]


def rom(page: int) -> list[Event]:
    return [fault(page), entry(), fault(page, write=True), mmio(page, write=True), entry()]


def inferred(events: list[Event], page_size: int = PAGE) -> list[tuple[int, int, int]]:
    source = infer_slots(events, decode, page_size=page_size)
    return [(c.gpa // page_size, (c.gpa + c.size) // page_size, c.flags) for c in source.changes]


DENSE = range(0x1010, 0x1010 + 64)


@pytest.mark.parametrize(
    ("events", "slots"),
    [
        ([], []),
        (touched(*DENSE), [(0x1010, 0x1050, RAM)]),
        (touched(*DENSE[1:]), [(0x1000, 0x1050, RAM)]),  # a short first run begins at the 2 MiB boundary
        ([*touched(*DENSE[1:]), *emulated(0x1008)], [(0x1009, 0x1050, RAM)]),  # but behind what is no memory
        (touched(*DENSE, 0x124F), [(0x1010, 0x1250, RAM)]),  # a gap of just under 2 MiB
        (touched(*DENSE, 0x1251), [(0x1010, 0x1050, RAM), (0x1200, 0x1252, RAM)]),
        ([*touched(*DENSE, 0x1110), *emulated(0x1080)], [(0x1010, 0x1050, RAM), (0x1081, 0x1111, RAM)]),
        (touched(*range(0x1000, 0x1400), 0x1800), [(0x1000, 0x1A00, RAM)]),  # a gap as large as the slot, and a block
        (touched(*range(0x1000, 0x1400), 0x1801), [(0x1000, 0x1400, RAM), (0x1800, 0x1802, RAM)]),
        (touched(0x1000, 0x1200, 0x1400), [(0x1000, 0x1600, RAM)]),  # blocks, each touched once
        ([*touched(0x1000, 0x1200), *emulated(0x1300)], [(0x1000, 0x1300, RAM)]),
        (touched(*DENSE, 0x11FF, 0x1200), [(0x1010, 0x1201, RAM)]),  # but only where it stands alone
        ([*touched(0x1000, 0x1200), *rom(0x1210)], [(0x1000, 0x1210, RAM), (0x1210, 0x1211, ROM)]),
        (touched(0x1000, 0x1010), [(0x1000, 0x1011, RAM)]),
        (emulated(1, 2, 3), []),
        ([fault(1), mmio(2), entry()], [(0, 2, RAM)]),  # an access to another page says nothing about this one
        ([fault(1), mmio(1, vcpu="1"), entry()], [(0, 2, RAM)]),  # nor one by another vCPU
        ([fault(1), ExitEvent(1, 0, "0", ""), mmio(1), entry()], [(0, 2, RAM)]),  # nor one after the next exit
        ([fault(1), fault(3), mmio(3)], [(0, 2, RAM)]),
        ([fault(1, vcpu="0"), fault(3, vcpu="1"), mmio(1, vcpu="0"), mmio(3, vcpu="1")], []),
        (rom(5), [(5, 6, ROM)]),
        ([*rom(5), *touched(4, 6, 8)], [(4, 7, ROM), (7, 9, RAM)]),  # a run is one slot, nothing joins it
        # memory was written beside it: a page of its own, which comes and goes
        ([*rom(5), fault(6, write=True)], [(6, 7, RAM), (5, 6, RAM), (5, 5, RAM)]),
        ([*rom(5), mmio(5)], [(5, 6, RAM), (5, 5, RAM)]),  # reads were emulated too: no memory at that time
    ],
)
def test_what_events_tell(events: list[Event], slots: list[tuple[int, int, int]]) -> None:
    assert inferred(events) == slots


def test_a_page_that_comes_and_goes_does_so_at_the_fault_that_shows_it() -> None:
    def at(time: int, *events: Event) -> list[Event]:
        return [dataclasses.replace(event, time=time) for event in events]

    events = [*at(10, fault(5), entry()), *at(20, fault(5), mmio(5), entry()), *at(30, fault(5), entry())]
    source = infer_slots(events, decode)
    assert [(c.time, c.size) for c in source.changes] == [(0, PAGE), (20, 0), (30, PAGE)]
    assert source.timed
    assert source.made_up
    later = infer_slots([*at(10, fault(5), mmio(5), entry()), *at(20, fault(5), entry())], decode)
    assert [(c.time, c.size) for c in later.changes] == [(20, PAGE)]
    gave_up = UserspaceExitEvent(1, 20, "0", "KVM_EXIT_INTERNAL_ERROR", 0)
    fetch = infer_slots([*at(20, fault(5)), gave_up, *at(30, entry())], decode)
    assert fetch.changes == ()


def test_pages_of_another_size() -> None:
    faults: list[Event] = [FaultEvent(1, 0, "0", "any", {"gpa": gpa}) for gpa in (0x3000, 0x4000, 0x5000, 0xB000)]
    assert inferred(faults, 0x4000) == [(0, 3, RAM)]


def test_notes_say_what_was_made_up_and_what_is_not_known() -> None:
    events = [*rom(5), *touched(9), FaultEvent(1, 0, "0", "any", {})]
    assert infer_slots(events, decode).notes == (
        "slots inferred: 2, from 2 touched pages; user addresses are made up",
        "read-only among them, since their writes were emulated: 1",
        "faults without a guest-physical address, which told nothing: 1",
    )


PAGES = st.integers(0, 0x800) | st.sampled_from((0x1000, 0x1200, 0x3FFFF, 0x40000, 1 << 24))
BURSTS = st.lists(
    st.one_of(
        PAGES.map(lambda p: touched(p)),
        PAGES.map(lambda p: emulated(p)),
        PAGES.map(rom),
        PAGES.flatmap(lambda p: st.integers(1, 200).map(lambda n: touched(*range(p, p + n)))),
    ),
    max_size=12,
)


@given(BURSTS)
def test_inferred_slots_hold_the_memory_and_nothing_that_was_only_emulated(bursts: list[list[Event]]) -> None:
    events = list(itertools.chain(*bursts))
    source = infer_slots(events, decode)
    by_slot = {c.slot: (c.gpa // PAGE, (c.gpa + c.size) // PAGE) for c in source.changes if c.size}
    held = sorted(by_slot.values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(held))
    assert sorted(by_slot) == list(range(len(held)))
    # An independent reading: an emulated access directly behind its fault.
    memory = set()
    for event, behind in itertools.zip_longest(events, events[1:]):
        if isinstance(event, FaultEvent):
            gpa = event.registers["gpa"]
            if not (isinstance(behind, MmioEvent) and behind.gpa // PAGE == gpa // PAGE):
                memory.add(gpa)
    other = {e.gpa & -PAGE for e in events if isinstance(e, MmioEvent)} - memory
    assert all(any(a * PAGE <= gpa < b * PAGE for a, b in held) for gpa in memory)
    assert not any(a * PAGE <= gpa < b * PAGE for a, b in held for gpa in other)


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 33)), max_size=6))
def test_made_up_addresses(areas: list[tuple[int, int]]) -> None:
    gpas = [(Gpa(page * PAGE), size * PAGE) for page, size in areas]
    placed = place(gpas)
    assert all((hva - gpa) % (1 << 30) == 0 for hva, (gpa, _) in zip(placed, gpas, strict=True))
    ends = [hva + size for hva, (_, size) in zip(placed, gpas, strict=True)]
    assert all(end <= hva for end, hva in zip(ends, placed[1:], strict=False))


# -- comparison --------------------------------------------------------------------------------------


def slots(*areas: tuple[int, int], ret: int | None = 0) -> SlotSource:
    return SlotSource(
        "test", tuple(SlotEvent(0, 0, "", n, 0, Gpa(a * PAGE), s * PAGE, Hva(0), ret) for n, (a, s) in enumerate(areas))
    )


AREAS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=6)


@given(AREAS, AREAS)
def test_comparison_counts_like_sets(mine: list[tuple[int, int]], true: list[tuple[int, int]]) -> None:
    have = {p for a, s in mine for p in range(a, a + s)}
    want = {p for a, s in true for p in range(a, a + s)}
    c = compare_slots(slots(*mine), slots(*true))
    assert (c.matched, c.missed, c.invented) == (len(have & want), len(want - have), len(have - want))
    for ranges, pages in ((c.missed_ranges, want - have), (c.invented_ranges, have - want)):
        listed = [p for gpa, size in ranges for p in range(gpa // PAGE, (gpa + size) // PAGE)]
        assert listed == sorted(pages)
        assert all(a[0] + a[1] < b[0] for a, b in itertools.pairwise(ranges))


def test_refused_changes_were_never_memory() -> None:
    assert compare_slots(slots((0, 4)), slots((0, 4), ret=-22)).invented == 4
    assert compare_slots(slots((0, 4)), slots((0, 4), ret=None)).matched == 4


# -- real recordings: a small assembler for two architectures ----------------------------------------

MMIO = Pattern("mmio {type:w} len {len:d} gpa {gpa:x} val {val:x}")
ARM64 = {
    "kvm_guest_fault": Pattern("ipa {ipa:x}, hsr {hsr:x}, hxfar {hxfar:x}, pc {pc:x}"),
    "kvm_entry": Pattern("PC: {pc:x}"),
    "kvm_mmio": MMIO,
}
X86 = {
    "kvm_page_fault": Pattern("vcpu {vcpu:d} rip {rip:x} address {address:x} error_code {error_code:x}"),
    "kvm_entry": Pattern("vcpu {vcpu:d}, rip {rip:x}"),
    "kvm_mmio": MMIO,
}


def assemble(path: Path) -> Iterator[Event]:
    for event, fields in read_fields(path, ARM64 if "arm64" in str(path) else X86):
        n, vcpu = fields.numbers, str(event.pid)
        match event.name:
            case "kvm_mmio":
                kind = fields.words["type"]
                yield MmioEvent(event.line, event.time, vcpu, Gpa(n["gpa"]), n["len"], kind == "write", n["val"], True)
            case "kvm_entry":
                yield EntryEvent(event.line, event.time, vcpu)
            case "kvm_guest_fault":  # kvm_is_write_fault
                walk, permission = n["hsr"] & 1 << 7, n["hsr"] & 0x3C == 0x0C
                write = permission if walk else n["hsr"] >> 26 == 0x24 and bool(n["hsr"] & 1 << 6)
                yield FaultEvent(event.line, event.time, vcpu, "arm64", {"gpa": n["ipa"], "write": write})
            case _:
                registers = {"gpa": n["address"] & -PAGE, "write": n["error_code"] & 2}
                yield FaultEvent(event.line, event.time, vcpu, "x86-npt", registers)


def trace_of(folder: Path) -> Path:
    return next(p for p in folder.iterdir() if p.name in ("trace.txt", "trace.txt.gz"))


def aux_of(folder: Path) -> Path:
    return next(p for p in folder.iterdir() if p.name in ("aux.txt", "aux.txt.gz"))


# Pages matched, missed and invented. What is missed was never touched: behind the last touch of a slot
# above all. The three that invent: two VMs of one recording joined, a ROM's and a small slot's edges.
COMPARED = {
    "npt-behaviours": (87, 114, 15),
    "npt-demand_paging-2vcpu": (1555, 135, 0),
    "npt-demand_paging-anon": (1555, 130, 0),
    "npt-demand_paging-thp": (2581, 132, 0),
    "npt-dirty_log_small": (1559, 133, 0),
    "npt-dirty_ring_small": (1543, 149, 0),
    "npt-kvm_page_table-thp": (2581, 132, 0),
    "npt-linux-l2": (24609, 31, 448),
    "npt-longmode2-cpl3": (1666, 390, 0),
    "npt-memslot_mod_stress": (1042, 130, 0),
    "npt-pre_fault": (532, 638, 0),
    "nptlegacy-longmode2-cpl3": (1666, 390, 0),
}


@pytest.mark.parametrize("name", COMPARED)
def test_inferred_beside_recorded_slots(name: str) -> None:
    folder = recording(f"x86aux/{name}")
    c = compare_slots(infer_slots(assemble(trace_of(folder)), decode), read_slots(aux_of(folder)))
    assert (c.matched, c.missed, c.invented) == COMPARED[name]


# Changes and VMs.
RECORDED = dict.fromkeys(COMPARED, (4, 1)) | {
    "npt-behaviours": (151, 37),
    "npt-kvm_page_table-thp": (6, 1),
    "npt-linux-l2": (58, 1),
    "npt-longmode2-cpl3": (8, 1),
    "npt-memslot_mod_stress": (14, 1),
    "nptlegacy-longmode2-cpl3": (8, 1),
    "shadow-behaviours": (151, 37),
    "shadow-dirty_log_small": (4, 1),
    "shadow-longmode2-cpl3": (8, 1),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_slots(name: str) -> None:
    source = read_slots(aux_of(recording(f"x86aux/{name}")))
    assert (len(source.changes), len(source.vms)) == RECORDED[name]
    assert {c.ret for c in source.changes} == {0}


# The recordings of the other architecture hold no memslot change (their probe never fired), but every
# stage-2 mapping made, and their output names some of the memory.
TEST_MEMORY = {
    "a-demand_paging_thp": [(0xFFFFFFBE00000, 0xFFFFFFFE00000)],
    "a-demand_paging_uffd_missing": [(0xFFFFBFF000, 0xFFFFFFF000)],
    "a-dirty_log_dirty": [(0xFFFEFFC000, 0xFFFFFFF000)],
    "a-kvm_page_table": [(0xFFFFDFF000, 0xFFFFFFF000)],
    "b-a57-dirty_log_dirty": [(0xFFFEFFC000, 0xFFFFFFF000)],
    "c-16k-dirty_log_dirty": [(0xFFFEFF8000, 0xFFFFFFC000)],
    "r-a57-reclaim_demand_paging": [(0xFFFF7FF000, 0xFFFFFFF000)],
    "vm2-linux_guest_thp_dirty": [(0xC000000, 0xC010000), (0x80000000, 0x8E200000), (0x100000000, 0x108000000)],
    "a-page_fault_anon_P40_4K": [],
    "b-a57-page_fault_anon_P40_4K": [],
}


@pytest.mark.parametrize("name", TEST_MEMORY)
def test_what_was_mapped_is_in_an_inferred_slot(name: str) -> None:
    folder = recording(f"arm64/{name}")
    page_size = 0x4000 if "16k" in name else PAGE
    source = infer_slots(assemble(trace_of(folder)), decode, page_size=page_size)
    areas = [(c.gpa, c.gpa + c.size) for c in source.changes]
    assert all(any(a <= start and end <= b for a, b in areas) for start, end in TEST_MEMORY[name])
    with pytest.raises(TraceError, match="holds no memslot event"):
        read_slots(aux_of(folder))
    maps = {"s2_map": Pattern(assigned="addr:x size:x"), "s2_map_ret": Pattern(assigned="ret:d")}
    asked: dict[int, tuple[int, int]] = {}
    mapped = set()
    for event, fields in read_fields(aux_of(folder), maps):
        n = fields.numbers
        if event.name == "s2_map":
            asked[event.pid] = n["addr"], n["addr"] + n["size"]
        elif not n["ret"]:
            mapped.add(asked[event.pid])
    assert mapped
    assert all(any(a <= start and end <= b for a, b in areas) for start, end in mapped)
