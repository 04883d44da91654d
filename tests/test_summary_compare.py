"""Two recordings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmfault.summary.compare import ENOUGH, compare
from kvmfault.summary.figures import Summary
from kvmfault.summary.given import Source
from kvmfault.summary.telling import tell
from kvmfault.trace.recording import Lost, Meta
from tests.cli import Cli
from tests.conftest import ROOT
from tests.summaries import READING, Made, entry, exit_, fault, gathered, handled, stretches, unmap

FOLDER = ROOT / "examples" / "recordings"
EXAMPLES = [str(FOLDER / f"{name}.trace.txt.gz") for name in ("x86-ept-kvm_page_table", "x86-npt-longmode2")]


def told(events: Sequence[Made], meta: Meta | None = None, lost: Sequence[Lost] = ()) -> Summary:
    counts: dict[str, int] = {}
    for event in events:
        counts[event.name] = counts.get(event.name, 0) + 1
    return tell(gathered(stretches(events)), READING, Source("made", meta or Meta(kind="test"), counts, lost))


def slow(gfn: int, ns: int) -> list[Made]:
    return [exit_(), fault(gfn), entry(after=ns)]


def test_what_changed_most_comes_first() -> None:
    a, b = told(handled(1) * 5 + handled(2, 6) * 9), told(handled(1) * 5 + handled(2, 6) * 2 + handled(3, 0x14))
    kinds = next(s for s in compare(a, b).sections if s.key == "kinds")
    assert [row[:5] for row in kinds.rows] == [
        ("write, missing", 9, 2, -7, pytest.approx(2 / 9)),
        ("fetch, missing", 0, 1, 1, None),
        ("read, missing", 5, 5, 0, 1.0),
    ]


def test_times_are_compared_by_percentile() -> None:
    a, b = told(slow(1, 9_000) * 10), told(slow(1, 19_000) * 10)
    (row,) = next(s for s in compare(a, b).sections if s.key == "latency").records()
    assert (row["p50 before"], row["p50 after"], row["p50 ratio"]) == (10_000, 20_000, 2.0)


def test_slower_is_told_where_there_is_enough() -> None:
    few, many = 10, ENOUGH
    for n, found in ((few, 0), (many, 3)):
        both = compare(told(slow(1, 9_000) * n), told(slow(1, 11_000) * n))
        assert len(both.slower(10)) == found
        assert both.slower(25) == []


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (told(handled(1), Meta(kind="test", ticks=True, clock="x86-tsc")), "clocks differ: ns and ticks"),
        (told(handled(1), Meta(kind="test", machine="other")), "machines differ: this and other"),
        (told(handled(1), lost=[Lost(0, 5, 1, 2)]), "the second lost events: 5 events in 1 gaps"),
        (told([*handled(1), unmap()]), "only the second has kvm_unmap_hva_range"),
        (told([entry()]), "only the first has kvm_exit, kvm_page_fault"),
    ],
)
def test_why_recordings_are_not_comparable_is_said(after: Summary, says: str) -> None:
    before = told(handled(1), Meta(kind="test", machine="this"))
    assert any(line.startswith(says) for line in compare(before, after).cautions)


def test_a_recording_is_as_itself() -> None:
    found = compare(told(handled(1)), told(handled(1)))
    assert not found.cautions
    assert all(row["change"] == 0 for s in found.sections if s.key != "latency" for row in s.records())


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli = Cli(capsys, monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("compare", "traces", *EXAMPLES)
    assert done.status == 0
    assert all(len(line) <= 80 for line in done.out.splitlines() if "examples/" not in line)
    data = cli("compare", "traces", *EXAMPLES, "--json", "--fail-if-slower", "0").json
    assert data["slower"] == []
    assert {"kinds", "latency", "cautions"} <= data.keys()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_whose_faults_they_are_can_be_told(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("v-1 [000] 1.000000: kvm_page_fault: vcpu 0 rip 0x1 address 0x5000 error_code 0x182\n" * 3)
    kinds = {
        told: cli("compare", "traces", str(path), str(path), *told, "--json").json.get("kinds")
        for told in ((), ("--backend", "x86-ept"))
    }
    assert kinds[()] is None
    assert kinds["--backend", "x86-ept"][0]["before"] == 3
    cli("compare", "traces", str(path), str(path), "--backend", "x86-ep").refused("x86-ep")
