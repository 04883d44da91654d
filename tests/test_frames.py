"""Sets of frames against Python's own sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmfault.vm.frames import FrameSet

ENDS = st.integers(0, 40)
EDITS = st.lists(st.tuples(st.booleans(), ENDS, ENDS), max_size=30)


def made(edits: list[tuple[bool, int, int]]) -> tuple[FrameSet, set[int]]:
    frames, plain = FrameSet(), set[int]()
    for add, start, end in edits:
        if add:
            frames.add(start, end)
            plain |= set(range(start, end))
        else:
            assert frames.discard(start, end) is bool(plain & set(range(start, end)))
            plain -= set(range(start, end))
    return frames, plain


@given(EDITS, ENDS, ENDS)
def test_as_a_set(edits: list[tuple[bool, int, int]], start: int, end: int) -> None:
    frames, plain = made(edits)
    asked = set(range(start, end))
    assert list(frames) == sorted(plain)
    assert len(frames) == len(plain)
    assert bool(frames) is bool(plain)
    assert [n in frames for n in range(42)] == [n in plain for n in range(42)]
    assert {n for run in frames.meeting(start, end) for n in run} == plain & asked
    if asked:
        assert frames.covers(start, end) is (asked <= plain)


@given(EDITS)
def test_equal_sets_have_equal_keys_and_no_two_ranges_touch(edits: list[tuple[bool, int, int]]) -> None:
    frames, plain = made(edits)
    again = FrameSet()
    for n in sorted(plain, key=lambda n: (n % 7, n)):  # another order
        again.add(n)
    assert frames.key() == again.key() == frames.ranges()
    assert all(a.stop < b.start for a, b in zip(frames.ranges(), frames.ranges()[1:], strict=False))


@given(EDITS, EDITS)
def test_a_fork_is_another_set(edits: list[tuple[bool, int, int]], later: list[tuple[bool, int, int]]) -> None:
    frames, plain = made(edits)
    fork = frames.fork()
    for add, start, end in later:
        (fork.add if add else fork.discard)(start, end)
    assert set(frames) == plain


def test_one_frame_without_an_end_and_things_that_are_no_frames() -> None:
    frames = FrameSet()
    frames.add(5)
    assert (5 in frames, 6 in frames, "5" in frames) == (True, False, False)
    assert frames.discard(5)
    assert not frames.discard(5)
    assert not frames


def test_a_set_costs_what_its_ranges_cost() -> None:
    frames = FrameSet()
    frames.add(0, 1 << 40)
    frames.discard(1 << 20, (1 << 20) + 1)
    assert [len(run) for run in frames.ranges()] == [1 << 20, (1 << 40) - (1 << 20) - 1]
    assert frames.covers(1 << 21, 1 << 39)
