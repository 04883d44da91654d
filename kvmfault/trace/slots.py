"""Memslots of a recording: given (`SlotSource`), inferred from its events (`infer_slots`), compared (`compare_slots`).

Events do not tell the slots; they tell which pages were memory. The rules of inference were chosen
on recordings that also hold the true slots:

* A fault answered by an emulated access to its page, before the vCPU enters the guest again, or by an
  emulation that failed (a fetch), hit no memory; any other fault did. A recording of several VMs gives
  the union of their memory.
* Memory pages join into one slot over a gap of 2 MiB, or as large as the slot has become (a guest
  that uses much memory uses it sparsely) up to 1 GiB, but never over a page that was only emulated.
* An edge lies where memory was touched, with two exceptions. A first run of under 64 pages starts at
  the 2 MiB boundary before it, since slots mostly do and first pages are mostly left alone. A last
  page that stands alone at the start of a 2 MiB block stands for the block: it was mapped whole.
* Memory whose writes were all emulated, and some were, is read-only; it keeps to the touched pages.
* Any other page that was both is a slot of its own, which comes and goes when the page was next found
  to be memory, or not: the true slot was made or deleted some time before.

What a guest never touched stays unknown: a slot is found no larger than its use.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Final, Protocol

from kvmfault.trace.events import EntryEvent, Event, ExitEvent, FaultEvent, MmioEvent, SlotEvent, UserspaceExitEvent
from kvmfault.types import Gpa, Hva
from kvmfault.vm.memslot import MemslotFlag

__all__ = ["FaultAddress", "SlotComparison", "SlotSource", "compare_slots", "infer_slots", "place"]

_BLOCK: Final = 1 << 21
_CONGRUENT: Final = 1 << 30
_DENSE: Final = 64
# Above what programs and guests use for themselves, and low enough for every user address space.
_HVA_BASE: Final = 1 << 44


@dataclass(frozen=True, slots=True)
class SlotSource:
    """Memslots and where they come from. The changes are in order of time."""

    origin: str
    changes: tuple[SlotEvent, ...]
    timed: bool = False
    """The changes have the times of a recording (those at time 0 come before it); otherwise all come before it."""
    made_up: bool = False
    """User addresses are not the recorded ones, so what the host did to its memory cannot be followed."""
    notes: tuple[str, ...] = ()
    """What a user should know about them, a line each."""

    @property
    def vms(self) -> tuple[str, ...]:
        """The VMs that the changes belong to, by first appearance."""
        return tuple(dict.fromkeys(change.vm for change in self.changes))


@dataclass(frozen=True, slots=True)
class SlotComparison:
    """Inferred memory beside true memory, in pages of ``page_size`` bytes. Ranges are (gpa, bytes)."""

    page_size: int
    matched: int
    missed: int
    """True pages that no inferred slot holds."""
    invented: int
    """Inferred pages that no true slot ever held."""
    missed_ranges: tuple[tuple[Gpa, int], ...]
    invented_ranges: tuple[tuple[Gpa, int], ...]


class FaultAddress(Protocol):
    """The part of a decoded fault that inference reads."""

    @property
    def is_write(self) -> bool:
        """Write permission was asked for."""
        ...

    def kvm_get_fault_gpa(self) -> Gpa | None:
        """Guest-physical page address, or None if the fault has none."""
        ...


@dataclass(slots=True)
class _Page:
    memory: int = 0
    memory_writes: int = 0
    emulated_reads: int = 0
    emulated_writes: int = 0
    flips: list[tuple[int, bool]] = field(default_factory=list)
    # times at which the page was first found to be memory (True) or not, after having been the other

    def found(self, time: int, memory: bool) -> None:
        if not self.flips or self.flips[-1][1] is not memory:
            self.flips.append((time, memory))

    @property
    def only_written_emulated(self) -> bool:
        return bool(self.memory and self.emulated_writes) and not self.emulated_reads and not self.memory_writes

    @property
    def comes_and_goes(self) -> bool:
        return bool(self.memory) and len(self.flips) > 1 and not self.only_written_emulated


@dataclass(slots=True)
class _Range:
    # Page numbers [start, end); lengths of its first and last runs of touched pages.
    start: int
    end: int
    readonly: bool
    head: int
    tail: int


def infer_slots(
    events: Iterable[Event], decode: Callable[[FaultEvent], FaultAddress], *, page_size: int = 4096
) -> SlotSource:
    """The slots that the faults among *events* need; see the module for the rules and their limits.

    *decode* is the backend's; *page_size* the host's. User addresses are made up: congruent with the
    guest's modulo 1 GiB, so that they allow every block size, and apart from each other.
    """
    pages, unknown = _classify(events, decode, page_size)
    memory = sorted(n for n, page in pages.items() if page.memory)
    fleeting = {n for n in memory if pages[n].comes_and_goes}
    for run in list(_runs([n for n in memory if n not in fleeting], pages)):
        if not run.readonly:  # somebody writes here: a page whose writes were emulated was no memory then
            fleeting |= {n for n in range(run.start, run.end) if pages[n].only_written_emulated}
    steady = [n for n in memory if n not in fleeting]
    emulated = sorted(fleeting | {n for n, page in pages.items() if not page.memory})
    ranges = _widen(_join(_runs(steady, pages), emulated, page_size), emulated, page_size)
    areas = [(Gpa(r.start * page_size), (r.end - r.start) * page_size) for r in ranges]
    areas += [(Gpa(n * page_size), page_size) for n in sorted(fleeting)]
    hvas = place(areas)
    changes = [
        SlotEvent(0, 0, "", n, int(MemslotFlag.READONLY) if r.readonly else 0, *areas[n], hvas[n], 0)
        for n, r in enumerate(ranges)
    ]
    for n, page in enumerate(sorted(fleeting), len(ranges)):
        changes += _comings_and_goings(n, pages[page], *areas[n], hvas[n])
    notes = [f"slots inferred: {len(ranges)}, from {len(steady)} touched pages; user addresses are made up"]
    if readonly := sum(r.readonly for r in ranges):
        notes.append(f"read-only among them, since their writes were emulated: {readonly}")
    if fleeting:
        notes.append(f"pages that were memory only at times, each a slot that comes and goes: {len(fleeting)}")
    if unknown:
        notes.append(f"faults without a guest-physical address, which told nothing: {unknown}")
    changes.sort(key=lambda change: change.time)
    return SlotSource("inferred", tuple(changes), timed=bool(fleeting), made_up=True, notes=tuple(notes))


def _comings_and_goings(slot: int, page: _Page, gpa: Gpa, size: int, hva: Hva) -> Iterator[SlotEvent]:
    for i, (time, memory) in enumerate(page.flips):
        if i or memory:  # what is no memory at first needs no change
            yield SlotEvent(0, time if i else 0, "", slot, 0, gpa, size if memory else 0, hva, 0)


def place(areas: Sequence[tuple[Gpa, int]]) -> list[Hva]:
    """A user address for each (gpa, bytes): congruent with the gpa modulo 1 GiB, none overlapping another."""
    placed, free = [], _HVA_BASE
    for gpa, size in areas:
        hva = free + (gpa - free) % _CONGRUENT
        placed.append(Hva(hva))
        free = hva + size
    return placed


def compare_slots(inferred: SlotSource, true: SlotSource, *, page_size: int = 4096) -> SlotComparison:
    """*inferred* beside *true*: all that was memory at any time, in any VM and address space, counts as true."""
    mine, theirs = _ever(inferred), _ever(true)
    missed, invented = _minus(theirs, mine), _minus(mine, theirs)

    def count(ranges: list[tuple[int, int]]) -> int:
        return sum(end - start for start, end in ranges) // page_size

    def sized(ranges: list[tuple[int, int]]) -> tuple[tuple[Gpa, int], ...]:
        return tuple((Gpa(start), end - start) for start, end in ranges)

    matched = count(theirs) - count(missed)
    return SlotComparison(page_size, matched, count(missed), count(invented), sized(missed), sized(invented))


# -- inference ---------------------------------------------------------------------------------------


def _classify(
    events: Iterable[Event], decode: Callable[[FaultEvent], FaultAddress], page_size: int
) -> tuple[dict[int, _Page], int]:
    pages: dict[int, _Page] = {}
    waiting: dict[str, tuple[int, bool, int]] = {}
    unknown = 0

    def was_memory(vcpu: str) -> None:
        if fault := waiting.pop(vcpu, None):
            page = pages.setdefault(fault[0], _Page())
            page.memory += 1
            page.memory_writes += fault[1]
            page.found(fault[2], True)

    for event in events:
        match event:
            case FaultEvent():
                was_memory(event.vcpu)
                fault = decode(event)
                if (gpa := fault.kvm_get_fault_gpa()) is None:
                    unknown += 1
                else:
                    waiting[event.vcpu] = gpa // page_size, fault.is_write, event.time
            case MmioEvent():
                number = event.gpa // page_size
                page = pages.setdefault(number, _Page())
                page.emulated_writes += event.is_write
                page.emulated_reads += not event.is_write
                if event.vcpu in waiting and waiting[event.vcpu][0] == number:
                    page.found(waiting.pop(event.vcpu)[2], False)
            case EntryEvent() | ExitEvent():
                was_memory(event.vcpu)
            case UserspaceExitEvent() if "INTERNAL_ERROR" in event.reason and event.vcpu in waiting:
                number, write, time = waiting.pop(event.vcpu)  # the emulator gave up: a fetch from no memory
                page = pages.setdefault(number, _Page())
                page.emulated_writes += write
                page.emulated_reads += not write
                page.found(time, False)
            case _:
                pass
    for vcpu in list(waiting):
        was_memory(vcpu)
    return pages, unknown


def _runs(memory: list[int], pages: dict[int, _Page]) -> Iterator[_Range]:
    # Runs of neighbouring touched pages.
    breaks = [i for i, (a, b) in enumerate(pairwise(memory), 1) if b != a + 1]
    for i, j in pairwise([0, *breaks, len(memory)] if memory else []):
        run = [pages[n] for n in memory[i:j]]
        readonly = any(p.only_written_emulated for p in run) and not any(p.memory_writes for p in run)
        yield _Range(memory[i], memory[j - 1] + 1, readonly, j - i, j - i)


def _join(runs: Iterator[_Range], emulated: list[int], page_size: int) -> list[_Range]:
    joined: list[_Range] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last is None or last.readonly or run.readonly or _first_from(emulated, last.end, run.start) is not None:
            joined.append(run)
            continue
        allowed = max(_BLOCK, min((last.end - last.start) * page_size, _CONGRUENT)) // page_size
        if run.start - last.end <= allowed:
            last.end, last.tail = run.end, run.tail
        else:
            joined.append(run)
    return joined


def _widen(ranges: list[_Range], emulated: list[int], page_size: int) -> list[_Range]:
    block = _BLOCK // page_size
    for before, r, behind in zip([None, *ranges], ranges, [*ranges[1:], None], strict=False):
        if r.readonly:
            continue
        if r.head < _DENSE:
            start = max(r.start // block * block, before.end if before else 0)
            i = bisect_left(emulated, r.start)
            r.start = max(start, emulated[i - 1] + 1) if i else start
        if r.tail == 1 and (r.end - 1) % block == 0:
            end = min(r.end - 1 + block, behind.start if behind else r.end - 1 + block)
            stop = _first_from(emulated, r.end, end)
            r.end = end if stop is None else stop
    return ranges


def _first_from(numbers: list[int], start: int, end: int) -> int | None:
    i = bisect_left(numbers, start)
    return numbers[i] if i < len(numbers) and numbers[i] < end else None


# -- comparison --------------------------------------------------------------------------------------


def _ever(source: SlotSource) -> list[tuple[int, int]]:
    # Sorted, disjoint byte ranges of all slots that were ever accepted (a return that is not known counts as accepted).
    merged: list[tuple[int, int]] = []
    for start, end in sorted((c.gpa, c.gpa + c.size) for c in source.changes if c.size and not c.ret):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _minus(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> list[tuple[int, int]]:
    # Both sorted, disjoint and not touching. Between two neighbouring edges nothing changes.
    edges = sorted(set(chain.from_iterable(left + right)))
    rest: list[tuple[int, int]] = []
    i = j = 0
    for start, end in pairwise(edges):
        while i < len(left) and left[i][1] <= start:
            i += 1
        while j < len(right) and right[j][1] <= start:
            j += 1
        inside = i < len(left) and left[i][0] <= start
        if inside and not (j < len(right) and right[j][0] <= start):
            rest.append((start, end))
    return rest
