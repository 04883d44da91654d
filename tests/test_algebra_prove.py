"""Proofs against brute force in plain Python; a counterexample is the smallest there is."""

from __future__ import annotations

from functools import reduce
from itertools import product
from operator import and_

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.algebra import domain, prove
from kvmfault.algebra.domain import branches
from kvmfault.algebra.expr import ALWAYS, NEVER, Pred, Word, union
from kvmfault.algebra.layout import Field, join, register
from kvmfault.algebra.prove import MAX_BITS, bits_read, combinations, relate, where, words_differ
from kvmfault.errors import UsageError
from tests.expressions import SMALL, WIDE, Meant, preds

LOW = register("LOW", 4, "made up", P=(3, 2), Q=1, R=0)
FIELDS: tuple[Field, ...] = (*LOW, SMALL["A"], SMALL["C"], SMALL["E"])
SPACE = [{"LOW": low, "SMALL": small} for low in range(16) for small in range(512) if not small & 0b001_000_101]
"""Every value of the bits of FIELDS (and of bits 6 and 3, which no field has)."""


def smallest(witnesses: list[dict[str, int]], order: list[str]) -> dict[str, int]:
    """Fewest bits set, then lowest, register by register."""
    return min(witnesses, key=lambda w: (sum(v.bit_count() for v in w.values()), [w[name] for name in order]))


@given(preds(FIELDS), preds(FIELDS), preds(FIELDS))
def test_relate_is_brute_force(a: Meant, b: Meant, within: Meant) -> None:
    found = relate(a.pred, b.pred, within.pred)
    reads = union(a.pred.reads, b.pred.reads, within.pred.reads)
    assert found.reads == reads
    rows = {tuple(row[name] & mask for name, mask in reads.items()) for row in SPACE}
    # bits that are not read do not matter: what is left out is 0
    space = [{"LOW": 0, "SMALL": 0} | dict(zip(reads, row, strict=True)) for row in rows]
    cells: dict[str, list[dict[str, int]]] = {"both": [], "only_a": [], "only_b": [], "neither": []}
    for row in space:
        if within.holds(row):
            in_a, in_b = a.holds(row), b.holds(row)
            name = "both" if in_a and in_b else "only_a" if in_a else "only_b" if in_b else "neither"
            cells[name].append({n: row[n] for n in reads})
    for name, hits in cells.items():
        assert getattr(found, name) == len(hits)
        assert found.witnesses.get(name) == (smallest(hits, list(reads)) if hits else None)
    assert found.cases == sum(map(len, cells.values()))
    assert found.equal == (not cells["only_a"] and not cells["only_b"])
    assert found.a_implies_b == (not cells["only_a"])
    assert found.b_implies_a == (not cells["only_b"])
    assert found.disjoint == (not cells["both"])


@given(preds(FIELDS[:2]), preds(FIELDS[:2]), preds(FIELDS))
def test_representatives_prove_the_same(a: Meant, b: Meant, within: Meant) -> None:
    # bits that only narrow the question may be too many to enumerate; here they are few, and it is done both ways
    full = relate(a.pred, b.pred, within.pred)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove, "FEW_BITS", 0)
        few = relate(a.pred, b.pred, within.pred)
    assert few.cases <= full.cases
    assert (few.equal, few.a_implies_b, few.b_implies_a, few.disjoint) == (
        full.equal, full.a_implies_b, full.b_implies_a, full.disjoint,
    )  # fmt: skip
    assert few.witnesses == full.witnesses


@pytest.mark.parametrize("most", [1, 3, 64])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
@given(preds(FIELDS[:2]), preds(FIELDS[:2]), preds(FIELDS))
def test_branches_prove_the_same(chunk: int, most: int, a: Meant, b: Meant, within: Meant) -> None:
    full = relate(a.pred, b.pred, within.pred)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain, "FEW", 0)  # choices are few here, and all of them branch
        patch.setattr(domain, "MAX_BRANCHES", most)
        patch.setattr(domain, "CHUNK", chunk)
        alternatives = branches(within.pred)
        quick = relate(a.pred, b.pred, within.pred, by_kinds=True)
        witness = where(a.pred & ~b.pred & within.pred)
    assert len(alternatives) <= most
    for row in SPACE[::31]:
        assert any(all(part.on(row) for part in parts) for parts in alternatives) == within.holds(row)
    assert quick.witnesses == full.witnesses
    if witness is not None:  # it knows all registers; where one is not read, it is 0
        assert {name: witness.get(name, 0) for name in full.reads} == full.witnesses["only_a"]
    assert (witness is None) == full.a_implies_b


def test_what_hardware_never_does_is_not_combined_with_the_rest() -> None:
    # 64 bits that must be 0, and one of two choices of many bits: all at once they would be 2**32 kinds
    single = [WIDE.field_at(bit, bit).is_(0) for bit in range(32)]
    choice = (SMALL["A"].is_(1) & reduce(and_, single)) | SMALL["A"].is_(2)
    top = reduce(and_, (WIDE.field_at(bit, bit).is_(0) for bit in range(32, 64)))
    assert where(choice & top & WIDE.field_at(0, 0).is_set) == {"SMALL": 2 << 7, "WIDE": 1}
    assert where(choice & SMALL["A"].is_(3)) is None


def test_a_representative_is_the_smallest_of_its_kind() -> None:
    wide = WIDE.field_at(63, 20)
    found = relate(SMALL["F"].is_set, NEVER, within=~wide.one_of((0, 1, 2)))
    assert found.witnesses["only_a"] == {"SMALL": 1, "WIDE": 4 << 20}


@pytest.mark.parametrize("chunk", [1, 2, 16, 1 << 18])
@pytest.mark.parametrize("order", [("LOW", "SMALL"), ("SMALL", "LOW")])
def test_the_witness_does_not_depend_on_the_chunks(
    chunk: int, order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(domain, "CHUNK", chunk)
    low, small = LOW.field_at(3, 0).one_of((1, 4, 7)), SMALL["A"].one_of((1, 2))
    parts = {"LOW": low | small, "SMALL": small | low}
    found = relate(parts[order[0]], NEVER)
    assert list(found.reads) == list(order)
    assert found.witnesses["only_a"] == ({"LOW": 0, "SMALL": 128} if order[0] == "LOW" else {"SMALL": 0, "LOW": 1})


def test_known_relations() -> None:
    p, q = LOW["P"], LOW["Q"].is_set
    assert relate(p.one_of((1, 2)), p.one_of((1, 2, 3))).a_implies_b
    assert not relate(p.one_of((1, 2)), p.one_of((1, 2, 3))).b_implies_a
    assert relate(p.is_(1), p.is_(2)).disjoint
    assert relate(~(q & p.is_(0)), ~q | ~p.is_(0)).equal
    assert relate(q, ~q, within=NEVER).cases == 0
    everywhere = relate(ALWAYS, NEVER)
    assert (everywhere.cases, everywhere.only_a, everywhere.witnesses) == (1, 1, {"only_a": {}})


def test_within_narrows() -> None:
    p, q = LOW["P"], LOW["Q"].is_set
    assert not relate(p.is_(1), q).equal
    assert relate(p.is_(1), q, within=p.is_(1) & q | ~p.is_(1) & ~q).equal


@given(st.integers(0, (1 << 64) - 1).filter(lambda m: m.bit_count() <= 10), st.integers(0, 31))
def test_combinations_are_every_value_once(mask: int, other: int) -> None:
    rows = [
        tuple(int(v) for v in row)
        for part in combinations({"WIDE": mask, "LOW": other})
        for row in zip(part["WIDE"], part["LOW"], strict=True)
    ]

    def submasks(m: int) -> list[int]:
        bits = [1 << i for i in range(64) if m >> i & 1]
        return [sum(chosen) for chosen in product(*((0, b) for b in bits))]

    assert sorted(rows) == sorted(product(submasks(mask), submasks(other)))


def test_a_wide_field_is_tried_with_one_value_of_each_kind() -> None:
    wide = WIDE.field_at(63, 0)
    assert bits_read(wide.is_(0).reads) == 64
    some = relate(wide.one_of((0, 5)), wide.is_(5))
    assert (some.kinds, some.cases, some.both, some.only_a, some.only_b, some.neither) == (True, 3, 1, 1, 0, 1)
    assert some.witnesses["only_a"] == {WIDE.name: 0}
    overlap = relate(wide.is_(1 << 40), WIDE.field_at(63, 32).is_(1 << 8))
    assert (overlap.a_implies_b, overlap.b_implies_a) == (True, False)
    assert not relate(WIDE.field_at(5, 0).is_(0), ALWAYS).kinds


def test_a_domain_of_many_bits_is_divided() -> None:
    # a choice of two, one of which fixes each of 32 bits: all combinations of them would be refused
    many = reduce(and_, (WIDE.field_at(bit, bit).is_(0) for bit in range(32)))
    within = SMALL["A"].is_(1) & many | SMALL["A"].is_(2)
    found = relate(SMALL["A"].is_(1), WIDE.field_at(3, 3).is_set, within)
    assert found.kinds
    assert (found.both, found.witnesses["only_b"]) == (0, {"SMALL": 2 << 7, "WIDE": 8})


def test_too_many_bits_are_refused() -> None:
    many = reduce(and_, (WIDE.field_at(i, i).is_set for i in range(MAX_BITS + 1)))
    with pytest.raises(UsageError, match=rf"^29 bits are read, at most {MAX_BITS} can be enumerated: narrow"):
        relate(many, ALWAYS)
    tables = join(*(WIDE.field_at(i + 7, i).table({1: 1 << i}) for i in range(0, 32, 8)))
    with pytest.raises(UsageError, match=r"^32 bits are read"):
        words_differ(tables, Word(()))


# Words.

S = register("S", 6, "made up", HI=(5, 3), MID=2, LO=(1, 0))


def _value(f: Field, registers: dict[str, int]) -> int:
    return registers[f.register] >> f.lo & (1 << f.width) - 1


@st.composite
def small_words(draw: st.DrawFn) -> Word:
    """Disjoint pieces of a word of 8 bits: shifted fields, tables and a constant."""
    pieces: list[Word] = []
    at = 0
    for f in draw(st.permutations([*S, LOW["P"], S["LO"]])):
        kind = draw(st.sampled_from(["field", "table", "none"]))
        if kind == "field":
            pieces.append(f << at)
        elif kind == "table":
            values = st.integers(0, (1 << f.width) - 1)
            pieces.append(f.table(draw(st.dictionaries(values, values, min_size=1, max_size=3))) << at)
        at += f.width
    const = draw(st.sampled_from([0, 1 << at]))
    return join(*pieces, Word((), const))


@given(small_words(), small_words())
def test_words_differ_is_brute_force(a: Word, b: Word) -> None:
    reads = list(union(a.reads, b.reads))
    masks = union(a.reads, b.reads)
    hits = []
    for s, low in product(range(64), range(16)):
        row = {"S": s, "LOW": low}
        if all(row[n] & ~masks[n] == 0 for n in reads) and a.on(row) != b.on(row):
            hits.append({n: row[n] for n in reads})
    found = words_differ(a, b)
    assert (found is None) == (not hits)
    if found is not None:
        assert found == smallest(hits, reads)
    assert words_differ(a, a) is None


@pytest.mark.parametrize(
    ("a", "b", "witness"),
    [
        (WIDE.field_at(63, 0), join(WIDE.field_at(63, 32) << 32, WIDE.field_at(31, 0)), None),
        (WIDE["CROSS"], WIDE.field_at(40, 27), None),
        (WIDE["CROSS"], WIDE.field_at(40, 28) << 1, {"WIDE": 1 << 27}),
        (WIDE["THREE"], WIDE["THREE"].table({i: i for i in range(8)}), None),
        (WIDE["THREE"], WIDE["THREE"].table({i: i for i in range(7)}), {"WIDE": 7 << 2}),
        (WIDE["THREE"].table({5: 1}), WIDE["THREE"].table({5: 2}), {"WIDE": 5 << 2}),
        (WIDE["TOP"] << 3, SMALL["F"] << 3, {"WIDE": 0, "SMALL": 1}),
        (Word((), 3), Word((), 3), None),
        (Word((), 3), Word((), 4), {}),
        # the smallest is in the bits that are not enumerated
        (join(WIDE["TWO"].table({3: 1}), WIDE["TOP"] << 8), Word(()), {"WIDE": 1 << 63}),
    ],
)  # fmt: skip
def test_words_differ(a: Word, b: Word, witness: dict[str, int] | None) -> None:
    assert words_differ(a, b) == witness


def test_a_proof_is_not_a_test_of_samples() -> None:
    # one combination in 2^20 is wrong, and found
    wide = WIDE.field_at(19, 0)
    wrong = ~wide.is_(0xB_EEF5)
    assert relate(wrong, ALWAYS).witnesses["only_b"] == {"WIDE": 0xB_EEF5}
    assert isinstance(wrong, Pred)


@given(preds(FIELDS), preds(FIELDS), preds(FIELDS))
def test_representatives_find_what_every_combination_finds(a: Meant, b: Meant, within: Meant) -> None:
    full = relate(a.pred, b.pred, within.pred)
    limit, prove.FEW_BITS = prove.FEW_BITS, -1
    try:
        few = relate(a.pred, b.pred, within.pred)
    finally:
        prove.FEW_BITS = limit
    for name in ("both", "only_a", "only_b", "neither"):
        assert bool(getattr(few, name)) == bool(getattr(full, name))
    assert few.cases <= full.cases


def test_a_question_narrowed_by_wide_fields_can_be_answered() -> None:
    wide = register("R", 64, "test", A=(63, 8), B=(7, 1), C=0)
    inside = (wide["A"].is_(5) & wide["B"].is_(3)) | (wide["A"].is_(0) & wide["C"].is_set)
    answer = relate(wide["C"].is_set, wide["B"].is_(3), inside)
    assert answer.only_a
    assert answer.only_b
    assert answer.both
    assert not answer.neither
