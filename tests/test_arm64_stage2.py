"""Stage-2 descriptors and geometry of arm64, checked against what kernels built and the architecture defines."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arch.arm64.policy import policy_612
from arch.arm64.stage2 import FORMATS, Stage2
from kvmfault.contract.format import Kind, Memory, Prot, R, W, X, block_sizes
from kvmfault.errors import LayoutError
from kvmfault.types import Gpa, Hpa

K, M, G = 1 << 10, 1 << 20, 1 << 30
ALL: Final = [*FORMATS.values(), replace(FORMATS["4k"], ipa_bits=40), replace(FORMATS["16k"], ipa_bits=40)]
formats = st.sampled_from(ALL)


@pytest.mark.parametrize(
    ("fmt", "levels", "root_bits"),
    [
        # start levels that the recorded kernels used: L1 for 40 bits with 4K, L0 for 48 and 52, L2 for 40 with 16K
        (Stage2("", 12, 40), "L1 L2 L3", 10),
        (Stage2("", 12, 48), "L0 L1 L2 L3", 9),
        (Stage2("", 12, 52, lpa2=True), "L0 L1 L2 L3", 13),
        (Stage2("", 14, 40), "L2 L3", 15),
        (Stage2("", 14, 48), "L1 L2 L3", 12),
        (Stage2("", 14, 52, lpa2=True), "L0 L1 L2 L3", 5),
        (Stage2("", 16, 40), "L2 L3", 11),
        (Stage2("", 16, 52), "L1 L2 L3", 10),
        (Stage2("", 12, 43), "L1 L2 L3", 13),  # 16 tables side by side
        (Stage2("", 12, 44), "L0 L1 L2 L3", 5),
        (Stage2("", 16, 32), "L2 L3", 3),  # never the last level alone
    ],
)
def test_levels(fmt: Stage2, levels: str, root_bits: int) -> None:
    assert " ".join(level.name for level in fmt.levels) == levels
    assert fmt.levels[0].index_bits == root_bits
    assert root_bits <= fmt.page_shift - 3 + 4
    assert sum(level.index_bits for level in fmt.levels) + fmt.page_shift == fmt.gpa_bits


def test_block_sizes() -> None:
    assert {name: block_sizes(fmt) for name, fmt in FORMATS.items()} == {
        "4k": (4 * K, 2 * M, G),
        "16k": (16 * K, 32 * M),
        "64k": (64 * K, 512 * M),
        "4k-lpa2": (4 * K, 2 * M, G),
        "16k-lpa2": (16 * K, 32 * M),
    }


@pytest.mark.parametrize("fmt", ALL, ids=lambda f: f"{f.name}-{f.ipa_bits}")
def test_policy_sizes_are_sizes_of_the_format(fmt: Stage2) -> None:
    policy = policy_612(fmt)
    sizes = block_sizes(fmt)
    assert policy.area_sizes is not None
    assert set(policy.area_sizes.values()) | set(policy.fit_sizes) <= set(sizes)
    assert policy.area_sizes[sizes[0]] == sizes[0]
    assert policy.fit_sizes == (sizes[1],)


@pytest.mark.parametrize(
    ("page_shift", "bits", "lpa2", "text"),
    [
        (12, 52, False, "x: 52 bits of IPA; pages of 4K, 16K, 64K take 32 to 48"),
        (12, 31, False, "x: 31 bits of IPA; pages of 4K, 16K, 64K take 32 to 48"),
        (13, 40, False, "x: 40 bits of IPA; pages of 4K, 16K, 64K take 32 to 48"),
        (16, 48, True, "x: LPA2 is about pages of 4K and 16K"),
    ],
)
def test_refuses(page_shift: int, bits: int, lpa2: bool, text: str) -> None:
    with pytest.raises(LayoutError, match=f"^{text}$"):
        Stage2("x", page_shift, bits, lpa2)


# Descriptors spelled out from the architecture's tables.
@pytest.mark.parametrize(
    ("name", "shift", "hpa", "prot", "memory", "tag", "desc"),
    [
        ("4k", 12, 0x1_4001_2000, R | W, Memory.NORMAL, 0, 0x0040_0001_4001_27FF),
        ("4k", 12, 0x1_4001_2000, R | W | X, Memory.NORMAL, 0, 0x0000_0001_4001_27FF),
        ("4k", 21, 0x1_4000_0000, R, Memory.NORMAL, 0, 0x0040_0001_4000_077D),
        ("4k", 30, 0x1_4000_0000, R | W, Memory.DEVICE, 0, 0x0040_0001_4000_07C5),
        ("4k", 12, 0x1_4001_2000, R | W, Memory.NONCACHEABLE, 0, 0x0040_0001_4001_27D7),
        ("4k", 12, 0x1_4001_2000, R | W, Memory.NORMAL, 3, 0x01C0_0001_4001_27FF),
        ("16k", 25, 0x2_0200_0000, R | X, Memory.NORMAL, 0, 0x0000_0002_0200_077D),
        ("64k", 16, 0xF_1234_0001_0000, R | W, Memory.NORMAL, 0, 0x0040_1234_0001_F7FF),
        ("64k", 29, 0xA_0000_2000_0000, R | W, Memory.NORMAL, 0, 0x0040_0000_2000_A7FD),
        ("4k-lpa2", 12, 0xF_1234_5678_9000, R | W, Memory.NORMAL, 0, 0x0043_1234_5678_97FF),
        ("16k-lpa2", 25, 0x9_0000_0200_0000, R, Memory.NORMAL, 1, 0x00C1_0000_0200_067D),
    ],
)
def test_leaf(name: str, shift: int, hpa: int, prot: int, memory: Memory, tag: int, desc: int) -> None:
    fmt = FORMATS[name]
    assert hex(fmt.leaf(shift, Hpa(hpa), prot, memory, young=True, host_writable=True, tag=tag)) == hex(desc)
    entry = fmt.entry(desc, shift)
    assert (entry.kind, entry.hpa, entry.prot, entry.memory) == (Kind.LEAF, hpa, Prot(prot), memory)
    level = f"the nested guest's own entry is at level {tag}"
    assert any(level in note for note in entry.notes) is bool(tag)
    assert len(entry.notes) == bool(tag)


@given(formats, st.data())
def test_leaf_reads_back(fmt: Stage2, data: st.DataObject) -> None:
    level = data.draw(st.sampled_from([level for level in fmt.levels if level.leaf]))
    hpa = Hpa(
        data.draw(st.integers(0, (1 << (52 if fmt.lpa2 or fmt.page_shift == 16 else 48)) - 1)) & -(1 << level.shift)
    )
    prot, memory = data.draw(st.integers(0, 7)), data.draw(st.sampled_from(Memory))
    young, tag = data.draw(st.booleans()), data.draw(st.integers(0, 3))
    desc = fmt.leaf(level.shift, hpa, prot, memory, young=young, host_writable=False, tag=tag)
    entry = fmt.entry(desc, level.shift)
    assert (entry.kind, entry.hpa, entry.prot, entry.memory) == (Kind.LEAF, hpa, Prot(prot), memory)
    assert (entry.accessed, entry.dirty) == (young, bool(prot & W))
    assert len(entry.notes) == bool(tag)
    assert fmt.prot(fmt.write_protect(desc)) == prot & ~W
    assert fmt.is_young(fmt.with_young(desc, True))
    assert fmt.with_young(fmt.with_young(desc, not young), young) == desc
    more = data.draw(st.integers(0, 7))
    relaxed = fmt.add_prot(desc, more)
    assert fmt.prot(relaxed) == prot | more
    assert (relaxed ^ desc) & ~fmt.perm_mask == 0
    assert fmt.fix_write(desc) is None


@given(formats, st.data())
def test_pieces_of_a_block(fmt: Stage2, data: st.DataObject) -> None:
    blocks = [i for i, level in enumerate(fmt.levels) if level.leaf][:-1]
    i = data.draw(st.sampled_from(blocks))
    level, child = fmt.levels[i], fmt.levels[i + 1]
    prot = data.draw(st.integers(0, 7))
    hpa = Hpa(data.draw(st.integers(0, (1 << 47) - 1)) & -(1 << level.shift))
    block = fmt.leaf(level.shift, hpa, prot, Memory.NORMAL, young=True, host_writable=False, tag=2)
    index = data.draw(st.integers(0, (1 << level.shift - child.shift) - 1))
    piece = Hpa(hpa + (index << child.shift))
    wanted = fmt.leaf(child.shift, piece, prot, Memory.NORMAL, young=True, host_writable=False, tag=2)
    assert fmt.child_leaf(block, level.shift, child.shift, index) == wanted


@given(formats, st.integers(0, (1 << 48) - 1))
def test_table_reads_back(fmt: Stage2, address: int) -> None:
    hpa = Hpa(address & -(1 << fmt.page_shift))
    for level in fmt.levels[:-1]:
        desc = fmt.table(hpa, level.shift)
        assert fmt.kind(desc, level.shift) is Kind.TABLE
        assert fmt.hpa(desc, level.shift) == hpa
        assert fmt.entry(desc, level.shift).notes == ()


@given(formats, st.integers(0, (1 << 64) - 1), st.data())
def test_any_descriptor_has_words(fmt: Stage2, desc: int, data: st.DataObject) -> None:
    shift = data.draw(st.sampled_from(fmt.levels)).shift
    entry = fmt.entry(desc, shift)
    assert (entry.value, entry.kind) == (desc, fmt.kind(desc, shift))
    fmt.hpa(desc, shift)
    if entry.kind is Kind.EMPTY and desc:
        assert entry.notes


@pytest.mark.parametrize(
    ("name", "desc", "shift", "kind", "word"),
    [
        ("4k", 0x0, 12, Kind.EMPTY, ""),
        ("4k", 0x1, 12, Kind.EMPTY, "reserved: a page has bit 1 set"),
        ("4k", 0x1, 39, Kind.EMPTY, "reserved: this level has no blocks"),
        ("16k", 0x1, 36, Kind.EMPTY, "reserved: this level has no blocks"),
        ("4k", 0x4, 12, Kind.EMPTY, "owned by component 1 of pKVM"),
        ("4k", 0x400, 12, Kind.EMPTY, "locked"),
        ("4k", 0x8000_0000_0000_0000, 12, Kind.EMPTY, "invalid, other bits 0x8000000000000000"),
        ("4k-lpa2", 0x1, 39, Kind.LEAF, "none that KVM uses without FWB"),
        ("16k-lpa2", 0x1, 36, Kind.LEAF, "none that KVM uses without FWB"),
        ("64k", 0x1, 42, Kind.LEAF, "none that KVM uses without FWB"),
        ("4k", 0x0008_0001_4001_27FF, 12, Kind.LEAF, "DBM"),
        ("4k", 0x0010_0001_4001_27FF, 12, Kind.LEAF, "contiguous"),
        ("4k", 0x0020_0001_4001_27FF, 12, Kind.LEAF, "FEAT_XNX"),
        ("4k", 0x1_4001_26FF, 12, Kind.LEAF, "outer shareable"),
        ("4k", 0x1_4001_07FD, 21, Kind.LEAF, "nT"),
        ("4k", 0x1_4000_17FD, 21, Kind.LEAF, "bits 0x1000 set: reserved"),
        ("4k", 0x8000_0001_4001_2003, 21, Kind.TABLE, "bits 0x8000000000000000 set"),
    ],
)
def test_words(name: str, desc: int, shift: int, kind: Kind, word: str) -> None:
    entry = FORMATS[name].entry(desc, shift)
    assert entry.kind is kind
    assert (any(word in note for note in entry.notes)) if word else not entry.notes


def test_there_are_no_mmio_entries() -> None:
    for fmt in FORMATS.values():
        assert fmt.mmio(Gpa(0x9000000), R, 1) is None
        assert fmt.mmio_generation_bits() == 0
        assert fmt.kind(fmt.empty, fmt.page_shift) is Kind.EMPTY
