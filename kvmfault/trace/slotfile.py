"""Memslots from a file: a list of slots written by hand, or a recording of the changes that user space made.

A list is TOML, or JSON of the same shape::

    [[slot]]
    id = 0
    gpa = 0x4000_0000        # numbers, or strings such as "0x40000000"
    size = 0x1000_0000
    hva = "0x7f0000000000"   # if missing, one is made up
    log_dirty = true         # also readonly = true, flags = 0x..., as_id = 1

A recording holds kprobe events on __kvm_set_memory_region: in text form ``memslot`` (fields slot, flags, gpa, size,
hva, and kvm if it can be had) and ``memslot_ret`` (ret), in a binary one of any name (`recorded_slots`). A call belongs
to the next return in the same task; one without stays unknown, and counts as accepted.

Which VM a change belongs to is told by the pointer ``kvm``. Where there is none, or it was used again
for a later VM, by this rule: a change that the kernel accepted, and that the slots before it would
have made it refuse, starts a new VM. A change goes to the VM that its task changed last, else to the
one changed last by anybody (tasks of one VM take turns), else to a new one. Two VMs that never
contradict each other are taken for one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kvmfault.errors import TraceError, UsageError
from kvmfault.trace.document import between, key_of, line_of, parse, wrong
from kvmfault.trace.events import SlotEvent
from kvmfault.trace.pattern import Pattern
from kvmfault.trace.recording import ReadStats, Recording
from kvmfault.trace.slots import SlotSource, place
from kvmfault.trace.source import Source, open_bytes, source_name
from kvmfault.trace.text import looks_recorded, read_fields
from kvmfault.types import U64, Gpa, Hva
from kvmfault.vm.memslot import NR_SLOTS, MemslotFlag, slot_number

__all__ = ["read_slots", "recorded_slots"]

_MAX_LIST: Final = 4 << 20
_PATTERNS: Final = {
    "memslot": Pattern(assigned="slot:d flags:x gpa:x size:x hva:x kvm:x?"),
    "memslot_ret": Pattern(assigned="ret:d"),
}


def read_slots(source: Source) -> SlotSource:
    """The memslots of *source*, told apart by content.

    Raises `UsageError` for a file that cannot be read or a list that is wrong (naming file, line where
    known, and key), `TraceError` for a recording that is damaged or holds no change of a memslot.
    """
    stats = ReadStats()
    pieces = open_bytes(source, stats)
    content = next(pieces, b"")
    if looks_recorded(content):
        return _read_recording(_Again(source_name(source), content, pieces), stats)
    for piece in pieces:
        content += piece
        if len(content) > _MAX_LIST:
            raise UsageError(f"{source_name(source)}: more than {_MAX_LIST} bytes are no list of slots")
    return _read_list(source_name(source), content)


@dataclass(slots=True)
class _Again:
    # A file whose beginning has been looked at.
    name: str
    first: bytes
    rest: Iterator[bytes]

    def read(self, _n: int = -1, /) -> bytes:
        piece, self.first = self.first, b""
        return piece or next(self.rest, b"")


# -- a list ------------------------------------------------------------------------------------------


def _number(low: int, high: int, what: str) -> BeforeValidator:
    return BeforeValidator(between(low, high, f'{what}, as a number or a string such as "0x1000"'))


class _Slot(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    id: Annotated[int, _number(0, NR_SLOTS - 1, f"an id below {NR_SLOTS}")]
    as_id: Annotated[int, _number(0, 0xFFFF, "an address space")] = 0
    gpa: Annotated[int, _number(0, U64, "an address of 64 bits")]
    size: Annotated[int, _number(1, U64, "bytes, more than 0 and of 64 bits")]
    hva: Annotated[int, _number(0, U64, "an address of 64 bits")] | None = None
    flags: Annotated[int, _number(0, U64 >> 32, "flags of 32 bits")] = 0
    readonly: bool = False
    log_dirty: bool = False


class _List(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    slot: Annotated[list[_Slot], Field(min_length=1)]


def _read_list(path: str, content: bytes) -> SlotSource:
    try:
        text = content.decode()
    except UnicodeDecodeError as e:
        raise UsageError(f"{path}: neither a list of slots (TOML, JSON) nor a recording in text form") from e
    try:
        slots = _List.model_validate(parse(path, text, what="a list of slots")).slot
    except ValidationError as e:
        raise wrong(path, text, e) from e
    seen: dict[tuple[int, int], int] = {}
    for n, s in enumerate(slots):
        if (first_n := seen.setdefault((s.as_id, s.id), n)) != n:
            loc = ("slot", n, "id")
            raise UsageError(f"{path}{line_of(text, loc)}: {key_of(loc)} is {s.id}, as in slot[{first_n}]")
    invented = iter(place([(Gpa(s.gpa), s.size) for s in slots if s.hva is None]))
    changes = tuple(
        SlotEvent(
            0,
            0,
            "",
            slot_number(s.as_id, s.id),
            _flags(s),
            Gpa(s.gpa),
            s.size,
            next(invented) if s.hva is None else Hva(s.hva),
            0,
        )
        for s in slots
    )
    return SlotSource(path, changes, made_up=any(s.hva is None for s in slots))


def _flags(slot: _Slot) -> int:
    return slot.flags | MemslotFlag.READONLY * slot.readonly | MemslotFlag.LOG_DIRTY * slot.log_dirty


# -- a recording -------------------------------------------------------------------------------------


_Hit: TypeAlias = tuple[bool, int, int, int, Mapping[str, int]]
"""A hit of the probe: is it the return, line or place, time, task, fields."""
_NEEDED: Final = ("slot", "flags", "gpa", "size", "hva")


def recorded_slots(recording: Recording, names: Collection[str]) -> SlotSource:
    """The changes of memslots in a binary recording; *names*: its kprobe events on __kvm_set_memory_region.

    Raises TraceError where one lacks a field, or there is none.
    """
    from kvmfault.trace.rows import events

    stats = ReadStats()

    def hits() -> Iterator[_Hit]:
        for row in events(recording, names, stats=stats):
            returns = "__probe_func" in row.fields
            numbers = {name: value for name, value in row.fields.items() if isinstance(value, int)}
            if absent := [name for name in (("ret",) if returns else _NEEDED) if name not in numbers]:
                raise TraceError(f"{row.name}: record {row.place} has no field {absent[0]}", path=recording.path)
            yield returns, row.place, row.time, row.pid, numbers

    return _changes(recording.path, hits(), stats)


def _read_recording(source: _Again, stats: ReadStats) -> SlotSource:
    read = read_fields(source, _PATTERNS, stats=stats, strict=True)
    hits = ((event.name != "memslot", event.line, event.time, event.pid, fields.numbers) for event, fields in read)
    return _changes(source.name, hits, stats)


def _changes(name: str, hits: Iterable[_Hit], stats: ReadStats) -> SlotSource:
    changes: list[SlotEvent] = []
    pointers: list[int | None] = []
    tasks: list[int] = []
    open_change: dict[int, int] = {}
    for returns, line, time, pid, n in hits:
        if not returns:
            open_change[pid] = len(changes)
            gpa, hva = Gpa(n["gpa"]), Hva(n["hva"])
            changes.append(SlotEvent(line, time, "", n["slot"], n["flags"], gpa, n["size"], hva, None))
            pointers.append(n.get("kvm"))
            tasks.append(pid)
        elif (i := open_change.pop(pid, None)) is not None:
            changes[i] = replace(changes[i], ret=n["ret"], end=time)
    if not changes:
        message = "the recording holds no memslot event (kprobe on __kvm_set_memory_region)"
        raise TraceError(message, path=name, line=1)
    vms = _Vms()
    named = tuple(replace(c, vm=vms.of(c, p, t)) for c, p, t in zip(changes, pointers, tasks, strict=True))
    return SlotSource(name, named, timed=True, notes=tuple(_notes(named, stats)))


def _notes(changes: tuple[SlotEvent, ...], stats: ReadStats) -> list[str]:
    notes = [f"{len(changes)} changes of memslots, VMs: {len({c.vm for c in changes})}"]
    if refused := sum(bool(c.ret) for c in changes):
        notes.append(f"{refused} of them refused")
    if unknown := sum(c.ret is None for c in changes):
        notes.append(f"{unknown} without a return value, taken as accepted")
    if lost := stats.lost.total() + stats.lost_unknown:
        notes.append(f"{lost} events lost: slots may be wrong")
    if stats.damage:
        notes.append(stats.damage)
    return notes


class _Vms:
    # Gives each change its VM; see the module for the rule.
    def __init__(self) -> None:
        self._slots: dict[str, dict[int, SlotEvent]] = {}
        self._pointers: dict[str, int | None] = {}
        self._last: dict[int | None, str] = {}
        self._by_task: dict[tuple[int | None, int], str] = {}

    def of(self, change: SlotEvent, pointer: int | None, task: int) -> str:
        candidates = dict.fromkeys((self._by_task.get((pointer, task)), self._last.get(pointer)))
        fits = (vm for vm in candidates if vm is not None and (change.ret or _possible(self._slots[vm], change)))
        vm = next(fits, None) or self._new(pointer)
        self._last[pointer] = self._by_task[pointer, task] = vm
        if not change.ret:
            if change.size:
                self._slots[vm][change.slot] = change
            else:
                self._slots[vm].pop(change.slot, None)
        return vm

    def _new(self, pointer: int | None) -> str:
        count = sum(p == pointer for p in self._pointers.values()) + 1
        name = f"vm{count}" if pointer is None else f"{pointer:#x}" + f"#{count}" * (count > 1)
        self._slots[name], self._pointers[name] = {}, pointer
        return name


def _possible(slots: Mapping[int, SlotEvent], change: SlotEvent) -> bool:
    # Whether a VM with these slots could accept the change, as far as the slots tell.
    old = slots.get(change.slot)
    if not change.size:
        return old is not None
    if old and ((old.size, old.hva) != (change.size, change.hva) or (old.flags ^ change.flags) & MemslotFlag.READONLY):
        return False
    others = (s for s in slots.values() if s.slot >> 16 == change.slot >> 16 and s.slot != change.slot)
    return all(s.gpa + s.size <= change.gpa or change.gpa + change.size <= s.gpa for s in others)
