"""What the live view counts: made-up events of every kind, and the application on top of it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Final

import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from kvmfault.cli import top
from kvmfault.cli.topapp import Grid, Help, Top
from kvmfault.contract.target import backend, backends
from kvmfault.contract.tracepoints import Sort
from kvmfault.errors import LiveError
from kvmfault.live import watch as watching
from kvmfault.live.stopping import Stop
from kvmfault.live.watch import Seen, Shot, Watch, every_event, fitting
from kvmfault.live.watch import counted as counted_events
from kvmfault.trace.opening import open_recording
from tests.cli import Cli
from tests.conftest import ROOT, recording
from tests.ringpages import Event, described, pages
from tests.tracefs import guest_command, kvmfault, leftovers, recordable

MMIO: Final = Event("kvm", "kvm_mmio", 1, ("type", "len", "gpa", "val"))
UNMAP: Final = Event("kvm", "kvm_unmap_hva_range", 2, ("start", "end"))
USER: Final = Event("kvm", "kvm_userspace_exit", 3, ("reason", "errno"))
ARM: Final = Event("kvm", "kvm_guest_fault", 4, ("vcpu_pc", "hsr", "hxfar", "ipa"))
X86: Final = Event("kvm", "kvm_page_fault", 5, ("vcpu_id", "guest_rip", "fault_address", "error_code"))
EXIT: Final = Event("kvm", "kvm_exit", 6, ("exit_reason", "isa"))
SET: Final = Event("kvmmmu", "kvm_mmu_set_spte", 7, ("gfn", "spte", "level"))
ASKED: Final = Event("kvmmmu", "kvm_mmu_spte_requested", 8, ("gfn", "pfn", "level"))
EVENTS: Final = (MMIO, UNMAP, USER, ARM, X86, EXIT, SET, ASKED)
ONE, TWO = 4194301, 4194302  # no process of this machine
NAMES: Final = {ONE: "vm-one", TWO: "vm [b]two"}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def counted(target: str, *records: bytes, seconds: float = 2.0) -> Shot:
    watch = Watch(backend(target), described(EVENTS, comms=NAMES))
    watch.take(0, pages(records))
    return watch.turn(seconds, 0, 0)


def kinds(seen: Seen) -> dict[str, int]:
    return {str(kind): count.total for kind, count in seen.kinds.items()}


def mmio(pid: int, gpa: int, kind: int = 2) -> bytes:
    return MMIO(pid, type=kind, len=4, gpa=gpa, val=0)


def test_faults_by_their_registers() -> None:
    write, walk, fetch = 0x9200004F, 0x920000C7, 0x82000007
    records = [ARM(ONE, vcpu_pc=0, hsr=h, hxfar=0, ipa=0x40000000) for h in (write, write, walk, fetch)]
    everything, one = counted("arm64", *records).seen
    assert kinds(one) == {
        "kvm_guest_fault write, permission": 2,
        "kvm_guest_fault read, missing, table walk": 1,
        "kvm_guest_fault exec, missing": 1,
    }
    assert kinds(everything) == kinds(one)
    assert one.counts[Sort.FAULT][:2] == (2.0, 4)
    assert [(r.start, r.size, r.counts[Sort.FAULT].total) for r in one.ranges] == [(0x40000000, 1 << 21, 4)]


@pytest.mark.parametrize(
    ("target", "code", "kind", "has_place"),
    [
        ("x86-ept", 0x182, "write, missing", True),
        ("x86-npt", 0x100000006, "write, missing", True),
        ("x86-shadow", 0x7, "write, permission", False),  # its address is the guest's own
    ],
)
def test_faults_of_each_x86(target: str, code: int, kind: str, has_place: bool) -> None:
    fault = X86(ONE, vcpu_id=0, guest_rip=0, fault_address=0x1234567, error_code=code)
    shot = counted(target, fault)
    assert kinds(shot.seen[1]) == {f"kvm_page_fault {kind}": 1}
    assert [r.start for r in shot.seen[1].ranges] == ([0x1200000] if has_place else [])
    assert shot.faults is Sort.FAULT


def test_what_stands_for_faults_where_they_have_no_event() -> None:
    shot = counted("x86-shadow", ASKED(ONE, gfn=0x200, pfn=1, level=1), SET(ONE, gfn=0x200, spte=7, level=1))
    assert shot.faults is Sort.HANDLED
    assert kinds(shot.seen[1]) == {"kvm_mmu_spte_requested level 1": 1, "kvm_mmu_set_spte level 1": 1}
    assert [(r.start, dict.fromkeys(r.counts)) for r in shot.seen[1].ranges] == [
        (0x200000, {Sort.HANDLED: None, Sort.ENTRY: None})
    ]


def test_everything_else_in_words() -> None:
    records = [
        mmio(ONE, 0xFEE000F0),
        mmio(ONE, 0xFEE000F0, 1),
        USER(ONE, reason=6, errno=0),
        UNMAP(TWO, start=0, end=4096),
        EXIT(ONE, exit_reason=1024, isa=2),
        EXIT(ONE, exit_reason=48, isa=1),
    ]
    everything, one, two = counted("x86-npt", *records).seen
    assert kinds(one) == {
        "kvm_mmio write": 1,
        "kvm_mmio read": 1,
        "kvm_userspace_exit KVM_EXIT_MMIO": 1,
        "kvm_exit npf": 1,
        "kvm_exit EPT_VIOLATION": 1,
    }
    assert kinds(two) == {"kvm_unmap_hva_range": 1}
    assert kinds(everything) == {**kinds(one), **kinds(two)}
    assert (one.name, two.name, everything.name, everything.threads) == (NAMES[ONE], NAMES[TWO], "all", 2)


def test_intervals() -> None:
    watch = Watch(backend("x86-npt"), described(EVENTS))
    shot = watch.turn(0.5, 0, 0)
    for n in (1, 2):
        watch.take(0, pages([mmio(ONE, 0)] * n))
        watch.take(1, pages([mmio(TWO, 0)]))
        shot = watch.turn(0.5, n, n)
    count = shot.seen[1].counts[Sort.MMIO]
    assert count == (4.0, 3, (0.0, 2.0, 4.0))
    assert shot.seen[0].counts[Sort.MMIO].total == 5
    assert (shot.lost, shot.seconds) == (2, 0.5)
    for _ in range(watching.HISTORY + 5):
        shot = watch.turn(0.5, 0, 0)
    assert shot.seen[1].counts[Sort.MMIO] == (0.0, 3, (0.0,) * watching.HISTORY)


def test_ranges_get_wider_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_RANGES", 64)
    watch = Watch(backend("x86-npt"), described(EVENTS))
    shot = watch.turn(1, 0, 0)
    for part in range(4):
        watch.take(0, pages([mmio(ONE, part << 32 | n << 21) for n in range(256)]))
        shot = watch.turn(1, 0, 0)
    shot = watch.turn(1, 0, 0)
    assert sum(r.counts[Sort.MMIO].total for r in shot.seen[1].ranges) == 1024
    assert all(r.size > 1 << 21 and r.start % r.size == 0 for r in shot.seen[1].ranges)
    assert len(shot.seen[1].ranges) <= 64


def test_real_pages_are_counted_whole() -> None:
    folder, formats = recording("x86/e1-longmode2-cpl3"), recording("x86/formats-6.12.117-bochs-e1")
    texts = {
        system.name: [path.read_bytes() for path in system.iterdir()]
        for system in formats.iterdir()
        if system.is_dir() and system.name != "ftrace"
    }
    header = (formats / "header_page").read_bytes()
    watch = Watch(backend("x86-ept"), replace(described([]), header_page=header, formats=texts))
    watch.take(0, (folder / "cpu0.raw").read_bytes())
    found = Counter[str]()
    for kind, count in watch.turn(1, 0, 0).seen[0].kinds.items():
        found[kind.event] += count.total
    names, frames = every_event(), Counter[str]()
    for part in open_recording(str(folder / "trace.dat")).frames(names):
        frames.update({name: len(frame) for name, frame in part.items()})
    assert found == frames
    assert frames["kvm_page_fault"] > 0


def test_a_backend_is_found_by_the_events_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise LiveError("no installed backend drives this machine's KVM")

    monkeypatch.setattr(watching, "this_machine", nothing)
    assert fitting(["kvm_guest_fault", "kvm_mmio"]).backend.name == "arm64"
    with pytest.raises(LiveError):
        fitting(["kvm_page_fault"])


def test_every_backend_watches_its_faults() -> None:
    for source in backends().values():
        sorts = {point.role.sort for point in counted_events(source.tracepoints).values() if point.role is not None}
        assert {Sort.MMIO, Sort.INVALIDATION, Sort.EXIT, Sort.USER_EXIT} <= sorts, source.name
        if source.name.startswith(("arm64", "x86")):  # elsewhere no event has a fault of its own
            assert {Sort.FAULT, Sort.ENTRY} <= sorts, source.name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.2"),
        (3, "3"),
        (9.5, "9.5"),
        (12.4, "12"),
        (123456, "123,456"),
        (1.5e6, "1.50M"),
        (2e9, "2.00G"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert top.number(value) == text


def test_a_trend() -> None:
    assert top.sparkline([0, 1, 4, 8], 6) == "   ▂▅█"
    assert top.sparkline([5, 0, 8], 2) == " █"
    assert top.sparkline([], 3) == "   "


# The application.


def shots(stop: Stop) -> Iterator[Shot]:
    watch = Watch(backend("arm64"), described(EVENTS, comms=NAMES))
    for n in range(1, 4):
        watch.take(0, pages([ARM(ONE, vcpu_pc=0, hsr=0x9200004F, hxfar=0, ipa=0x40000000)] * n * 10))
        watch.take(0, pages([mmio(TWO, 0x9000000)] * 70))
        yield watch.turn(1.0, 0, n - 1)
    while not stop.asked:
        time.sleep(0.01)


def shown(grid: Grid) -> list[list[str]]:
    """Headings and cells."""
    rows = [[str(cell).strip() for cell in grid.get_row_at(n)] for n in range(grid.row_count)]
    return [[str(column.label) for column in grid.ordered_columns], *rows]


class Driven:
    """The application in a terminal that is not there."""

    def __init__(self, app: Top, pilot: Pilot[None]) -> None:
        self.app, self.pilot = app, pilot

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    @property
    def processes(self) -> list[list[str]]:
        return shown(self.app.screen_stack[0].query_one("#processes", Grid))

    @property
    def kinds(self) -> list[list[str]]:
        return shown(self.app.screen_stack[0].query_one("#kinds", Grid))

    @property
    def ranges(self) -> list[list[str]]:
        return shown(self.app.screen_stack[0].query_one("#ranges", Grid))

    @property
    def head(self) -> str:
        return str(self.app.screen_stack[0].query_one("#head", Static).render())


def drive(act: Callable[[Driven], Awaitable[None]], size: tuple[int, int] = (120, 40)) -> Stop:
    stop = Stop(-1)

    async def run() -> None:
        app = Top(shots(stop), "the machine", stop)
        try:
            async with app.run_test(size=size) as pilot:
                driven = Driven(app, pilot)
                while "2 events lost" not in driven.head:
                    await pilot.pause(0.02)
                await pilot.pause()
                await act(driven)
        finally:
            stop.asked = True

    asyncio.run(run())
    return stop


def test_the_application() -> None:
    async def act(it: Driven) -> None:
        assert it.head == "per second; 2 events lost; the machine"
        heads, everything, one, two = it.processes
        assert heads[:4] == ["process", "", "faults ▼", "MMIO"]
        assert everything[:4] == ["", "all", "30", "70"]
        assert one[:4] == [str(ONE), "vm-one", "30", "0"]
        assert two[:4] == [str(TWO), "vm [b]two", "0", "70"]
        assert one[-1] == "▃▆█"
        assert [row[:4] for row in it.kinds[1:]] == [
            ["faults", "kvm_guest_fault write, permission", "30", "60"],
            ["MMIO", "kvm_mmio write", "70", "210"],
        ]
        assert it.ranges == [
            ["from", "faults", "MMIO"],
            ["0x0009000000 + 2 MiB", "0", "70"],
            ["0x0040000000 + 2 MiB", "30", "0"],
        ]

    assert drive(act).asked


def test_keys() -> None:
    async def act(it: Driven) -> None:
        await it.press("down")
        assert [row[1] for row in it.kinds[1:]] == ["kvm_guest_fault write, permission"]
        assert str(it.app.query_one("#kinds", Grid).border_title) == f"kinds: vm-one {ONE}"
        await it.press("s")
        assert it.processes[0][3] == "MMIO ▼"
        assert [row[0] for row in it.processes[2:]] == [str(TWO), str(ONE)]
        assert it.app.query_one("#processes", Grid).cursor_row == 2, "the mark stays with its process"
        await it.press("t")
        assert it.head.startswith("totals; ")
        assert it.processes[1][2:4] == ["60", "210"]
        await it.press("space")
        assert it.head.startswith("PAUSED, totals; ")
        screens = [type(it.app.screen)]
        for key in ("question_mark", "x"):
            await it.press(key)
            screens.append(type(it.app.screen))
        assert [screen is Help for screen in screens] == [False, True, False]
        await it.press("q")

    assert drive(act).asked


@pytest.mark.parametrize(("width", "side_by_side"), [(80, False), (200, True)])
def test_widths(width: int, side_by_side: bool) -> None:
    async def act(it: Driven) -> None:
        kinds, ranges = (it.app.query_one(f"#{name}", Grid) for name in ("kinds", "ranges"))
        assert (kinds.region.y == ranges.region.y) is side_by_side
        for grid in (it.app.query_one("#processes", Grid), kinds, ranges):
            assert grid.virtual_size.width <= width, "no column is out of sight"
            assert grid.row_count

    drive(act, (width, 30))


# For real.


@recordable
def test_a_real_guest_is_watched(cli: Cli) -> None:
    busy = subprocess.Popen(guest_command(400), stdout=subprocess.DEVNULL)
    try:
        run = kvmfault("trace", "top", "--json", "--interval", "0.5", "--pid", str(busy.pid))
        assert run.stdout is not None
        own = []
        for line in islice(run.stdout, 60):
            own += [seen for seen in json.loads(line)["processes"] if seen["process"] == busy.pid]
            if len(own) > 1:
                break
        run.send_signal(signal.SIGINT)
        assert run.communicate()[1] == ""
        assert run.returncode == 0
    finally:
        busy.kill()
        busy.wait()
    counts = own[-1]["counts"]
    assert counts["mmio"]["total"] > 0
    assert counts["user exits"]["total"] > counts["mmio"]["total"] / 2
    assert sum(kind["total"] for kind in own[-1]["kinds"]) == sum(count["total"] for count in counts.values())
    assert not [name for name in leftovers()[0] if str(run.pid) in name]


@recordable
def test_once(cli: Cli) -> None:
    done = cli("trace", "top", "--once", "--interval", "0.1")
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[2].startswith("process ")


@pytest.mark.parametrize(
    ("package", "code", "extra"),
    [
        ("polars", "run((), 1, None, once=True, json=False)", "trace"),
        ("textual", "application()", "top"),
    ],
)
def test_what_is_not_installed(package: str, code: str, extra: str) -> None:
    script = f"import sys; sys.modules['{package}'] = None; from kvmfault.cli.top import *; {code}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"UsageError: trace top: needs the extra '{extra}': pip install 'kvmfault[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--interval", "0"], "--interval is a number of seconds from 0.1 to 3600"),
        (["--interval", "nan"], "--interval is a number"),
        (["--backend", "nothing"], "nothing"),
    ],
)
def test_refused(cli: Cli, arguments: list[str], says: str) -> None:
    cli("trace", "top", "--once", *arguments).refused(says)
