"""The invalidation protocol: every row of the kernel's truth table and sequence, and what they do not reach."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest

from kvmfault.types import U64, Gfn
from kvmfault.vm.invalidate import UNSET, Invalidation
from tests.conftest import VECTORS

DATA: Final = json.loads((VECTORS / "x86_vectors.json").read_text())
TABLE: Final = DATA["invalidate_truth_table"]
ROWS: Final = [dict(zip(TABLE["columns"], row, strict=True)) for row in TABLE["rows"]]


def test_vectors_are_all_here() -> None:
    assert (len(ROWS), len(DATA["invalidate_sequence"])) == (144, 21)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(str(v) for v in row.values()))
def test_truth_table(row: dict[str, Any]) -> None:
    inv = Invalidation()
    inv.in_progress = row["in_progress"]
    inv.range_start, inv.range_end = (int(row[k], 16) & U64 for k in ("range_start", "range_end"))
    inv.seq = 5
    seq = inv.seq - row["seq_changed"]
    gfn = Gfn(int(row["gfn"], 16))
    asked = (inv.retry(seq), inv.retry_gfn(seq, gfn), inv.retry_gfn_unsafe(seq, gfn), inv.warnings)
    assert asked == (row["retry"], row["retry_gfn"], row["retry_gfn_unsafe"], row["warn"])


def test_sequence() -> None:
    """The answers are text; the vectors print the state before a query (Q) asks its tests, and warnings by step."""
    inv, snapshot, got = Invalidation(), 0, []
    for step in DATA["invalidate_sequence"]:
        name, *words = step["op"].split()
        gfns = [Gfn(int(word, 16)) for word in words]
        before, tests = inv.warnings, ""
        match name:
            case "S":
                snapshot = inv.snapshot()
            case "B":
                inv.begin()
            case "A":
                inv.add(*gfns)
            case "E":
                inv.end()
        state = f"{name} inprog={inv.in_progress} seq={inv.seq} start={inv.range_start:x} end={inv.range_end:x}"
        warned = inv.warnings - before
        if name == "Q":
            answers = inv.retry(snapshot), inv.retry_gfn(snapshot, *gfns), inv.retry_gfn_unsafe(snapshot, *gfns)
            tests = " retry={:d} gfn={:d} unsafe={:d}".format(*answers)
        got.append(f"{state} warn={warned}{tests}")
    assert got == [step["state"] for step in DATA["invalidate_sequence"]]
    assert inv.bugged


def test_sequence_number_wraps_at_64_bits() -> None:
    inv = Invalidation()
    inv.seq = U64
    inv.begin()
    inv.add(Gfn(1), Gfn(2))
    inv.end()
    assert inv.seq == 0
    assert inv.retry(U64)


def test_pair_without_a_range_warns() -> None:
    inv = Invalidation()
    inv.begin()
    inv.end()
    assert (inv.warnings, inv.bugged) == (1, False)


def test_range_outside_a_pair_warns() -> None:
    inv = Invalidation()
    inv.add(Gfn(1), Gfn(2))
    assert (inv.warnings, inv.range_start, inv.range_end) == (1, 1, 2)


def test_first_begin_forgets_the_old_range_and_a_nested_one_does_not() -> None:
    inv = Invalidation()
    inv.begin()
    inv.add(Gfn(8), Gfn(9))
    inv.begin()
    assert (inv.range_start, inv.range_end) == (8, 9)
    inv.end()
    inv.end()
    inv.begin()
    assert (inv.range_start, inv.range_end) == (UNSET, UNSET)


def test_ranges_become_one_hull_whatever_their_order() -> None:
    for ranges in ([(2, 4), (10, 12)], [(10, 12), (2, 4)]):
        inv = Invalidation()
        inv.begin()
        for start, end in ranges:
            inv.add(Gfn(start), Gfn(end))
        assert (inv.range_start, inv.range_end) == (2, 12)


def test_notifier_calls_are_counted_apart() -> None:
    inv = Invalidation()
    inv.notifier_enters()
    inv.notifier_enters()
    inv.notifier_leaves()
    assert (inv.active, inv.in_progress, inv.seq, inv.warnings) == (1, 0, 0, 0)
    inv.notifier_leaves()
    inv.notifier_leaves()
    assert (inv.active, inv.warnings) == (0, 1)


def test_fork_is_independent_and_key_tells() -> None:
    inv = Invalidation()
    inv.begin()
    inv.add(Gfn(1), Gfn(2))
    copy = inv.fork()
    assert copy.key() == inv.key()
    before = inv.key()
    copy.end()
    copy.end()
    copy.notifier_enters()
    assert inv.key() == before != copy.key()
    assert len({inv.key(), copy.key()}) == 2
    for name in Invalidation.__slots__:
        other = inv.fork()
        setattr(other, name, not getattr(other, name))
        assert other.key() != inv.key(), name
