"""SPTE formats: bit for bit what kernels installed, and laws over all entries."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arch.x86.spte import (
    EPT_4K,
    EPT_4K_5LEVEL,
    EPT_4K_NO_AD,
    NPT_4K,
    SHADOW_4K,
    TAG_NESTED,
    TAG_SUPERVISOR,
    SpteFormat,
)
from kvmfault.contract.format import PROTS, Entry, Kind, Memory, Prot, R, W, X, block_sizes, level_of, watch_writes
from kvmfault.types import U64, Gpa, Hpa
from tests.conftest import ROOT, recordings

FORMATS: Final = {"x86-ept": EPT_4K, "x86-npt": NPT_4K, "x86-shadow": SHADOW_4K}
EXCERPTS: Final = sorted((ROOT / "tests" / "data" / "x86_sptes").glob("*.txt"))

# What kernels installed.

_SET: Final = re.compile(r"kvm_mmu_set_spte: gfn (\w+) spte (\w+) \((\S+)\) level (\d)")
_CHANGED: Final = re.compile(r"kvm_tdp_mmu_spte_changed: as id \d+ gfn (\w+) level (\d) old_spte (\w+) new_spte (\w+)")
_MMIO: Final = re.compile(r"check_mmio_spte: spte (\w+) kvm_gen \w+ spte-gen (\w+)")


@dataclass(frozen=True)
class Recorded:
    """One entry of a recording; ``text`` is what the kernel said of its permissions, None where it said nothing."""

    gfn: int
    desc: int
    level: int
    text: str | None = None
    generation: int | None = None


def recorded(lines: Iterator[str]) -> Iterator[Recorded]:
    for line in lines:
        if m := _SET.search(line):
            yield Recorded(int(m[1], 16), int(m[2], 16), int(m[4]), m[3])
        elif m := _CHANGED.search(line):
            for spte in (m[3], m[4]):
                yield Recorded(int(m[1], 16), int(spte, 16), int(m[2]))
        elif m := _MMIO.search(line):
            yield Recorded(-1, int(m[1], 16), 1, generation=int(m[2], 16))


def rebuilt(fmt: SpteFormat, entry: Entry, shift: int) -> int:
    """The same entry made by the format from what it says of itself."""
    match entry.kind:
        case Kind.TABLE:
            return fmt.table(entry.hpa or Hpa(0), shift)
        case Kind.MMIO:
            return fmt.mmio(entry.gpa or Gpa(0), entry.prot, entry.generation or 0)
        case Kind.EMPTY:
            return entry.value
    prot = entry.prot | (W if entry.mmu_writable else 0)
    desc = fmt.leaf(
        shift,
        entry.hpa or Hpa(0),
        prot,
        entry.memory or Memory.NORMAL,
        young=entry.accessed,
        host_writable=bool(entry.host_writable),
    )
    if entry.mmu_writable and not entry.prot & W:
        desc = fmt.write_protect(desc)
    if prot & W and not entry.dirty:  # replaced an entry that had the W bit, or was harvested (PML)
        desc = fmt.with_dirty(desc, False)
    return fmt.with_user(desc, False) if "supervisor only" in entry.notes else desc


def check(fmt: SpteFormat, record: Recorded) -> Kind:
    shift = 12 + 9 * (record.level - 1)
    entry = fmt.entry(record.desc, shift)
    assert rebuilt(fmt, entry, shift) == record.desc, record
    assert not [note for note in entry.notes if "mean nothing" in note or "reserved" in note], record
    if record.text is not None:
        assert record.text == f"{entry.prot}"[:1] + f"{entry.prot}"[1:] + ("u" if _admits_user(entry) else "-"), record
    if entry.kind is Kind.MMIO and record.gfn >= 0:
        assert entry.gpa == record.gfn << 12
    if record.generation is not None:
        assert (entry.kind, entry.generation) == (Kind.MMIO, record.generation)
    return entry.kind


def _admits_user(entry: Entry) -> bool:
    return "supervisor only" not in entry.notes


@pytest.mark.parametrize("path", EXCERPTS, ids=lambda p: p.stem)
def test_entries_that_kernels_installed(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = next(line for line in lines if line.startswith("# target")).split()
    fmt = replace(FORMATS[header[2]], l1tf_mask=int(header[4], 0))
    kinds = Counter(check(fmt, record) for record in recorded(iter(lines)))
    assert kinds[Kind.LEAF] >= 10
    assert kinds[Kind.MMIO]


def test_the_excerpts_are_there() -> None:
    assert {p.stem for p in EXCERPTS} == {"svm-npt", "svm-shadow", "vmx-ept", "vmx-ept-pml", "vmx-shadow"}


_L1TF: Final = {"e1": 0xF8 << 36, "e2": 0xF8 << 36, "e3": 0xF8 << 32}
"""Address bits marked by the mitigating kernels of the recordings made with these prefixes."""


@pytest.mark.parametrize("path", recordings("x86/*/trace.txt.gz"))
def test_entries_of_whole_recordings(path: Path) -> None:
    name = path.parent.name
    fmt = EPT_4K if name[:2] in ("e1", "e3") else SHADOW_4K if name[0] == "c" or name[:2] == "e2" else NPT_4K
    fmt = replace(fmt, l1tf_mask=_L1TF.get(name[:2], 0))
    with gzip.open(path, "rt", errors="replace") as lines:
        found = set(recorded(iter(lines)))
    kinds = Counter(check(fmt, record) for record in found)
    assert kinds[Kind.LEAF]


# Single entries in words.


@pytest.mark.parametrize(
    ("fmt", "desc", "shift", "members"),
    [
        (NPT_4K, 0x107400E67, 12, {"hpa": 0x107400000, "prot": "rwx", "dirty": True, "host_writable": True}),
        (NPT_4K, 0x107400E65, 12, {"prot": "r-x", "mmu_writable": True}),
        (NPT_4K, 0x8000000000000EE7, 21, {"hpa": 0, "prot": "rw-"}),
        (NPT_4K, 0x107CD7827, 30, {"kind": Kind.TABLE, "hpa": 0x107CD7000}),
        (NPT_4K, 0x8000003001037, 12, {"kind": Kind.MMIO, "gpa": 0x3001000, "generation": 6, "prot": "rw-"}),
        (EPT_4K, 0x86000000033F3B77, 12, {"hpa": 0x33F3000, "prot": "rwx", "memory": Memory.NORMAL}),
        (EPT_4K, 0x80000000036D8875, 12, {"prot": "r-x", "accessed": False, "host_writable": False}),
        (EPT_4K, 0x3000036, 12, {"kind": Kind.MMIO, "gpa": 0x3000000, "generation": 6, "prot": "---"}),
        (EPT_4K, 0x8000000000000000, 12, {"kind": Kind.EMPTY, "notes": ()}),
        (EPT_4K, 0x80000000000005A0, 12, {"kind": Kind.EMPTY, "notes": ("frozen: another vCPU is changing it",)}),
        (NPT_4K, 0x5A0, 12, {"kind": Kind.EMPTY, "notes": ("frozen: another vCPU is changing it",)}),
        (NPT_4K, 0, 12, {"kind": Kind.EMPTY, "notes": ()}),
        (EPT_4K, 0x107, 12, {"notes": ("not present: bit 11 is clear; bits 0x107 mean nothing to KVM",)}),
        (EPT_4K, 0x8000000000000837, 12, {"notes": ("memory type WB, guest PAT applies",), "memory": None}),
        (NPT_4K, 0x8A5, 39, {"notes": ("reserved: a PG_LEVEL_512G entry cannot be a leaf",)}),
        (NPT_4K, 0x821, 12, {"notes": ("supervisor only",)}),
    ],
)
def test_entry(fmt: SpteFormat, desc: int, shift: int, members: dict[str, object]) -> None:
    entry = fmt.entry(desc, shift)
    for name, value in members.items():
        found = getattr(entry, name)
        assert (str(found) if isinstance(found, Prot) else found) == value, name


def test_a_mark_of_the_l1tf_mitigation_is_pointed_out() -> None:
    entry = EPT_4K.entry(0xF8003001036, 12)
    assert entry.notes == ("on a host that mitigates L1TF, bits 43:39 are marks and the gpa is 0x3001000",)
    assert replace(EPT_4K, l1tf_mask=0xF8 << 36).entry(0xF8003001036, 12).gpa == 0x3001000


# Laws.

formats = st.sampled_from([EPT_4K, EPT_4K_5LEVEL, EPT_4K_NO_AD, NPT_4K, SHADOW_4K])
shifts = st.sampled_from([12, 21, 30])
words = st.integers(0, U64)
prots = st.sampled_from(PROTS)
readable = st.sampled_from([p for p in PROTS if p & R])


@given(formats, words, st.sampled_from([12, 21, 30, 39, 48]))
def test_any_value_is_explained(fmt: SpteFormat, desc: int, shift: int) -> None:
    entry = fmt.entry(desc, shift)
    assert entry.value == desc
    assert entry.kind is fmt.kind(desc, shift)
    assert (entry.hpa is None) == (entry.kind in (Kind.EMPTY, Kind.MMIO))


@given(formats, shifts, words, readable, st.sampled_from(Memory), st.booleans(), st.booleans())
def test_a_leaf_says_what_it_was_made_of(
    fmt: SpteFormat, shift: int, address: int, prot: Prot, memory: Memory, young: bool, host: bool
) -> None:
    hpa = Hpa(address & (1 << 51) - 1 & -(1 << shift))  # bit 51 is the MMIO mark where MAXPHYADDR allows it
    host = host or bool(prot & W)
    desc = fmt.leaf(shift, hpa, prot, memory, young=young, host_writable=host)
    entry = fmt.entry(desc, shift)
    assert (entry.kind, entry.hpa, entry.accessed, entry.host_writable) == (Kind.LEAF, hpa, young, host)
    assert entry.mmu_writable is bool(prot & W)
    shown = fmt.entry(fmt.with_young(desc, True), shift)
    assert shown.prot == (prot & ~W if not fmt.hardware_ad and not young else prot)
    assert fmt.kind(desc, shift) is Kind.LEAF
    if fmt.bits.memory_mask:
        assert entry.memory is memory


@given(formats, shifts, readable)
def test_access_tracking(fmt: SpteFormat, shift: int, prot: Prot) -> None:
    young = fmt.leaf(shift, Hpa(0), prot, Memory.NORMAL, young=True, host_writable=True)
    old = fmt.with_young(young, False)
    assert fmt.is_young(young)
    assert not fmt.is_young(old)
    assert fmt.kind(old, shift) is Kind.LEAF
    back = fmt.with_young(old, True)
    assert fmt.prot(back) | (W if fmt.fix_write(back) is not None else 0) == prot
    assert fmt.is_dirty(young) is bool(prot & W)
    if not fmt.hardware_ad:
        assert not fmt.is_dirty(old)
        assert fmt.prot(old) == 0
        assert fmt.fix_write(back) == (young if prot & W else None)


@given(formats, shifts, st.sampled_from([R | W, R | W | X]))
def test_write_protection_comes_and_goes(fmt: SpteFormat, shift: int, prot: int) -> None:
    desc = fmt.leaf(shift, Hpa(0), prot, Memory.NORMAL, young=True, host_writable=True)
    protected = fmt.write_protect(desc)
    assert fmt.prot(protected) == prot & ~W
    assert fmt.fix_write(protected) == desc
    readonly = fmt.leaf(shift, Hpa(0), prot & ~W, Memory.NORMAL, young=True, host_writable=False)
    assert fmt.fix_write(readonly) is None


@given(formats, prots, readable)
def test_added_permissions(fmt: SpteFormat, more: Prot, prot: Prot) -> None:
    desc = fmt.leaf(12, Hpa(0), prot, Memory.NORMAL, young=True, host_writable=True)
    added = fmt.add_prot(desc, more)
    assert fmt.prot(added) == prot | more
    if more & W:
        assert fmt.fix_write(fmt.write_protect(added)) == added
        assert fmt.entry(added, 12).host_writable


@given(formats, st.sampled_from([21, 30]), readable, st.integers(0, 511), st.integers(0, (1 << 22) - 1))
def test_pieces_of_a_block(fmt: SpteFormat, shift: int, prot: Prot, index: int, block: int) -> None:
    hpa = Hpa(block << 30 & (1 << 51) - 1)
    whole = fmt.leaf(shift, hpa, prot, Memory.NORMAL, young=True, host_writable=True)
    piece = fmt.child_leaf(whole, shift, shift - 9, index)
    same = fmt.leaf(shift - 9, Hpa(hpa + (index << shift - 9)), prot, Memory.NORMAL, young=True, host_writable=True)
    assert piece == same


@given(formats, words, prots, st.integers(0, U64), st.sampled_from([0, 0xF8 << 36, 0xF8 << 32]))
def test_mmio_entries_keep_address_and_generation(
    fmt: SpteFormat, address: int, prot: Prot, generation: int, l1tf_mask: int
) -> None:
    fmt = replace(fmt, l1tf_mask=l1tf_mask)
    gpa = Gpa(address & (1 << (l1tf_mask.bit_length() or 51)) - 1 & -4096)
    desc = fmt.mmio(gpa, prot, generation)
    entry = fmt.entry(desc, 12)
    assert (entry.kind, entry.gpa) == (Kind.MMIO, gpa)
    assert entry.generation == generation % (1 << fmt.mmio_generation_bits())
    assert entry.prot == (prot & (R | W) if fmt.bits.mmio_read else 0)
    assert not fmt.prot(desc) & R or fmt.bits is NPT_4K.bits


@pytest.mark.parametrize("fmt", [EPT_4K, EPT_4K_5LEVEL, NPT_4K], ids=["ept", "ept5", "npt"])
def test_geometry(fmt: SpteFormat) -> None:
    assert block_sizes(fmt) == (1 << 12, 1 << 21, 1 << 30)
    assert fmt.gpa_bits == 12 + sum(level.index_bits for level in fmt.levels) == 12 + 9 * len(fmt.levels)
    assert level_of(fmt, 1 << 21).name == "PG_LEVEL_2M"
    assert fmt.kind(fmt.empty, 12) is Kind.EMPTY
    assert fmt.kind(fmt.table(Hpa(0x1000), 21), 21) is Kind.TABLE
    assert fmt.perm_mask == 0


def test_entries_without_hardware_accessed_and_dirty_bits() -> None:
    assert EPT_4K_NO_AD.table(Hpa(0x1000), 21) == 0x8010000000001807
    entry = EPT_4K_NO_AD.entry(EPT_4K_NO_AD.table(Hpa(0x1000), 21), 21)
    assert entry.notes == ("hardware A/D bits are off for this entry",)
    old = EPT_4K_NO_AD.leaf(12, Hpa(0x1000), R | W | X, Memory.NORMAL, young=False, host_writable=True)
    assert old == 0x8750000000001870
    assert "access-tracked: permissions are saved in bits 54 and 56" in str(EPT_4K_NO_AD.entry(old, 12).notes)


def test_npt_cannot_grant_less_than_reading() -> None:
    assert NPT_4K.prot(NPT_4K.leaf(12, Hpa(0), X, Memory.NORMAL, young=True, host_writable=False)) == R | X
    assert EPT_4K.prot(EPT_4K.leaf(12, Hpa(0), X, Memory.NORMAL, young=True, host_writable=False)) == X


# Dirty logging.


@pytest.mark.parametrize(
    ("fmt", "shift", "tag", "hardware_log", "writable", "dirty"),
    [
        (EPT_4K, 12, 0, True, True, False),  # the processor logs the next write
        (EPT_4K, 21, 0, True, False, False),  # a block is to be split by a fault
        (EPT_4K, 12, TAG_NESTED, True, False, True),  # the log would tell addresses of the guest's guest
        (EPT_4K_NO_AD, 12, 0, True, False, False),  # no dirty bit: dirty is what is writable
        (EPT_4K, 12, 0, False, False, True),
        (EPT_4K, 21, 0, False, False, True),
        (NPT_4K, 12, 0, False, False, True),
        (SHADOW_4K, 12, TAG_SUPERVISOR, False, False, True),
    ],
)
def test_the_next_write_is_noted(
    fmt: SpteFormat, shift: int, tag: int, hardware_log: bool, writable: bool, dirty: bool
) -> None:
    desc = fmt.leaf(shift, Hpa(0x4000_0000), 7, Memory.NORMAL, young=True, host_writable=True, tag=tag)
    assert fmt.is_dirty(desc)
    watched = watch_writes(fmt, desc, shift, hardware_log=hardware_log)
    assert (bool(fmt.prot(watched) & W), fmt.is_dirty(watched)) == (writable, dirty)
    assert watched == watch_writes(fmt, watched, shift, hardware_log=hardware_log)
    assert fmt.fix_write(watched) == watched | 1 << 1  # the fault that finds it gives it back without the lock


@pytest.mark.parametrize("tag", [0, TAG_SUPERVISOR, TAG_NESTED, TAG_NESTED | TAG_SUPERVISOR])
@pytest.mark.parametrize("fmt", [EPT_4K, EPT_4K_NO_AD, NPT_4K, SHADOW_4K], ids=["ept", "no A/D", "npt", "shadow"])
def test_tags(fmt: SpteFormat, tag: int) -> None:
    def leaf(tag: int) -> int:
        return fmt.leaf(12, Hpa(0x1000), 7, Memory.NORMAL, young=True, host_writable=True, tag=tag)

    supervisor = fmt.bits.user if tag & TAG_SUPERVISOR else 0
    nested = 2 << 52 if tag & TAG_NESTED and fmt.hardware_ad else 0
    assert leaf(tag) == (leaf(0) | nested) & ~supervisor
