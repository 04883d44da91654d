"""Decisions as the vectors write them: ``python -m tests.kernel.arm64_decide < lines``.

A line is ``esr far hpfar [key=value ...]``, hexadecimal, keys as tests/vectors/PROVENANCE.md lists them; its answer one
JSON object: ``ret`` (negative errno, 0 exit, 1 resume), ``events`` in order, ``exit``, ``rd`` and ``reg``. A bad line
ends the run with status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from arch.arm64 import BACKEND
from arch.arm64.stage2 import Stage2
from kvmfault.algebra.expr import Maybe, Word
from kvmfault.algebra.scalar import Regs, compile_pred, compile_word
from kvmfault.contract.format import Memory
from kvmfault.contract.outcome import (
    Completion,
    Done,
    Error,
    Exit,
    Inject,
    MmioAccess,
    Outcome,
    Resume,
    Signal,
    UndecodedMmio,
)
from kvmfault.contract.ports import Area, GuestTranslation, GuestWalkFault, MapResult, Memslot, Pin, PinError, VmFacts
from kvmfault.contract.target import Target
from kvmfault.errors import KvmfaultError
from kvmfault.path.run import BoundPath, bind
from kvmfault.types import U64, Gfn, Gpa, Hva, Pfn
from kvmfault.vm.memslot import MemslotFlag
from tests.kernel.scripted import ScriptedPorts
from tests.kernel.words import ANY, ERRNO, FRAME, WORD, keys, number

DEFAULTS: Final = {
    "ipa_limit": 0x30, "ia_bits": 0x28, "nested": 0, "walk": 0, "walkfsc": 0, "out": 0, "tsz": 0x1000, "tr": 1,
    "tw": 1, "tx": 1, "tlevel": 3, "slot": 1, "base": 0x40000, "npages": 0x40000, "uaddr": 0x7F00_0000_0000,
    "logging": 0, "vmashift": 12, "mteok": 1, "anyuc": 0, "vma": 1, "pfn": 0, "pfnkind": 0, "mapw": 1, "retry": 0,
    "mte": 0, "dic": 0, "mapsz": 0x1000, "topup": 0, "mapret": 0, "bus": 1, "be": 0, "val": 0, "prot": 0, "nisv": 0,
    "apei": 1, "busval": 0, "user": 0, "el0": 0,
}  # fmt: skip
_BITS: Final = range(64)
ALLOWED: Final[Mapping[str, range]] = {
    **dict.fromkeys(DEFAULTS, ANY),
    **dict.fromkeys(("ipa_limit", "ia_bits", "vmashift", "walkfsc"), _BITS),
    **dict.fromkeys(("out", "tsz", "uaddr"), WORD),
    **dict.fromkeys(("base", "npages", "pfn"), FRAME),
    **dict.fromkeys(("topup", "mapret"), ERRNO),
    "slot": range(3),
    "pfnkind": range(4),
}
"""What each key may be."""
_EAGAIN, _NORMAL, _DEVICE, _POISON = 11, 0, 1, 2
_PROT_BIT: Final = {Memory.NORMAL: 0, Memory.DEVICE: 8, Memory.NONCACHEABLE: 16}
_TARGETS: Final = {kernel: Target(BACKEND, "4k", kernel) for kernel in BACKEND.kernels}


@dataclass(frozen=True, slots=True)
class _Endless(Stage2):
    # the table is as large as ia_bits says, whatever a real one of this format could hold
    @property
    def gpa_bits(self) -> int:
        return 64


_FORMAT: Final = _Endless("4k", 12)


def _printed(name: str) -> Callable[[Regs], int]:
    accessor = _TARGETS["6.12"].accessors[name]
    assert not isinstance(accessor, Maybe)
    order = _TARGETS["6.12"].order
    return compile_word(accessor, order) if isinstance(accessor, Word) else compile_pred(accessor, order)


_PRINTED: Final = {
    name: _printed(name) for name in ("kvm_vcpu_dabt_get_rd", "kvm_vcpu_get_fault_ipa", "kvm_vcpu_trap_is_iabt")
}
"""What the vectors print of the registers, also where 7.4 decides."""


class Surroundings(ScriptedPorts):
    """What the keys say about the world around the fault. ``resumed``: the value with which the guest goes on."""

    def __init__(self, env: Mapping[str, int]) -> None:
        self.env = env
        facts = VmFacts(
            ipa_limit_bits=env["ipa_limit"],
            table_bits=env["ia_bits"],
            nested=bool(env["nested"]),
            tagging=bool(env["mte"]),
            coherent_icache=bool(env["dic"]),
            protected=bool(env["prot"]),
            undecoded_mmio_exits=bool(env["nisv"]),
            host_claims_aborts=not env["apei"],
            big_endian=bool(env["be"]),
        )
        super().__init__(_FORMAT, facts)
        self.resumed = 1
        flags = MemslotFlag.READONLY if env["slot"] == 2 else MemslotFlag(0)
        self.slot = Memslot(
            id=0,
            as_id=0,
            base_gfn=Gfn(env["base"]),
            npages=env["npages"],
            hva=Hva(env["uaddr"]),
            flags=flags | (MemslotFlag.LOG_DIRTY if env["logging"] else MemslotFlag(0)),
            page_shift=12,
        )

    def find_slot(self, gfn: Gfn) -> Memslot | None:
        return self.slot if self.env["slot"] and self.slot.contains(gfn) else None

    def walk_guest(self, gpa: Gpa) -> GuestTranslation | GuestWalkFault | None:
        env = self.env
        self.events.append(f"walk_s2 ipa={gpa:x}")
        if env["walk"]:
            self.resumed = max(1, env["walk"])
            return GuestWalkFault(env["walkfsc"], max(0, -env["walk"]))
        return GuestTranslation(
            Gpa(env["out"]), env["tsz"], bool(env["tr"]), bool(env["tw"]), bool(env["tx"]), env["tlevel"]
        )

    def repair_young(self, gpa: Gpa) -> None:
        self.events.append(f"mkyoung ipa={gpa:x}")

    def topup(self) -> int:
        self.events.append("topup")
        return -self.env["topup"]

    def area(self, hva: Hva) -> Area | None:
        env = self.env
        device = env["pfnkind"] == _DEVICE
        return Area(1 << env["vmashift"], bool(env["mteok"]), bool(env["anyuc"]), device) if env["vma"] else None

    def pin(self, slot: Memslot, gfn: Gfn, hva: Hva, *, write: bool, nowait: bool, interruptible: bool) -> Pin:
        env = self.env
        self.events.append(f"faultin gfn={gfn:x} write={write:d}")
        if env["retry"]:
            self.invalidations.begin()
            self.invalidations.add(gfn, Gfn(gfn + 1))
            self.invalidations.end()
        if env["pfnkind"] not in (_NORMAL, _DEVICE):
            return Pin(None, PinError.HWPOISON if env["pfnkind"] == _POISON else PinError.FAULT)
        pfn = Pfn(env["pfn"] or gfn + 0x100000)
        return Pin(pfn, writable=bool(env["mapw"]), device=env["pfnkind"] == _DEVICE)

    def mapping_size(self, hva: Hva) -> int:
        return self.env["mapsz"]

    def prepare_page(self, pfn: Pfn, size: int) -> None:
        self.events.append(f"mte_sanitise pfn={pfn:x} size={size:x}")

    def map(
        self, gpa: Gpa, size: int, pfn: Pfn, prot: int, memory: Memory, *, host_writable: bool, young: bool, tag: int
    ) -> MapResult | int:
        bits = prot | _PROT_BIT[memory] | (tag & 3) << 55
        self.events.append(f"map addr={gpa:x} size={size:x} phys={pfn << 12:x} prot={bits:x}")
        return self._mapped()

    def relax(self, gpa: Gpa, prot: int, memory: Memory) -> MapResult | int:
        self.events.append(f"relax addr={gpa:x} prot={prot | _PROT_BIT[memory]:x}")
        return self._mapped()

    def _mapped(self) -> MapResult | int:
        errno = -self.env["mapret"]
        return MapResult.FIXED if not errno else MapResult.LOST if errno == _EAGAIN else errno

    def mark_dirty(self, slot: Memslot, gfn: Gfn, pfn: Pfn) -> None:
        self.events += [f"pfn_dirty pfn={pfn:x}", f"mark_dirty gfn={gfn:x}"]

    def signal(self, signal: Signal) -> None:
        self.events.append(f"hwpoison hva={signal.hva:x} lsb={signal.lsb}")

    def warn(self, text: str) -> None:
        self.events.append("warn")

    def bus(self, access: MmioAccess) -> int | None:
        data = f" data={_number(access):x}" if access.is_write else ""
        direction = "write" if access.is_write else "read"
        self.events.append(f"bus_{direction} addr={access.gpa:x} len={access.size}{data}")
        return None if self.env["bus"] else self.env["busval"] & U64

    def register(self, number: int) -> int:
        return 0 if number == 31 else self.env["val"] & U64


def _number(access: MmioAccess) -> int:
    return int.from_bytes(access.data, "little")


def decide(
    esr: int, far: int, hpfar: int, script: Mapping[str, int], kernel: str = "6.12", path: BoundPath | None = None
) -> dict[str, object]:
    """What the vectors record of one fault in the surroundings that *script* describes."""
    target = _TARGETS[kernel]
    vm = Surroundings({**DEFAULTS, **script})
    fault = target.decode(ESR_EL2=esr, FAR_EL2=far, HPFAR_EL2=hpfar)
    outcome = (path or bind(target)).resolve(vm, fault)
    told = _Told(vm, lambda accessor: _PRINTED[accessor](fault.of), hpfar)
    told.outcome(outcome)
    answer: dict[str, object] = {"ret": told.ret, "events": vm.events, "exit": told.exit}
    if told.register != 31:
        answer |= {"rd": told.register, "reg": told.value}
    return answer


class _Told:
    # an outcome in the vectors' words: injections and exits are events there
    def __init__(self, vm: Surroundings, accessor: Callable[[str], int], hpfar: int) -> None:
        self.vm = vm
        self.accessor = accessor
        self.hpfar = hpfar
        self.register = accessor("kvm_vcpu_dabt_get_rd")
        self.value = vm.register(self.register)
        self.ret = vm.resumed
        self.exit = 0

    def outcome(self, outcome: Outcome) -> None:
        events = self.vm.events
        match outcome:
            case Inject():
                self.inject(outcome)
            case Exit():
                self.leave(outcome)
            case Error(errno):
                self.ret = -errno
            case Resume(Done.CLAIMED):
                events.append(self.asked_host())
            case Resume(Done.SKIPPED):
                events.append("incr_pc")
            case Resume(Done.BUS, completion=Completion() as completion):
                self.complete(completion, outcome.value)

    def asked_host(self) -> str:
        # the host is asked through a VM fact, which leaves no trace of its own
        return f"apei addr={self.accessor('kvm_vcpu_get_fault_ipa'):x}"

    def inject(self, outcome: Inject) -> None:
        address = f"addr={outcome.address:x}"
        match outcome.what:
            case "vabt":
                self.vm.events += [self.asked_host(), "inject_vabt"]
            case "size_fault":
                is_iabt = self.accessor("kvm_vcpu_trap_is_iabt")
                self.vm.events.append(f"inject_size_fault iabt={is_iabt:d} {address}")
            case "s2_fault":
                saved = f"esr={outcome.syndrome:x} far={outcome.address:x} hpfar={self.hpfar:x}"
                self.vm.events.append(f"inject_s2_fault {saved}")
            case what:
                self.vm.events.append(f"inject_{what} {address}")
        if outcome.errno:
            self.ret = -outcome.errno

    def leave(self, outcome: Exit) -> None:
        self.ret, self.exit = -outcome.errno, outcome.reason.value
        match outcome.detail:
            case MmioAccess() as access:
                address = f"addr={access.gpa:x} len={access.size} write={access.is_write:d}"
                self.vm.events.append(f"exit_mmio {address} data={_number(access):x}")
                if self.vm.env["user"] and outcome.completion is not None:
                    self.complete(outcome.completion, self.vm.env["busval"] & U64)
            case UndecodedMmio(syndrome, gpa):
                self.vm.events.append(f"exit_nisv esr_iss={syndrome:x} ipa={gpa:x}")

    def complete(self, completion: Completion, bus_value: int) -> None:
        value = completion.finish(bus_value)
        self.value = self.value if value is None else value
        self.vm.events.append("incr_pc")


def parse(line: str) -> tuple[int, int, int, dict[str, int]]:
    """The three registers and the keys. Raises ValueError saying what is wrong."""
    words = line.split()
    if len(words) < 3:
        raise ValueError(f"{line.strip()[:80]!r}: expected 'esr far hpfar [key=value ...]', hexadecimal")
    esr, far, hpfar = (number(name, word, WORD, 16) for name, word in zip(("esr", "far", "hpfar"), words, strict=False))
    return esr, far, hpfar, keys(words[3:], ALLOWED, 16)


def answers(lines: Iterable[str], path: BoundPath | None = None) -> Iterator[dict[str, object]]:
    """The answer to each line, on *path* or that of 6.12. Raises ValueError with the number of a bad line."""
    for line_number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield decide(*parse(line), path=path)
        except (ValueError, KvmfaultError) as error:
            raise ValueError(f"line {line_number}: {error}") from error


def main() -> int:
    """Answer standard input."""
    try:
        for answer in answers(sys.stdin):
            print(json.dumps(answer))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
