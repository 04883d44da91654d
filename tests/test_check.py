"""``replay --check``: recorded faults in step with the model, beside what the kernel then did."""

from __future__ import annotations

import gzip
import random
import re
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from kvmfault.check.run import CheckReport, check
from kvmfault.check.tally import MAIN, Aspect
from kvmfault.contract.probes import Said
from kvmfault.contract.target import backend
from kvmfault.errors import TraceError
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.events import EntryEvent, FaultEvent
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.text import TextEvent
from kvmfault.trace.truth import ProbeReader, Told, beside, probed, read_truth
from tests.cli import Cli
from tests.conftest import recordings

CUT = Path(__file__).parent / "data" / "traces"
NPT, VCPUS, SHADOW = (CUT / name / "trace.txt.gz" for name in ("x86_npt", "x86_two_vcpus", "x86_shadow"))
THRESHOLD = 0.999
WALKS = "kvm_mmu_pagetable_walk:|kvm_mmu_paging_element:"


def target_of(path: Path) -> str:
    """What recorded it, by the folder's name."""
    name = path.parent.name
    shadow = name.startswith(("shadow", "c", "e2", "x86_shadow"))
    return f"x86-{'shadow' if shadow else 'ept' if name.startswith('e') else 'npt'}@6.12"


def without(path: Path, folder: Path, pattern: str) -> str:
    """The recording and its probes as they are where some events were not recorded."""
    gone = re.compile(pattern)
    for name in ("trace.txt", "aux.txt"):
        source = next(path.parent.glob(f"{name}*"))
        lines = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
        kept = [line for line in lines.decode().splitlines(keepends=True) if not gone.search(line)]
        (folder / name).write_text("".join(kept))
    return str(folder / "trace.txt")


def disagreements(report: CheckReport) -> list[str]:
    return [str(found) for found in report.tally.disagreements]


# All recordings.


@pytest.mark.parametrize("path", recordings("x86aux/*/trace.txt*"))
def test_recordings_with_probes(path: Path) -> None:
    report = check(str(path), target_of(path))
    assert report.aux is not None
    assert report.faults
    for aspect in MAIN:
        agreed, compared = report.tally.of(aspect)
        assert agreed >= THRESHOLD * compared > 0, disagreements(report)
    assert not report.unexplained, disagreements(report)
    assert not report.unknown
    assert not report.unpaired


@pytest.mark.parametrize("path", recordings("x86/*/trace.txt*"))
def test_trace_events_alone(path: Path) -> None:
    report = check(str(path), target_of(path))
    assert report.aux is None
    agreed, compared = report.tally.of(Aspect.PERMISSIONS)
    assert agreed >= 0.99 * compared > 0
    assert not report.unexplained, disagreements(report)


# Two devices; of the second access the syndrome has no size, and KVM_RUN fails.
DEVICES = """\
 vm-7 [000] 1.000001: kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x400c34
 vm-7 [000] 1.000002: kvm_guest_fault: ipa 0x9000000, hsr 0x93800047, hxfar 0x4000, pc 0x400c34
 vm-7 [000] 1.000003: kvm_mmio: mmio write len 4 gpa 0x9000000 val 0x1
 vm-7 [000] 1.000004: kvm_userspace_exit: reason KVM_EXIT_MMIO (6)
 vm-7 [000] 1.000005: kvm_entry: PC: 0x400c38
 vm-7 [000] 1.000006: kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x400c38
 vm-7 [000] 1.000007: kvm_guest_fault: ipa 0x9002000, hsr 0x92000047, hxfar 0x5000, pc 0x400c38
 vm-7 [000] 1.000008: kvm_mmio_nisv: ipa 0x9002000, esr 0x92000047, far 0x5000, pc 0x400c38
 vm-7 [000] 1.000009: kvm_userspace_exit: reason error ({errno})
"""


@pytest.mark.parametrize(
    ("errno", "differs"),
    [
        (38, set()),
        (14, {(Aspect.ANSWER, "error ENOSYS", "error EFAULT")}),
    ],
)
def test_a_device_access_without_probes(errno: int, differs: set[tuple[Aspect, str, str]], tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(DEVICES.format(errno=errno))
    report = check(str(path), "arm64@6.12")
    assert report.tally.of(Aspect.ANSWER)[1] == 2
    assert {(d.aspect, d.model, d.kernel) for d in report.tally.disagreements} == differs


@pytest.mark.parametrize("path", recordings("arm64/d-*/trace.*t"))
def test_device_accesses_alone(path: Path) -> None:
    report = check(str(path), "arm64@6.12")
    agreed, compared = report.tally.of(Aspect.ANSWER)
    assert agreed == compared > 0, disagreements(report)
    assert not report.unexplained, disagreements(report)


@pytest.mark.parametrize("path", recordings("x86aux/npt-kvm_page_table-thp/trace.txt*"))
def test_the_kernel_is_found(path: Path) -> None:
    # 7.4 answers otherwise where an entry is there already
    report = check(str(path.parent.parent / "npt-longmode2-cpl3" / "trace.txt.gz"))
    assert report.target.kernel == "6.12"
    assert report.notes[0].startswith("kernel 6.12: differs in 0 places (7.4: ")


@pytest.mark.parametrize(
    ("name", "pattern", "causes"),
    [
        # where the guest's tables lead is then known from what the kernel made of it
        ("shadow-longmode2-cpl3", WALKS, set()),
        ("shadow-dirty_log_small", WALKS + "|kvm_entry:", set()),
        ("shadow-longmode2-cpl3", WALKS + "|set_accessed_bit|set_dirty_bit", {Aspect.LOG}),
        # few probes, as where very many slots are made
        ("npt-longmode2-cpl3", "memslot_change|flush_slot:|zap_all_fast:|memslot_ret:.*ret=0", set()),
        ("npt-longmode2-cpl3", "kvm_entry:|kvm_tdp_mmu_spte_changed:", set()),
        ("npt-longmode2-cpl3", " (inv_start|inv_end|unmap_gfn|unmap_gfn_ret): ", set()),
        ("npt-longmode2-cpl3", " tdp_map_ret: ", set()),
        ("npt-behaviours", " (page_fault|kvm_tdp_page_fault|tdp_map|faultin_pfn|fast_page_fault)(_ret)?: .*kvm", set()),
    ],
)
@pytest.mark.parametrize("path", recordings("x86aux"))
def test_what_is_not_recorded(path: Path, name: str, pattern: str, causes: set[Aspect], tmp_path: Path) -> None:
    source = next((path / name).glob("trace.txt*"))
    report = check(without(source, tmp_path, pattern), target_of(source))
    assert not report.unexplained, disagreements(report)
    assert {aspect for aspect, _ in report.tally.causes} == causes


# Cut recordings.


@pytest.mark.parametrize(
    ("path", "answers", "permissions"),
    [(NPT, 87, 81), (VCPUS, 7, 6), (SHADOW, 117, 90)],
    ids=["npt", "vcpus", "shadow"],
)
def test_cut_recordings(path: Path, answers: int, permissions: int) -> None:
    report = check(str(path), target_of(path))
    tally = report.tally
    assert not tally.disagreements
    assert tally.of(Aspect.ANSWER) == (answers, answers)
    assert tally.of(Aspect.PERMISSIONS) == (permissions, permissions)
    assert tally.of(Aspect.ENTRY) == (permissions, permissions)


@pytest.mark.parametrize(
    ("path", "setting", "aspect"),
    [
        (NPT, "read-maps-writable=never", Aspect.PERMISSIONS),
        (NPT, "exec-grant=on_fetch", Aspect.PERMISSIONS),
        (NPT, "invalid-slot=as_none", None),
        (NPT, "hardware-access-dirty=no", Aspect.ENTRY),
        (SHADOW, "guest-paging=no", None),
        (SHADOW, "exec-grant=on_fetch", Aspect.PERMISSIONS),
        (VCPUS, "marks-rewritten=yes", None),
    ],
)
def test_another_model_differs(path: Path, setting: str, aspect: Aspect | None) -> None:
    report = check(str(path), target_of(path), settings=[setting])
    found = {a for a, cause in report.tally.causes if not cause}
    assert aspect in found if aspect is not None else not found


def test_a_race_is_the_models_own() -> None:
    # of two vCPUs that map a page at a time the first wins, the other tries again
    report = check(str(VCPUS), target_of(VCPUS))
    assert report.tally.agreed[Aspect.ANSWER, "write on walk, missing"] == 6
    assert report.taken["page of the host, as known from before"] == 1


def test_a_wrong_recording_is_found(tmp_path: Path) -> None:
    copied = without(NPT, tmp_path, "no line")
    aux = tmp_path / "aux.txt"
    changes = {
        "ret=5 gfn=0x11 slotp": "ret=1 gfn=0x11 slotp",
        "ret=5 addr=0x11000 ": "ret=1 addr=0x11000 ",
        "ret=5 addr=0x12010 error_code=0x200000006 gfn=0x12 prefetch=0 exec=0 write=1 present=0 rsvd=0 user=1 "
        "max_level=3 req_level=1 goal_level=1": "ret=5 addr=0x12010 error_code=0x200000006 gfn=0x12 prefetch=0 exec=0 "
        "write=1 present=0 rsvd=0 user=1 max_level=3 req_level=1 goal_level=2",
        "gfn=0x13 slotp=0xffff8881057a4a00 slot=0": "gfn=0x13 slotp=0xffff8881057a4a00 slot=7",
        "slot=0 start=0x10 end=0x11": "slot=0 start=0x10 end=0x12",
    }
    text = aux.read_text()
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new, 1)
    aux.write_text(text)
    trace = tmp_path / "trace.txt"
    trace.write_text(trace.read_text().replace("gfn 14 spte 10e7f1e67 (rwxu)", "gfn 14 spte 10e7f1e65 (r-xu)"))
    report = check(copied, "x86-npt@6.12")
    assert report.unexplained == len(report.tally.disagreements)
    found = [(d.aspect, d.model, d.kernel) for d in report.tally.disagreements]
    assert found == [
        (Aspect.FRAMES, "slot 0 frames 0x10 to 0x11", "slot 0 frames 0x10 to 0x12"),
        (Aspect.REPEATED, "mapped answer fixed", "mapped answer retry"),
        (Aspect.ANSWER, "fixed", "retry"),
        (Aspect.LEVEL, "4K", "2M"),
        (Aspect.SLOT, "0", "7"),
        (Aspect.PERMISSIONS, "rwx", "r-x"),
        (Aspect.ENTRY, "0x10e7f1e67", "0x10e7f1e65"),
    ]


# Reading.


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("(kvm_vm_ioctl+0x4/0x1090 [kvm]) cmd=0xae47 arg=0x1", ("kvm_vm_ioctl", False, "cmd=0xae47 arg=0x1")),
        ("(kvm_vm_ioctl+0xa9f/0x1090 [kvm] <- kvm_set_memslot) ret=-17", ("kvm_set_memslot", True, "ret=-17")),
        ("([unknown/kretprobe'd] <- direct_page_fault) ret=5", ("direct_page_fault", True, "ret=5")),
        ("(a+0x0/0x8 <- b.isra.0+0x0/0x9 [kvm]) ret=1", ("b", True, "ret=1")),
        ("(kvm_pgtable_stage2_map+0x0/0x140)", ("kvm_pgtable_stage2_map", False, "")),
        ("(half", None),
        ("vcpu 0, rip 0x10", None),
    ],
)
def test_probed_functions(body: str, wanted: tuple[str, bool, str] | None) -> None:
    assert probed(TextEvent(1, "t", 1, 0, 0, "any", 1, body)) == wanted


def test_a_null_slot_is_none() -> None:
    reader = ProbeReader(backend("x86-npt@6.12").backend)
    body = "(a+0x0/0x1 [kvm] <- kvm_faultin_pfn) ret=0 gfn=0x44 slotp=0x0 slot=17 pfn=0x8000000000000000 hva=0x1"
    told = reader.read(TextEvent(1, "t", 1, 0, 0, "x", 1, body), aux=True)
    assert told is not None
    assert (told.says, told.values) == (Said.PINNED, {"answer": "continue", "gfn": 0x44})


def test_order_of_one_time() -> None:
    own = backend("x86-npt@6.12").backend
    assembler, reader = Assembler([own], told=own.name), ProbeReader(own)
    aux = beside(NPT)
    assert aux is not None
    events = list(read_truth(str(NPT), None, aux, assembler, reader, stats=ReadStats()))
    assert [e.time for e in events] == sorted(e.time for e in events)
    # each fault comes before the probe of its handler, and the entry after the probe of its return
    order = [e.says if isinstance(e, Told) else type(e) for e in events]
    wanted = [e for e in order if e in (FaultEvent, EntryEvent, Said.FAULT, Said.RETURNED)]
    pairs = list(pairwise(wanted))
    assert all(after is Said.FAULT for before, after in pairs if before is FaultEvent)
    assert all(after is Said.RETURNED for before, after in pairs if before is Said.FAULT)


# The command.


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def test_command(cli: Cli) -> None:
    done = cli("replay", str(NPT), "--check", "--backend", "x86-npt@6.12")
    assert done.status == 0
    assert re.search(r"^answer +87 +87 +100\.00 %$", done.out, re.MULTILINE)
    data = cli("replay", str(NPT), "--check", "--backend", "x86-npt@6.12", "--json").json
    assert data["aspects"]["answer"]["compared"] == 87
    assert data["unexplained"] == 0


def test_command_finds_a_difference(cli: Cli) -> None:
    done = cli("replay", str(NPT), "--check", "--backend", "x86-npt@6.12", "--set", "read-maps-writable=never")
    assert done.status == 1
    assert "permissions: model r-x, kernel rwx" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--aux", "absent.txt"), "absent.txt: no such file"),
        (("--check", "--backend", "arm64", "--backend", "x86-npt"), "give one --backend at most"),
    ],
)
def test_command_refuses(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    cli("replay", str(NPT), *arguments).refused(message)


# Damage.

_VALUES = ("0", "1", "-1", "0xffffffffffffffff", "0x8000000000000000", "64", "0x7fffffffffff", "7ff0000000000000")


def damaged(rng: random.Random, lines: list[str]) -> str:
    """Lines lost, doubled, moved and with other numbers."""
    lines = lines.copy()
    for _ in range(rng.choice([1, 5, 30])):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        match rng.randrange(10):
            case 0 | 1:
                del lines[i]
            case 2:
                lines.insert(j, lines[i])
            case 3:
                lines[i], lines[j] = lines[j], lines[i]
            case _:
                numbers = list(re.finditer(r"(?<=[= ])(-?\d+|0x[0-9a-f]+|[0-9a-f]{4,16})(?= |$)", lines[i]))
                if numbers:
                    at = rng.choice(numbers)
                    lines[i] = lines[i][: at.start()] + rng.choice(_VALUES) + lines[i][at.end() :]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", [NPT, VCPUS, SHADOW], ids=["npt", "vcpus", "shadow"])
@pytest.mark.parametrize("seed", range(8))
def test_damaged_recordings(path: Path, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    for name in ("trace", "aux"):
        lines = gzip.decompress(path.with_name(f"{name}.txt.gz").read_bytes()).decode().splitlines()
        (tmp_path / f"{name}.txt").write_text(damaged(rng, lines))
    with suppress(TraceError):  # a memslot that cannot be read
        assert check(str(tmp_path / "trace.txt"), target_of(path)).faults
