"""What eight kernels answered to small guests and to ioctls (behaviours-*.json), asked of the model.

Where this machine runs the kernel of a file, its KVM is asked too: that shows the scripts here to be those of the file.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

import pytest

from kvmfault.contract.outcome import Error, Exit, MmioAccess, Reason
from kvmfault.contract.target import backend
from kvmfault.live.device import Device, DeviceKvm
from kvmfault.live.ioctl import told
from kvmfault.live.model import ModelKvm, OneToOne
from kvmfault.live.script import (
    POOL,
    Access,
    Answer,
    ClearDirtyLog,
    CreateMemfd,
    DirtyRing,
    GetDirtyLog,
    Host,
    HostAction,
    Kvm,
    ManualProtect,
    Operation,
    Prefault,
    SetAttributes,
    log_bytes,
    perform,
)
from kvmfault.live.sequences import Sequence, fetch, read, region, write
from kvmfault.types import Gpa
from tests.conftest import VECTORS
from tests.real_mode import CODE_AT, Guest
from tests.test_live import CHECK

TARGETS: Final = {
    "6.1.192-svm-npt": "x86-npt@6.12+prefault=absent",
    "6.1.192-svm-shadow": "x86-shadow@6.12+prefault=absent",
    "6.12.117-svm-npt": "x86-npt@6.12",
    "6.12.117-svm-shadow": "x86-shadow@6.12",
    "6.12.117-vmx-ept": "x86-ept@6.12",
    "6.12.117-vmx-ept-pml": "x86-ept@6.12",
    "6.12.117-vmx-shadow": "x86-shadow@6.12",
    "6.18-pvm": "x86-shadow@6.12",
}
"""By the name of the file. KVM_PRE_FAULT_MEMORY came with 6.11."""
INTERPRETED: Final = {"6.18-pvm"}
"""Where KVM's emulator runs guests in real mode."""
SPARSE: Final = {"6.1.192-svm-shadow", "6.12.117-svm-npt", "6.12.117-vmx-ept"}
"""Where page 20 of the log was not present in the host when the guest read it: a read then gets the shared page of
zeros, which is mapped read-only and not marked. In the other runs it was present, as memory that comes by huge pages is
after one touch. The files do not say so, but their answers to "guest-read-20" follow neither kernel nor paging."""


@cache
def load(name: str) -> Any:  # noqa: ANN401  JSON
    return json.loads((VECTORS / f"behaviours-{name}.json").read_text())


@cache
def caps(name: str) -> Any:  # noqa: ANN401  HostCaps, but the cache hides it
    asked = {number.split("(")[0]: value for number, value in load(name)["caps"].items()}
    asked["GUEST_MEMFD_FLAGS"] = asked["cap_244"]
    target = backend(TARGETS[name])
    return told(target.backend.host(target.format), lambda e: asked.get(e.name, 0))


def model(name: str) -> ModelKvm:
    return ModelKvm(OneToOne(backend(TARGETS[name]), caps=caps(name)), interpreted=name in INTERPRETED)


@contextmanager
def kvm(name: str, *, real: bool) -> Iterator[Kvm]:
    if not real:
        yield model(name)
        return
    if isinstance(CHECK, str):
        pytest.skip(CHECK)
    guest = next((g for g in CHECK.live.guests if g.interpreted()), None)
    if guest is None:
        pytest.skip("no usable KVM: it is not that of the file")
    with Device() as device, DeviceKvm(device, guest) as found:
        yield found


EACH: Final = [*((name, False) for name in TARGETS), ("6.18-pvm", True)]
each = pytest.mark.parametrize(("name", "real"), EACH, ids=lambda v: v if isinstance(v, str) else ("model", "kvm")[v])


def test_all_files_are_here() -> None:
    assert {path.stem.removeprefix("behaviours-") for path in VECTORS.glob("behaviours-*.json")} == set(TARGETS)
    for name in TARGETS:
        assert {len(load(name)[part]) for part in ("exits",)} == {30}
        assert len(load(name)["dirty_log"]) == 80
        assert len(load(name)["misc"]) == 27


# Exits.

MEMORY: Final[Sequence] = (
    region(0, 0, 0x40000, 0),
    region(1, 0x60000, 0x4000, 1 << 20, 2),
    region(2, 0x44000, 0x2000, 2 << 20),
    region(3, 0x46000, 0x1000, 3 << 20),
)
BEFORE: Final = {
    "bad-hva-read": HostAction.UNMAP,
    "bad-hva-write": HostAction.UNMAP,
    "hva-prot-read-write": HostAction.READ_ONLY,
    "hva-prot-read-read": HostAction.READ_ONLY,
    "hva-prot-none-read": HostAction.NO_ACCESS,
}
MOVES: Final = "slot-delete-recreate-move"
DEVICE: Final = bytes.fromhex("a55ac33c11223344")
"""What the VMM gave to loads; the first byte of the read-only slot is 1, all other memory is zero."""
NAMES: Final = sorted(load("6.18-pvm")["exits"].keys() - {MOVES})


def content(gpa: int, size: int) -> int:
    return int.from_bytes(DEVICE[:size], "little") if gpa >= 0x80000 else int(gpa == 0x60000)


def expected(rows: list[dict[str, Any]]) -> tuple[Exit | Error, ...]:
    """The exits of one run, without the HLT that ends it."""
    found: list[Exit | Error] = []
    for row in rows:
        match row:
            case {"reason": "HLT"}:
                pass
            case {"reason": "MMIO", "phys_addr": gpa, "len": size, "is_write": is_write, "data": data}:
                stored = bytes.fromhex(data)[:size] if is_write else b""
                found.append(Exit(Reason.MMIO, MmioAccess(Gpa(int(gpa, 16)), size, bool(is_write), stored)))
            case {"reason": "INTERNAL_ERROR", "suberror": 1}:
                found.append(Exit(Reason.INTERNAL_ERROR))
            case {"reason": "UNKNOWN", "run_errno": name}:
                found.append(Error(getattr(errno, name)))
            case _:
                raise ValueError(row)
    return tuple(found)


def run(on: Kvm, accesses: Iterator[Access] | Sequence) -> tuple[Exit | Error, ...]:
    """The exits of one guest; what comes after a failure does not run."""
    exits: list[Exit | Error] = []
    for access in accesses:
        exits += perform(on, access).exits
        if exits and not (isinstance(exits[-1], Exit) and exits[-1].reason is Reason.MMIO):
            break
    return tuple(exits)


@each
@pytest.mark.parametrize("case", NAMES)
def test_exits(name: str, real: bool, case: str) -> None:
    row = load(name)["exits"][case]
    with kvm(name, real=real) as on:
        for operation in MEMORY:
            assert perform(on, operation) == Answer()
        if case in BEFORE:
            perform(on, Host(BEFORE[case], POOL + 0x10000, 4096))
        assert run(on, Guest(bytes.fromhex(row["code"]), content).accesses()) == expected(row["exits"])


@each
def test_exits_while_a_slot_goes_and_comes(name: str, real: bool) -> None:
    # the values that the guest got ("ax") are contents of memory, of which the model has none
    changes: tuple[Sequence, ...] = (
        (),
        (region(2, 0x44000, 0, 2 << 20),),
        (region(2, 0x44000, 0x2000, 4 << 20),),
        (region(2, 0x48000, 0x2000, 4 << 20),),
    )
    with kvm(name, real=real) as on:
        for operation in MEMORY:
            perform(on, operation)
        got = []
        for change in changes:
            assert [perform(on, operation) for operation in change] == [Answer()] * len(change)
            got.append(run(on, (fetch(CODE_AT), read(0x44000, 2))))
    assert got == [expected(rows) for rows in load(name)["exits"][MOVES]["exits"]]


# Dirty log.


class Log:
    """A script in the words of the file: each line asked for is compared with the file's."""

    def __init__(self, on: Kvm, lines: dict[str, Any]) -> None:
        self.on = on
        self.lines = lines
        self.seen: set[str] = set()

    def do(self, *operations: Operation) -> Answer:
        answer = Answer()
        for operation in operations:
            answer = perform(self.on, operation)
        return answer

    def guest(self, *accesses: Access) -> tuple[Exit | Error, ...]:
        return run(self.on, (fetch(CODE_AT), *accesses))

    def line(self, key: str, got: object) -> None:
        self.seen.add(key)
        assert got == self.lines[key], key


def word(answer: Answer) -> str:
    return errno.errorcode[answer.errno] if answer.errno else "ok"


def both(answer: Answer) -> list[object]:
    return [word(answer), list(answer.pages)]


LOG_ON, LOG_OFF = (region(0, 0, 0x80000, 0, flags) for flags in (1, 0))


def plain_log(log: Log, name: str) -> None:
    get = GetDirtyLog(0)
    log.do(LOG_ON, region(1, 0x90000, 0x4000, 1 << 20))
    log.line("fresh-slot", both(log.do(get)))
    log.guest(write(0x10000), write(0x12000), write(0x3F000))
    log.line("guest-wrote-16-18-63", list(log.do(get).pages))
    log.line("second-get", list(log.do(get).pages))
    log.guest(write(0x10000))
    log.line("guest-wrote-16-again", list(log.do(get).pages))
    if name in SPARSE:
        log.do(Host(HostAction.DISCARD, POOL + 0x14000, 4096))
    log.guest(read(0x14000))
    log.line("guest-read-20", list(log.do(get).pages))
    log.do(Host(HostAction.STORE, POOL + 0x1E000, 4096))
    log.line("host-wrote-30", list(log.do(get).pages))
    log.guest(write(0x11FFF, 2))
    log.line("guest-write16-crossing-17-18", list(log.do(get).pages))
    log.guest(write(0x14000))
    log.line("flags->0", word(log.do(LOG_OFF)))
    log.line("get-with-log-off", word(log.do(get)))
    log.guest(write(0x15000))
    log.line("flags->LOG", word(log.do(LOG_ON)))
    log.line("get-after-off-on (20 written on,21 written off)", list(log.do(get).pages))
    log.guest(write(0x16000))
    log.line("noop-set-keeps-bitmap", [word(log.do(LOG_ON)), list(log.do(get).pages)])
    log.line("get-nonlog-slot", word(log.do(GetDirtyLog(1))))
    log.line("get-absent-slot", word(log.do(GetDirtyLog(5))))
    for slot in (0x7FFB, 0x7FFC, 0x7FFF, 0xFFFF, 0x10000, 0xFFFFFFFF):
        log.line(f"get-slot-id-{slot:#x}", word(log.do(GetDirtyLog(slot))))
    log.line("get-bad-pointer (bitmap clean)", word(log.do(GetDirtyLog(0, bad_pointer=True))))
    log.guest(write(0x19000))
    log.line("get-bad-pointer (25 dirty)", word(log.do(GetDirtyLog(0, bad_pointer=True))))
    log.line("get-after-bad-pointer", list(log.do(get).pages))


def other_slots(log: Log, name: str) -> None:
    log.do(LOG_ON)
    small = log.do(region(2, 0xC0000, 0x3000, 1 << 20, 1), GetDirtyLog(2))
    size = log_bytes(3)
    log.line("slot-of-3-pages-bitmap-bytes-written", [small.errno, "00" * size + "ff" * (24 - size)])
    log.do(region(3, 0x90000, 0x4000, 2 << 20, 1))
    log.guest(write(0x90000), write(0x92000))
    log.line(
        "move keeps bitmap: write 0x90,0x92 then move",
        both(log.do(region(3, 0xA0000, 0x4000, 2 << 20, 1), GetDirtyLog(3))),
    )
    log.guest(write(0xA1000))
    log.line("after-move-write-0xa1", list(log.do(GetDirtyLog(3)).pages))
    log.line("ro+log slot: set", word(log.do(region(4, 0xB0000, 0x4000, 3 << 20, 3))))
    (met,) = log.guest(write(0xB0000, 2, 0xB000))
    assert isinstance(met, Exit)
    assert isinstance(met.detail, MmioAccess)
    told_exit = [
        met.reason.name,
        f"{met.detail.gpa:#x}",
        met.detail.size,
        "w",
        met.detail.data.hex().ljust(16, "0"),
        "ok",
        "",
    ]
    log.line("ro+log: write exits", [told_exit, ["HLT", "", "", "", "", "ok", ""]])
    log.line("ro+log: get", both(log.do(GetDirtyLog(4))))


def clear_without_manual(log: Log, name: str) -> None:
    log.do(LOG_ON)
    log.guest(write(0x10000), write(0x11000))
    log.line("clear-without-manual-cap", word(log.do(ClearDirtyLog(0, 0, 64, 1 << 16))))
    log.line("get-after-clear", list(log.do(GetDirtyLog(0)).pages))


CLEARS: Final = {
    0: ((1, 64), (32, 64), (64, 63), (64, 64), (64, 1), (0, 32), (128, 64), (64, 128), (0, 129), (0, 0)),
    1: ((64, 6), (64, 7), (64, 5), (0, 70), (0, 64), (64, 64)),
}


def manual(log: Log, flags: int) -> None:
    def count() -> int:
        return len(log.do(GetDirtyLog(0)).pages)

    log.line(f"enable MANUAL_DIRTY_LOG_PROTECT2={flags}", word(log.do(ManualProtect(flags))))
    log.do(LOG_ON, region(1, 0x100000, 70 * 4096, 1 << 20, 1))
    log.line(f"manual{flags} initial-popcount", count())
    log.guest(write(0x10000), write(0x11000), write(0x64000))
    log.line(f"manual{flags} get1-popcount", count())
    log.line(f"manual{flags} get2-popcount", count())
    log.line(f"manual{flags} clear first=0 n=64 bits 16", word(log.do(ClearDirtyLog(0, 0, 64, 1 << 16))))
    found = log.do(GetDirtyLog(0)).pages
    log.line(f"manual{flags} after clear: 16,17,100 set?", [page in found for page in (16, 17, 100)])
    log.guest(write(0x10000))
    log.line(f"manual{flags} rewrite 16 -> set?", 16 in log.do(GetDirtyLog(0)).pages)
    for slot, asked in CLEARS.items():
        for first, num in asked:
            key = f"manual{flags} slot{slot}({(128, 70)[slot]}p) clear first={first} num={num}"
            log.line(key, word(log.do(ClearDirtyLog(slot, first, num, 0))))


def rings(log: Log, name: str) -> None:
    log.line("enable MANUAL_DIRTY_LOG_PROTECT2=2", word(log.do(ManualProtect(2))))
    log.line("dirty-ring enable size 4096 (cap 192)", word(log.do(DirtyRing(4096))))
    log.do(LOG_ON)
    log.line("get-dirty-log with ring", word(log.do(GetDirtyLog(0))))


@each
def test_dirty_log(name: str, real: bool) -> None:
    lines = load(name)["dirty_log"]
    seen: set[str] = set()
    for part in (plain_log, other_slots, clear_without_manual, rings):
        with kvm(name, real=real) as on:
            log = Log(on, lines)
            part(log, name)
            seen |= log.seen
    for flags in (1, 3):
        with kvm(name, real=real) as on:
            log = Log(on, lines)
            manual(log, flags)
            seen |= log.seen
    assert seen == set(lines)


# Attributes, guest_memfd, pre-fault.


def fields_of(key: str) -> dict[str, int]:
    """Numbers of a key such as "CREATE_GUEST_MEMFD size=0x1000 flags=0"."""
    return {field: int(value, 0) for field, _, value in (word.partition("=") for word in key.split()) if value}


def misc(number: int, key: str) -> Operation:
    """The operation that a key of "misc" stands for."""
    asked = fields_of(key)
    match key.split()[0]:
        case "SET_MEMORY_ATTRIBUTES":
            return SetAttributes(asked["gpa"], asked["size"], asked["attr"], asked["flags"])
        case "CREATE_GUEST_MEMFD":
            return CreateMemfd(number, asked["size"], asked["flags"])
        case "PRE_FAULT":
            return Prefault(asked["gpa"], asked["size"], asked["flags"])
    raise ValueError(key)


@each
def test_misc(name: str, real: bool) -> None:
    with kvm(name, real=real) as on:
        for operation in MEMORY:
            perform(on, operation)
        for number, (key, value) in enumerate(load(name)["misc"].items()):
            got = perform(on, misc(number, key))
            said = word(got) if got.rest is None else [word(got), *map(hex, got.rest)]
            assert said == value, key
