"""What if: recorded accesses made again on other targets and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmfault.cli.whatif import as_data, render
from kvmfault.contract.access import Access, Cause
from kvmfault.contract.target import Target, backend
from kvmfault.errors import UsageError
from kvmfault.machine.guest import Ended
from kvmfault.replay.run import replay
from kvmfault.replay.settings import AS_RECORDED, split_settings
from kvmfault.replay.whatif import Figures, Variant
from kvmfault.trace.events import FaultEvent, SlotEvent, UnmapEvent
from kvmfault.trace.slotfile import read_slots
from kvmfault.types import Gpa, Gva, Hva
from tests.conftest import recordings

RAM, HVA = 0x4000_0000, 0x7F00_0000_0000
OWN = backend("arm64")


def variant(target: Target, *settings: str) -> Variant:
    host, rest = split_settings(settings)
    new = Variant(target.with_settings(rest), OWN, host=host)
    slot = SlotEvent(line=0, time=0, vm="", slot=0, flags=0, gpa=Gpa(RAM), size=4 << 20, hva=Hva(HVA), ret=0)
    new.set_slot(slot, made_up=False)
    return new


def fault(gpa: int, *, write: bool = False, vcpu: str = "1") -> FaultEvent:
    wanted = Access(gpa=Gpa(gpa & -4096), offset=gpa & 4095, gva=Gva(gpa), read=not write, write=write, exec=False)
    made = OWN.encode(wanted.with_(cause=Cause.MISSING, granule=4096, final=True))
    return FaultEvent(line=1, time=0, vcpu=vcpu, target="arm64", registers=OWN.named(made.fault))


def run(new: Variant, *faults: FaultEvent) -> Figures:
    for each in faults:
        new.fault(each)
    return new.figures


PAGES = [fault(RAM + n * 4096, write=True) for n in range(16)]


def test_every_page_faults_where_memory_comes_in_pages() -> None:
    got = variant(OWN)
    assert run(got, *PAGES) == Figures(accesses=16, faults=16)
    assert got.entries() == {4096: 16}
    assert got.ended == {Ended.DONE: 16}
    assert got.dirty_pages() is None


def test_blocks_avoid_faults() -> None:
    got = variant(OWN, "thp=always")
    assert run(got, *PAGES) == Figures(accesses=16, faults=1, avoided=15)
    assert got.entries() == {2 << 20: 1}
    assert got.table_bytes() < variant_after(*PAGES).table_bytes()


def variant_after(*faults: FaultEvent) -> Variant:
    got = variant(OWN)
    run(got, *faults)
    return got


def test_dirty_logging_takes_the_blocks_away() -> None:
    got = variant(OWN, "thp=always", "dirty-log=on")
    assert run(got, *PAGES).faults == 16
    assert got.dirty_pages() == 16


def test_larger_pages_of_the_host() -> None:
    got = variant(backend("arm64:16k"))
    assert run(got, *PAGES) == Figures(accesses=16, faults=4, avoided=12)
    assert got.entries() == {16384: 4}


def test_other_architecture_with_two_vcpus() -> None:
    got = variant(backend("x86-npt"))
    assert run(got, fault(RAM, vcpu="9"), fault(RAM, write=True)) == Figures(accesses=2, faults=1, avoided=1)
    assert got.target.backend.name == "x86-npt"


def test_what_the_host_takes_faults_again() -> None:
    got = variant(OWN, "thp=always")
    run(got, PAGES[0])
    got.host_did(UnmapEvent(line=2, time=0, start=Hva(HVA), end=Hva(HVA + 4096)))
    assert run(got, PAGES[1]).faults == 2


def test_devices_leave_for_user_space() -> None:
    got = variant(OWN)
    run(got, fault(0x900_0000))
    assert got.figures.exits == 1


def test_what_is_no_access_is_skipped_and_counted() -> None:
    got = variant(OWN)
    registers = {"ESR_EL2": 0x9200_0010, "FAR_EL2": 0, "HPFAR_EL2": 0}  # synchronous external abort
    got.fault(FaultEvent(line=1, time=0, vcpu="1", target="arm64", registers=registers))
    assert got.figures == Figures()
    assert sum(got.skipped.values()) == 1


@pytest.mark.parametrize(
    ("setting", "said"), [("thp=sometimes", "thp=sometimes: the value is never, always"), ("dirty_log=", "dirty-log=:")]
)
def test_a_value_that_there_is_not(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        split_settings([setting])


def test_names_tell_the_settings() -> None:
    assert variant(OWN, "thp=always", "dirty-log=on", "precheck=yes").name == (
        "arm64:4k@7.4+precheck=yes+dirty-log=on+thp=always"
    )
    assert AS_RECORDED.told() == ()


BUNDLED = Path(__file__).parent.parent / "examples" / "recordings"


def test_a_recording_is_compared_with_itself_as_recorded() -> None:
    trace = str(next(BUNDLED.glob("*longmode2.trace.txt.gz")))
    slots = read_slots(next(BUNDLED.glob("*longmode2.aux.txt.gz")))
    report = replay(trace, ["x86-npt", "arm64"], slots, settings=["thp=always"])
    assert [v.name for v in report.variants] == [
        "x86-npt:4k@7.4",
        "x86-npt:4k@7.4+thp=always",
        "arm64:4k@7.4+thp=always",
    ]
    assert len({v.figures.accesses + sum(v.skipped.values()) for v in report.variants}) == 1
    recorded, thp, _ = report.variants
    assert thp.figures.faults < recorded.figures.faults
    assert 2 << 20 in thp.entries().keys() - recorded.entries().keys()
    assert replay(trace, [], slots).variants == []
    faults = report.kinds.total()
    text = render(report.variants, faults)
    head, names = text.splitlines()[:2]
    assert head.split() == ["what", "if", "recorded", "model", "of", "model", "on", "model", "on"]
    assert names.split() == ["x86-npt", *(v.name for v in report.variants)]
    taken = next(line for line in text.splitlines() if line.startswith("faults taken"))
    assert taken.split()[2:] == [str(n) for n in (faults, *(v.figures.faults for v in report.variants))]
    assert f"{(thp.figures.faults - recorded.figures.faults) / recorded.figures.faults:+.1%}" in text
    data = as_data(report.variants, faults)
    assert [d["faults"] for d in data] == [v.figures.faults for v in report.variants]
    assert [d["recorded_faults"] for d in data] == [421] * 3
    assert [d["models_recorded_machine"] for d in data] == [True, False, False]


@pytest.mark.parametrize("path", recordings("arm64/c-16k-dirty_log_dirty") + recordings("arm64/a-kvm_page_table"))
def test_the_file_tells_page_size_and_kernel(path: Path) -> None:
    report = replay(str(path / "trace.dat"), ["arm64:4k", "arm64:16k"])
    assert report.own.name == f"arm64:{'16k' if '16k' in path.name else '4k'}@6.12"
    assert [v.name for v in report.variants] == [report.own.name, "arm64:4k@7.4", "arm64:16k@7.4"]
