"""Host and user space as actors: the events that they do, one after the other."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Final, NamedTuple, cast

from kvmfault.errors import ModelError
from kvmfault.explore.actions import (
    Action,
    Done,
    age,
    ask,
    begin_change,
    change,
    clear_bits,
    collect,
    end_change,
    flush,
    flush_and_unlock,
    harvest,
    mark,
    prefault,
    range_end,
    range_start,
    remap_guest,
    report,
    reset,
    slot_flush,
    stage,
    store,
    track,
    zap,
)
from kvmfault.explore.actor import Actor, Did, Rest
from kvmfault.explore.world import Blocked, Explored
from kvmfault.scenario import events
from kvmfault.scenario.world import Misuse

__all__ = ["EVENTS", "HostActor", "Where"]

_TABLES: Final = frozenset(("own_table", "reverse"))
_UNMAPS: Final = _TABLES | {"log"}
_NOTIFIER: Final = frozenset(("writer", "invalidations", "host", "buffers")) | _UNMAPS
_NOTIFY: Final = (range_start, zap, flush_and_unlock, change, range_end)
_SLOT: Final = (ask, stage, slot_flush, stage, slot_flush)
_CHANGE: Final = (begin_change, flush_and_unlock, store, end_change)
_LOGS: Final = frozenset(("log", "written")) | _TABLES
EVENTS: Final[Mapping[type, tuple[tuple[Action, ...], frozenset[str]]]] = {
    events.Host: (_NOTIFY, _NOTIFIER),
    events.Back: (_NOTIFY, _NOTIFIER),
    events.Age: ((age,), _TABLES),
    events.SetSlot: (_SLOT, frozenset(("slots", "userfault")) | _LOGS),
    events.DeleteSlot: (_SLOT, frozenset(("slots", "userfault")) | _LOGS),
    events.GetLog: ((collect, report), _LOGS),
    events.ClearLog: ((clear_bits, report), _LOGS),
    events.HarvestRing: ((harvest,), frozenset()),
    events.ResetRings: ((reset, report), _LOGS),
    events.Convert: (_CHANGE, frozenset(("writer", "invalidations", "private", "mixing")) | _UNMAPS),
    events.PunchHole: (
        _CHANGE,
        frozenset(("writer", "invalidations", "memfds", "memfd_pages", "memfd_next")) | _UNMAPS,
    ),
    events.Prefault: (
        (prefault,),
        frozenset(("warnings", "signals", "vcpu", "marks", "fault", "reads", "host", "invalidations")) | _LOGS,
    ),
    events.GuestMap: ((remap_guest,), frozenset(("guest_tables",))),
    events.Mark: ((mark,), frozenset(("userfault",))),
    events.Track: ((track, flush), frozenset(("tracked",)) | _TABLES),
}
"""What may be explored beside accesses: the actions of each kind of event, and what they may change."""
_UNDER_SLOTS_LOCK: Final = (
    events.SetSlot,
    events.DeleteSlot,
    events.GetLog,
    events.ClearLog,
    events.ResetRings,
    events.Convert,
)
"""Ioctls that hold slots_lock from begin to end: of these one runs at a time."""
_DIGITS: Final = "0123456789"
_OF_VCPUS: Final = ("tlb", "ring", "inside")
"""Parts of vCPUs that others may change."""


class Where(NamedTuple):
    """Where an actor is: event, action of the event, and what the action before left."""

    event: int
    action: int = 0
    data: Hashable = None


class HostActor(Actor):
    """The host, or a thread of user space: events one after the other."""

    def __init__(
        self,
        name: str,
        does: Sequence[events.Event],
        actions: Mapping[type, tuple[Action, ...]] | None = None,
        *,
        place: int = 0,
    ) -> None:
        """*place*: among the scenario's actors."""
        self.name = name
        self._place = place
        self._refused: dict[int, str] = {}
        self._accepted: set[int] = set()
        self._events = tuple(does)
        for event in self._events:
            if type(event) not in EVENTS:
                raise ModelError(f"{event.do} is not something that an actor does beside others")
        self._actions = tuple((actions or {}).get(type(e), EVENTS[type(e)][0]) for e in self._events)

    def start(self) -> Hashable:
        """See Actor."""
        return Where(0)

    def ended(self, local: Hashable) -> bool:
        """See Actor."""
        return cast(Where, local).event == len(self._events)

    def rest(self, local: Hashable, parts: tuple[str, ...]) -> Rest:
        """See Actor."""
        left = self._events[cast(Where, local).event :]
        if not left:
            return Rest(frozenset(), frozenset())
        writes = frozenset[str]().union(*(EVENTS[type(event)][1] for event in left))
        foreign = {"vcpu", "fault", "idle", "marks", "inside", "retired"}
        if any(isinstance(event, events.SetSlot | events.DeleteSlot) for event in left):
            foreign.discard("inside")
        if any(isinstance(event, events.Prefault) for event in left):  # done as the vCPU
            foreign.clear()
        if any(isinstance(event, _UNDER_SLOTS_LOCK) for event in left):
            writes |= {"slots_lock"}
        else:
            foreign.add("slots_lock")
        changes = frozenset(p for p in parts if p.rstrip(_DIGITS) in {*_OF_VCPUS, *writes} - foreign)
        return Rest(frozenset(p for p in parts if p.rstrip(_DIGITS) not in foreign), changes)

    def act(self, vm: Explored, local: Hashable) -> Did:
        """See Actor. Raises Misuse for what no host could do in this state."""
        at = cast(Where, local)
        vm.vcpu = vm.vcpus[0]
        event, actions = self._events[at.event], self._actions[at.event]
        locks = isinstance(event, _UNDER_SLOTS_LOCK)
        if locks and vm.slots_lock not in (None, self.name):
            raise Blocked
        try:
            done = actions[at.action](vm, event, self.name, at.data)
        except ModelError as e:
            raise Misuse(f"{e}, in some order", "actor", self._place, "event", at.event) from e
        following = self._following(at, done)
        if locks:
            vm.slots_lock = self.name if following.event == at.event else None
        return Did(done.name, following, done.note or (f"refused: {done.refused}" if done.refused else ""))

    def _following(self, at: Where, done: Done) -> Where:
        if done.refused:
            self._refused[at.event] = done.refused
            return Where(at.event + 1)
        self._accepted.add(at.event)
        if done.again:
            return at._replace(data=done.data)
        if done.name == "return" or at.action + 1 == len(self._actions[at.event]):
            return Where(at.event + 1)
        return Where(at.event, at.action + 1, done.data)

    def check(self) -> None:
        """After everything was searched: Misuse for an ioctl that was never accepted."""
        for event, why in self._refused.items():
            if event not in self._accepted:
                raise Misuse(f"refused in every order: {why}", "actor", self._place, "event", event)
