"""Decoding as the vectors write it: ``python -m tests.kernel.x86_decode < lines``.

A line is ``KIND code [0xaddr] [flags]``: KIND ept, misconfig, npf, npf-snp or pf, code hexadecimal, flags of swp
(software-protected VM), priv (the frame's attribute is private), ad (KVM uses A/D bits), nxwa (NX workaround), apart
by commas or spaces. Its answer is one JSON object. A bad line ends the run with status 2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from arch.x86 import EPT, NPT, SHADOW
from arch.x86.joints import can_fast, rmp_handler_runs
from arch.x86.pferr import error_code
from arch.x86.registers import EPT_MISCONFIG, EPT_VIOLATION, KVM
from kvmfault.algebra.expr import Maybe, Pred, Word
from kvmfault.algebra.scalar import Regs, compile_pred
from kvmfault.contract.backend import Backend
from kvmfault.contract.fault import PageFault
from kvmfault.contract.format import Prot, block_sizes
from kvmfault.contract.outcome import Error, Fixed, Outcome
from kvmfault.contract.progress import Progress
from kvmfault.contract.shapes import Raw
from kvmfault.contract.target import Target
from kvmfault.path.run import bind
from tests.kernel.scripted_x86 import X86Ports, level

FLAGS: Final = frozenset({"swp", "priv", "ad", "nxwa"})
BEFORE_HANDLER: Final = ("screen", "translate", "lookup")
"""Steps of the path that stand before the point where the vectors captured the fault."""
DEFAULT_ADDRESS: Final = 0x12345678
_CODE: Final = re.compile(r"(?:0[xX])?[0-9a-fA-F]{1,16}")
_ADDRESS: Final = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
_STALE: Final = 2
_CAPTURED: Final = Fixed(1 << 12, Prot(0))
"""What the handler that captured the fault answered."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One KIND: the backend, where code and address go, what else is set, and what makes the kernel warn."""

    backend: Backend
    code: str
    address: str
    extra: Mapping[str, int]
    warns: str = ""
    snp: bool = False
    rmp: Callable[[PageFault, Outcome], bool] = lambda fault, outcome: False
    """Whether the handler of RMP faults runs."""

    @property
    def target(self) -> Target:
        return _TARGETS[self.backend.name]


KINDS: Final = {
    "ept": Kind(EPT, "EXIT_QUALIFICATION", "GUEST_PHYSICAL_ADDRESS", {"EXIT_REASON": EPT_VIOLATION}),
    "misconfig": Kind(EPT, "EXIT_QUALIFICATION", "GUEST_PHYSICAL_ADDRESS", {"EXIT_REASON": EPT_MISCONFIG}),
    "npf": Kind(NPT, "EXITINFO1", "EXITINFO2", {}, "hardware_synthetic", rmp=rmp_handler_runs),
    "npf-snp": Kind(
        NPT, "EXITINFO1", "EXITINFO2", {"KVM": KVM["SNP"].mask}, "hardware_synthetic", snp=True, rmp=rmp_handler_runs
    ),
    "pf": Kind(SHADOW, "ERROR_CODE", "CR2", {}, "upper_half"),
}
_TARGETS: Final = {b.name: Target(b, "4k", "6.12") for b in (EPT, NPT, SHADOW)}
_COMPILED: Final[dict[tuple[str, str], Callable[[Regs], bool]]] = {}


def _asks(target: Target, name: str, fault: Raw) -> bool:
    key = (target.name, name)
    if key not in _COMPILED:
        accessor = target.accessors[name]
        assert isinstance(accessor, Pred)
        _COMPILED[key] = compile_pred(accessor, target.order)
    return _COMPILED[key](fault.of)


def decode(kind: Kind, code: int, address: int, flags: frozenset[str]) -> dict[str, object]:
    """The fields of one vector."""
    target = kind.target
    fault = target.decode(**{kind.code: code, kind.address: address, **kind.extra})
    keys = {"walk": _STALE, "attr": int("priv" in flags), "swp": int("swp" in flags), "ad": int("ad" in flags)}
    keys["hasprv"] = int(kind.snp or "swp" in flags)
    vm = X86Ports(target.format, keys, small_exec="nxwa" in flags)
    at, outcome = _before_handler(target, vm, fault)
    warned = len(vm.warnings) + (_asks(target, kind.warns, fault) if kind.warns else 0)
    fields: dict[str, object] = {
        "captured": outcome is None,
        "rc": -outcome.errno if isinstance(outcome, Error) else 1,
        "warn": warned,
        "rmp_handler": int(kind.rmp(fault, outcome or _CAPTURED)),
    }
    return fields if outcome is not None else {**fields, **_captured(target, vm, fault, at)}


def _before_handler(target: Target, vm: X86Ports, fault: Raw) -> tuple[Progress, Outcome | None]:
    at = Progress(target.policy, target.joints)
    for step, function in bind(target).named:
        if step.name not in BEFORE_HANDLER:
            break
        outcome = function(vm, fault, at)
        if outcome is not None:
            return at, outcome
    return at, None


def _captured(target: Target, vm: X86Ports, fault: Raw, at: Progress) -> dict[str, object]:
    page = 1 << vm.page_shift
    pferr = target.accessors["pferr"]
    assert isinstance(pferr, Word | Maybe)
    return {
        "pferr": hex(error_code(pferr, target.named(fault), at.private)),
        "gfn": hex(at.gfn),
        "exec": fault.is_exec,
        "write": fault.is_write,
        "present": _asks(target, "PFERR_PRESENT", fault),
        "rsvd": fault.is_reserved,
        "user": _asks(target, "PFERR_USER", fault),
        "prefetch": fault.is_prefetch,
        "is_tdp": _asks(target, "is_tdp", fault),
        "is_private": at.private,
        "nxwa": vm.facts.small_exec,
        "can_fast": can_fast(fault, vm, at.private, at.gfn),
        "gpt_write": _asks(target, "write_to_guest_page_table", fault),
        "max_level": level(block_sizes(vm.format)[-1]),
        "req_level": level(at.wanted or page),
        "goal_level": level(at.size or page),
    }


def parse(line: str) -> tuple[Kind, int, int, frozenset[str]] | None:
    """The words of a line; None for an empty one. Raises ValueError saying what is wrong."""
    words = line.replace(",", " ").split()
    if not words:
        return None
    if words[0] not in KINDS:
        raise ValueError(f"kind {words[0]!r}: expected one of {', '.join(KINDS)}")
    if len(words) < 2 or not _CODE.fullmatch(words[1]):
        raise ValueError(f"code {''.join(words[1:2])!r}: expected a hexadecimal number of up to 64 bits")
    rest = words[2:]
    address = DEFAULT_ADDRESS
    if rest and _ADDRESS.fullmatch(rest[0]):
        address = int(rest.pop(0), 16)
    for flag in rest:
        if flag not in FLAGS and flag != "-":
            raise ValueError(f"flag {flag!r}: expected {', '.join(sorted(FLAGS))} (or an address as 0x...)")
    return KINDS[words[0]], int(words[1], 16), address, frozenset(rest)


def answers(lines: Iterable[str]) -> Iterator[str]:
    """The answer to each line. Raises ValueError with the number of a bad line."""
    for number, line in enumerate(lines, 1):
        try:
            parsed = parse(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if parsed is not None:
            yield json.dumps(decode(*parsed))


def main() -> int:
    """Answer standard input."""
    try:
        for answer in answers(sys.stdin):
            print(answer)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
