"""Recorded calls of the page-table functions beside the path's, where neither memslots nor host were recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmfault.check.assume import Assumed
from kvmfault.check.calls import CallsCheck
from kvmfault.check.run import check
from kvmfault.check.tally import Aspect, Tally
from kvmfault.contract.target import Target, backend
from kvmfault.contract.values import ExecGrant, ReadMaps
from kvmfault.errors import UsageError
from kvmfault.trace.assemble import Assembler
from kvmfault.trace.recording import ReadStats
from kvmfault.trace.truth import ProbeReader, Truth, read_truth
from tests.conftest import recordings

CUT = Path(__file__).parent / "data" / "traces"
THRESHOLD = 0.999
COMPARED = (
    Aspect.CALL,
    Aspect.ADDRESS,
    Aspect.LEVEL,
    Aspect.PERMISSIONS,
    Aspect.ANSWER,
    Aspect.RETURN,
    Aspect.MMIO,
    Aspect.INJECTION,
    Aspect.FRAME,
    Aspect.TABLE,
)
TARGET = "arm64@6.12"


def share(tally: Tally, aspect: Aspect) -> float:
    agreed, compared = tally.of(aspect)
    return agreed / compared if compared else 1.0


@pytest.mark.parametrize("aux", recordings("arm64/*/aux.txt*"))
def test_recordings_agree(aux: Path) -> None:
    recording = next(aux.parent.glob("trace.txt*"))
    report = check(str(recording), TARGET)
    assert {a: share(report.tally, a) for a in COMPARED if share(report.tally, a) < THRESHOLD} == {}
    assert report.unexplained == 0
    calls = sum(report.tally.of(a)[1] for a in (Aspect.ADDRESS, Aspect.MMIO, Aspect.INJECTION))
    assert calls > report.faults / 4
    # what was taken beside the frames stays rare, or is of the kind that the workload is about
    taken = {what: n for what, n in report.taken.items() if what not in (Assumed.FRAME.value, Assumed.BLOCK.value)}
    assert sum(taken.values()) < 0.2 * report.faults


TAKEN = {
    "arm64_two_vcpus": {Assumed.FRAME: 2, Assumed.BLOCK: 2, Assumed.ORDER: 12},
    "arm64_slots": {Assumed.FRAME: 47, Assumed.NO_SLOT: 1},
    "arm64_reclaim": {Assumed.FRAME: 6, Assumed.INVALIDATION: 3, Assumed.INVALIDATED: 1},
}


@pytest.mark.parametrize("name", TAKEN)
def test_cut_recordings_agree(name: str) -> None:
    report = check(str(CUT / name / "trace.txt"), TARGET)
    assert report.tally.disagreements == []
    assert report.taken == {what.value: n for what, n in TAKEN[name].items()}


WRONG: dict[str, tuple[str, dict[str, object], Aspect]] = {
    "loads in logged slots map writable": ("arm64_slots", {"read_maps_writable": ReadMaps.ALWAYS}, Aspect.PERMISSIONS),
    "loads never map writable": ("arm64_slots", {"read_maps_writable": ReadMaps.NEVER}, Aspect.PERMISSIONS),
    "everything is executable": ("arm64_slots", {"exec_grant": ExecGrant.ALWAYS}, Aspect.PERMISSIONS),
    "permission faults map anew": ("arm64_slots", {"relax_in_place": False}, Aspect.CALL),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_model_is_noticed(wrong: str) -> None:
    name, policy, aspect = WRONG[wrong]
    own = backend(TARGET).with_policy(**policy)
    checked = CallsCheck(own)
    checked.run(read(CUT / name / "trace.txt", CUT / name / "aux.txt", own))
    assert share(checked.tally, aspect) < THRESHOLD
    assert checked.tally.unexplained > 0


# A recording made up: what is said in a line is its own.


class Recording:
    """Lines of probes, one microsecond apart."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, function: str, fields: str, *, pid: int = 7) -> Recording:
        time = 1 + len(self.lines) / 1e6
        self.lines.append(f"{'vcpu':>16}-{pid:<6} [000] ..... {time:.6f}: probe: ({function}+0x0/0x8) {fields}")
        return self

    def returns(self, function: str, ret: int, *, pid: int = 7) -> Recording:
        time = 1 + len(self.lines) / 1e6
        self.lines.append(
            f"{'vcpu':>16}-{pid:<6} [000] ..... {time:.6f}: probe: (caller+0x1/0x8 <- {function}) ret={ret}"
        )
        return self

    def unmap_host(self, start: int, end: int, *, pid: int = 9) -> Recording:
        time = 1 + len(self.lines) / 1e6
        text = f"kvm_unmap_hva_range: mmu notifier unmap range: {start:#018x} -- {end:#018x}"
        self.lines.append(f"{'host':>16}-{pid:<6} [000] ..... {time:.6f}: {text}")
        return self

    def fault(self, esr: int, gpa: int, *, pid: int = 7, far: int = 0) -> Recording:
        hpfar = gpa >> 8 & ~0xF
        return self.say("kvm_handle_guest_abort", f"esr={esr:#x} far={far:#x} hpfar={hpfar:#x}", pid=pid)

    def map(
        self, addr: int, prot: int, *, size: int = 0x1000, phys: int = 0x100000, ret: int = 0, pid: int = 7
    ) -> Recording:
        fields = f"addr={addr:#x} size={size:#x} phys={phys:#x} prot={prot:#x}"
        return self.say(MAP, fields, pid=pid).returns(MAP, ret, pid=pid)

    def done(self, ret: int = 1, *, pid: int = 7) -> Recording:
        return self.returns("kvm_handle_guest_abort", ret, pid=pid)

    def checked(self, folder: Path, target: str | Target = TARGET) -> CallsCheck:
        (folder / "aux.txt").write_text("\n".join(self.lines) + "\n")
        own = backend(target) if isinstance(target, str) else target
        made = CallsCheck(own)
        made.run(read(folder / "aux.txt", None, own))
        return made


MAP = "kvm_pgtable_stage2_map"
LOAD, STORE, FETCH = 0x93C08007, 0x93C08047, 0x82000007
STORE_PERMISSION = 0x93C0804F
FETCH_FAULT_ON_WALK = 0x82000087
UNDECODED_STORE = 0x92000047


def read(recording: Path, aux: Path | None, own: Target) -> Iterator[Truth]:
    assembler = Assembler([own.backend], told=own.backend.name)
    return read_truth(str(recording), None, aux, assembler, ProbeReader(own.backend), stats=ReadStats())


MAPPED = Recording().fault(LOAD, 0x5000).map(0x5000, 6).done()
UNMAPPED = "kvm_pgtable_stage2_unmap"
CASES: dict[str, tuple[Recording, set[Assumed], list[tuple[Aspect, str]]]] = {
    "a load maps writable": (MAPPED, {Assumed.FRAME}, []),
    "of a page that the host may only read": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 4).done(),
        {Assumed.FRAME, Assumed.UNWRITABLE},
        [],
    ),
    "a page that was mapped writable stays so, unless logging began": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 6).done().fault(FETCH, 0x5000).map(0x5000, 5, ret=-11).done(),
        {Assumed.FRAME, Assumed.LOGGED},
        [],
    ),
    "a fetch maps executable": (Recording().fault(FETCH, 0x5000).map(0x5000, 7).done(), {Assumed.FRAME}, []),
    "a load does not": (
        Recording().fault(FETCH, 0x5000).map(0x5000, 6).done(),
        set(),
        [(Aspect.PERMISSIONS, "")],
    ),
    "coherent instruction caches": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 7).done(),
        {Assumed.FRAME, Assumed.COHERENT},
        [],
    ),
    "a block of the host": (
        Recording().fault(STORE, 0x345000).map(0x200000, 6, size=0x200000, phys=0x400000).done(),
        {Assumed.FRAME, Assumed.BLOCK},
        [],
    ),
    "a block at an address that no block has": (
        Recording().fault(STORE, 0x345000).map(0x345000, 6, size=0x200000, phys=0x400000).done(),
        set(),
        [(Aspect.LEVEL, "")],
    ),
    "a device": (
        Recording().fault(STORE, 0x9000, far=0x123).say("io_mem_abort", "ipa=0x9123").done(0),
        {Assumed.NO_SLOT},
        [],
    ),
    "a device inside the kernel": (
        Recording().fault(STORE, 0x9000, far=0x123).say("io_mem_abort", "ipa=0x9123").done(1),
        {Assumed.NO_SLOT, Assumed.KERNEL_DEVICE},
        [],
    ),
    "a device access of another address": (
        Recording().fault(STORE, 0x9000, far=0x123).say("io_mem_abort", "ipa=0x9124").done(0),
        set(),
        [(Aspect.CALL, ""), (Aspect.RETURN, ""), (Aspect.MMIO, "")],
    ),
    "a device access that the syndrome does not describe": (
        Recording().fault(UNDECODED_STORE, 0x9000, far=0x123).say("io_mem_abort", "ipa=0x9123").done(-38),
        {Assumed.NO_SLOT},
        [],
    ),
    "a fetch from no memory": (
        Recording().fault(FETCH, 0x9000, far=0x7123).say("kvm_inject_pabt", "addr=0x7123").done(),
        {Assumed.NO_SLOT},
        [],
    ),
    "an injection at another address": (
        Recording().fault(FETCH, 0x9000, far=0x7123).say("kvm_inject_pabt", "addr=0x7000").done(),
        set(),
        [(Aspect.CALL, ""), (Aspect.INJECTION, "")],
    ),
    "beyond the VM's table": (
        Recording().fault(STORE, 1 << 41, far=0x7123).say("kvm_inject_dabt", f"addr={1 << 41 | 0x123:#x}").done(),
        {Assumed.TABLE_BITS},
        [],
    ),
    "a slot that is read-only after all": (
        Recording()
        .fault(STORE, 0x9000)
        .say("io_mem_abort", "ipa=0x9000")
        .done(0)
        .fault(LOAD, 0x9000)
        .map(0x9000, 4)
        .done(),
        {Assumed.NO_SLOT, Assumed.READONLY_SLOT, Assumed.FRAME},
        [],
    ),
    "logging": (
        Recording()
        .say("kvm_pgtable_stage2_wrprotect", "addr=0x0 size=0x200000")
        .fault(LOAD, 0x5000)
        .map(0x5000, 4)
        .done()
        .fault(STORE_PERMISSION, 0x5000)
        .say("kvm_pgtable_stage2_relax_perms", "addr=0x5000 prot=0x6")
        .done(),
        {Assumed.FRAME},
        [],
    ),
    "logging ends": (
        Recording()
        .say("kvm_pgtable_stage2_wrprotect", "addr=0x0 size=0x200000")
        .fault(LOAD, 0x5000)
        .map(0x5000, 6)
        .done()
        .fault(LOAD, 0x6000)
        .map(0x6000, 6, phys=0x101000)
        .done(),
        {Assumed.FRAME, Assumed.NOT_LOGGED},
        [],
    ),
    "the host has no page": (Recording().fault(STORE, 0x5000).done(-14), {Assumed.PIN_FAILED}, []),
    "the handler fails otherwise": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 6).done().fault(STORE, 0x5000).done(-12),
        {Assumed.FRAME},
        [
            (Aspect.CALL, "the host's answer to the request for the page"),
            (Aspect.RETURN, "the host's answer to the request for the page"),
        ],
    ),
    "asking for the page invalidates it": (
        Recording()
        .fault(LOAD, 0x5000)
        .map(0x5000, 4)
        .done()
        .fault(STORE_PERMISSION, 0x5000)
        .unmap_host(0x7000, 0x8000, pid=7)
        .say(UNMAPPED, "addr=0x5000 size=0x1000")
        .done(),
        {Assumed.FRAME, Assumed.UNWRITABLE},
        [],
    ),
    "an invalidation runs": (
        Recording()
        .fault(LOAD, 0x5000)
        .map(0x5000, 6)
        .done()
        .unmap_host(0x7000, 0x8000)
        .say(UNMAPPED, "addr=0x5000 size=0x1000", pid=9)
        .fault(LOAD, 0x6000)
        .done()
        .fault(LOAD, 0x6000)
        .done()
        .fault(LOAD, 0x6000)
        .map(0x6000, 6)
        .done(),
        {Assumed.FRAME, Assumed.INVALIDATION, Assumed.INVALIDATED},
        [],
    ),
    "no invalidation runs": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 6).done().fault(LOAD, 0x6000).done(),
        {Assumed.FRAME},
        [(Aspect.CALL, "an invalidation of host memory")],
    ),
    "the frame stays": (
        Recording()
        .fault(LOAD, 0x5000)
        .map(0x5000, 6)
        .done()
        .fault(LOAD, 0x5000)
        .map(0x5000, 6, phys=0x7000, ret=-11)
        .done(),
        {Assumed.FRAME},
        [(Aspect.FRAME, "the host's answer to the request for the page")],
    ),
    "the entry was there": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 6).done().fault(LOAD, 0x5000).map(0x5000, 6, ret=-11).done(),
        {Assumed.FRAME},
        [],
    ),
    "nobody else changes the entry": (
        Recording().fault(LOAD, 0x5000).map(0x5000, 6, ret=-11).done(),
        set(),
        [(Aspect.ANSWER, "what else changed the entry")],
    ),
    "two vCPUs, one entry": (
        Recording()
        .fault(LOAD, 0x5000)
        .fault(LOAD, 0x5000, pid=8)
        .say(MAP, "addr=0x5000 size=0x1000 phys=0x100000 prot=0x6")
        .map(0x5000, 6, ret=-11, pid=8)
        .done(pid=8)
        .returns(MAP, 0)
        .done(),
        {Assumed.FRAME, Assumed.ORDER},
        [],
    ),
    "two vCPUs, two entries": (
        Recording()
        .fault(LOAD, 0x5000)
        .map(0x5000, 6)
        .done()
        .fault(LOAD, 0x6000)
        .fault(LOAD, 0x7000, pid=8)
        .say(MAP, "addr=0x6000 size=0x1000 phys=0x101000 prot=0x6")
        .map(0x7000, 6, phys=0x102000, ret=-11, pid=8)
        .done(pid=8)
        .returns(MAP, 0)
        .done(),
        {Assumed.FRAME},
        [(Aspect.ANSWER, "what else changed the entry")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path) -> None:
    recording, assumed, differs = CASES[name]
    checked = recording.checked(tmp_path)
    found = {(d.aspect, d.cause) for d in checked.tally.disagreements if d.aspect is not Aspect.TABLE}
    assert found == set(differs)
    assert {what for what in Assumed if checked.taken[what.value]} >= assumed
    if not differs:
        assert {what for what in Assumed if checked.taken[what.value]} == assumed


SLOT = "slot={slot} flags={flags} gpa={gpa:#x} size={size:#x} hva={hva:#x}"
SET = "__kvm_set_memory_region"


def with_slot(
    recording: Recording, folder: Path, *, flags: int = 0, hva: int = 0x7F0000000000, size: int = 0x400000
) -> dict[str, int]:
    """What is taken when the recording begins with a memslot; nothing may disagree."""
    head = Recording()
    head.say(SET, SLOT.format(slot=0, flags=flags, gpa=0, size=size, hva=hva)).returns(SET, 0)
    for number, line in enumerate(head.lines):
        head.lines[number] = line.replace("probe:", "memslot:" if not number else "memslot_ret:")
    head.lines += [line.replace(" 1.0", " 2.0", 1) for line in recording.lines]
    (folder / "trace.txt").write_text("# tracer: nop\n" + "\n".join(head.lines) + "\n")
    report = check(str(folder / "trace.txt"), TARGET)
    assert report.tally.disagreements == [] or dict(report.tally.causes) == {}, report.tally.disagreements
    return dict(report.taken)


def test_recorded_slots_need_no_assumption(tmp_path: Path) -> None:
    beside = Recording().fault(STORE, 0x400000, far=0x123).say("io_mem_abort", "ipa=0x400123").done(0)
    assert with_slot(beside, tmp_path) == {}
    readonly = (
        Recording()
        .fault(LOAD, 0x5000)
        .map(0x5000, 4)
        .done()
        .fault(STORE, 0x5000)
        .say("io_mem_abort", "ipa=0x5000")
        .done(0)
    )
    assert with_slot(readonly, tmp_path, flags=2) == {Assumed.FRAME.value: 1}
    logged = Recording().fault(LOAD, 0x5000).map(0x5000, 4).done()
    assert with_slot(logged, tmp_path, flags=1) == {Assumed.FRAME.value: 1}


def test_geometry_of_recorded_slots_decides(tmp_path: Path) -> None:
    block = Recording().fault(STORE, 0x5000).map(0, 6, size=0x200000, phys=0x400000).done()
    assert with_slot(block, tmp_path) == {Assumed.FRAME.value: 1, Assumed.BLOCK.value: 1}
    with pytest.raises(AssertionError, match="LEVEL"):
        with_slot(block, tmp_path, hva=0x7F0000001000)


def test_another_vm_is_noticed(tmp_path: Path) -> None:
    # two recordings in a row, of VMs with the same addresses; the first ends in the middle
    own = backend(TARGET)
    events = list(read(CUT / "arm64_slots" / "trace.txt", CUT / "arm64_slots" / "aux.txt", own))
    checked = CallsCheck(own)
    checked.run(events[: len(events) // 4] + events)
    assert checked.taken[Assumed.NEW_VM.value] == 1
    assert checked.tally.disagreements == []


def test_probes_of_another_run_are_refused(tmp_path: Path) -> None:
    trace = next((CUT / "arm64_two_vcpus").glob("trace.txt*"))
    other = next((CUT / "arm64_reclaim").glob("aux.txt*"))
    with pytest.raises(UsageError, match=r"its faults are from .*: give the probes of the same run"):
        check(str(trace), aux=str(other))


def test_faults_that_the_probes_lack_are_told(tmp_path: Path) -> None:
    trace, aux = (CUT / "arm64_reclaim" / f"{name}.txt" for name in ("trace", "aux"))
    lines = aux.read_text().splitlines(keepends=True)
    part = tmp_path / "aux.txt"
    part.write_text("".join(lines[: len(lines) // 2]))
    assert not [n for n in check(str(trace), aux=str(aux)).notes if "are not in" in n]
    assert [n for n in check(str(trace), aux=str(part)).notes if "were not checked" in n]
