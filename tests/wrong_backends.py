"""Backends with one mistake each: small changes of the example, of arm64 and of x86, and the check that must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from kvmfault_toy import BACKEND as TOY
from kvmfault_toy.facts import FACTS
from kvmfault_toy.format import YOUNG, ToyFormat
from kvmfault_toy.policy import POLICY, host
from kvmfault_toy.registers import ADDR, CAUSE

from arch.arm64 import BACKEND as ARM64
from arch.arm64.stage2 import Stage2 as Arm64Format
from arch.x86 import NPT
from arch.x86.spte import NPT_4K, SpteFormat
from kvmfault.algebra.expr import ALWAYS, NEVER, Term, Word
from kvmfault.algebra.layout import Register, register
from kvmfault.contract.access import Access
from kvmfault.contract.accessors import Gap
from kvmfault.contract.backend import Backend, Behaviour, Joints
from kvmfault.contract.fault import MmioFault
from kvmfault.contract.format import Entry, Kind, Level, R, Stage2Format, W
from kvmfault.contract.outcome import Inject, Outcome
from kvmfault.contract.ports import Ports
from kvmfault.contract.progress import Progress
from kvmfault.contract.tracepoints import Tells, recorded
from kvmfault.contract.values import LoggedSize, ReadMaps
from kvmfault.types import Gpa, Hpa


@dataclass(frozen=True, slots=True)
class Wrong:
    """*backend* has one mistake, *what*, that the check must find, and no other may."""

    check: str
    what: str
    backend: Backend

    def __str__(self) -> str:
        return f"{self.check}: {self.what}"


def with_format(fmt: Stage2Format) -> Backend:
    """The toy with another format."""
    return replace(TOY, formats={"4k": fmt})


def with_facts(**facts: Any) -> Backend:  # noqa: ANN401  a fact or a value
    """The toy with other facts."""
    changed = replace(FACTS, **facts)
    return replace(TOY, facts={"1.0": lambda fmt: changed})


def behaving(**members: Any) -> Backend:  # noqa: ANN401  members of Behaviour
    """The toy with another behaviour."""
    changed: Behaviour = replace(TOY.behaviour(), **members)
    return replace(TOY, behaviour=lambda: changed)


def with_policy(**members: Any) -> Backend:  # noqa: ANN401  members of Policy
    """The toy with another policy."""
    changed = replace(POLICY, **members)
    return behaving(policies={"1.0": lambda fmt: changed})


def with_joints(**places: Any) -> Backend:  # noqa: ANN401  members of Joints
    """The toy with other joints."""
    return behaving(joints={"1.0": Joints(**places)})


def encoding(change: Callable[[dict[str, int], Access], object]) -> Backend:
    """The toy with registers changed after they were encoded."""

    def encode(access: Access, fmt: Stage2Format) -> tuple[Mapping[str, int], Mapping[str, str]]:
        registers, reasons = TOY.encode(access, fmt)
        changed = dict(registers)
        change(changed, access)
        return changed, reasons

    return behaving(encode=encode)


# Formats.


class Deeper(ToyFormat):
    gpa_bits = 31


class Gapped(ToyFormat):
    levels = (Level("block", 22, 8, True), Level("page", 12, 9, True))


class EmptyIsLeaf(ToyFormat):
    empty = YOUNG


class LowFrames(ToyFormat):
    def hpa(self, desc: int, shift: int) -> Hpa:
        return Hpa(desc & 0xFFFF_F000)


class AlwaysRuns(ToyFormat):
    def prot(self, desc: int) -> int:
        return desc & 7 | 1


class TableIsLeaf(ToyFormat):
    def table(self, hpa: Hpa, shift: int) -> int:
        return hpa | YOUNG


class ShowsNoRights(ToyFormat):
    def entry(self, desc: int, shift: int) -> Entry:
        return replace(super().entry(desc, shift), prot=type(super().entry(desc, shift).prot)(0))


class Surprised(ToyFormat):
    def entry(self, desc: int, shift: int) -> Entry:
        if desc >> 63:
            raise ValueError("bit 63 is reserved")
        return super().entry(desc, shift)


class ProtectsTooMuch(ToyFormat):
    def write_protect(self, desc: int, *, for_good: bool = False) -> int:
        return desc & ~(W | R)


class GivesBackTooMuch(ToyFormat):
    def fix_write(self, desc: int) -> int | None:
        return desc | W


class StaysYoung(ToyFormat):
    def with_young(self, desc: int, young: bool) -> int:
        return desc | YOUNG


class NotesNoWrites(ToyFormat):
    def clear_dirty(self, desc: int) -> int:
        return desc


class SamePiece(ToyFormat):
    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        return desc


class OldPiece(ToyFormat):
    def child_leaf(self, desc: int, shift: int, child_shift: int, index: int) -> int:
        return super().child_leaf(desc, shift, child_shift, index) & ~YOUNG


class RefusesAll(ToyFormat):
    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        return "never" if old and old != new else None


class LosesHalf(ToyFormat):
    # right for every entry by itself; in a table the upper pages of a block are taken for empty
    def kind(self, desc: int, shift: int) -> Kind:
        if shift == 12 and desc & 0x10_0000 and desc >> 36:
            return Kind.EMPTY
        return super().kind(desc, shift)


class Unbroken(Arm64Format):
    def change_refused(self, old: int, new: int, shift: int) -> str | None:
        return None


class AnyFrameIsTheSame(Arm64Format):
    @property
    def perm_mask(self) -> int:
        return super().perm_mask | (1 << 48) - (1 << 12)


class ForgetsGeneration(SpteFormat):
    def mmio(self, gpa: Gpa, prot: int, generation: int) -> int:
        return super().mmio(gpa, prot, 0)


def _arm64(fmt: Stage2Format) -> Backend:
    return replace(
        ARM64, formats={"4k": fmt}, facts={"7.4": ARM64.facts["7.4"]}, accessors={}, behaviour=_arm64_behaviour
    )


def _arm64_behaviour() -> Behaviour:
    whole = ARM64.behaviour()
    return replace(whole, policies={"7.4": whole.policies["7.4"]}, joints={"7.4": whole.joints["7.4"]})


# Facts and text.


def _startled(registers: Mapping[str, int]) -> tuple[str, ...]:
    return () if registers["CAUSE"] < 8 else (["odd"][registers["CAUSE"]],)


def _other_register(registers: Mapping[str, int]) -> Register:
    return ADDR


def _too_wide(line: str) -> Mapping[str, int] | None:
    return {"CAUSE": 0x100} if "CAUSE" in line else None


def _short_of_words(line: str) -> Mapping[str, int] | None:
    return {"CAUSE": int(line.split()[0], 16)} if line.startswith("x") else None


# Joints.


def _refuse_all(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    return Inject("no", 0)


def _sample_again(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    at.seq = vm.invalidations.seq
    return None


def _fails_on_prefetch(vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
    if fault.is_prefetch:
        raise KeyError("nobody waits")
    return None


def _no_outcome(vm: Ports, fault: MmioFault, at: Progress) -> Any:  # noqa: ANN401  the point
    return "fixed" if fault.is_exec else None


class _Remembers:
    __name__ = __qualname__ = "_remembers"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, vm: Ports, fault: MmioFault, at: Progress) -> Outcome | None:
        self.calls += 1
        return Inject("every third", 0) if self.calls % 3 == 0 else None


def _wide(registers: dict[str, int], access: Access) -> None:
    registers["CAUSE"] |= 0x100 * (access.write is True)


def _forgets_prefetch(registers: dict[str, int], access: Access) -> None:
    registers["CALLER"] = 0


def _fails_without_cause(registers: dict[str, int], access: Access) -> None:
    assert access.cause is not None, "which cause?"


def tracing(**members: Any) -> Backend:  # noqa: ANN401  members of Tracepoint
    """The toy with another event."""
    return behaving(tracepoints={"toy_fault": replace(TOY.tracepoints["toy_fault"], **members)})


_BITS: Final = NPT_4K.bits
_BLOCKS_LOGGED: Final = with_policy(read_maps_writable=ReadMaps.ALWAYS, logged_size=LoggedSize.PAGE_ON_WRITE)
_elsewhere: Final = register("ELSEWHERE", 64, "declared, and not listed", BIT=0)

_BOTH: Final = CAUSE["WRITE"].is_set & CAUSE["FETCH"].is_set
WRONG: Final = (
    Wrong("layout", "a lone code is no register", replace(TOY, code="CUASE")),
    Wrong("layout", "a mark that the synthetic register has not", replace(TOY, given={"ADDR": "GIVEN"})),
    Wrong("layout", "a default that does not fit", replace(TOY, defaults={"CAUSE": 0x100})),
    Wrong("layout", "a name that no TARGET can have", replace(TOY, name="Toy @home")),
    Wrong("geometry", "addresses wider than the root", with_format(Deeper())),
    Wrong("geometry", "levels that leave a gap", with_format(Gapped())),
    Wrong("geometry", "an empty entry that maps", with_format(EmptyIsLeaf())),
    Wrong("descriptors", "frames lose their upper bits", with_format(LowFrames())),
    Wrong("descriptors", "everything can be executed", with_format(AlwaysRuns())),
    Wrong("descriptors", "a table is taken for a leaf", with_format(TableIsLeaf())),
    Wrong("descriptors", "MMIO entries forget the generation", replace(NPT, formats={"4k": ForgetsGeneration(_BITS)})),
    Wrong("entries", "permissions are not shown", with_format(ShowsNoRights())),
    Wrong("entries", "odd bits cannot be shown", with_format(Surprised())),
    Wrong("changes", "write protection takes reading away", with_format(ProtectsTooMuch())),
    Wrong("changes", "write permission is given back that never was", with_format(GivesBackTooMuch())),
    Wrong("changes", "a leaf never gets old", with_format(StaysYoung())),
    Wrong("changes", "a clean leaf is written unnoticed", with_format(NotesNoWrites())),
    Wrong("pieces", "all pieces of a block are the first", with_format(SamePiece())),
    Wrong("pieces", "pieces lose the access flag", with_format(OldPiece())),
    Wrong("pieces", "live leaves change without a break", _arm64(Unbroken("4k", 12))),
    Wrong("tables", "no entry may be replaced", with_format(RefusesAll())),
    Wrong("tables", "another frame counts as the same mapping", _arm64(AnyFrameIsTheSame("4k", 12))),
    Wrong("expressions", "a fact reads a register that is not listed", with_facts(is_user=_elsewhere["BIT"].is_set)),
    Wrong("expressions", "a gap without a reason", with_facts(is_user=Gap(" "))),
    Wrong("totality", "diagnostics fail on odd values", replace(TOY, unusual=_startled)),
    Wrong("totality", "a layout of another register", replace(TOY, layouts={"CAUSE": _other_register})),
    Wrong("laws", "a fetch is a read, too", with_facts(is_read=~CAUSE["WRITE"].is_set)),
    Wrong("laws", "two causes at once", with_facts(is_reserved=CAUSE["PRESENT"].is_set)),
    Wrong("laws", "a fact that never holds", with_facts(is_cache_op=_BOTH)),
    Wrong("laws", "no fault is possible", replace(TOY, reachable=NEVER)),
    Wrong("laws", "a fetch that writes is not excluded", replace(TOY, fetch_writes=_BOTH)),
    Wrong("laws", "an address that nobody captured", with_facts(gpa_valid=ALWAYS)),
    Wrong("values", "the page address has bits below 12", with_facts(gpa_page=ADDR["PAGE"] << 11)),
    Wrong("values", "a size that no entry maps", with_facts(granule_valid=ALWAYS, granule_bytes=Word((), 3))),
    Wrong("values", "an access of 3 bytes", with_facts(mmio_valid=ALWAYS, mmio_bytes=Word((), 3))),
    Wrong("shapes", "a value of more than 64 bits", with_facts(gva_bits=Word((Term("ADDR", 1, -64, None),)))),
    Wrong("encode", "prefetch is lost in silence", encoding(_forgets_prefetch)),
    Wrong("encode", "a register does not hold its value", encoding(_wide)),
    Wrong("encode", "an access without a cause cannot be made", encoding(_fails_without_cause)),
    Wrong("policies", "a size that no leaf has", with_policy(fit_sizes=(1 << 22,))),
    Wrong("policies", "a value of another type", with_policy(poison_span=4096)),
    Wrong("policies", "joints of another kernel", behaving(joints={"2.0": Joints()})),
    Wrong("policies", "a host with other pages", behaving(host=lambda fmt: replace(host(fmt), page_shift=16))),
    Wrong("path", "a joint fails", with_joints(screen=(_fails_on_prefetch,))),
    Wrong("path", "a joint gives no outcome", with_joints(screen=(_no_outcome,))),
    Wrong("path", "a joint remembers", with_joints(screen=(_Remembers(),))),
    Wrong("guest", "a joint refuses everything", with_joints(screen=(_refuse_all,))),
    Wrong("logging", "blocks are mapped for writing in a logged slot", _BLOCKS_LOGGED),
    Wrong("invalidation", "the sequence is sampled too late", with_joints(refuse_page=(_sample_again,))),
    Wrong("tracepoints", "an event tells a register that is none", tracing(registers={"CASE": recorded("cause")})),
    Wrong("tracepoints", "an event tells what it does not have", tracing(registers={"ADDR": recorded("gpa")})),
    Wrong("tracepoints", "a template that cannot be read", tracing(fields="cause:q")),
    Wrong("tracepoints", "its kinds are told by what it does not have", tracing(told_by=("kind",))),
    Wrong("tracepoints", "it is placed by what it does not have", tracing(address=recorded("gpa") << 0)),
    Wrong("tracepoints", "it tells a check what its role does not", tracing(tells=Tells(lambda recorded: None))),
    Wrong("text", "a pasted line gives too much", replace(TOY, paste=_too_wide)),
    Wrong("text", "a pasted line makes it fail", replace(TOY, paste=_short_of_words)),
)  # fmt: skip
