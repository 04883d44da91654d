"""Faults together with what KVM then did for them, as probes of its functions tell, in the order in which it counted.

What several tasks did overlaps. A fault counts when its last call ended (the entry is there from then on), or, where it
made none, when its handler returned; what changes the table or the host counts when it was recorded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from kvmfault.contract.probes import Said
from kvmfault.trace.events import EntryEvent, UnmapEvent
from kvmfault.trace.truth import Told, Truth
from kvmfault.types import U64

__all__ = ["MOST_WAITING", "Call", "Handled", "Item", "in_order"]

MOST_WAITING: Final = 1 << 18
"""Events kept back for a handler that has not returned; beyond that its return counts as not recorded."""


class Call(NamedTuple):
    """One thing that KVM did for a fault."""

    does: Said
    """MAPPING, RELAXING, MAKING_YOUNG, DEVICE or INJECTED."""
    address: int
    size: int = 0
    prot: int = 0
    kind: str = ""
    """Memory type of a mapping; what is injected."""
    answer: str = ""
    """Of a mapping."""


_CALLS: Final = frozenset({Said.MAPPING, Said.RELAXING, Said.MAKING_YOUNG, Said.DEVICE, Said.INJECTED})


@dataclass(slots=True)
class Handled:
    """One fault and what KVM did for it. Places are numbers in the order of the recording."""

    line: int
    time: int
    pid: int
    registers: Mapping[str, int]
    began: int
    entered: int
    """Where the vCPU last entered the guest; -1: not recorded."""
    calls: list[Call] = field(default_factory=list)
    hpa: int | None = None
    """First byte that was mapped."""
    mapping: tuple[int, int] | None = None
    """Where the call to map began and ended."""
    unmapped: bool = False
    """The task itself took something out of the table meanwhile: asking for the page invalidated it."""
    ret: int | None = None
    """What the handler returned; None: not recorded."""
    effect: int = -1
    done: bool = False
    reach: tuple[int, int] | None = None
    """Addresses of the first entry that it changed, once it was run."""
    rivals: tuple[Handled, ...] = ()
    """Faults of other tasks whose calls to map overlap this one's."""


Item: TypeAlias = tuple[int, Handled | Told]
"""With its place."""


class _Sorter:
    def __init__(self, registers: Iterable[str]) -> None:
        self.registers = tuple(registers)
        self.queue: deque[Item] = deque()
        self.open: dict[int, Handled] = {}
        self.entered: dict[int, int] = {}
        self.maps: deque[Handled] = deque()
        self.place = 0

    def feed(self, event: Truth) -> None:
        self.place += 1
        if isinstance(event, EntryEvent):
            self.entered[int(event.vcpu)] = self.place
        if isinstance(event, UnmapEvent):
            span = {"start": event.start, "end": event.end}
            event = Told(Said.INVALIDATE, event.line, event.time, int(event.vcpu or 0), span, aux=False)
        if not isinstance(event, Told):
            return
        fault = self.open.get(event.pid)
        if event.says is Said.FAULT:
            if fault is not None:
                self.close(fault)
            registers = {name: event.number(name) & U64 for name in self.registers if name in event.values}
            entered = self.entered.get(event.pid, -1)
            self.open[event.pid] = Handled(event.line, event.time, event.pid, registers, self.place, entered)
            return
        if fault is None or not self._add(fault, event):
            self.queue.append((self.place, event))

    def _add(self, fault: Handled, told: Told) -> bool:
        says = told.says
        if says in _CALLS:
            address = told.number("gpa", told.number("address")) & U64
            kind = str(told.values.get("memory", told.values.get("what", "")))
            fault.calls.append(Call(says, address, told.number("size") & U64, told.number("prot"), kind))
            if says is Said.MAPPING:
                fault.hpa = told.number("hpa") & U64
                fault.mapping = (self.place, -1)
                self.maps.append(fault)
            else:
                self._counts(fault)
        elif says is Said.MAPPED and fault.mapping is not None:
            fault.calls[-1] = fault.calls[-1]._replace(answer=str(told.values.get("answer", "")))
            fault.mapping = (fault.mapping[0], self.place)
            self._counts(fault)
        elif says is Said.RETURNED:
            fault.ret = told.number("ret")
            self.close(fault)
        else:
            # the page is asked for before anything else is done
            fault.unmapped |= says is Said.RANGE_UNMAPPED and not fault.calls
            return says is Said.RELAXED
        return True

    def _counts(self, fault: Handled) -> None:
        if fault.effect < 0:
            fault.effect = self.place
            self.queue.append((self.place, fault))

    def close(self, fault: Handled) -> None:
        self._counts(fault)
        fault.done = True
        self.open.pop(fault.pid, None)

    def ready(self) -> Iterator[Item]:
        queue = self.queue
        while queue:
            head = queue[0][1]
            if isinstance(head, Handled):
                if not head.done:
                    if len(queue) <= MOST_WAITING:
                        return
                    self.close(head)
                self._find_rivals(head)
            yield queue.popleft()

    def _find_rivals(self, fault: Handled) -> None:
        oldest = min((f.began for f in self.open.values()), default=self.place)
        oldest = min([oldest, fault.began, *(f.began for _, f in self.queue if isinstance(f, Handled))])
        while self.maps and self.maps[0].mapping is not None and 0 <= self.maps[0].mapping[1] < oldest:
            self.maps.popleft()
        if fault.mapping is None:
            return
        first, last = fault.mapping
        fault.rivals = tuple(
            f
            for f in self.maps
            if f.pid != fault.pid and f.mapping is not None and f.mapping[0] < last and not 0 <= f.mapping[1] < first
        )


def in_order(events: Iterable[Truth], registers: Iterable[str]) -> Iterator[Item]:
    """The handled faults among *events*, and what else probes said, each where it counts."""
    sorter = _Sorter(registers)
    for event in events:
        sorter.feed(event)
        if sorter.queue:
            yield from sorter.ready()
    for fault in list(sorter.open.values()):
        sorter.close(fault)
    yield from sorter.ready()
