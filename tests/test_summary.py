"""Summaries: figures against plain counting, parts against the whole, every reason, text and JSON."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmfault.contract.target import backends
from kvmfault.summary import latency, sums
from kvmfault.summary.figures import Summary
from kvmfault.summary.given import Source
from kvmfault.summary.meaning import Meaning
from kvmfault.summary.partial import FACTS, Partial, Reading
from kvmfault.summary.reasons import REASONS, STORM, Known, reason
from kvmfault.summary.repeats import Seen
from kvmfault.summary.run import summarise
from kvmfault.summary.telling import tell
from kvmfault.trace.faults import FaultColumns
from kvmfault.trace.recording import Lost, Meta
from tests.cli import Cli
from tests.conftest import ROOT, recording, recordings
from tests.summaries import (
    LEAF,
    NONE,
    READ_ONLY,
    READING,
    TABLE,
    Made,
    age,
    change,
    entry,
    exit_,
    fault,
    gathered,
    handled,
    misconfigured,
    mmio,
    stretches,
    unmap,
    user,
)  # fmt: skip

EXAMPLE = "examples/recordings/x86-ept-kvm_page_table.trace.txt.gz"
GOLDEN = ROOT / "tests" / "data" / "summary"


def told(events: Sequence[Made], *, lost: Sequence[Lost] = (), ticks: bool = False) -> Summary:
    """The summary of made-up events."""
    counts = Counter(event.name for event in events)
    source = Source("made up", Meta(kind="test", ticks=ticks, comms={1: "first"}), counts, lost)
    return tell(gathered(stretches(events)), READING, source)


def rows(summary: Summary, key: str, *columns: str) -> list[tuple[object, ...]]:
    """Those columns of a section; nothing if it is not there."""
    section = summary.section(key)
    return [tuple(record[c] for c in columns) for record in section.records()] if section else []


# -- figures against counting in plain Python over what trace-cmd prints

LINE = re.compile(r"-(\d+)\s+\[\d+\]\s+(\d+)\.(\d+): (\w+):\s*(.*)$")


def printed(path: Path) -> list[tuple[int, int, str, dict[str, str]]]:
    """(pid, time in us, event, fields) of a `trace-cmd report -R`."""
    with gzip.open(path, "rt") as file:
        found = [LINE.search(line) for line in file]
    return [
        (int(m[1]), int(m[2]) * 10**6 + int(m[3]), m[4], dict(w.split("=", 1) for w in m[5].split() if "=" in w))
        for m in found
        if m
    ]


@pytest.mark.parametrize(
    ("folder", "report", "frame_of"),
    [
        ("arm64/a-dirty_log_dirty", "report-raw.txt.gz", "ipa"),
        ("arm64/r-a57-reclaim_demand_paging", "report-raw.txt.gz", "ipa"),
        ("x86/b2-longmode2-cpl3", "report-R.txt.gz", "fault_address"),
        ("x86/b1-dirty_log_split", "report-R.txt.gz", "fault_address"),
    ],
)
def test_figures_are_those_of_plain_counting(folder: str, report: str, frame_of: str) -> None:
    lines = printed(recording(f"{folder}/{report}"))
    summary = summarise(str(recording(f"{folder}/trace.dat")))
    assert summary.events == Counter(name for _, _, name, _ in lines)

    frames, last, repeated, took = Counter[int](), dict[int, int](), 0, list[int]()
    mmio_counts: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0, 0])
    faults = 0
    for pid, time, name, f in lines:
        if frame_of in f and name in {"kvm_guest_fault", "kvm_page_fault"}:
            faults += 1
            frame = int(f[frame_of], 16) >> 12
            repeated += frames[frame] > 0
            frames[frame] += 1
        elif name == "kvm_exit":
            last[pid] = time
        elif name == "kvm_entry" and pid in last:
            took.append(time - last.pop(pid))
        elif name == "kvm_mmio":
            mmio_counts[int(f["gpa"], 16), int(f["len"])][int(f["type"])] += 1
    assert summary.about["faults"] == faults
    assert sum(n for (n,) in rows(summary, "kinds", "faults")) == faults  # type: ignore[misc]  # counts
    assert sum(n for *_, n in summary.rate) == sum(n for *_, n in summary.map) == faults
    assert sum(n for (n,) in rows(summary, "repeats", "faults")) == repeated  # type: ignore[misc]  # counts
    hottest = sorted(frames.items(), key=lambda c: (-c[1], c[0]))[:20]
    assert rows(summary, "hot_frames", "frame", "faults") == [(f << 12, n) for f, n in hottest if n > 1]
    devices = rows(summary, "mmio", "address", "bytes", "reads by user space", "reads", "writes")
    assert {(gpa, size): counts for gpa, size, *counts in devices} == mmio_counts
    assert sum(n for h in summary.histograms for *_, n in h.steps) == len(took)
    longest = max(high for h in summary.histograms for _, high, _ in h.steps) - 1
    assert max(took) * 1000 - 2000 <= longest <= (max(took) + 2) * 1000 * 33 // 32


@pytest.mark.parametrize("path", recordings("*/*/trace.dat"))
def test_every_recording_has_a_summary(path: Path) -> None:
    summary = summarise(str(path))
    listed = path.with_name("counts.txt")
    counts = listed.read_text().split() if listed.exists() else []
    numbers, names = [w for w in counts if w.isdigit()], [w for w in counts if not w.isdigit()]
    if len(numbers) == len(names):
        expected = {name.rpartition(":")[2]: int(n) for name, n in zip(names, numbers, strict=True)}
        if "tracing_mark_write" in expected:  # how the text names it
            expected["print"] = expected.pop("tracing_mark_write")
        # what trace-cmd itself writes into the buffer is not in every counts file
        assert {n: c for n, c in summary.events.items() if n in expected} == expected
    assert json.dumps([section.records() for section in summary.sections])


def test_the_big_recording_is_counted_whole() -> None:
    summary = summarise(str(recording("big_kvm_4.49M_v7zstd.dat")))
    assert summary.about["events"] == 4_492_656
    assert rows(summary, "mmio", "address", "reads", "reads by user space") == [(0xC0000000, 48_541, 48_541)]
    assert rows(summary, "lost", "cpu", "events")[0] == ("0", 6_401_059)


# -- parts and the whole

DROPPED = Made("kvm_mmu_zap_all_fast", 9, {"mmu_valid_gen": 0, "mmu_used_pages": 1})


def _events() -> st.SearchStrategy[list[Made]]:
    pids, gfns = st.integers(1, 2), st.sampled_from([1, 2, 513])
    big = LEAF | 1 << 7
    one = st.one_of(
        st.builds(handled, gfns, st.sampled_from([4, 6, 7, 0x14]), pids),
        st.builds(lambda p, r, a: [exit_(p, r, a)], pids, st.sampled_from([0x400, 0x60]), st.integers(0, 1 << 20)),
        st.builds(lambda g, p: [fault(g, 6, p)], gfns, pids),
        st.builds(lambda p, a: [entry(p, a)], pids, st.integers(0, 1 << 40)),
        st.builds(lambda g, new: [change(g, LEAF, new)], gfns, st.sampled_from([NONE, READ_ONLY])),
        st.builds(lambda g, new: [change(g & ~511, big, new, 2)], gfns, st.sampled_from([NONE, TABLE, big & ~2])),
        st.sampled_from([[unmap()], [age()], [DROPPED]]),
        st.builds(lambda k, p: [mmio(0xFEE000F0, k, 4, p)], st.integers(0, 2), pids),
        st.builds(lambda p: [user(p)], pids),
        st.builds(lambda g, p: [misconfigured(p), mmio(g << 12, 2, 4, p), entry(p)], gfns, pids),
    )
    return st.lists(one, min_size=2, max_size=30).map(lambda parts: [event for part in parts for event in part])


def _same(a: Partial, b: Partial) -> None:
    for name in ("span", "events", "time_scale", "place_scale", "block_scale"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.tables.keys() == b.tables.keys()
    pairs = [(a.tables[n], b.tables[n]) for n in a.tables]
    assert a.life is not None
    assert b.life is not None
    assert a.edges is not None
    assert b.edges is not None
    assert a.life.ever == b.life.ever
    for one, other in (*pairs, *zip(a.life[:3], b.life[:3], strict=True), *zip(a.edges, b.edges, strict=True)):
        assert (one is None) == (other is None)
        if isinstance(one, pl.DataFrame) and isinstance(other, pl.DataFrame):
            assert one.sort(one.columns[:3]).rows() == other.select(one.columns).sort(one.columns[:3]).rows()


@given(_events(), st.integers(1, 4))
def test_parts_come_to_the_whole(events: list[Made], length: int) -> None:
    _same(gathered(stretches(events, range(length, len(events), length))), gathered(stretches(events)))


@given(_events(), st.integers(1, 4))
def test_any_grouping_of_parts_comes_to_the_same(events: list[Made], length: int) -> None:
    faults = FaultColumns.of(facts=FACTS)
    parts = [
        READING.summarise(stretch, faults.take(stretch))
        for stretch in stretches(events, range(length, len(events), length))
    ]
    left = right = Partial()
    for part in parts:
        left = READING.merge(left, part)
    for part in reversed(parts):
        right = READING.merge(part, right)
    _same(left, right)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), min_size=1), st.integers(0, 60), st.integers(1, 12))
def test_a_sample_does_not_depend_on_the_cut(pairs: list[tuple[int, int]], cut: int, cap: int) -> None:
    rule = sums.Rule(("key",), cap)
    table = pl.DataFrame(pairs, schema={"key": pl.UInt64, "n": pl.UInt64}, orient="row")
    whole = sums.combine([table], rule)
    parts = sums.combine([sums.combine([t], rule) for t in (table[:cut], table[cut:])], rule)
    assert whole is not None
    assert parts is not None
    assert whole.rows() == parts.rows()
    assert whole.height == min(cap, table["key"].n_unique())
    exact = dict(table.group_by("key").agg(pl.col("n").sum()).iter_rows())
    assert all(exact[key] == n for key, n in whole.iter_rows())


@given(st.integers(0, (1 << 62) - 1))
def test_a_time_lies_in_its_step(ns: int) -> None:
    low, high = latency.bounds(int(latency.bucket(np.array([ns]))[0]))
    assert low <= ns < high
    assert high - low <= max(1, low // 32)


@given(st.lists(st.integers(0, 10**9), min_size=1), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_percentile_is_exact_to_its_step(took: list[int], share: float) -> None:
    counts = sorted(Counter(int(b) for b in latency.bucket(np.array(took))).items())
    told_ns = latency.percentile(counts, share, max(took))
    exact = sorted(took)[max(0, int(np.ceil(share * len(took))) - 1)]
    assert exact <= told_ns <= exact + exact // 32 + 1


# -- why a frame faults again

AGAIN = handled(7, code=7)
WRITTEN = handled(7, code=6)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([*WRITTEN, change(7, LEAF, NONE), *WRITTEN], "invalidation"),
        ([*WRITTEN, change(0, LEAF | 1 << 7, NONE, 2), *WRITTEN], "invalidation"),  # a large entry over the frame
        ([*WRITTEN, change(512, LEAF | 1 << 7, NONE, 2), *WRITTEN], "retried"),  # one over others
        ([*WRITTEN, change(8, LEAF, NONE), *WRITTEN], "retried"),
        ([change(7, LEAF, NONE), *WRITTEN, *WRITTEN], "retried"),  # before the first
        ([*WRITTEN, unmap(), *WRITTEN], "invalidation, likely"),
        ([*WRITTEN, unmap(), change(8, LEAF, NONE), *WRITTEN], "retried"),  # entries are told: it was another's
        ([*WRITTEN, change(7, LEAF, READ_ONLY), *AGAIN], "dirty logging"),
        ([*WRITTEN, *AGAIN], "dirty logging"),
        ([*WRITTEN, change(8, LEAF, NONE), *AGAIN], "spurious"),
        ([*handled(7), *AGAIN], "more rights"),
        ([*handled(7), *handled(7, code=0x15)], "more rights"),
        ([*WRITTEN, change(0, LEAF | 1 << 7, TABLE, 2), *WRITTEN], "large page split"),
        ([*WRITTEN, DROPPED, *WRITTEN], "table dropped"),
        ([*WRITTEN, age(), *WRITTEN], "aging"),
        ([unmap(), *WRITTEN, *handled(7, code=6, pid=2)], "several vCPUs"),
        ([unmap(), *WRITTEN, *WRITTEN], "retried"),
        ([*WRITTEN, *WRITTEN], "not recorded"),
        ([exit_(), fault(7), mmio(0x7010, 2), entry()] * 2, "device"),
        ([*WRITTEN, change(7, LEAF, NONE)] * (STORM + 1), "invalidation storm"),
        ([*WRITTEN, change(7, LEAF, NONE)] * STORM, "invalidation"),
    ],
)  # fmt: skip
def test_why_a_frame_faults_again(events: list[Made], why: str) -> None:
    summary = told(events)
    assert [name for (name,) in rows(summary, "repeats", "likely reason")] == [why]
    n = sum(e.name == "kvm_page_fault" for e in events) - 1
    assert rows(summary, "hot_frames", "frame", "faults", "again, why") == [(0x7000, n + 1, f"{why} {n}")]


def test_an_access_flag_fault_is_told_by_the_fault_alone() -> None:
    known = Known(entries=False, host=False)
    assert reason(Seen.ACCESS_FLAG | Seen.WRITE | Seen.WROTE, known) == "access flag"


def test_every_pair_of_faults_has_a_reason_that_the_manual_explains() -> None:
    names = {rule.name for rule in REASONS}
    for entries in (False, True):
        found = {reason(Seen(bits), Known(entries=entries, host=True)) for bits in range(1 << 12)}
        assert found <= names
    manual = (ROOT / "docs" / "summary.md").read_text()
    assert all(f"`{name}`" in manual for name in [*names, "device", "invalidation storm"])


# -- single sections


def test_exits_that_return_to_user_space_are_told_apart() -> None:
    summary = told([exit_(), fault(3), user(), entry(after=5000), exit_(), fault(4), entry(after=100)])
    assert sorted(rows(summary, "latency", "kind", "handled in", "exits", "max")) == [
        ("read, missing", "kernel", 1, 1100),
        ("read, missing", "user space", 1, 7000),
    ]
    assert rows(summary, "user_exits", "reason", "returns") == [("KVM_EXIT_MMIO", 1)]


def test_a_vcpu_is_its_number_where_the_event_tells_it() -> None:
    second = Made("kvm_page_fault", 9, {"fault_address": 0x5000, "error_code": 4, "vcpu_id": 2})
    summary = told([*handled(3, pid=7), exit_(9), second])
    assert sorted(rows(summary, "vcpus", "vcpu", "task", "faults")) == [("2", "9", 1), ("7", "7", 1)]


def test_faults_that_no_exit_tells_are_of_the_target_that_the_user_names(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("v-1 [000] 1.000000: kvm_page_fault: vcpu 0 rip 0x1 address 0x5000 error_code 0x182\n" * 3)
    unknown = cli("trace", "summary", str(path), "--json")
    assert unknown.json["about"]["faults"] == 0
    assert any(line.startswith("3 faults: no exit") for line in unknown.json["unsaid"])
    named = cli("trace", "summary", str(path), "--backend", "x86-ept", "--json").json
    assert [(t["backend"], t["faults"]) for t in named["targets"]] == [("x86-ept", 3)]
    cli("trace", "summary", str(path), "--backend", "x86-ep").refused("x86-ep")


def test_exits_whose_address_no_event_tells_are_said() -> None:
    faults, whole = FaultColumns.of(facts=FACTS), Partial()
    for frames in stretches([misconfigured(), entry()], [1]):
        whole = READING.merge(whole, READING.summarise(frames, faults.take(frames)))
    source = Source("made up", Meta(kind="test"), {"kvm_exit": 1}, unplaced=faults.stats.without_address)
    assert any(line.startswith("1 faults: no event tells the address") for line in tell(whole, READING, source).unsaid)


def test_an_exit_without_an_entry_is_no_time() -> None:
    summary = told([entry(), exit_(), exit_(), fault(1), exit_(2), entry()])
    assert [n for (n,) in rows(summary, "exits", "exits")] == [1]


def test_large_entries_by_what_became_of_them() -> None:
    big = LEAF | 1 << 7
    split = Made("kvm_mmu_split_huge_page", 9, {"gfn": 0, "spte": big, "level": 2, "errno": 0})
    failed = Made("kvm_mmu_split_huge_page", 9, {"gfn": 0, "spte": big, "level": 2, "errno": -12})
    changes = [change(0, big, TABLE, 2), change(0, TABLE, big, 2), change(0, big, NONE, 3), change(0, LEAF, NONE, 1)]
    summary = told([split, failed, *changes])
    assert {what: (size, n) for what, size, n in rows(summary, "large_pages", "what", "size", "entries")} == {
        "split ahead, all at once": (1 << 21, 1),
        "refused to split": (1 << 21, 1),
        "split: a table took its place": (1 << 21, 1),
        "formed: took the place of a table": (1 << 21, 1),
        "lost: taken away": (1 << 30, 1),
    }  # fmt: skip


def test_large_pages_that_were_refused_where_a_probe_tells_what_was_wanted() -> None:
    decided = [
        Made("aux:kvm_tdp_page_fault_ret", 1, {"__probe_func": 1, "ret": 5, "req_level": wanted, "goal_level": used})
        for wanted, used in ((2, 1), (2, 1), (2, 2), (3, 2), (1, 1), (9, 1))
    ]
    summary = told(decided)
    assert rows(summary, "large_pages", "what", "size", "entries") == [
        ("refused: a smaller one was mapped", 1 << 30, 1),
        ("refused: a smaller one was mapped", 1 << 21, 2),
    ]
    assert not any("refused" in line for line in summary.unsaid)
    assert not told(decided[4:5]).section("large_pages")
    assert any("refused" in line for line in told(handled(1)).unsaid)


def test_lost_events_are_told_with_their_time() -> None:
    summary = told(handled(1), lost=[Lost(3, 17, 1500, 2500), Lost(4, None, None, 2000)])
    assert rows(summary, "lost", "cpu", "events", "after", "before") == [("3", 17, 500, 1500), ("4", None, None, 1000)]
    assert any("events were lost" in line for line in summary.unsaid)


def test_what_is_missing_is_said() -> None:
    summary = told([unmap()])
    assert [line.partition(":")[0] for line in summary.unsaid] == [
        "faults", "times and reasons of exits", "times from exit to entry", "device accesses", "returns to user space",
        "how entries changed", "large pages that were refused",
    ]  # fmt: skip


def test_hostile_numbers_do_no_harm() -> None:
    top = (1 << 64) - 1
    wild = [
        *handled(top >> 12, code=top >> 33),
        change(top, top, NONE, 7),
        Made("kvm_unmap_hva_range", 9, {"start": top, "end": 0}),
        mmio(top, 3, top >> 32),
        entry(after=(1 << 62)),
        *handled(0),
    ]
    assert told(wild).about["faults"] == 2


# -- the command


@pytest.mark.parametrize("width", [80, 200])
def test_the_text_is_as_it_was(width: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(ROOT)
    done = cli("trace", "summary", EXAMPLE)
    assert done.status == 0
    assert done.out == (GOLDEN / f"{width}-x86-ept-kvm_page_table.txt").read_text()
    assert all(len(line) <= width for line in done.out.splitlines())


def test_json_has_every_event_and_every_section(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    data = cli("trace", "summary", EXAMPLE, "--json").json
    assert sum(data["events"].values()) == data["about"]["events"] == 5358
    assert data["kinds"][0] == {"kind": "write on walk, missing", "faults": 9, "share": 0.375}
    assert {"latency", "exits", "hot_frames", "hot_ranges", "repeats", "rate", "histograms", "unsaid"} <= data.keys()


def test_given_slots_are_counted(cli: Cli) -> None:
    folder = ROOT / "examples" / "recordings"
    trace, aux = folder / "x86-npt-longmode2.trace.txt.gz", folder / "x86-npt-longmode2.aux.txt.gz"
    slots = {
        row["slot"]: row["faults"]
        for row in cli("trace", "summary", str(trace), "--slots", str(aux), "--json").json["slots"]
    }
    assert slots == {"0": 360, "2": 27, "1": 3, "none": 31}
    alone = cli("trace", "summary", str(trace), "--json").json  # those that the probes beside it recorded
    assert {row["slot"]: row["faults"] for row in alone["slots"]} == slots
    assert alone["notes"]["slots"] == [f"memslots: {aux}"]


def test_a_file_that_is_none_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli("trace", "summary", str(tmp_path / "absent.dat")).refused("absent.dat")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    return Cli(capsys, monkeypatch)


def test_the_declarations_agree_on_what_neutral_code_reads() -> None:
    meaning = Meaning.of(backends().values())
    for points in meaning.points.values():
        assert len({point.role for point in points}) == 1
    assert isinstance(READING, Reading)
